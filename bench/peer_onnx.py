"""onnxruntime-genai's model builder, run as its users run it: a process of its own, from a folder, offline.

    python bench/peer_onnx.py MODEL … --keep FOLDER [--variants int4,k_quant_mixed] [--threads 2]

Makes a package of each variant under FOLDER/model/variant and prints its bytes (model.onnx and its data) and what the
operating system counted for the process: seconds of wall time and of all cores, and the largest resident set. A
package that is there already is kept; its costs are read from the file that was written beside it then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import stock
from stock import Cost, NotRun

# name -> (precision, extra options); "int4" is what `-p int4` alone makes: rounding to nearest, blocks of 32
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "int4": ("int4", ()),
    "k_quant": ("int4", ("algo_config=k_quant",)),
    "k_quant_mixed": ("int4", ("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8")),
    "int4-block128": ("int4", ("block_size=128",)),
    "int8": ("int8", ()),
    "fp32": ("fp32", ()),
}
BUILDER = "onnxruntime_genai.models.builder"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
GRAPH, COSTS = "model.onnx", "costs.json"


@dataclass(frozen=True, slots=True)
class Package:
    """A folder with a graph, and what it cost to make where that is known."""

    name: str
    folder: Path
    cost: Cost | None = None

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    @property
    def nbytes(self) -> int:
        return package_bytes(self.folder)


def package_bytes(folder: Path) -> int:
    """The bytes of the graph and its data: what a package needs beside tokenizer and configuration."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(GRAPH))


def build(model: Path, variant: str, folder: Path, threads: int = 0, python: str = sys.executable) -> Cost:
    """What the builder took to make a variant in a folder. threads: cores it may use, 0 for all. Raises: NotRun."""
    precision, extra = VARIANTS[variant]
    os.environ.update(OFFLINE)
    with tempfile.TemporaryDirectory() as cache:
        command = [python, "-m", BUILDER, "-m", str(model), "-o", str(folder), "-p", precision, "-e", "cpu"]
        command += ["-c", cache, *(["--extra_options", *extra] if extra else [])]
        cost = stock.measured(command, threads)
    if not (folder / GRAPH).is_file():
        raise NotRun(f"the builder left no {GRAPH} for {variant}")
    return cost


def kept(model: Path, variant: str, under: Path, threads: int = 0, python: str = sys.executable) -> Package:
    """The package of a variant below a folder, built where it is missing. Raises: NotRun."""
    folder = under / model.name / variant
    told = folder / COSTS
    if told.is_file():
        return Package(variant, folder, Cost(**json.loads(told.read_text(encoding="utf-8"))))
    shutil.rmtree(folder, ignore_errors=True)
    cost = build(model, variant, folder, threads, python)
    told.write_text(json.dumps(asdict(cost)), encoding="utf-8")
    return Package(variant, folder, cost)


def row(model: str, package: Package) -> str:
    start = f"{model:18} {package.name:14} {package.nbytes:12,}"
    cost = package.cost
    return start if cost is None else f"{start} {cost.wall:7.1f} {cost.cpu:7.1f} {cost.peak:8.0f}"


HEADER = f"{'model':18} {'variant':14} {'bytes':>12} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}"


def chosen(names: str) -> Sequence[str]:
    """An argument that lists variants, with commas between them."""
    wrong = [name for name in names.split(",") if name not in VARIANTS]
    if wrong:
        raise argparse.ArgumentTypeError(f"no variant {', '.join(wrong)}; choose of {', '.join(VARIANTS)}")
    return names.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="packages stand here, below the model's name")
    parser.add_argument("--variants", type=chosen, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=0, help="cores that the builder may use; all by default")
    parser.add_argument("--python", type=stock.program, default=sys.executable, help="has onnxruntime-genai, torch")
    asked = parser.parse_args()
    print(stock.machine())
    print(HEADER)
    for model in asked.models:
        for variant in asked.variants:
            try:
                print(row(model.name, kept(model, variant, asked.keep, asked.threads, asked.python)), flush=True)
            except NotRun as reason:
                print(f"{model.name:18} {variant:14} not run: {reason}", flush=True)


if __name__ == "__main__":
    main()
