"""Manifests read back: whoever wrote the file, what is admitted here has the keys and the bounds that it should."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, UsageError
from llmx.exporters.manifest import SCHEMA
from llmx.formats.json_text import read_object
from llmx.formats.safetensors import shorten

_NAME = re.compile(r"[^/\\\0]+")
_HASH = re.compile(r"[0-9a-f]{64}")
Problem = str


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A file's name, size and sha256 in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class HashedTensor:
    """A tensor, where its bytes stand in which file, and their sha256.

    file, offset: None where a builder was given these bytes and the artifact does not say where it has them.
    """

    name: str
    file: str | None
    offset: int | None
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """path: where it was read. told: the whole, as plain data."""

    path: Path
    files: tuple[HashedFile, ...]
    tensors: tuple[HashedTensor, ...]
    source_files: tuple[HashedFile, ...]
    told: Mapping[str, Any]


def read_manifest(path: Path) -> Manifest:
    """The manifest in a JSON file.

    Raises: UsageError when there is none, IntegrityError for a file that is no manifest of this version, names files
    outside its folder, or places tensors outside their files, every problem at once.
    """
    if not path.is_file():
        raise UsageError("there is no such manifest", where=path)
    told = read_object(path)
    if told.get("schema") != SCHEMA:
        fix = f"this llmx reads {SCHEMA}"
        raise IntegrityError(f"this is no manifest: its schema is {told.get('schema')!r}", where=path, fix=fix)
    problems = [f"{key}: {words}" for key, (good, words) in _KEYS.items() if not good(_reach(told, key))]
    if problems:
        raise IntegrityError("the manifest is broken", where=path, problems=problems)
    files = tuple(HashedFile(f["name"], f["bytes"], f["sha256"]) for f in told["files"])
    tensors = tuple(HashedTensor(t["name"], t["file"], t["offset"], t["bytes"], t["sha256"]) for t in told["tensors"])
    source = tuple(HashedFile(f["name"], f["bytes"], f["sha256"]) for f in told["source"]["files"])
    problems = _contradictions(files, tensors)
    if problems:
        raise IntegrityError("the manifest contradicts itself", where=path, problems=shorten(problems))
    return Manifest(path, files, tensors, source, told)


def _contradictions(files: tuple[HashedFile, ...], tensors: tuple[HashedTensor, ...]) -> list[str]:
    sizes = {file.name: file.nbytes for file in files}
    problems = [f"{file.name!r} is not the plain name of a file" for file in files if not _NAME.fullmatch(file.name)]
    problems += [f"{file.name!r} stands there twice" for file in files if sizes[file.name] != file.nbytes]
    if len(sizes) < len(files) or len({tensor.name for tensor in tensors}) < len(tensors):
        problems.append("a name stands there twice")
    for tensor in tensors:
        if tensor.file is None or tensor.offset is None:
            continue
        if tensor.file not in sizes:
            problems.append(f"{tensor.name}: there is no file {tensor.file!r}")
        elif tensor.offset + tensor.nbytes > sizes[tensor.file]:
            problems.append(f"{tensor.name} ends behind the end of {tensor.file}")
    return problems


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _hash(value: object) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _hashed(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("name"), str)
        and _count(value.get("bytes"))
        and _hash(value.get("sha256"))
    )


def _hashed_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_hashed, value))


def _tensor_list(value: object) -> bool:
    return _hashed_list(value) and all(map(_placed, value))  # type: ignore[arg-type]


def _placed(tensor: Mapping[str, object]) -> bool:
    place = (tensor.get("file", _ABSENT), tensor.get("offset", _ABSENT))
    return place == (None, None) or (isinstance(place[0], str) and _count(place[1]))


def _object(value: object) -> bool:
    return isinstance(value, Mapping)


def _calibration(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and isinstance(value.get("text"), str)
        and isinstance(value.get("device"), str)
        and _hash(value.get("sha256"))
        and _count(value.get("tokens"))
    )


def _importance(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping) and isinstance(value.get("name"), str) and _hash(value.get("sha256"))
    )


def _budget(value: object) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and value.keys() <= {"bytes", "bits_per_weight"}
        and len(value) == 1
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value.values())
    )


_KEYS: dict[str, tuple[Callable[[object], bool], str]] = {
    "format": (lambda value: isinstance(value, str), "the name of a format"),
    "files": (_hashed_list, "a list of files with name, bytes and sha256"),
    "tensors": (_tensor_list, "a list of tensors with name, bytes, sha256, file and offset"),
    "source.name": (lambda value: isinstance(value, str), "what the checkpoint is called"),
    "source.revision": (lambda value: value is None or isinstance(value, str), "a revision, or null"),
    "source.files": (_hashed_list, "a list of files with name, bytes and sha256"),
    "libraries": (lambda v: isinstance(v, Mapping) and all(isinstance(x, str) for x in v.values()), "versions"),
    "tool.version": (lambda value: isinstance(value, str), "a version"),
    "recipe": (_object, "a recipe"),
    "calibration": (_calibration, "null, or text, sha256, tokens, length and device"),
    "importance": (_importance, "null, or name and sha256"),
    "options.tensor_types": (
        lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
        "a list of REGEX=TYPE",
    ),
    "options.split_max_bytes": (lambda value: value is None or _count(value), "bytes, or null"),
    "options.budget": (_budget, "null, or bytes or bits_per_weight"),
    "options.builder": (lambda value: value is _ABSENT or isinstance(value, str), "the name of a builder"),
    **dict.fromkeys(
        ("options.max_batch", "options.max_input", "options.max_length", "options.profiles"),
        (lambda value: value is _ABSENT or _count(value), "a whole number"),
    ),
    **dict.fromkeys(
        ("options.refit", "options.portable", "options.wide_head"),
        (lambda value: value is _ABSENT or value is None or isinstance(value, bool), "true or false"),
    ),
    "options.optimization_level": (
        lambda value: value is _ABSENT or value is None or _count(value),
        "a whole number, or null",
    ),
    "options.dialect": (lambda value: value is _ABSENT or isinstance(value, str), "the name of a dialect"),
    "options.layout": (lambda value: value is _ABSENT or isinstance(value, str), "the name of a layout"),
    **dict.fromkeys(
        ("options.tp", "options.pp"),
        (lambda value: value is _ABSENT or value is None or _count(value), "a whole number, or null"),
    ),
    "options.kv_cache": (
        lambda value: value is _ABSENT or value is None or isinstance(value, str),
        "the name of a type, or null",
    ),
}
"""Key, with a dot between an object and its key -> (whether a value is good, what is expected)."""


def _reach(told: Mapping[str, Any], key: str) -> object:
    value: object = told
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


_ABSENT = object()
