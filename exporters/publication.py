"""Where an export that was killed while its files got their names is taken up again.

    journal: "publishing" {name: sha256} ── files/NAME becomes NAME, one after another, the first last

Killed there, some files have their names already, whole. With --resume they are taken back to where they were made,
each if it is still what was put there, and the export ends as if nothing had been moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmx.exporters import journal
from llmx.exporters.artifact import file_sha256
from llmx.exporters.journal import Journal
from llmx.exporters.workplace import folder_of

_STEP = "publishing"


def announce(notes: Journal, partial: Sequence[Path], targets: Sequence[Path]) -> None:
    """Note that these files are about to become those."""
    digests = {target.name: file_sha256(path) for path, target in zip(partial, targets, strict=True)}
    notes.record({_STEP: digests}, [*partial, partial[0].parent])


def moved(place: Path, targets: Sequence[Path]) -> set[Path]:
    """Those of the targets that an export which was killed had put there. place: what its folder is named after."""
    digests = journal.peek(folder_of(place), _STEP) or {}
    there = [target for target in targets if target.name in digests and target.is_file() and not target.is_symlink()]
    return {target for target in there if file_sha256(target) == digests[target.name]}


def take_back(place: Path, partial: Sequence[Path], targets: Sequence[Path]) -> None:
    """Move those to where they were made."""
    there = moved(place, targets)
    for path, target in zip(partial, targets, strict=True):
        if target in there and not path.exists():
            target.replace(path)
