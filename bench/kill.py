"""Exports killed (SIGKILL) at random moments and gone on with: never a damaged file, always the same bytes.

    python bench/kill.py --kills 200 > results/DATE-kill.txt

An undisturbed export tells how long one takes and what its files are. Then, case by case: a run is killed at a moment
drawn from all of that time, up to four times in a row, each one after the first with --resume; a last one may finish.
After each kill, whatever stands under a final name must have the bytes of the undisturbed export; after each finish,
everything must.

Runs are forks of a process that has made the undisturbed export, so that no moment falls on imports. Every tensor is
synced and noted at once, which an export of this size would do at its end only. It is not validated: that reads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")  # a pool of threads does not outlive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
GPTQ = ("--method", "gptq", "--calibration-tokens", "512")
RTN = ("--method", "rtn")
# name -> options, what is written
CASES = {
    "gguf Q4_0": (("--format", "gguf", "--type", "Q4_0", *RTN), "m.gguf"),
    "gguf Q4_0 in shards": (("--format", "gguf", "--type", "Q4_0", "--split-max-size", "200K", *RTN), "m.gguf"),
    "gguf Q4_0 gptq": (("--format", "gguf", "--type", "Q4_0", *GPTQ), "m.gguf"),
    "onnx int4": (("--format", "onnx", "--type", "int4", *RTN), "m"),
    "onnx int4 gptq": (("--format", "onnx", "--type", "int4", *GPTQ), "m"),
    "trtllm W4A16": (("--format", "trtllm", "--type", "W4A16", "--split-max-size", "200K", *RTN), "m"),
    "trtllm W4A16 gptq": (("--format", "trtllm", "--type", "W4A16", *GPTQ), "m"),
}
IN_A_ROW = 4
LATE = 1.1  # of the time an export takes, where the last moments are


@dataclass(slots=True)
class Told:
    """What was seen in a case. steps: in the journal after each kill. under_final_names: kills after which files were
    there.
    """

    kills: int = 0
    finished: int = 0
    resumed: int = 0
    under_final_names: int = 0
    problems: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--minutes", type=float, default=60, help="no new kills after so long")
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    parser.add_argument("--case", choices=CASES, help="this one alone, told as JSON")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    if given.case is not None:
        told = _case(given.model, given.case, given.kills, random.Random(f"{given.seed} {given.case}"), until)
        print(json.dumps(asdict(told)))
        return
    shares = [given.kills // len(CASES) + (i < given.kills % len(CASES)) for i in range(len(CASES))]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(lambda one: _apart(given, until, *one), zip(CASES, shares, strict=True)))
    print(f"{'case':22}{'kills':>7}{'resumed':>9}{'finished':>10}{'under names':>13}{'steps at kills':>18}  problems")
    for name, told in zip(CASES, found, strict=True):
        spread = f"{min(told.steps, default=0)} to {max(told.steps, default=0)}"
        row = f"{told.kills:>7}{told.resumed:>9}{told.finished:>10}{told.under_final_names:>13}{spread:>18}"
        print(f"{name:22}{row}  {'; '.join(told.problems) or 'none'}")
    sums = [sum(getattr(told, of) for told in found) for of in ("kills", "resumed", "finished", "under_final_names")]
    print(f"{'in all':22}{sums[0]:>7}{sums[1]:>9}{sums[2]:>10}{sums[3]:>13}")
    sys.exit(any(told.problems for told in found))


def _apart(given: argparse.Namespace, until: float, name: str, kills: int) -> Told:
    """One case in a process of its own, which may be forked."""
    minutes = max(0.0, until - time.monotonic()) / 60
    asked = ["--case", name, "--kills", str(kills), "--seed", str(given.seed), "--minutes", str(minutes)]
    command = [sys.executable, __file__, *asked, "--model", str(given.model)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return Told(problems=[f"the case ended with {done.returncode}"])
    told = Told(**json.loads(done.stdout.splitlines()[-1]))
    print(f"{name}: {told.kills} kills, {len(told.problems)} problems", file=sys.stderr, flush=True)
    return told


def _case(model: Path, name: str, kills: int, chance: random.Random, until: float) -> Told:
    options, target = CASES[name]
    told = Told()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        whole.mkdir()
        _export(model, options, whole / target)
        started = time.monotonic()
        _ended(_forked(model, (*options, "--force"), whole / target, Path(place) / "first"))
        took = time.monotonic() - started
        expected = _files(whole)
        folder = Path(place) / "killed"
        while told.kills < kills and time.monotonic() < until:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _round(model, options, folder / target, took, expected, chance, told)
    return told


def _round(
    model: Path, options: tuple[str, ...], target: Path, took: float, expected: dict[str, str], chance: random.Random,
    told: Told,
) -> None:  # fmt: skip
    """Kills in a row, then a run that may finish."""
    for attempt in range(chance.randint(1, IN_A_ROW) + 1):
        more = ("--resume",) if _journals(target.parent) else ()
        told.resumed += bool(more)
        log = target.parent.parent / "log"
        run = _forked(model, (*options, *more), target, log)
        last = attempt == IN_A_ROW or (attempt and chance.random() < 1 / IN_A_ROW)
        if not last:
            time.sleep(chance.uniform(0, LATE * took))
        code = _ended(run) if last else _killed(run)
        there = _files(target.parent)
        wrong = [name for name, sha256 in there.items() if expected.get(name) != sha256]
        told.problems += [f"{name} is damaged" for name in wrong]
        if code == -signal.SIGKILL:
            told.kills += 1
            told.under_final_names += bool(there)
            told.steps.append(sum(path.read_bytes().count(b"\n") - 1 for path in _journals(target.parent)))
            if there != expected or _journals(target.parent):
                continue
            code = 0  # it was tidying up: all is there, and nothing to go on with
        if code:
            told.problems.append(f"exit {code}: {log.read_text().strip().splitlines()[-3:]}")
        elif there != expected:
            told.problems.append("other files than undisturbed")
        told.finished += 1
        return


def _journals(folder: Path) -> list[Path]:
    return list(folder.glob(".*.partial/journal.jsonl"))


def _export(model: Path, options: tuple[str, ...], target: Path) -> None:
    """llmx export in this process; it returns, or raises SystemExit."""
    from llmx import cli
    from llmx.exporters import ledger

    ledger.BATCH_BYTES = 1
    given = ["llmx", "export", str(model), *options, "--effort", "fast", "--no-validate", "--threads", "1"]
    sys.argv = [*given, "-o", str(target)]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def _forked(model: Path, options: tuple[str, ...], target: Path, log: Path) -> int:
    """The process's id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        _export(model, options, target)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def _killed(child: int) -> int:
    """Its exit code, or -SIGKILL where it had not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return _ended(child)


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of what stands under a final name; the report, which tells times, is not of it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = {path.relative_to(folder): path for path in paths}
    kept = {n: p for n, p in named.items() if not any(part.startswith(".") for part in n.parts)}
    return {str(n): hashlib.sha256(p.read_bytes()).hexdigest() for n, p in kept.items() if "report" not in n.name}


if __name__ == "__main__":
    main()
