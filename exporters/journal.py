"""What an export has done so far, a line of JSON a step, so that one that was stopped can be gone on with.

    journal.jsonl   {"journal": 1, "key": {…}}                          what is exported: all that shapes the bytes
                    {"step": "solved layers.0.q.weight", "facts": {…}}  a step that is done
                    …

A line stands for bytes that are on the disk: they are synced before it is written, and it is synced in its turn. What
follows the last whole line was cut off by whatever stopped the export, and is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmx.errors import UsageError
from llmx.exporters.artifact import sync

NAME = "journal.jsonl"
VERSION = 1


class Journal:
    """An open journal. Not to be shared between processes; see exporters/workplace.py for the lock."""

    __slots__ = ("_done", "_path", "_waiting", "went_on")

    def __init__(self, path: Path, done: dict[str, dict[str, Any]], went_on: bool) -> None:
        """went_on: whether steps of an earlier run may be in it."""
        self._path, self._done, self.went_on = path, done, went_on
        self._waiting: dict[str, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._done)

    def facts(self, step: str) -> dict[str, Any] | None:
        """What was recorded of a step; None where it is not done."""
        return self._done.get(step)

    def note(self, step: str, facts: Mapping[str, Any]) -> None:
        """Record a step with the next one: for what alone is not worth keeping an export's folder."""
        self._waiting[step] = facts

    def record(self, steps: Mapping[str, Mapping[str, Any]], files: Iterable[Path] = ()) -> None:
        """Note steps that are done, with plain data about each, once the files that hold their bytes are synced."""
        for path in files:
            sync(path)
        steps, self._waiting = {**self._waiting, **steps}, {}
        lines = [json.dumps({"step": step, "facts": facts}) for step, facts in steps.items()]
        with self._path.open("ab") as stream:
            stream.write("".join(f"{line}\n" for line in lines).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._done |= {step: json.loads(json.dumps(facts)) for step, facts in steps.items()}


def start(folder: Path, key: Mapping[str, Any]) -> Journal:
    """An empty journal in the folder. key: plain data, all that shapes the bytes of the export."""
    path = folder / NAME
    path.write_bytes(json.dumps({"journal": VERSION, "key": key}).encode() + b"\n")
    sync(path)
    sync(folder)
    return Journal(path, {}, went_on=False)


def go_on(folder: Path, key: Mapping[str, Any]) -> Journal | None:
    """The journal of an export that was stopped; None where none was, or before its first line was whole.

    Raises: UsageError where that export would have made other bytes.
    """
    path = folder / NAME
    try:
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        head, *lines = [json.loads(line) for line in whole.split(b"\n")]
        kept = head["key"] if head["journal"] == VERSION else None
        done = {line["step"]: line["facts"] for line in lines}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    wanted = json.loads(json.dumps(key))
    if kept != wanted:
        kept = kept if isinstance(kept, dict) else {}
        names = sorted(name for name in kept.keys() | wanted if kept.get(name) != wanted.get(name))
        raise UsageError(
            "the export that was stopped would have made other bytes",
            problems=[f"{name} differs" for name in names],
            where=folder,
            fix="give the same model and options as then, or leave out --resume to start anew",
        )
    with path.open("r+b") as stream:  # a line behind a cut one would be lost with it
        stream.truncate(len(whole) + 1)
    return Journal(path, done, went_on=True)


def peek(folder: Path, step: str) -> dict[str, Any] | None:
    """What the journal of an export that was stopped says of a step; None where it says nothing. Changes nothing."""
    try:
        whole, _, _ = (folder / NAME).read_bytes().rpartition(b"\n")
        done = {line["step"]: line["facts"] for line in map(json.loads, whole.split(b"\n")[1:])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return done.get(step)
