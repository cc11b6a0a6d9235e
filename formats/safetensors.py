"""safetensors files: a bounded reader, and a streaming writer.

    0        8                8+n                              end of file
    ├────────┼────────────────┼────────────────────────────────┤
    │ n: u64 │ header: JSON   │ tensors, one after another      │
    └────────┴────────────────┴────────────────────────────────┘
      little    {"name": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [begin, end]}, …,
      endian     "__metadata__": {"text": "text"}}        offsets count from 8+n; no gap, no overlap

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import IntegrityError, UsageError
from llmx.formats.json_text import parse_object

HEADER_LIMIT = 100_000_000  # bytes; the reference reader's own limit
DIMENSION_LIMIT = 16
LISTED_PROBLEMS = 100

# Bits an element. Four- and six-bit elements are packed, so a tensor of them must fill whole bytes.
BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies. `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open file. Safe from any thread.

    It is read, not mapped: where a file is cut meanwhile, or its disk fails, a map would end the process (SIGBUS) with
    no word about it. Measured: 0.06 s of one core more for each GB, beside 0.3 s for making floats of it.
    """

    __slots__ = ("__weakref__", "_descriptor", "metadata", "path", "tensors")

    def __init__(
        self, path: Path, descriptor: int, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
    ) -> None:
        """descriptor: of the open file, closed with the object."""
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """u8[stop - start], the tensor's bytes from `start`.

        Raises: IntegrityError where the file is shorter than it was, or cannot be read.
        """
        tensor = self.tensors[name]
        stop = tensor.nbytes if stop is None else stop
        assert 0 <= start <= stop <= tensor.nbytes
        found = np.empty(stop - start, np.uint8)
        done = 0
        while done < found.size:
            try:
                count = os.preadv(self._descriptor, [found[done:].data], tensor.offset + start + done)
            except OSError as error:
                raise IntegrityError(f"{name!r} cannot be read: {error.strerror}", where=self.path) from error
            if count == 0:
                raise IntegrityError(
                    f"the file was cut while it was read: {name!r} is no longer whole",
                    where=self.path,
                    fix="run again when nothing writes to it, or download it again",
                )
            done += count
        return found

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing: what was read belongs to who has it. Readers of maps hand pages back here."""


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """The file, its header checked and nothing else read.

    Raises: IntegrityError, naming every offence, when the header is too large or no JSON, a key comes twice, an
    entry is malformed, ranges overlap, leave gaps or pass the end of the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file, size, path)
            metadata = header.pop("__metadata__", {})
            tensors = _checked(header, metadata, data_start, size, path)
            return SafetensorsFile(path, os.dup(file.fileno()), tensors, metadata)
    except OSError as error:
        raise IntegrityError(f"The file cannot be read: {error.strerror}.", where=path) from error


def _checked(
    header: Mapping[str, Any], metadata: Any, data_start: int, size: int, path: Path
) -> dict[str, StoredTensor]:
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ is not a map of texts")
    tensors = {name: _entry(name, entry, data_start, problems) for name, entry in header.items()}
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len(found) == len(tensors):
        problems += _coverage_problems(found, data_start, size)
    if problems:
        raise IntegrityError(
            "The header of this safetensors file does not hold together.",
            where=path,
            problems=shorten(problems),
            fix="Download the file again; compare its size with the one on the hub.",
        )
    return found


def shorten(problems: Sequence[str]) -> list[str]:
    """The first LISTED_PROBLEMS problems and a count of the others: a hostile file must not fill the terminal."""
    rest = len(problems) - LISTED_PROBLEMS
    return [*problems[:LISTED_PROBLEMS], *([f"and {rest} more"] if rest > 0 else [])]


