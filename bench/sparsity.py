"""KL of sparse exports: 2:4 by each method, and 2:4 with 4 bits solved at once or one after the other.

    python bench/sparsity.py MODEL --text eval.txt --calibration calib.txt --keep FOLDER [--tokens 24576]

Judged: mean KL(transformers f32 ‖ artifact) in nats. Pruned artifacts are F16 GGUF files, judged by `llmx compare` over
the second halves of chunks of 256; those with 4 bits ONNX folders of --type, judged on onnxruntime as
bench/onnx_quality.py does, over all positions of 20 such chunks. What stands in FOLDER is judged again and not made
again.

One after the other: the F16 artifact of sparsegpt is the checkpoint of a second export, whose solver holds the zeros.
"plain" rounds the weights that are left with GPTQ under the mask; "repaired" first moves them, zeros held, to make up
for what earlier layers lost against the pruned model, as the joint export does against the original one.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from onnx_quality import judge
from peer_onnx import Package

from llmx import api
from llmx.comparing import compare
from llmx.exporters import solving
from llmx.exporters.assignment import Assignment
from llmx.formats.safetensors import write_safetensors
from llmx.models.model import open_model
from llmx.quant.gptq import damped
from llmx.quant.pruning import LAST_STEPS
from llmx.quant.solve import PLAIN_SHARE, Prepared, SolveOptions, target
from llmx.quant.sparse import Pruned, settle
from llmx.quant.workers import Workers
from llmx.validate.kinds import find_kind
from llmx.validate.oracle import Tokens

METHODS = ("magnitude", "wanda", "sparsegpt")
POSITIONS, CHUNKS = 5080, 20


def held(
    values: torch.Tensor,
    prepared: Prepared,
    assigned: Assignment,
    options: SolveOptions,
    workers: Workers,
    *,
    repaired: bool,
) -> Pruned | None:
    """The matrix with the zeros that it has already: what stands for `sparse_rows.pruned` in a second export."""
    if assigned.sparsity is None:
        return None
    kept, value, share, name = values != 0, values, PLAIN_SHARE, "held"
    if repaired:
        wanted, share, _ = target(values, prepared, options.shares, workers)
        hessian = damped(prepared.statistics.fitted.hessian, share)
        settled = settle(values.T.contiguous(), wanted.T, hessian, kept.T, LAST_STEPS)
        value, name = settled.T.contiguous(), "held, repaired"
    return Pruned(value, kept, name, share, math.nan, {}, 0.0)


def checkpoint_of(artifact: Path, model: Path, folder: Path) -> Path:
    """A checkpoint with the artifact's weights, in float32, in the place of the model's."""
    source = open_model(model)
    kind = find_kind(artifact)
    file = kind.mapped(kind.open(artifact), source.architecture)
    found = kind.restored(file, source, kind.entries(file, source, Tokens(model).size))
    shutil.copytree(model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    parts = ((name, np.ascontiguousarray(read(), np.float32)) for name, read in found.items())
    stored = [(name, "F32", values.shape, [values.tobytes()]) for name, values in parts]
    write_safetensors(folder / "model.safetensors", stored)
    return folder


def made(path: Path, fields: dict[str, Any]) -> None:
    """The artifact, unless it is there."""
    if path.exists():
        print(f"{path.name}: kept", flush=True)
        return
    started, cpu = time.monotonic(), time.process_time()
    api.export(api.ExportRequest(output=path, validate=False, force=True, **fields))
    print(f"{path.name}: {time.monotonic() - started:.0f} s, {time.process_time() - cpu:.0f} CPU s", flush=True)


def told(model: Path, text: Path, artifacts: Sequence[Path], threads: int) -> dict[str, float]:
    """Name -> mean KL."""
    table = compare(artifacts, str(model), text=text, positions=POSITIONS, threads=threads)
    missing = [f"{row.name}: {row.error}" for row in table.rows if row.kl_mean is None]
    if missing:
        raise SystemExit("\n".join(missing))
    return {row.name: row.kl_mean for row in table.rows if row.kl_mean is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--type", default="int4-g128-sym-float32")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    asked.keep.mkdir(parents=True, exist_ok=True)
    common = {
        "model": str(asked.model),
        "sparsity": asked.sparsity,
        "calibration": asked.calibration,
        "calibration_tokens": asked.tokens,
        "threads": asked.threads,
    }
    pruned = {method: asked.keep / f"F16-{method}.gguf" for method in METHODS}
    for method, path in pruned.items():
        made(path, {**common, "method": method, "format": "gguf", "type_name": "F16"})
    rounded = {how: asked.keep / f"{asked.type}-{how}" for how in ("joint", "plain", "repaired")}
    fields = {**common, "method": "sparsegpt", "format": "onnx", "type_name": asked.type}
    made(rounded["joint"], fields)
    sparse = checkpoint_of(pruned["sparsegpt"], asked.model, asked.keep / "checkpoint")
    for how in ("plain", "repaired"):
        with mock.patch.object(solving, "pruned", partial(held, repaired=how == "repaired")):
            made(rounded[how], {**fields, "model": str(sparse)})
    found = told(asked.model, asked.text, [*pruned.values()], asked.threads)
    packages = [("llmx", Package(path.name, path)) for path in rounded.values()]
    text = asked.text.read_text(encoding="utf-8")
    found |= {one.package.name: one.kl for one in judge(asked.model, text, CHUNKS, packages, asked.threads)}
    report(found, pruned, rounded)


def report(found: dict[str, float], pruned: dict[str, Path], rounded: dict[str, Path]) -> None:
    ratio: Callable[[Path, Path], float] = lambda a, b: found[a.name] / found[b.name]  # noqa: E731
    print(f"{'artifact':40s} {'KL':>10s}")
    for name, kl in found.items():
        print(f"{name:40s} {kl:10.5f}")
    print(f"sparsegpt over magnitude   {ratio(pruned['sparsegpt'], pruned['magnitude']):.3f}   (0.5 or less)")
    print(f"sparsegpt over wanda       {ratio(pruned['sparsegpt'], pruned['wanda']):.3f}   (0.9 or less)")
    for how in ("plain", "repaired"):
        print(f"joint over {how:15s} {ratio(rounded['joint'], rounded[how]):.3f}   (below 1)")


if __name__ == "__main__":
    main()
