"""KL of our files against stock llama.cpp's, per type and method: the same source, the same judge, one run.

    python bench/quality.py MODEL … --text eval.txt [other-domain.txt …] --quantize llama-quantize \\
        [--calibration calib.txt [--llama-imatrix llama-imatrix] | --imatrix imatrix.gguf] \\
        [--types Q4_K_M,Q2_K] [--methods rtn,rtn+importance,auto] [--json rows.json] [--plot docs/quality.svg]
    python bench/quality.py --rows rows.json --plot docs/quality.svg      # draw again; pip install -e '.[bench]'

Judged: mean KL(transformers f32 ‖ file on stock llama.cpp) in nats over the second halves of chunks of 256. A row is a
type, a method and a text; it compares with stock's file of that type without and with importance.

    rtn               no importance on our side
    rtn+importance    the matrix that stock gets too
    gptq, auto        our method with --calibration, as `llmx export --method`

The importance comes from --imatrix, or from --calibration by llama-imatrix where given, else by `llmx calibrate`. It is
measured on as many tokens as our methods get. Stock's source is float32 by its own converter (--convert), or by ours
where that is not given or fails; the row names the maker. Without a quantizer stock says "not run".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import stock
from stock import NotRun, Stock

from llmx import api
from llmx.formats.gguf import read_gguf
from llmx.validate.case import chunks
from llmx.validate.metrics import Comparison
from llmx.validate.oracle import Reference, Tokens
from llmx.validate.runtimes import find_runtime

CHUNK = 256
TYPES = "Q8_0,Q6_K,Q5_K_M,Q5_K_S,Q5_1,Q5_0,Q4_K_M,Q4_K_S,Q4_1,Q4_0,IQ4_NL,IQ4_XS,Q3_K_L,Q3_K_M,Q3_K_S,Q2_K"
STOCK_TOKENS = 100_000  # of importance, where nothing is asked for: llama-imatrix would take the whole text

# name -> (`--method`, what it is given: nothing, the importance matrix, or the calibration text)
METHODS: dict[str, tuple[str, str | None]] = {
    "rtn": ("rtn", None),
    "rtn+importance": ("rtn", "imatrix"),
    "gptq": ("gptq", "calibration"),
    "auto": ("auto", "calibration"),
}
Row = dict[str, Any]


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


@dataclass(frozen=True, slots=True)
class Settings:
    """What is compared. texts: judged on each. tokens: of calibration, None for llmx's own number."""

    types: Sequence[str]
    methods: Sequence[str]
    texts: Sequence[Path]
    tools: Stock
    calibration: Path | None = None
    tokens: int | None = None
    imatrix: Path | None = None
    effort: str | None = None
    chunks: int = 40
    threads: int = 2


