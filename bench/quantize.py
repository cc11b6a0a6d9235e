"""Speed: a Hugging Face folder to a GGUF file with importance, ours against llama.cpp's converter and quantizer.

    python bench/quantize.py --convert convert_hf_to_gguf.py (--quantize llama-quantize | --stock-python PYTHON) \\
        [--types Q4_K_M,Q8_0] [--size 1.1] [--repeats 3] [--threads 2] [--method rtn] [--effort balanced] [--json FILE]

Ours is one process, `llmx export`, from Python's start to the last fsync, checking every weight included. Stock's is
convert_hf_to_gguf.py to BF16, run once a repeat, and then the quantizer, once a type. Both run on the same cores,
alternately, in changing order, with the same importance matrix (drawn, log-normal: it need not be real to cost what a
real one costs) and the same random checkpoint, whose 2.2 GB stay in the page cache. The disk is flushed before every
start, not counted. Before the first start a small export of each type fills numba's cache, as any earlier export of a
user has. Medians of the repeats; a ratio below 1 is ours in front.

Where the converter does not run, only the quantizer is counted for stock and the row says so. With --method gptq or
auto ours measures its inputs too (--calibration); llama-imatrix, which does that for stock, is never counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import stock
from large import SHAPES, WARM_UP, export, make, warm_up
from stock import Cost, Stock

from llmx import api
from llmx.formats.imatrix import write_imatrix

TYPES = "Q4_K_M,Q6_K,Q3_K_M,IQ4_XS,Q8_0"
METHODS = ("rtn", "gptq", "auto")
EFFORTS = ("fast", "balanced", "best")
COSTS = ("wall", "cpu", "peak")


def drawn_importance(folder: Path, path: Path) -> Path:
    """Write an importance matrix for every matrix of the layers, its values log-normal; returns its path."""
    random = np.random.default_rng(0)
    steps = api.plan(api.ExportRequest(str(folder), type_name="BF16")).exporter.plan.steps
    matrices = [step for step in steps if step.name.startswith("blk.") and len(step.shape) > 1]
    sums = {step.name: np.exp(random.normal(size=(1, step.shape[-1]))).astype(np.float32) for step in matrices}
    counts = {name: np.ones(1, np.float32) for name in sums}
    write_imatrix(path, sums, counts, datasets=["drawn"], chunk_count=1, chunk_size=1)
    return path


def our_options(options: argparse.Namespace, importance: Path) -> list[str]:
    """The options of `llmx export` that the bench's own stand for."""
    chosen = ["--method", options.method, "--effort", options.effort]
    if options.method == "rtn":
        return [*chosen, "--imatrix", str(importance)]
    calibration = ["--calibration", str(options.calibration)] if options.calibration else []
    tokens = ["--calibration-tokens", str(options.calibration_tokens)] if options.calibration_tokens else []
    return [*chosen, *calibration, *tokens]


