"""Does the validator fail a sound file? Every model in every type, the whole suite of checks on each file.

    python bench/false_alarms.py MODELS [--models tiny-qwen3 …] [--types Q4_K_M,…] [--methods rtn,gptq,awq,stock] \\
        [--solved Q4_K_M] [--quantize llama-quantize [--max-kl 0.05]] [--json rows.json]

MODELS is a folder of checkpoint folders. Each model is rounded to every type, and exported once by GPTQ and once by AWQ
(of type --solved). With --quantize, llama.cpp's own quantizer makes every type of our F32 file, too: the
checks must pass it, or fail it by its quality alone, where its KL is above what a file of such types may have.

Printed are every figure's worst share of its limit, the files that did not pass, and stock's KL beside its limit. Exit
code 1 when a file of ours did not pass, or a stock file failed by anything but its quality. With --json the rows are
kept as they come, and a run that was stopped goes on: a new file for other settings.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import stock
from stock import NotRun, Stock

from llmx import api
from llmx.errors import LlmxError
from llmx.validate.case import Limits, Settings
from llmx.validate.gate import AT_LEAST
from llmx.validate.report import Check, Report
from llmx.validate.suite import validate

TYPES = "Q2_K,Q3_K_M,Q4_0,Q4_K_M,IQ4_XS,Q5_K_M,Q6_K,Q8_0,F16,F32"
FLOATS = ("F16", "F32")
STOCK = "stock"
SOLVED = ("gptq", "awq")
METHODS = ("rtn", *SOLVED, STOCK)
COUNTS = ("quality.positions", "tokens.vocabulary")  # more of them, or just as many, is no strain on a limit

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file to make and to judge. method: rtn, gptq, awq, or stock."""

    model: Path
    method: str
    type_name: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model.name, self.method, self.type_name


def wanted(models: Iterable[Path], methods: list[str], types: list[str], solved: str) -> Iterator[Wanted]:
    """Every file, a model after the other."""
    types_of = {
        "rtn": types,
        **{method: [solved] for method in SOLVED},
        STOCK: [name for name in types if name not in FLOATS],
    }
    for model in models:
        yield from (Wanted(model, method, name) for method in methods for name in types_of[method])


def export(one: Wanted, type_name: str, method: str, target: Path, threads: int) -> None:
    """Write a file of ours, unproven. AWQ and GPTQ calibrate on the built-in corpus."""
    request = api.ExportRequest(
        str(one.model),
        type_name=type_name,
        method=method,
        effort="fast",
        output=target,
        validate=False,
        threads=threads,
    )
    api.export(request)


def make(one: Wanted, target: Path, tools: Stock, threads: int) -> None:
    """Write the file. Raises: NotRun, LlmxError."""
    if one.method != STOCK:
        export(one, one.type_name, one.method, target, threads)
        return
    source = target.with_name("source.gguf")
    export(one, "F32", "rtn", source, threads)
    try:
        tools.quantize(source, target, one.type_name, threads=threads)
    finally:
        source.unlink()


def share(check: Check) -> float | None:
    """How much of its limit a figure uses; None where it has no limit, or one of 0, or is a count."""
    if check.name in COUNTS:
        return None
    if not isinstance(check.value, int | float) or not isinstance(check.limit, int | float) or not check.limit:
        return None
    if check.name in AT_LEAST:
        return check.limit / check.value if check.value else float("inf")
    return check.value / check.limit


def row_of(one: Wanted, report: Report, seconds: float) -> Row:
    """What is kept of a report."""
    quality = next((check for check in report.checks if check.name == "quality.kl"), None)
    return {
        "model": one.model.name,
        "method": one.method,
        "type": one.type_name,
        "exit_code": report.exit_code,
        "kl": None if quality is None else quality.value,
        "limit": None if quality is None else quality.limit,
        "shares": {check.name: found for check in report.checks if (found := share(check)) is not None},
        "failed": {check.name: check.detail for check in report.failed},
        "missing": {check.name: check.detail for check in report.missing},
        "seconds": round(seconds, 1),
    }


def as_it_should(row: Row) -> bool:
    """A file of ours passes; one of stock's passes within its limit on the KL and fails by its quality beyond it."""
    if row["method"] != STOCK:
        return row["exit_code"] == 0
    over = not row["kl"] or row["kl"] > row["limit"]
    by_quality = not row["missing"] and all(name.startswith("quality.") for name in row["failed"])
    return by_quality and over == ("quality.kl" in row["failed"]) and row["exit_code"] == (4 if row["failed"] else 0)