@dataclass(slots=True)
class Bench:
    """One model's judges, stock's source and the importance matrix."""

    model: Path
    settings: Settings
    scratch: Path
    judges: dict[str, Judge] = field(init=False)
    source: Path = field(init=False)
    maker: str = field(init=False)
    importance: Path | None = field(init=False)
    importance_by: str = field(init=False)

    def __post_init__(self) -> None:
        threads = self.settings.threads
        self.source = self.scratch / "f32.gguf"
        _, self.maker = stock.float_file(self.settings.tools, self.model, "F32", self.source, threads)
        self.importance, self.importance_by = self._importance()
        texts = {path.stem: path.read_text(encoding="utf-8") for path in self.settings.texts}
        self.judges = {name: Judge(self.model, text, self.settings.chunks, threads) for name, text in texts.items()}

    def _importance(self) -> tuple[Path | None, str]:
        given, text, target = self.settings.imatrix, self.settings.calibration, self.scratch / "importance.gguf"
        if given or not text:
            return given, given.name if given else "none"
        if self.settings.tools.imatrix:
            tokens = self.settings.tokens or STOCK_TOKENS
            self.settings.tools.measure_importance(self.source, text, target, tokens, self.settings.threads)
            return target, f"llama-imatrix, {tokens:,} tokens of {text.name}"
        size = ["--calibration-tokens", str(self.settings.tokens)] if self.settings.tokens else []
        command = [sys.executable, "-m", "llmx.cli", "calibrate", str(self.model), "--calibration", str(text)]
        stock.measured([*command, *size, "-o", str(target)])
        return target, f"llmx calibrate, {text.name}"

    def rows(self, type_name: str) -> Iterator[Row]:
        """A row for each method and text of the settings."""
        theirs: dict[str, tuple[Path, Row]] = {}
        for label, importance in (("stock", None), ("stock_importance", self.importance)):
            path = self.scratch / f"{label}.gguf"
            if self.settings.tools.here and (label == "stock" or importance):
                self.settings.tools.quantize(self.source, path, type_name, importance, self.settings.threads)
                theirs[label] = path, {"bytes": path.stat().st_size, "kl": self._judged(path)}
        for method in self.settings.methods:
            path, seconds = self._export(type_name, method)
            peer = "stock_importance" if METHODS[method][1] and "stock_importance" in theirs else "stock"
            same = same_types(path, theirs[peer][0]) if peer in theirs else None
            judged = self._judged(path)
            for text, kl in judged.items():
                yield {
                    "model": self.model.name,
                    "type": type_name,
                    "method": method,
                    "effort": self.settings.effort,
                    "text": text,
                    "positions": self.judges[text].positions,
                    "bytes": path.stat().st_size,
                    "kl": kl,
                    **{
                        label: {"bytes": facts["bytes"], "kl": facts["kl"][text]}
                        for label, (_, facts) in theirs.items()
                    },
                    "peer": peer,
                    "same_types": same,
                    "seconds": round(seconds, 1),
                    "source": self.maker,
                    "importance": self.importance_by,
                }

    def _export(self, type_name: str, method: str) -> tuple[Path, float]:
        """Our file and the seconds that it took."""
        name, given = METHODS[method]
        target = self.scratch / "ours.gguf"
        options: dict[str, Any] = {"method": name}
        if given == "imatrix":
            options["imatrix"] = self.importance
        if given == "calibration":
            options["calibration"] = self.settings.calibration
            options |= {"calibration_tokens": self.settings.tokens} if self.settings.tokens else {}
        options |= {"effort": self.settings.effort} if self.settings.effort else {}
        started = time.monotonic()
        api.export(
            api.ExportRequest(
                str(self.model),
                type_name=type_name,
                output=target,
                threads=self.settings.threads,
                validate=False,
                force=True,
                **options,
            )
        )
        return target, time.monotonic() - started

    def _judged(self, path: Path) -> dict[str, float]:
        return {text: judge.kl(path) for text, judge in self.judges.items()}


def same_types(ours: Path, theirs: Path) -> bool:
    """Whether both files hold the same tensors in the same types."""
    types = [{n: (t.type_name, t.shape) for n, t in read_gguf(path).tensors.items()} for path in (ours, theirs)]
    return types[0] == types[1]


def measure(model: Path, settings: Settings, done: Collection[tuple[str, str]] = ()) -> Iterator[Row]:
    """The rows of one model; (model, type) pairs in `done` are left out. Raises: NotRun when a tool of stock fails."""
    types = [type_name for type_name in settings.types if (model.name, type_name) not in done]
    if not types:
        return
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(model, settings, Path(scratch))
        for type_name in types:
            yield from bench.rows(type_name)


def ratio(row: Row, label: str) -> float | None:
    """Our KL as a share of that of stock's file; None where there is no such file."""
    return row["kl"] / row[label]["kl"] if label in row else None


HEADER = (
    f"{'model':16} {'text':16} {'type':7} {'method':15} {'bytes':>13} {'of stock':>9} {'KL':>9} "
    f"{'stock':>9} {'ratio':>6} {'+import.':>9} {'ratio':>6}  same types"
)


def source(row: Row) -> str:
    """What is the same for all rows of a model."""
    stocks = f"stock's float32 file by {row['source']}" if "stock" in row else "stock not run"
    return f"{row['model']}: {row['positions']} positions; importance: {row['importance']}; {stocks}"


def line(row: Row) -> str:
    """A row of the table."""
    start = f"{row['model'][:16]:16} {row['text'][:16]:16} {row['type']:7} {row['method']:15} {row['bytes']:>13,}"
    size = f"{row['bytes'] / row[row['peer']]['bytes']:9.5f}" if row["peer"] in row else f"{'':9}"
    cells = ""
    for label in ("stock", "stock_importance"):
        found = ratio(row, label)
        cells += f" {'not run':>9} {'':6}" if found is None else f" {row[label]['kl']:9.6f} {found:6.3f}"
    return f"{start} {size} {row['kl']:9.6f}{cells}  {'' if row['same_types'] is None else row['same_types']}"