class Race:
    """Both sides on one checkpoint. costs: for each type, for "ours" and "stock", one Cost a repeat."""

    def __init__(self, options: argparse.Namespace, folder: Path, scratch: Path) -> None:
        self._options, self._folder, self._scratch = options, folder, scratch
        self._tools: Stock = stock.chosen(options)
        self._importance = drawn_importance(folder, scratch / "importance.gguf")
        self._ours = our_options(options, self._importance)
        self._source = scratch / "bf16.gguf"
        self.types: list[str] = options.types.split(",")
        self.costs: dict[str, dict[str, list[Cost]]] = {name: {"ours": [], "stock": []} for name in self.types}
        self.written = dict.fromkeys(self.types, 0)
        self.converted: list[Cost] = []
        self.maker = ""

    def warm_up(self) -> None:
        """Compile what every type needs, on a checkpoint too small to count."""
        make(WARM_UP, self._scratch / WARM_UP)
        importance = drawn_importance(self._scratch / WARM_UP, self._scratch / "warm-up-importance.gguf")
        warm_up(self.types, self._options.threads, self._scratch, *our_options(self._options, importance))

    def repeat(self, number: int) -> None:
        """Every type once by each side; odd repeats let stock begin."""
        converted = self._convert() if self._tools.here else None
        sides: list[tuple[str, Callable[[str], Cost]]] = [("ours", self._export)]
        if self._tools.here:
            sides.append(("stock", lambda type_name: self._quantize(type_name, converted)))
        for type_name in self.types:
            for side, run in sides if number % 2 == 0 else sides[::-1]:
                cost = run(type_name)
                self.costs[type_name][side].append(cost)
                print(f"repeat {number + 1}: {type_name} {side} {cost.wall:.1f} s", file=sys.stderr)

    def _convert(self) -> Cost | None:
        if self.maker.startswith("llmx"):
            return None  # it did not convert this checkpoint the first time
        self._source.unlink(missing_ok=True)
        cost, self.maker = stock.float_file(self._tools, self._folder, "BF16", self._source, self._options.threads)
        self.converted += [cost] if cost else []
        return cost

    def _export(self, type_name: str) -> Cost:
        target = self._scratch / "ours.gguf"
        cost = export(self._folder, type_name, self._options.threads, target, *self._ours)
        self.written[type_name] = target.stat().st_size
        return cost

    def _quantize(self, type_name: str, converted: Cost | None) -> Cost:
        target = self._scratch / "stock.gguf"
        cost = self._tools.quantize(self._source, target, type_name, self._importance, self._options.threads)
        return converted.then(cost) if converted else cost

    def row(self, type_name: str) -> dict[str, object]:
        """Medians, ratios and every single cost of a type."""
        sides = {side: costs for side, costs in self.costs[type_name].items() if costs}
        medians = {
            side: {key: median(getattr(c, key) for c in costs) for key in COSTS} for side, costs in sides.items()
        }
        ratios = {}
        if "stock" in medians:
            ratios = {key: medians["ours"][key] / medians["stock"][key] for key in COSTS}
        return {
            "type": type_name,
            "bytes": self.written[type_name],
            "medians": medians,
            "ratios": ratios,
            "runs": {side: [asdict(cost) for cost in costs] for side, costs in sides.items()},
            "stock": self.what,
        }

    @property
    def what(self) -> str:
        """What is counted for stock."""
        if not self._tools.here:
            return "not run"
        if self.converted:
            return f"convert_hf_to_gguf.py and {self._tools.words}"
        return f"{self._tools.words} only (BF16 file by {self.maker})"


_THREE = f"{'wall s':>9}{'CPU s':>8}{'peak MB':>9}  |"
HEADER = f"{'type':8}{'out MB':>8}{_THREE}{_THREE}{'wall':>6}{'CPU':>6}{'peak':>6}"


def line(row: dict) -> str:
    """A row of the table: ours, stock, ratios."""
    ours, theirs = row["medians"]["ours"], row["medians"].get("stock")
    start = f"{row['type']:8}{row['bytes'] / 1e6:8.0f}{ours['wall']:9.1f}{ours['cpu']:8.1f}{ours['peak']:9.0f}  |"
    if not theirs:
        return f"{start} not run"
    ratios = "".join(f"{row['ratios'][key]:6.2f}" for key in COSTS)
    return f"{start}{theirs['wall']:9.1f}{theirs['cpu']:8.1f}{theirs['peak']:9.0f}  |{ratios}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--size", default="1.1", choices=SHAPES, help="billions of random parameters")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--method", default="rtn", choices=METHODS)
    parser.add_argument("--effort", default="balanced", choices=EFFORTS)
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--calibration-tokens", type=int, metavar="N")
    parser.add_argument("--keep", type=Path, help="make the checkpoint here and keep it")
    parser.add_argument("--json", type=Path, help="also write every run here")
    stock.add_options(parser)
    return parser.parse_args()


def main() -> None:
    options = _parse()
    print(stock.machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)) / f"random-{options.size}b"
        total = make(options.size, folder)
        race = Race(options, folder, Path(scratch))
        race.warm_up()
        for number in range(options.repeats):
            race.repeat(number)
        rows = [race.row(type_name) for type_name in race.types]
    print(f"{total / 1e6:,.0f} MB of BF16 in, {options.threads} threads, medians of {options.repeats}")
    print(f"ours: llmx export --method {options.method} --effort {options.effort}   stock: {race.what}")
    if race.converted:
        walls, cpus = ([getattr(cost, key) for cost in race.converted] for key in ("wall", "cpu"))
        print(f"of stock's, the converter takes {median(walls):.1f} s wall and {median(cpus):.1f} s CPU")
    print(f"{'':8}{'':8}{'ours':>9}{'':17}  |{'stock':>9}{'':17}  |{'ours / stock':>14}\n{HEADER}")
    print("\n".join(line(row) for row in rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