def judged(one: Wanted, settings: Settings, limits: Limits, tools: Stock) -> Row:
    """Make the file, judge it, remove it. Raises: NotRun, LlmxError."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / f"{one.model.name}-{one.type_name}.gguf"
        make(one, target, tools, settings.threads)
        started = time.monotonic()
        report = validate(target, one.model, settings=settings, limits=limits if one.method == STOCK else None)
        return row_of(one, report, time.monotonic() - started)


def measured(
    files: Iterable[Wanted], settings: Settings, limits: Limits, tools: Stock, rows: list[Row]
) -> Iterator[Row | str]:
    """New rows, and for a file that could not be made or read a line that says why."""
    done = {(row["model"], row["method"], row["type"]) for row in rows}
    for one in files:
        if one.key in done:
            continue
        try:
            yield judged(one, settings, limits, tools)
        except (NotRun, LlmxError) as reason:
            yield f"{' '.join(one.key)}: not run: {reason}"


def table(rows: list[Row]) -> str:
    """The worst share of each limit, the files that did not pass, and stock's files."""
    ours = [row for row in rows if row["method"] != STOCK]
    lines = [f"{'check':24} {'worst, of its limit':>19}  where (files of ours)"]
    for name in sorted({name for row in ours for name in row["shares"]}):
        worst = max((row for row in ours if name in row["shares"]), key=lambda row: row["shares"][name])
        lines.append(f"{name:24} {worst['shares'][name]:19.3g}  {_named(worst)}")
    alarms = [row for row in rows if not as_it_should(row)]
    lines += [f"\n{len(ours)} files of ours, {sum(row['exit_code'] == 0 for row in ours)} passed"]
    lines += [f"  {_named(row)}: exit code {row['exit_code']}: {_reasons(row)}" for row in alarms]
    theirs = [row for row in rows if row["method"] == STOCK]
    if theirs:
        lines += [f"\n{'stock file':36} {'KL':>10} {'limit':>10}  exit code"]
        for row in theirs:
            kl, limit = (
                f"{row[key]:10.3g}" if isinstance(row[key], float) else "-".rjust(10) for key in ("kl", "limit")
            )
            lines.append(f"{_named(row):36} {kl} {limit}  {row['exit_code']}  {', '.join(row['failed'])}")
    return "\n".join(lines)


def _named(row: Row) -> str:
    return f"{row['model']} {row['method']} {row['type']}"


def _reasons(row: Row) -> str:
    return "; ".join(f"{name}: {detail}" for name, detail in {**row["failed"], **row["missing"]}.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="MODELS")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument(
        "--methods", default=",".join(METHODS), help="of which files; stock's where --quantize is given"
    )
    parser.add_argument("--solved", default="Q4_K_M", metavar="TYPE", help="type of the GPTQ and the AWQ file")
    parser.add_argument("--quantize", type=stock.program, metavar="PROGRAM", help="stock llama-quantize")
    parser.add_argument("--max-kl", type=float, help="what stock's files are judged by, instead of the defaults")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows here, and go on from those that are")
    options = parser.parse_args()
    models = sorted(path.parent for path in options.folder.glob("*/config.json"))
    models = [model for model in models if not options.models or model.name in options.models]
    rows: list[Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    settings = Settings(positions=options.positions, threads=options.threads)
    methods = [name for name in options.methods.split(",") if name != STOCK or options.quantize]
    if unknown := set(methods) - set(METHODS):
        parser.error(f"no method is called {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    files = wanted(models, methods, options.types.split(","), options.solved)
    failures: list[str] = []
    limits = Limits(max_kl=options.max_kl)
    for found in measured(files, settings, limits, Stock(binary=options.quantize), rows):
        if isinstance(found, str):
            failures.append(found)
            continue
        rows.append(found)
        print(f"{_named(found)}: exit code {found['exit_code']}, {found['seconds']} s", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{date.today()}, {options.positions} positions, {options.threads} threads; {stock.machine()}")
    print("\n".join([table(rows), *failures]))
    sys.exit(bool(failures) or not rows or not all(map(as_it_should, rows)))


if __name__ == "__main__":
    main()
