"""Is there a model, type or text on which our method is not worth it? Every pair, worst first.

    python bench/no_regret.py MODELS --calibration calib.txt --text eval.txt other-domain.txt \\
        --quantize llama-quantize [--llama-imatrix llama-imatrix] [--types …] [--method auto] [--json rows.json]

MODELS is a folder of checkpoint folders. Every model is exported to every mix of 3 bits and more by our method,
calibrated on one text, and judged on each text, so that a calibration that does not transfer shows; stock's file of the
same type has importance calibrated on the same text. Judge, importance and stock's source: bench/quality.py.
Exit code 1 when our KL is above --limit (0.9) of stock's anywhere, or when anything could not be run.

With --json the rows are kept as they come, and a run that was stopped goes on: a new file for other options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import stock
from quality import METHODS, Row, Settings, add_options, measure, ratio, settings_of
from stock import NotRun

from llmx.errors import LlmxError

# By size. Two-bit mixes are left out: nobody deploys models this small in them.
TYPES = "Q3_K_S,Q3_K_M,Q3_K_L,IQ4_XS,IQ4_NL,Q4_0,Q4_K_S,Q4_K_M,Q4_1,Q5_0,Q5_K_S,Q5_K_M,Q5_1,Q6_K,Q8_0"
PEER = "stock_importance"


def table(rows: list[Row], limit: float) -> str:
    """The ratios, worst first, and how many are above the limit."""
    lines = [f"{'ratio':>6}  {'model':18} {'type':7} {'text':18} {'KL':>9} {'stock':>9} {'of stock':>9}  same types"]
    for row in sorted(rows, key=_ratio, reverse=True):
        size = row["bytes"] / row[PEER]["bytes"]
        lines.append(
            f"{_ratio(row):6.3f}  {row['model']:18} {row['type']:7} {row['text']:18} {row['kl']:9.6f} "
            f"{row[PEER]['kl']:9.6f} {size:9.5f}  {row['same_types']}"
        )
    above = sum(_ratio(row) > limit for row in rows)
    return "\n".join([*lines, f"{above} of {len(rows)} ratios are above {limit}"])


def _ratio(row: Row) -> float:
    found = ratio(row, PEER)
    assert found is not None, "rows without stock's file are refused before"
    return found


def measured(models: list[Path], settings: Settings, rows: list[Row]) -> Iterator[Row | str]:
    """New rows, and for a model that could not be run a line that says why."""
    texts = {path.stem for path in settings.texts}
    judged: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        judged.setdefault((row["model"], row["type"]), set()).add(row["text"])
    done = {pair for pair, found in judged.items() if found >= texts}
    for model in models:
        try:
            yield from measure(model, settings, done)
        except (NotRun, LlmxError) as reason:
            yield f"{model.name}: not run: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="MODELS")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--method", default="auto", choices=METHODS)
    parser.add_argument("--limit", type=float, default=0.9, help="largest ratio to stock with importance")
    add_options(parser)
    options = parser.parse_args()
    if not (options.calibration and options.text and stock.chosen(options).here):
        parser.error("give --calibration, --text, and --quantize or --stock-python")
    models = sorted(path.parent for path in options.folder.glob("*/config.json"))
    rows: list[Row] = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    failures: list[str] = []
    settings = settings_of(options, options.types.split(","), [options.method])
    for found in measured(models, settings, rows):
        if isinstance(found, str):
            failures.append(found)
            continue
        rows.append(found)
        print(f"{found['model']} {found['type']} {found['text']}: {_ratio(found):.3f}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if rows:
        print(f"method {options.method}; importance: {rows[-1]['importance']}")
    print("\n".join([table(rows, options.limit), *failures]))
    sys.exit(bool(failures) or not rows or max(map(_ratio, rows)) > options.limit)


if __name__ == "__main__":
    main()
