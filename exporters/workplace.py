"""Where the files of an export are written before they get their names: a folder beside them, one export's alone.

    .NAME.partial/files/…         the artifact's files, moved to their names at the end
    .NAME.partial/journal.jsonl   the steps that are done, see journal.py
    .NAME.partial/kept/…          the bytes of those steps that are not in the files yet

The folder itself is locked (flock), which ends with the process however it ends. An export that fails takes its folder
with it; one that is stopped, or that ran out of disk or memory, leaves it where steps are done: --resume goes on there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import ResourceError, UsageError
from llmx.exporters import journal
from llmx.exporters.journal import Journal

PARTIAL = ".partial"
FILES, KEPT = "files", "kept"
# What stops an export that nothing is wrong with: it may go on once there is room, or time.
STOPS = (KeyboardInterrupt, SystemExit, ResourceError, OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class Workplace:
    """An export's own folder. files: the paths of the targets in it, in their order. kept: for bytes of steps."""

    files: tuple[Path, ...]
    kept: Path
    journal: Journal


def folder_of(place: Path) -> Path:
    """The folder that an export works in. place: its first target, or the folder that all of them become."""
    return place.with_name(f".{place.name}{PARTIAL}")


@contextlib.contextmanager
def workplace(
    targets: Sequence[Path], place: Path, key: Mapping[str, Any], *, resume: bool = False
) -> Iterator[Workplace]:
    """Work on the targets alone. key: what shapes the bytes. resume: go on with what an export that was stopped left,
    if anything.

    Raises: UsageError where another export works on the same, or where the one that was stopped was another.
    """
    folder = folder_of(place)
    with _locked(folder):
        made = journal.go_on(folder, key) if resume else None
        if made is None:
            made = _anew(folder, key)
        for name in (FILES, KEPT):
            (folder / name).mkdir(exist_ok=True)
        try:
            yield Workplace(tuple(folder / FILES / target.name for target in targets), folder / KEPT, made)
        except STOPS as stop:
            if not len(made):
                _remove(folder)
            else:
                stop.add_note(f"{len(made)} steps of it are kept in {folder}: the same command with --resume goes on")
            raise
        except BaseException:
            _remove(folder)
            raise
        _remove(folder)


def _anew(folder: Path, key: Mapping[str, Any]) -> Journal:
    """An empty journal in an empty folder: what an export that was stopped left there goes."""
    (folder / journal.NAME).unlink(missing_ok=True)  # first: what is half removed must not be gone on with
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return journal.start(folder, key)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / journal.NAME).unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, with its lock. Raises: UsageError where somebody has it."""
    while True:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise UsageError("the folder that the export would work in is a symbolic link", where=folder)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the export that had it may have finished and removed the folder.
            if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
                yield
                return
        except BlockingIOError as error:
            raise UsageError(
                "another export is writing the same artifact", where=folder, fix="wait for it, or choose another -o"
            ) from error
        finally:
            os.close(descriptor)
