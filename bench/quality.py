"""KL of our files against stock llama.cpp's, per type: the same float32 source, the same judge, one run.

    python bench/quality.py ../shared/models/stories42m-llama --quantize /path/to/llama-quantize \\
        --text ../shared/text/stories.eval.txt [--types Q4_K_M,Q2_K] [--imatrix imatrix.gguf] [--chunks 40]

For each type: bytes, mean KL(transformers f32 ‖ file on stock llama.cpp) over the second halves of chunks of 256, and
the ratio of ours to stock. Without --quantize only our files are judged and stock says "not run".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from llmx import api
from llmx.formats.gguf import read_gguf
from llmx.validate.case import chunks
from llmx.validate.metrics import Comparison
from llmx.validate.oracle import Reference, Tokens
from llmx.validate.runtimes import find_runtime

CHUNK = 256
TYPES = "Q8_0,Q6_K,Q5_K_M,Q5_K_S,Q5_1,Q5_0,Q4_K_M,Q4_K_S,Q4_1,Q4_0,IQ4_NL,IQ4_XS,Q3_K_L,Q3_K_M,Q3_K_S,Q2_K"


class Judge:
    """The reference's logits of the judged positions, kept as float32, and the runtime that they are compared on."""

    def __init__(self, model: Path, text: str, count: int, threads: int) -> None:
        tokens = Tokens(model)
        special = tokens.encode("", add_special=True)
        leading = special[:1] if special[:1] == [tokens.bos] else []
        self._sequences = list(chunks(tokens.encode(text, add_special=False), leading, CHUNK, count))
        self._judged = range(CHUNK // 2, CHUNK - 1)
        reference = Reference(model, threads)
        self._expected = [np.concatenate(list(reference.logits(s)))[self._judged.start :] for s in self._sequences]
        self._threads = threads

    @property
    def positions(self) -> int:
        return len(self._sequences) * len(self._judged)

    def kl(self, artifact: Path) -> float:
        """Mean KL(reference ‖ artifact) in nats."""
        comparison = Comparison()
        start = self._judged.start
        with find_runtime("llama.cpp").open(artifact, threads=self._threads, context=CHUNK) as session:
            for sequence, expected in zip(self._sequences, self._expected, strict=True):
                found = np.concatenate(list(session.logits(sequence)))[start:]
                comparison.add_streams(sequence[start:], [expected], [found], range(len(self._judged)))
        return comparison.summary().kl_mean


def same_types(ours: Path, stock: Path) -> bool:
    """Whether both files hold the same tensors in the same types."""
    types = [{n: (t.type_name, t.shape) for n, t in read_gguf(path).tensors.items()} for path in (ours, stock)]
    return types[0] == types[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--quantize", type=Path, help="stock llama-quantize")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    judge = Judge(options.model, options.text.read_text(encoding="utf-8"), options.chunks, options.threads)
    print(f"{judge.positions} positions, importance: {options.imatrix.name if options.imatrix else 'none'}")
    print(f"{'type':8} {'bytes':>12} {'of stock':>9} {'KL':>10} {'stock KL':>10} {'ratio':>6}  same types")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "f32.gguf"
        api.export(api.ExportRequest(str(options.model), type_name="F32", output=source, validate=False))
        for type_name in options.types.split(","):
            rows.append(_row(type_name, options, judge, source, Path(scratch)))
            print(_line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def _row(type_name: str, options: argparse.Namespace, judge: Judge, source: Path, scratch: Path) -> dict[str, object]:
    ours, stock = scratch / "ours.gguf", scratch / "stock.gguf"
    api.export(
        api.ExportRequest(
            str(options.model), type_name=type_name, imatrix=options.imatrix, output=ours, validate=False, force=True
        )
    )
    row: dict[str, object] = {"type": type_name, "bytes": ours.stat().st_size, "kl": judge.kl(ours), "stock_kl": None}
    if options.quantize:
        importance = ["--imatrix", str(options.imatrix)] if options.imatrix else []
        command = [str(options.quantize), *importance, str(source), str(stock), type_name, str(options.threads)]
        subprocess.run(command, check=True, capture_output=True)
        row |= {"stock_bytes": stock.stat().st_size, "stock_kl": judge.kl(stock), "same_types": same_types(ours, stock)}
    return row


def _line(row: dict[str, object]) -> str:
    start = f"{row['type']:8} {row['bytes']:>12,}"
    if row["stock_kl"] is None:
        return f"{start} {'':>9} {row['kl']:10.6f}    not run"
    size, ratio = row["bytes"] / row["stock_bytes"], row["kl"] / row["stock_kl"]  # type: ignore[operator]
    return f"{start} {size:9.5f} {row['kl']:10.6f} {row['stock_kl']:10.6f} {ratio:6.3f}  {row['same_types']}"


if __name__ == "__main__":
    main()
