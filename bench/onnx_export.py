"""CPU seconds and peak memory of our ONNX export against onnxruntime-genai's model builder, in turns, and by size.

    python bench/onnx_export.py MODEL … [--ours "--type INT4 --method rtn"] [--variants int4,k_quant] [--repeat 3]
    python bench/onnx_export.py --sizes 1.1,4.4 [--keep FOLDER] [--ours …] [--peer]

Every run is a process of its own, from the folder to the finished package, without validation; the figures are the
operating system's for that process: the least CPU time and the largest resident set of the repeats. The random
checkpoints of --sizes (bench/large.py makes them, of many shards) show that memory follows the largest tensor and not
the model; the builder, which holds the model several times, runs on them only where --peer asks for it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import large
import peer_onnx
import stock
from onnx_quality import export_command
from stock import Cost, NotRun

OURS = ("--type INT4 --method rtn", "--type INT4_M --method rtn")
VARIANTS = ("int4", "k_quant", "k_quant_mixed")


@dataclass(frozen=True, slots=True)
class Maker:
    """A way to make a package of a model in a folder."""

    name: str
    run: Callable[[Path, Path], Cost]


def makers(ours: Sequence[str], variants: Sequence[str], threads: int, python: str) -> list[Maker]:
    """Ours first; every one is given an absent folder."""

    def our(options: str) -> Maker:
        extra = shlex.split(options)
        return Maker(
            f"llmx {options}",
            lambda model, folder: stock.measured(export_command(model, folder, threads, *extra), threads),
        )

    def theirs(variant: str) -> Maker:
        return Maker(
            f"builder {variant}", lambda model, folder: peer_onnx.build(model, variant, folder, threads, python)
        )

    return [*map(our, ours), *map(theirs, variants)]


@dataclass(frozen=True, slots=True)
class Result:
    """A maker's least time, its largest memory in MB, and the bytes of what it made."""

    name: str
    cost: Cost
    nbytes: int


def raced(model: Path, entrants: Sequence[Maker], repeat: int) -> Iterator[Result]:
    """Let the makers run in turns, `repeat` times."""
    costs: dict[str, list[Cost]] = {maker.name: [] for maker in entrants}
    sizes: dict[str, int] = {}
    for _ in range(repeat):
        for maker in entrants:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "package"
                try:
                    costs[maker.name].append(maker.run(model, folder))
                except NotRun as reason:
                    print(f"{maker.name}: not run: {reason}", file=sys.stderr)
                    continue
                sizes[maker.name] = peer_onnx.package_bytes(folder)
    for name, found in costs.items():
        if found:
            best = Cost(min(c.wall for c in found), min(c.cpu for c in found), max(c.peak for c in found))
            yield Result(name, best, sizes[name])


HEADER = f"{'model':18} {'maker':44} {'bytes':>13} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}"


def line(model: str, result: Result) -> str:
    cost = result.cost
    return f"{model:18} {result.name[:44]:44} {result.nbytes:>13,} {cost.wall:7.1f} {cost.cpu:7.1f} {cost.peak:8.0f}"


def ratios(results: Sequence[Result]) -> Iterator[str]:
    """Each of ours against each of theirs."""
    for one in (r for r in results if r.name.startswith("llmx")):
        for other in (r for r in results if r.name.startswith("builder")):
            cpu, peak = one.cost.cpu / other.cost.cpu, one.cost.peak / other.cost.peak
            yield f"  {one.name} / {other.name}: CPU {cpu:.2f}, peak {peak:.2f}"


def by_size(asked: argparse.Namespace) -> None:
    """Peaks over the random checkpoints, and how far the largest is from the smallest."""
    entrants = makers(asked.ours or OURS[:1], asked.variants[:1] if asked.peer else (), asked.threads, asked.python)
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in asked.sizes.split(","):
            folder = (asked.keep or Path(scratch)) / f"random-{size}b"
            large.make(size, folder)
            results = list(raced(folder, entrants, 1))
            for result in results:
                print(line(f"{size} B", result), flush=True)
                peaks.setdefault(result.name, []).append(result.cost.peak)
            for told in ratios(results):
                print(told, flush=True)
            if not asked.keep:
                shutil.rmtree(folder)
    for name, found in peaks.items():
        print(f"  {name}: the largest peak is {max(found) / min(found):.3f} of the smallest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--ours", action="append", metavar="OPTIONS", help=f"default: {', '.join(OURS)}")
    parser.add_argument("--variants", type=peer_onnx.chosen, default=list(VARIANTS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="and cores, for both sides")
    parser.add_argument("--sizes", help=f"billions of parameters, of {', '.join(large.SHAPES)}")
    parser.add_argument("--peer", action="store_true", help="the builder makes its first variant of --sizes, too")
    parser.add_argument("--keep", type=Path, help="make the checkpoints of --sizes here and keep them")
    parser.add_argument("--python", type=stock.program, default=sys.executable, help="has onnxruntime-genai, torch")
    asked = parser.parse_args()
    print(stock.machine())
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:  # numba's cache is filled before anything counts
        large.make(large.WARM_UP, warm := Path(scratch) / "warm-up")
        for maker in makers(asked.ours or OURS, (), asked.threads, asked.python):
            maker.run(warm, Path(scratch) / "package")
    for model in asked.models:
        results = list(
            raced(model, makers(asked.ours or OURS, asked.variants, asked.threads, asked.python), asked.repeat)
        )
        for result in results:
            print(line(model.name, result), flush=True)
        for told in ratios(results):
            print(told, flush=True)
    if asked.sizes:
        by_size(asked)


if __name__ == "__main__":
    main()