SERIES = (  # label of the rows, name, colour, mark
    ("stock", "llama.cpp", "#8c8c8c", "o"),
    ("stock_importance", "llama.cpp with importance", "#c77d2e", "s"),
    ("ours", "llmx, {method}", "#1f5fa8", "D"),
)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (bytes, KL) points that no other is at most as large and at most as bad as, by size."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw KL against file size, a panel for each model, on its first text; ours is the last method of the rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "llmx", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(7.2 * len(models), 4.4), squeeze=False)
    for panel, model in zip(axes[0], models, strict=True):
        ours = [row for row in rows if row["model"] == model]
        ours = [row for row in ours if (row["text"], row["method"]) == (ours[0]["text"], ours[-1]["method"])]
        _panel(panel, ours)
        panel.set_title(f"{model}, {ours[0]['text']}", loc="left", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    for label, name, colour, mark in SERIES:
        found = [row if label == "ours" else row[label] for row in rows if label == "ours" or label in row]
        points = [(point["bytes"] / 1e6, point["kl"]) for point in found]
        if points:
            panel.plot(*zip(*front(points), strict=True), color=colour, linewidth=1.2, alpha=0.6)
            shown = name.format(method=rows[0]["method"])
            panel.plot(*zip(*points, strict=True), mark, color=colour, markersize=4.5, linestyle="none", label=shown)
    leading = front([(row["bytes"], row["kl"]) for row in rows])
    # Named: the types that no other beats, above and below in turn, so that names of nearly equal sizes do not meet.
    for number, point in enumerate(leading):
        row = next(row for row in rows if (row["bytes"], row["kl"]) == point)
        heights = [row["kl"], *(row[label]["kl"] for label in ("stock", "stock_importance") if label in row)]
        at, offset, angle = (max(heights), (0, 5), 60) if number % 2 == 0 else (min(heights), (0, -5), -60)
        panel.annotate(
            row["type"],
            (row["bytes"] / 1e6, at),
            offset,
            textcoords="offset points",
            rotation=angle,
            rotation_mode="anchor",
            va="center",
            fontsize=6.5,
        )
    panel.margins(x=0.06, y=0.16)
    panel.set(yscale="log", xlabel="file size, MB", ylabel="mean KL from the float32 model, nats")
    panel.grid(axis="y", which="major", linewidth=0.4, alpha=0.5)
    panel.legend(frameon=False, loc="upper right")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that Settings come from."""
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="judged on each")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="for importance and for our methods")
    parser.add_argument("--calibration-tokens", type=int, metavar="N")
    parser.add_argument("--effort", help="fast, balanced or best, for our methods. [default: llmx's]")
    parser.add_argument("--chunks", type=int, default=40, help=f"of {CHUNK} tokens judged")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    stock.add_options(parser)


def settings_of(options: argparse.Namespace, types: Sequence[str], methods: Sequence[str]) -> Settings:
    """The settings that the command line asks for."""
    return Settings(
        types=types,
        methods=methods,
        texts=options.text,
        tools=stock.chosen(options),
        calibration=options.calibration,
        tokens=options.calibration_tokens,
        imatrix=getattr(options, "imatrix", None),
        effort=options.effort,
        chunks=options.chunks,
        threads=options.threads,
    )


def _methods(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    given = {"imatrix": options.imatrix or options.calibration, "calibration": options.calibration, None: True}
    names = options.methods.split(",") if options.methods else ["rtn", "rtn+importance", "auto"]
    if unknown := set(names) - set(METHODS):
        parser.error(f"there is no method {', '.join(sorted(unknown))}; choose of {', '.join(METHODS)}")
    lacking = [name for name in names if not given[METHODS[name][1]]]
    if options.methods and lacking:
        parser.error(f"{', '.join(lacking)} needs --calibration")
    return [name for name in names if name not in lacking]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance of the one model given")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)} [default: all but gptq that can be run]")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="take the rows from here instead of measuring")
    add_options(parser)
    options = parser.parse_args()
    if not options.rows and not (options.models and options.text):
        parser.error("give models and --text, or --rows")
    if options.imatrix and len(options.models) != 1:
        parser.error("--imatrix belongs to one model; with several give --calibration")
    rows: list[Row] = json.loads(options.rows.read_text()) if options.rows else []
    settings = settings_of(options, options.types.split(","), _methods(options, parser))
    told: set[str] = set()
    print(HEADER)
    for row in rows or _measured(options.models, settings):
        if row["model"] not in told:
            told.add(row["model"])
            print(source(row))
        print(line(row), flush=True)
        if not options.rows:
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


def _measured(models: Sequence[Path], settings: Settings) -> Iterator[Row]:
    for model in models:
        try:
            yield from measure(model, settings)
        except NotRun as reason:
            print(f"{model.name}: not run: {reason}", flush=True)


if __name__ == "__main__":
    main()
