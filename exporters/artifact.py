"""Writing files so that an output appears whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import ResourceError, UsageError

PARTIAL = ".partial"
FAILED = ".failed"
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class ArtifactFile:
    """One written file."""

    path: Path
    nbytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.path.name, "bytes": self.nbytes, "sha256": self.sha256}


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_targets(targets: list[Path], sources: tuple[Path, ...], force: bool) -> None:
    """Refuse targets that exist or that lie on the checkpoint itself.

    Raises: UsageError naming every offence.
    """
    read = {path.resolve() for path in sources}
    on_source = [f"{path} is part of the checkpoint being read" for path in targets if path.resolve() in read]
    if on_source:
        raise UsageError("the target would overwrite its source", problems=on_source, fix="choose another -o")
    folders = [f"{path} is a folder" for path in targets if path.is_dir()]
    if folders:
        raise UsageError("the target is a folder", problems=folders, fix="choose another -o")
    existing = [str(path) for path in targets if path.exists() or path.is_symlink()]
    if existing and not force:
        raise UsageError("the target exists already", problems=existing, fix="add --force, or choose another -o")


def check_room(folder: Path, nbytes: int) -> None:
    """Raises: ResourceError when the disk under `folder` has less room than `nbytes`."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"the artifact needs {nbytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
            where=folder,
            fix="free some room, choose another -o, or a smaller type",
        )


def check_folder(targets: list[Path]) -> None:
    """Refuse a folder of an artifact's own, or files in it, that are symbolic links or no folder.

    Written through a link, files would appear where nobody looked.
    Raises: UsageError naming every offence.
    """
    folders = [targets[0].parent, failed_names(targets, is_folder=True)[0].parent]
    links = [str(path) for path in (*folders, *targets) if path.is_symlink()]
    if links:
        raise UsageError("the target is a symbolic link", problems=links, fix="choose another -o, or remove the link")
    files = [str(path) for path in folders if path.exists() and not path.is_dir()]
    if files:
        raise UsageError("the target is a folder, and a file is in its place", problems=files, fix="choose another -o")


def failed_names(targets: list[Path], *, is_folder: bool) -> list[Path]:
    """What the files of an artifact that did not pass are called. is_folder: its folder has the other name instead."""
    if not is_folder:
        return [target.with_name(target.name + FAILED) for target in targets]
    # "here" and "above" have no name that something can be put behind, so that what they stand for is asked.
    folder = targets[0].parent if targets[0].parent.name not in ("", "..") else targets[0].parent.resolve()
    return [folder.with_name(folder.name + FAILED) / target.name for target in targets]


def make_folder(folder: Path) -> None:
    """Create the target folder. Raises: UsageError when it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            "the target folder cannot be made", where=f"{folder}: {error.strerror}", fix="choose another -o"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UsageError("the target folder cannot be written to", where=folder, fix="choose another -o")


@contextlib.contextmanager
def partial_files(targets: list[Path], workplace: Path | None = None) -> Iterator[list[Path]]:
    """Paths with the targets' names in a temporary folder beside workplace, removed with all that is left in it.

    workplace: the first target, or the folder that all of them become.

    Call `publish` inside the block to move the files to the final names.
    """
    workplace = workplace or targets[0]
    folder = workplace.parent / f".{workplace.name}{PARTIAL}-{os.getpid()}"
    folder.mkdir()
    try:
        yield [folder / target.name for target in targets]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(partial: list[Path], targets: list[Path]) -> None:
    """Move finished files to their final names. The first file goes last: a set is complete once it is there."""
    for path in partial:
        sync(path)
    for path, target in reversed(list(zip(partial, targets, strict=True))):
        path.replace(target)
    for folder in {target.parent for target in targets}:
        sync(folder)


def publish_folder(partial: list[Path], targets: list[Path], replaced: Sequence[Path] = ()) -> None:
    """Make finished files, which are all that is in their folder, the folder of the targets.

    Where there is none yet, it appears with all its files at once. Else the file to load is the first to go and the
    last to come, so that no reader meets a mixture of the old artifact and the new one. replaced: files of the old one.
    """
    folder = targets[0].parent
    if not folder.exists():
        for path in (*partial, partial[0].parent):
            sync(path)
        partial[0].parent.rename(folder)
        sync(folder.parent)
        return
    targets[0].unlink(missing_ok=True)
    for path in replaced:
        path.unlink(missing_ok=True)
    publish(partial, targets)


def set_aside(path: Path, nbytes: int) -> None:
    """Make a file as long as that, with room for it on the disk: a memory map that finds none ends the process.

    What is in the file stays. Raises: OSError for a full disk.
    """
    with path.open("ab") as stream:
        if nbytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, nbytes)
        elif path.stat().st_size < nbytes:
            stream.truncate(nbytes)


def write_text(path: Path, content: str) -> None:
    """Write a small text file, whole or not at all."""
    with partial_files([path]) as [partial]:
        partial.write_text(content, encoding="utf-8")
        publish([partial], [path])


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
