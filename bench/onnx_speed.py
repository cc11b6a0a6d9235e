"""Prefill and decode of ONNX packages against the first one's, in one process, in turns.

    python bench/onnx_speed.py PEER OURS … [--threads 2] [--prefill 128] [--decode 32] [--rounds 15] [--json rows.json]

Each round runs every package once, on plain onnxruntime (buffers bound, caches in place) and on onnxruntime-genai's
generator. Tokens a second are of the best: the shortest prefill, and for each decoded position its shortest run.
`x` is that ratio to the first package; in brackets the median over rounds of the ratio within a round: where both
agree, the rest of the machine was quiet enough.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_session
import stock
from onnx_session import RUNNERS, Times

Row = dict[str, Any]
# Seconds: the threads of the session before spin for a while, and would take a core from the next one.
PAUSE = 0.1


def measure(folders: Sequence[Path], runner: str, asked: argparse.Namespace) -> list[Times]:
    """The times of each package after one round that warms it."""
    room = asked.prefill + asked.decode + 2
    sessions = [RUNNERS[runner](folder, asked.threads, room) for folder in folders]
    prompt = [3 + 7 * index % asked.tokens for index in range(asked.prefill)]
    for session in sessions:
        session.round(prompt, asked.decode, Times())
    times = [Times() for _ in sessions]
    for number in range(asked.rounds):
        for turn in range(len(sessions)):
            index = (turn + number) % len(sessions)  # nobody is always behind the same one
            time.sleep(PAUSE)
            sessions[index].round(prompt, asked.decode, times[index])
    return times


def rows(folders: Sequence[Path], runner: str, asked: argparse.Namespace) -> Iterator[Row]:
    """A row for each package."""
    times = measure(folders, runner, asked)
    first = times[0]
    for folder, found in zip(folders, times, strict=True):
        prefills = np.asarray(first.prefill) / np.asarray(found.prefill)
        decodes = np.sum(first.decode, axis=1) / np.sum(found.decode, axis=1)
        yield {
            "package": "/".join(folder.resolve().parts[-2:]),
            "runtime": runner,
            "threads": asked.threads,
            "prefill_per_second": asked.prefill / found.best_prefill,
            "prefill_ratio": first.best_prefill / found.best_prefill,
            "prefill_median_ratio": float(np.median(prefills)),
            "decode_per_second": asked.decode / found.best_decode,
            "decode_ratio": first.best_decode / found.best_decode,
            "decode_median_ratio": float(np.median(decodes)),
        }


def line(row: Row) -> str:
    cells = [
        f"{row[f'{part}_per_second']:9.1f} x{row[f'{part}_ratio']:5.2f} ({row[f'{part}_median_ratio']:5.2f})"
        for part in ("prefill", "decode")
    ]
    return f"{row['runtime']:18} {row['package'][-38:]:38} {'  '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="folders; the first is what the others compare with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=500, help="ids of the made-up prompt are below this one")
    parser.add_argument("--runtimes", default=",".join(RUNNERS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print(f"{stock.machine()}; onnxruntime {onnx_session.onnxruntime.__version__}, {asked.threads} threads")
    print(f"{'runtime':18} {'package':38} {'prefill/s':>9} {'x first':>14}  {'decode/s':>9} {'x first':>14}")
    found = []
    for runner in asked.runtimes.split(","):
        for row in rows(asked.packages, runner, asked):
            found.append(row)
            print(line(row), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
