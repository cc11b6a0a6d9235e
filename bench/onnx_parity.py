"""Export checkpoints to ONNX in both dialects and compare onnxruntime's logits with those of transformers in float32.

    python bench/onnx_parity.py ../shared/models/* --text ../shared/text/stories.eval.txt

A line each: mean KL (nats) and the largest difference of a logit, with the whole sequence at once and with its second
half a position at a time through the cache; seconds of the processor for recording and writing; bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from llmx.exporters.onnx import DIALECTS, OnnxOptions, check_weights, prepare, write
from llmx.models.model import Model, open_model
from llmx.validate.oracle import Reference, Tokens
from llmx.validate.runtimes.onnxruntime import OnnxRuntime


def exported(model: Model, options: OnnxOptions, folder: Path) -> tuple[float, int]:
    """(seconds of the processor, bytes) of an export into a folder."""
    started = time.process_time()
    planned = prepare(model, options)
    check_weights(planned)
    write(planned, [folder / file.name for file in planned.plan.files])
    return time.process_time() - started, planned.plan.nbytes


def compared(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """(mean KL in nats, largest difference) of f32[T, V]."""
    a, b = (x.astype(np.float64) for x in (theirs, ours))
    p, q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in (a, b)
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean()), float(np.abs(a - b).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--type", default="F32")
    asked = parser.parse_args()
    text = asked.text.read_text(encoding="utf-8")
    for folder in asked.models:
        model = open_model(folder)
        length = min(asked.positions, model.architecture.context_length)
        tokens = Tokens(folder).encode(text[: 12 * length], add_special=False)[:length]
        theirs = np.concatenate(list(Reference(folder, threads=1).logits(tokens)))
        for dialect in DIALECTS:
            with tempfile.TemporaryDirectory() as scratch:
                seconds, nbytes = exported(model, OnnxOptions(asked.type, dialect), Path(scratch))
                told = f"{folder.name:20} {dialect:9} {len(tokens):4} positions {seconds:6.2f} s {nbytes:12,} bytes"
                with OnnxRuntime().open(Path(scratch) / "model.onnx", threads=1, context=length) as session:
                    for decode_from in (None, len(tokens) // 2):
                        ours = np.concatenate(list(session.logits(tokens, decode_from)))
                        told += "  KL {:.1e} max {:.1e}".format(*compared(theirs, ours))
            print(told, flush=True)


if __name__ == "__main__":
    main()
