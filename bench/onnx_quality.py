"""KL of our ONNX packages against those of onnxruntime-genai's model builder: one source, one judge, one run.

    python bench/onnx_quality.py MODEL --text eval.txt --calibration calib.txt --keep FOLDER \\
        [--ours "--bits 4" --ours "--type INT4_M"] [--variants int4,k_quant,k_quant_mixed] [--packages FOLDER …]

Judged: mean KL(transformers f32 ‖ package on onnxruntime's CPU, as it is shipped) in nats over all positions of chunks
of 256. Bytes are those of model.onnx and its data. Each --ours is one export: `llmx export MODEL --format onnx` with
these options and the calibration text. All packages stand below --keep; the builder's are made once, ours every time.

The second table has a row for each of the builder's packages: the best of ours that is no larger, and its share of
the builder's KL.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peer_onnx
import stock
from onnx_session import PlainSession
from peer_onnx import Package, kept
from stock import NotRun

from llmx.validate.case import chunks
from llmx.validate.metrics import Comparison, Divergence
from llmx.validate.oracle import Reference, Tokens

CHUNK = 256
OURS = ("--type INT4", "--type INT4_M")
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Judged:
    """A package, whose it is, and how far it is from the reference."""

    maker: str
    package: Package
    divergence: Divergence

    @property
    def kl(self) -> float:
        return self.divergence.kl_mean


def export(model: Path, options: str, calibration: Path | None, under: Path, threads: int) -> Package:
    """Our package with these options of the command line, exported afresh. Raises: NotRun."""
    label = options.replace("--", "").replace("/", "_").replace(" ", "_")
    folder, given = under / model.name / "llmx" / label, shlex.split(options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if calibration and not {"rtn", "--statistics", "--calibration"} & set(given):
        given += ["--calibration", str(calibration)]
    return Package(options, folder, stock.measured(export_command(model, folder, threads, *given), threads))


def export_command(model: Path, folder: Path, threads: int, *options: str) -> list[str]:
    """The command line of one export into a folder, without validation."""
    command = [sys.executable, "-m", "llmx.cli", "export", str(model), "--format", "onnx", "-o", str(folder)]
    return [*command, "--threads", str(threads), "--no-validate", "--force", *options]


def judge(model: Path, text: str, count: int, packages: Sequence[tuple[str, Package]], threads: int) -> list[Judged]:
    """All packages on the same chunks of text, each chunk's reference computed once and not kept."""
    tokens = Tokens(model)
    special = tokens.encode("", add_special=True)
    leading = special[:1] if special[:1] == [tokens.bos] else []
    sequences = list(chunks(tokens.encode(text, add_special=False), leading, CHUNK, count))
    reference = Reference(model, threads)
    sessions = [PlainSession(package.folder, threads, CHUNK) for _, package in packages]
    comparisons = [Comparison() for _ in packages]
    for sequence in sequences:
        expected = np.concatenate(list(reference.logits(sequence)))
        for session, comparison in zip(sessions, comparisons, strict=True):
            session.restart()
            found = session.run(sequence, 0).astype(np.float32, copy=False)
            comparison.add_streams(sequence, [expected], [found], range(len(sequence) - 1))
    return [
        Judged(maker, package, comparison.summary())
        for (maker, package), comparison in zip(packages, comparisons, strict=True)
    ]


def row(model: str, judged: Judged) -> Row:
    """What is known of a package, for a file."""
    package, found = judged.package, judged.divergence
    return {
        "model": model,
        "maker": judged.maker,
        "package": package.name,
        "bytes": package.nbytes,
        "kl": found.kl_mean,
        "same_top1": found.same_top1,
        "positions": found.positions,
        "cpu_seconds": round(package.cost.cpu, 1) if package.cost else None,
        "peak_mb": round(package.cost.peak) if package.cost else None,
    }


HEADER = f"{'model':16} {'maker':8} {'package':44} {'bytes':>12} {'KL':>9} {'top-1':>6} {'CPU s':>7} {'peak MB':>8}"

CLASSES_HEADER = (
    f"{'builder':16} {'bytes':>12} {'KL':>9}  {'our best that is no larger':44} {'bytes':>12} {'KL':>9} {'ratio':>6}"
)


def line(row: Row) -> str:
    start = f"{row['model'][:16]:16} {row['maker']:8} {row['package'][:44]:44} {row['bytes']:>12,} {row['kl']:9.6f}"
    cost = "" if row["peak_mb"] is None else f" {row['cpu_seconds']:7.1f} {row['peak_mb']:8.0f}"
    return f"{start} {row['same_top1']:6.4f}{cost}"


def classes(rows: Sequence[Row]) -> list[str]:
    """A line for each of the builder's packages: our best that is no larger."""
    ours = [one for one in rows if one["maker"] == "llmx"]
    lines = []
    for theirs in (one for one in rows if one["maker"] == "builder"):
        fitting = [one for one in ours if one["bytes"] <= theirs["bytes"]]
        start = f"{theirs['package']:16} {theirs['bytes']:>12,} {theirs['kl']:9.6f}"
        if not fitting:
            lines.append(f"{start}  no package of ours is this small")
            continue
        best = min(fitting, key=lambda one: one["kl"])
        ratio = best["kl"] / theirs["kl"]
        lines.append(f"{start}  {best['package'][:44]:44} {best['bytes']:>12,} {best['kl']:9.6f} {ratio:6.3f}")
    return lines


def packages_of(asked: argparse.Namespace) -> list[tuple[str, Package]]:
    """Every package that is judged, made where it is missing; one that cannot be made is told on stderr."""
    found: list[tuple[str, Package]] = []
    for variant in asked.variants:
        try:
            found.append(("builder", kept(asked.model, variant, asked.keep, 0, asked.python)))
        except NotRun as reason:
            print(f"builder, {variant}: not run: {reason}", file=sys.stderr)
    for options in asked.ours or OURS:
        try:
            found.append(("llmx", export(asked.model, options, asked.calibration, asked.keep, asked.threads)))
        except NotRun as reason:
            print(f"llmx export {options}: not run: {reason}", file=sys.stderr)
    found += [("llmx", Package(folder.name, folder)) for folder in asked.packages]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="text for our exports; without it they get none")
    parser.add_argument("--keep", type=Path, required=True, help="all packages stand here, below the model's name")
    parser.add_argument("--ours", action="append", metavar="OPTIONS", help=f"default: {', '.join(OURS)}")
    parser.add_argument("--packages", nargs="*", type=Path, default=[], help="folders of ours that are there already")
    parser.add_argument("--variants", type=peer_onnx.chosen, default=["int4", "k_quant", "k_quant_mixed"])
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", type=stock.program, default=sys.executable, help="has onnxruntime-genai, torch")
    parser.add_argument("--json", type=Path, help="write the rows here")
    asked = parser.parse_args()
    packages = packages_of(asked)
    text = asked.text.read_text(encoding="utf-8")
    judged = judge(asked.model, text, asked.chunks, packages, asked.threads)
    rows = [row(asked.model.name, one) for one in judged]
    print(f"{asked.model.name}: {rows[0]['positions']} positions of {asked.text.name}")
    print("\n".join([HEADER, *map(line, rows), ""]))
    print(CLASSES_HEADER)
    print("\n".join(classes(rows)))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