def _read_header(file: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise IntegrityError(f"A safetensors file has at least 8 bytes; this one has {size}.", where=path)
    length = int.from_bytes(prefix, "little")
    if length > HEADER_LIMIT:
        raise IntegrityError(f"A header of {length} bytes is refused; the limit is {HEADER_LIMIT}.", where=path)
    if 8 + length > size:
        raise IntegrityError(
            f"The file is cut: its header needs {8 + length} bytes and the file has {size}.",
            where=path,
            fix="Download the file again.",
        )
    return parse_object(file.read(length), path), 8 + length


def _entry(name: str, entry: Any, data_start: int, problems: list[str]) -> StoredTensor | None:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape", ()), fields.get("data_offsets", ())
    if set(fields) != {"dtype", "shape", "data_offsets"} or not _naturals(shape) or not _naturals(offsets):
        problems.append(f"{name!r}: an entry is exactly dtype, shape and data_offsets, in whole numbers")
        return None
    if not isinstance(dtype, str) or dtype not in BITS:
        problems.append(f"{name!r}: unknown dtype {dtype!r}")
        return None
    if len(shape) > DIMENSION_LIMIT:
        problems.append(f"{name!r}: {len(shape)} dimensions, the limit is {DIMENSION_LIMIT}")
        return None
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        problems.append(f"{name!r}: data_offsets {offsets} is no range")
        return None
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        problems.append(f"{name!r}: {dtype} {shape} takes {bits // 8} bytes, not {offsets[1] - offsets[0]}")
        return None
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _coverage_problems(tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> list[str]:
    """Every byte after the header belongs to exactly one tensor; what breaks that, one line each."""
    problems = []
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        end = tensor.offset + tensor.nbytes
        if end > size:
            problems.append(f"{name!r} ends at byte {end}, past the end of the file at {size} (the file is cut)")
        elif tensor.offset < position:
            problems.append(f"{name!r} begins at byte {tensor.offset}, inside the tensor before it")
        elif tensor.offset > position:
            problems.append(f"{tensor.offset - position} bytes before {name!r} belong to no tensor")
        position = max(position, end)
    if position < size:
        problems.append(f"the last {size - position} bytes belong to no tensor")
    return problems


@dataclass(frozen=True, slots=True)
class Placement:
    """A file to be written: its first bytes, where each tensor's bytes begin, and its size."""

    header: bytes
    offsets: tuple[int, ...]
    nbytes: int


def place(
    tensors: Iterable[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    where: Path | None = None,
) -> Placement:
    """Where (name, dtype, shape) tensors lie in a file, in the given order, before a byte of them is known.

    Raises: UsageError for an unknown dtype, or a name given twice.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, begins = 0, []
    for name, dtype, shape in tensors:
        if name in header or dtype not in BITS:
            raise UsageError(f"Tensor {name!r} of dtype {dtype!r} is given twice or has no such dtype.", where=where)
        nbytes = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": (position, position + nbytes)}
        begins.append(position)
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return Placement(len(text).to_bytes(8, "little") + text, tuple(start + at for at in begins), start + position)


def write_safetensors(
    path: str | Path,
    tensors: Iterable[tuple[str, str, Sequence[int], Iterable[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write (name, dtype, shape, chunks) tensors in the given order; chunks are bytes-like and consumed one by one.

    The file appears under its name only when it is whole.
    Raises: UsageError for an unknown dtype, a name given twice, or chunks that do not fill the shape.
    """
    path = Path(path)
    entries = [(name, dtype, tuple(shape), chunks) for name, dtype, shape, chunks in tensors]
    placed = place(((name, dtype, shape) for name, dtype, shape, _ in entries), metadata, path)
    ends = (*placed.offsets[1:], placed.nbytes)
    unfinished = path.with_name(path.name + ".part")
    try:
        with unfinished.open("wb") as file:
            file.write(placed.header)
            for (name, _, _, chunks), begin, end in zip(entries, placed.offsets, ends, strict=True):
                written = sum(file.write(chunk) for chunk in chunks)
                if written != end - begin:
                    raise UsageError(f"Tensor {name!r} needs {end - begin} bytes and was given {written}.", where=path)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
