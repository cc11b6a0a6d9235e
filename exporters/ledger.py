"""Which tensors are in the files of an export that is being written, so that one that was stopped goes on behind them.

    tensor's bytes ── file ── fsync ── journal: "written NAME" {"file", "offset", "nbytes", "sha256"}

Syncing takes a while, so tensors are noted some at a time. What a journal says of a file is read back before it is
believed: the bytes of every noted tensor have the sha256 that they had.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from llmx.errors import IntegrityError
from llmx.exporters.journal import Journal

# Bytes and time after which what is written is synced and noted: all that has to be written again after a stop.
BATCH_BYTES = 256 << 20
BATCH_SECONDS = 10.0
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes are: the number of the file among those that hold tensors, and where in it."""

    file: int
    offset: int
    nbytes: int


class Ledger:
    """The notes of one set of files. For one thread. journal: None keeps none, and knows none."""

    __slots__ = ("_bytes", "_journal", "_paths", "_since", "_streams", "_waiting")

    def __init__(self, journal: Journal | None, paths: Sequence[Path], streams: Sequence[BinaryIO]) -> None:
        self._journal, self._paths, self._streams = journal, paths, streams
        self._waiting: dict[str, dict[str, object]] = {}
        self._bytes, self._since = 0, time.monotonic()

    def known(self, name: str, place: Place) -> str | None:
        """The sha256 of a tensor that an earlier run wrote to this place; None where none did.

        Raises: IntegrityError where other bytes are there now.
        """
        facts = None if self._journal is None else self._journal.facts(_step(name))
        if facts is None or {**asdict(place), "sha256": facts["sha256"]} != facts:
            return None
        if sha256_of(self._streams[place.file], place.offset, place.nbytes) != facts["sha256"]:
            raise IntegrityError(
                f"the bytes that were written of {name} have changed",
                where=self._paths[place.file],
                fix="leave out --resume to start anew",
            )
        return facts["sha256"]

    def done(self, name: str, place: Place, sha256: str) -> None:
        """A tensor's bytes were all given to its stream."""
        self._waiting[_step(name)] = {**asdict(place), "sha256": sha256}
        self._bytes += place.nbytes
        if self._bytes >= BATCH_BYTES or time.monotonic() - self._since >= BATCH_SECONDS:
            self.note()

    def note(self) -> None:
        """Sync what is written, and note it."""
        if self._journal is not None and self._waiting:
            for stream in self._streams:
                stream.flush()
            folders = {path.parent for path in self._paths}  # a file is there once its folder says so
            self._journal.record(self._waiting, [*self._paths, *folders])
        self._waiting = {}
        self._bytes, self._since = 0, time.monotonic()


@contextlib.contextmanager
def ledger(
    paths: Sequence[Path], sizes: Sequence[int], journal: Journal | None
) -> Iterator[tuple[Ledger, Sequence[BinaryIO]]]:
    """Files of these sizes, open for writing and reading, with their ledger: those that a stopped run left, else new
    ones. What is written is noted at the end, unless that comes early."""
    with contextlib.ExitStack() as stack:
        went_on = journal is not None and journal.went_on
        streams = [stack.enter_context(path.open("r+b" if went_on and path.exists() else "w+b")) for path in paths]
        for stream, size in zip(streams, sizes, strict=True):
            stream.truncate(size)
        made = Ledger(journal, paths, streams)
        yield made, streams
        made.note()


def sha256_of(stream: BinaryIO, offset: int, nbytes: int) -> str:
    """The sha256 of these bytes, read back."""
    stream.seek(offset)
    digest, left = hashlib.sha256(), nbytes
    while left and (data := stream.read(min(_READ_BYTES, left))):
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()


def _step(name: str) -> str:
    """What a journal calls it."""
    return f"written {name}"
