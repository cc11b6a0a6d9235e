"""A hostile file as data: how it is made, the command that meets it, and the words that name the offence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
CORPUS = Path(__file__).parents[1] / "corpus"
INTEGRITY = 6
Command = tuple[object, ...]
Content = bytes | str | None | Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Hostile:
    """make: writes it into an empty folder and gives the command's arguments. says: words of the message."""

    name: str
    make: Callable[[Path], Command]
    says: str
    exit_code: int = INTEGRITY


def inspected(file: str, data: bytes) -> Callable[[Path], Command]:
    """A file of those bytes, for `llmx inspect`."""

    def make(folder: Path) -> Command:
        (folder / file).write_bytes(data)
        return "inspect", folder / file

    return make


def example(folder: Path, files: Mapping[str, Content]) -> Path:
    """The example's checkpoint with other files: their bytes, text, None for none, or a function of the sound JSON."""
    for path in EXAMPLE.iterdir():
        if path.name not in files:
            (folder / path.name).symlink_to(path)
    for name, content in files.items():
        data = json.dumps(content(json.loads((EXAMPLE / name).read_text()))) if callable(content) else content
        if data is not None:
            (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def planned(**files: Content) -> Callable[[Path], Command]:
    """The example's checkpoint with other files, for `llmx plan`. A dot of a name is written as two underlines."""
    named = {name.replace("__", "."): content for name, content in files.items()}
    return lambda folder: ("plan", example(folder, named), "--bits", 8)


def with_values(**values: object) -> Callable[[dict[str, Any]], object]:
    """The sound JSON object with other values; ... leaves one out."""
    return lambda sound: {key: value for key, value in {**sound, **values}.items() if value is not ...}


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """The sound JSON object, changed in its place."""

    def run(sound: dict[str, Any]) -> object:
        change(sound)
        return sound

    return run


def rows(group: str, table: Mapping[str, tuple[Callable[[Path], Command], str]]) -> tuple[Hostile, ...]:
    """A table's rows."""
    return tuple(Hostile(f"{group}: {name}", make, says) for name, (make, says) in table.items())
