"""What a second thread brings to an export, and whether reading, computing and writing lie over each other.

    python bench/threads.py [--type Q4_K_M] [--rounds 5] [--layers 6] [--folder FOLDER]

Of one random checkpoint, every round, on one and on two threads:
    read      the checkpoint's rows as float32, as the encoders take them (from the page cache, if there is room)
    compute   the encoders alone, on rows that are in memory
    write     the same bytes written to a file, hashed and synced
    export    all of it, as `llmx export` writes a GGUF file, with its journal
Figures are medians over the rounds. `steal` is the share of the machine's CPU time that went to others while we ran:
half of two cores is left to them by one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import large
import numpy as np
import psutil
import stock

from llmx import api
from llmx.exporters import gguf, journal
from llmx.exporters.gguf_tensors import read_rows, release_rows
from llmx.quant.grid import encode

HIDDEN, INTERMEDIATE, HEADS, GROUPED = 2048, 5632, 32, 4

Chunk = tuple[Any, str, int, int]  # entry, type, first row, last


def plan(folder: Path, type_name: str, threads: int) -> gguf.GgufExport:
    request = api.ExportRequest(str(folder), type_name=type_name, method="rtn", threads=threads)
    return api.plan(request).exporter.export  # type: ignore[attr-defined]


def chunks_of(export: gguf.GgufExport) -> list[Chunk]:
    """What the exporter's workers are given, one after another."""
    steps = zip(export.entries, export.plan.steps, strict=True)
    return [(e, s.type_name, *span) for e, s in steps for span in gguf._chunks(e)]


def reading(export: gguf.GgufExport, threads: int) -> None:
    def read(chunk: Chunk) -> None:
        entry, _, start, stop = chunk
        read_rows(export.model, entry, start, stop)
        release_rows(export.model, entry, start, stop)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, chunks_of(export)))


def computing(held: Sequence[tuple[str, np.ndarray]], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda item: encode(item[0], item[1], None, effort="balanced").nbytes, held))


def writing(source: Path, target: Path) -> None:
    digest, data = hashlib.sha256(), memoryview(source.read_bytes())
    started = time.monotonic()
    with target.open("wb") as stream:
        for start in range(0, len(data), 1 << 20):
            stream.write(data[start : start + (1 << 20)])
            digest.update(data[start : start + (1 << 20)])
        stream.flush()
        os.fsync(stream.fileno())
    writing.seconds = time.monotonic() - started  # type: ignore[attr-defined]


def exporting(export: gguf.GgufExport, folder: Path) -> None:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    gguf.write(export, [work / "out.gguf"], None, journal.start(work, {}))


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds of wall, share of the machine's CPU time that others had meanwhile)."""
    os.sync()
    before, own, started = psutil.cpu_times(), psutil.Process().cpu_times(), time.monotonic()
    work()
    wall, after, ours = time.monotonic() - started, psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(after) - sum(before) - (after.idle - before.idle) - (after.iowait - before.iowait)
    mine = ours.user + ours.system - own.user - own.system
    return wall, max(0.0, busy - mine) / (wall * (os.cpu_count() or 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="make the checkpoint here and keep it")
    options = parser.parse_args()
    print(stock.machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "checkpoint"
        large.SHAPES["threads"] = (HIDDEN, INTERMEDIATE, options.layers, HEADS, GROUPED)
        large.make("threads", folder)
        found = rounds(folder, Path(scratch), options.type, options.rounds)
    told(found)


def rounds(folder: Path, scratch: Path, type_name: str, count: int) -> dict[str, list[tuple[float, float]]]:
    """name -> (seconds, steal) of every round."""
    exports = {threads: plan(folder, type_name, threads) for threads in (1, 2)}
    one = exports[1]
    held = [(t, read_rows(one.model, e, start, stop)) for e, t, start, stop in chunks_of(one)]
    exporting(replace(one), scratch)  # compiles, and fills the page cache
    copy = scratch / "copy.gguf"
    os.link(scratch / "work" / "out.gguf", copy)
    work: dict[str, Callable[[], None]] = {"write": lambda: writing(copy, scratch / "written")}
    for threads, export in exports.items():
        work[f"read {threads}"] = lambda export=export, threads=threads: reading(export, threads)
        work[f"compute {threads}"] = lambda threads=threads: computing(held, threads)
        work[f"export {threads}"] = lambda export=export: exporting(export, scratch)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(count):
        for name in work if number % 2 else reversed(work):
            (scratch / "work" / "out.gguf").unlink(missing_ok=True)
            wall, steal = timed(work[name])
            found[name].append((writing.seconds if name == "write" else wall, steal))  # type: ignore[attr-defined]
    return found


def told(found: dict[str, list[tuple[float, float]]]) -> None:
    middle = {name: statistics.median(wall for wall, _ in runs) for name, runs in found.items()}
    for name, runs in found.items():
        walls = " ".join(f"{wall:.2f}" for wall, _ in runs)
        print(f"{name:10} {middle[name]:6.2f} s   {walls}   steal {max(steal for _, steal in runs):.0%} at most")
    for what in ("read", "compute", "export"):
        print(f"{what}: 2 threads {middle[f'{what} 1'] / middle[f'{what} 2']:.2f} times as fast as 1")
    for threads in (1, 2):
        parts = {name: middle[name] for name in (f"read {threads}", f"compute {threads}", "write")}
        longest = max(parts, key=lambda name: parts[name])
        print(f"export {threads}: {middle[f'export {threads}'] / parts[longest]:.2f} times {longest} alone")


if __name__ == "__main__":
    main()
