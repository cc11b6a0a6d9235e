"""Split sets: one model in several GGUF files, PREFIX-00001-of-00003.gguf and so on.

The first shard holds all metadata. Each holds three keys of its own: split.no (u16, from 0), split.count (u16) and
split.tensors.count (i32, of the whole set). Source: llama.cpp's gguf-split and its loader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmx.errors import IntegrityError, UsageError
from llmx.formats.gguf_reader import GgufFile, GgufTensor, read_gguf
from llmx.formats.gguf_values import (
    DEFAULT_ALIGNMENT,
    SPLIT_COUNT_KEY,
    SPLIT_NUMBER_KEY,
    SPLIT_TENSORS_KEY,
    Value,
    i32,
    u16,
)
from llmx.formats.gguf_writer import TensorInfo, padded

MAX_SHARDS = 65535  # split.count is a u16
MAX_LISTED = 20
SPLIT_TYPES = {SPLIT_NUMBER_KEY: "u16", SPLIT_COUNT_KEY: "u16", SPLIT_TENSORS_KEY: "i32"}
SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
SIZE = re.compile(r"\s*(?P<count>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?I?)B?\s*")
SIZE_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_size(size: str) -> int:
    """Returns bytes from "2GB", "500M", "1.5G" (powers of 1000), "1GiB" (of 1024) or a plain number.

    Raises: UsageError when it is none of these, or less than one byte.
    """
    match = SIZE.fullmatch(size.upper())
    unit = SIZE_UNITS.get(match["unit"]) if match else None
    if match is None or unit is None or (count := int(float(match["count"]) * unit)) < 1:
        raise UsageError(f"{size!r} is not a size", fix="write it like 2GB, 500M, 1.5G or 1GiB")
    return count


def split(tensors: Sequence[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Returns the tensors of each shard, in order, so that no shard's padded data exceeds `max_bytes`.

    Headers do not count, as in llama.cpp's gguf-split, which groups the same way.

    Raises: UsageError when a single tensor is larger than that, or the shards would be more than 65535.
    """
    sizes = [padded(tensor.nbytes, DEFAULT_ALIGNMENT) for tensor in tensors]
    too_large = [f"{t.name}: {size} bytes" for t, size in zip(tensors, sizes, strict=True) if size > max_bytes]
    if too_large:
        fix = f"allow at least {max(sizes)} bytes a shard"
        raise UsageError(f"tensors are larger than a shard of {max_bytes} bytes", fix=fix, problems=too_large)
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        if filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) > MAX_SHARDS:
        raise UsageError(f"{len(shards)} shards; a GGUF set has at most {MAX_SHARDS}", fix="allow larger shards")
    return shards


def shard_metadata(
    metadata: Mapping[str, Value], shards: Sequence[Sequence[TensorInfo]], number: int
) -> dict[str, Value]:
    """Returns the metadata of shard `number` (from 0): all of it in the first, the split's own keys in every one."""
    return {
        **(metadata if number == 0 else {}),
        SPLIT_NUMBER_KEY: u16(number),
        SPLIT_COUNT_KEY: u16(len(shards)),
        SPLIT_TENSORS_KEY: i32(sum(len(shard) for shard in shards)),
    }


def shard_name(prefix: str, number: int, count: int) -> str:
    """Returns the file name of shard `number` (from 0): PREFIX-00001-of-00003.gguf."""
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def read_gguf_set(path: str | Path) -> GgufFile:
    """Returns the file, or the whole set when `path` is any one of its shards; then each tensor knows its shard.

    Raises: IntegrityError when shards are missing, renamed, exchanged, doubled or contradict each other (all listed);
    and what read_gguf raises.
    """
    path = Path(path)
    opened = read_gguf(path)
    # A merged file keeps split.count as 0.
    count = opened.metadata.get(SPLIT_COUNT_KEY, 0)
    named = SHARD_NAME.fullmatch(path.name)
    if count in (0, 1) and (named is None or int(named["count"]) <= 1):
        return opened
    if named is None or not isinstance(count, int) or not 0 < int(named["number"]) <= int(named["count"]) == count:
        said = f"{SPLIT_COUNT_KEY} is {count}"
        raise IntegrityError(f"{said}, which the file's name contradicts", where=path, fix="restore the shard's name")
    paths = tuple(path.with_name(shard_name(named["prefix"], number, count)) for number in range(count))
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        listed = missing[:MAX_LISTED] + [f"and {len(missing) - MAX_LISTED} more"] * (len(missing) > MAX_LISTED)
        raise IntegrityError(f"{len(missing)} of {count} shards are missing", where=path.parent, problems=listed)
    return _join(tuple(read_gguf(each) for each in paths))


def _join(shards: tuple[GgufFile, ...]) -> GgufFile:
    first = shards[0]
    tensors: dict[str, GgufTensor] = {}
    problems = _contradictions(shards)
    for number, shard in enumerate(shards):
        doubled = tensors.keys() & shard.tensors.keys()
        problems += [f"{shard.paths[0].name}: tensor {name!r} is in another shard too" for name in sorted(doubled)]
        tensors.update({name: replace(tensor, shard=number) for name, tensor in shard.tensors.items()})
    expected = first.metadata.get(SPLIT_TENSORS_KEY)
    if len(tensors) != expected:
        problems.append(f"{SPLIT_TENSORS_KEY} is {expected}, but the shards hold {len(tensors)} tensors")
    if problems:
        raise IntegrityError("the shards do not make one model", where=first.paths[0], problems=problems)
    return replace(
        first,
        paths=tuple(shard.paths[0] for shard in shards),
        tensors=tensors,
        trailing_bytes=sum(shard.trailing_bytes for shard in shards),
        maps=tuple(shard.maps[0] for shard in shards),
    )


def _contradictions(shards: tuple[GgufFile, ...]) -> list[str]:
    first, problems = shards[0], []
    for number, shard in enumerate(shards):
        name = shard.paths[0].name
        if shard.metadata.get(SPLIT_NUMBER_KEY) != number:
            found = shard.metadata.get(SPLIT_NUMBER_KEY)
            problems.append(f"{name}: {SPLIT_NUMBER_KEY} is {found} instead of {number}: exchanged or doubled")
        for key, value in shard.metadata.items():
            if key in SPLIT_TYPES and shard.types[key] != SPLIT_TYPES[key]:
                problems.append(f"{name}: {key} is {shard.types[key]} instead of {SPLIT_TYPES[key]}")
            elif key != SPLIT_NUMBER_KEY and (key not in first.metadata or first.metadata[key] != value):
                problems.append(f"{name}: {key} contradicts the first shard")
    return problems
