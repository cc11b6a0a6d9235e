"""A bounded GGUF reader: every count, length, shape and offset is checked against the file before it is used.

The header's picture is in gguf_writer.py, the values' in gguf_values.py. Any file that this reader admits can be read
by llama.cpp's own parser; the reverse is nearly so (see the limits below). It looks at a file before any runtime does.

Source: the GGUF specification; the offences known from llama.cpp (CVE-2025-53630, CVE-2026-27940).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats.ggml_blocks import BLOCKS_BY_ID, row_bytes
from llmx.formats.gguf_values import (
    ALIGNMENT_KEY,
    ARRAY_ID,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_NAME_BYTES,
    SCALARS,
    TYPE_NAMES,
    Plain,
    Scalar,
)

VERSIONS = (2, 3)  # the same layout; version 1 had 32-bit counts
MAX_HEADER_BYTES = 2**28  # a vocabulary of 262144 tokens and its merges take about 15 MB
MAX_ITEMS = 2**22  # of one array, and of all together: Python objects take about 60 bytes each
MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
MIN_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one dim, type, offset
MAX_BYTES = 2**63 - 1


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor. shape: as numpy has it; offset: from the start of its file; shard: which file of a set."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int = 0


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An open GGUF file, or set of files. types: each metadata value's GGUF type, "[str]" for an array of strings.

    trailing_bytes: what follows the last tensor and is not padding; runtimes ignore it.
    """

    paths: tuple[Path, ...]
    version: int
    alignment: int
    metadata: dict[str, Plain]
    types: dict[str, str]
    tensors: dict[str, GgufTensor]
    trailing_bytes: int
    maps: tuple[mmap.mmap, ...]

    @property
    def format(self) -> str:
        """Its name among the formats."""
        return "gguf"

    @property
    def nbytes(self) -> int:
        """The size of all its files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def weights(self) -> int:
        """How many values its tensors hold."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Of the tensors' data; None for a file without any."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / self.weights if self.weights else None

    def bytes(self, name: str) -> np.ndarray:
        """Returns uint8[nbytes], a read-only view of the mapped file.

        Raises: IntegrityError where the file was cut since it was opened: touching what is gone would end the process.
        """
        tensor = self.tensors[name]
        if self.maps[tensor.shard].size() < tensor.offset + tensor.nbytes:
            raise IntegrityError(
                f"the file was cut while it was read: {name!r} is no longer whole",
                where=self.paths[tensor.shard],
                fix="run again when nothing writes to it, or download it again",
            )
        return np.frombuffer(self.maps[tensor.shard], np.uint8, tensor.nbytes, tensor.offset)

    def release(self, name: str) -> None:
        """Hands the tensor's pages back to the system; reading it again maps them again."""
        tensor = self.tensors[name]
        start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self.maps[tensor.shard].madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)


def read_gguf(path: str | Path) -> GgufFile:
    """Returns one file, with every tensor inside the file and where the format wants it. No data is read.

    Raises: IntegrityError naming the offence, key or tensor, and byte offset; UnsupportedError for a tensor type whose
    size is not known; UsageError when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such file", where=path)
    size = path.stat().st_size
    if size < len(MAGIC):
        raise IntegrityError(f"a file of {size} bytes is not a GGUF file", where=path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Header(path, mapped)
    version, tensor_count, pair_count = reader.start()
    metadata, types = reader.pairs(pair_count)
    alignment = reader.alignment(metadata, types)
    infos = [reader.info(number) for number in range(tensor_count)]
    data_start = -(-reader.at // alignment) * alignment
    tensors, end = _place(path, infos, data_start, alignment, len(mapped))
    trailing = max(0, len(mapped) - end) if tensors else 0
    return GgufFile((path,), version, alignment, metadata, types, tensors, trailing, (mapped,))


class _Header:
    """A cursor over the header. Nothing is read past `limit`; every refusal names what was being read, and where."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.mapped = path, mapped
        self.at = 0
        self.limit = min(len(mapped), MAX_HEADER_BYTES)
        self.items_left = MAX_ITEMS
        self.names: set[str] = set()

    def refuse(self, what: str, subject: str, at: int | None = None) -> NoReturn:
        raise IntegrityError(f"{subject}: {what}", where=f"{self.path} at byte {self.at if at is None else at}")

    def need(self, count: int, subject: str) -> None:
        if count > self.limit - self.at:
            end = "the file" if self.limit == len(self.mapped) else f"the {MAX_HEADER_BYTES} bytes a header may have"
            self.refuse(f"{count} bytes wanted, past the end of {end}", subject)

    def number(self, layout: struct.Struct, subject: str) -> int | float | bool:
        self.need(layout.size, subject)
        (value,) = layout.unpack_from(self.mapped, self.at)
        self.at += layout.size
        return value

    def u32(self, subject: str) -> int:
        return int(self.number(SCALARS["u32"][1], subject))

    def u64(self, subject: str) -> int:
        return int(self.number(SCALARS["u64"][1], subject))

    def text(self, subject: str) -> str:
        start = self.at
        length = self.u64(subject)
        self.need(length, f"{subject}'s text")
        raw = self.mapped[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse(f"not valid UTF-8 ({error.reason})", subject, start)

    def start(self) -> tuple[int, int, int]:
        """Returns version, number of tensors, number of metadata pairs."""
        if self.mapped[:4] != MAGIC:
            self.refuse(f"the file begins with {self.mapped[:4]!r} instead of {MAGIC!r}", "magic")
        self.at = 4
        version = self.u32("version")
        if version not in VERSIONS:
            other = " (big-endian, or damaged)" if version & 0xFFFF == 0 else ""
            self.refuse(f"version {version}{other} is not supported; versions 2 and 3 are", "version", 4)
        tensors, pairs = self.u64("tensor count"), self.u64("metadata count")
        left = self.limit - self.at
        if tensors * MIN_INFO_BYTES + pairs * MIN_PAIR_BYTES > left:
            self.refuse(f"{tensors} tensors and {pairs} metadata pairs cannot fit into {left} bytes", "counts", 8)
        return version, tensors, pairs

    def pairs(self, count: int) -> tuple[dict[str, Plain], dict[str, str]]:
        metadata: dict[str, Plain] = {}
        types: dict[str, str] = {}
        for number in range(count):
            start = self.at
            key = self.text(f"metadata key {number}")
            if not key:
                self.refuse("is empty", f"metadata key {number}", start)
            if key in metadata:
                self.refuse("the key occurs twice", repr(key), start)
            types[key], metadata[key] = self.value(repr(key))
        return metadata, types

    def value(self, subject: str) -> tuple[str, Plain]:
        kind = self.u32(subject)
        if kind != ARRAY_ID:
            name = self.type_name(kind, subject)
            return name, self.text(subject) if name == "str" else self.scalar(name, subject)
        item = self.u32(subject)
        if item == ARRAY_ID:
            self.refuse("an array of arrays, which no runtime reads", subject, self.at - 4)
        name = self.type_name(item, subject)
        count = self.u64(subject)
        self.items_left -= count
        if self.items_left < 0:
            self.refuse(f"an array of {count} items; a file may hold {MAX_ITEMS}", subject, self.at - 8)
        return f"[{name}]", self.texts(count, subject) if name == "str" else self.numbers(name, count, subject)

    def type_name(self, kind: int, subject: str) -> str:
        if kind not in TYPE_NAMES:
            self.refuse(f"value type {kind} does not exist", subject, self.at - 4)
        return TYPE_NAMES[kind]

    def scalar(self, name: str, subject: str) -> Scalar:
        return self.numbers(name, 1, subject)[0]

    def numbers(self, name: str, count: int, subject: str) -> list[int] | list[float] | list[bool]:
        packer = SCALARS[name][1]
        self.need(count * packer.size, subject)
        if name == "bool":
            return self.flags(count, subject)
        found = np.frombuffer(self.mapped, packer.format, count, self.at).tolist()
        self.at += count * packer.size
        return found

    def flags(self, count: int, subject: str) -> list[bool]:
        raw = np.frombuffer(self.mapped, np.uint8, count, self.at)
        if count and raw.max() > 1:
            worst = int(raw.argmax())
            self.refuse(f"a bool is {raw[worst]}, neither 0 nor 1", subject, self.at + worst)
        self.at += count
        return raw.astype(bool).tolist()

    def texts(self, count: int, subject: str) -> list[str]:
        self.need(count * 8, subject)
        # A loop of its own, because a vocabulary has a quarter of a million strings.
        at, limit, mapped, length_at = self.at, self.limit, self.mapped, SCALARS["u64"][1].unpack_from
        found: list[str] = []
        for number in range(count):
            start = at + 8
            if start > limit or (end := start + length_at(mapped, at)[0]) > limit:
                self.refuse("a string ends past the end of the file", f"{subject} item {number}", at)
            try:
                found.append(mapped[start:end].decode("utf-8"))
            except UnicodeDecodeError as error:
                self.refuse(f"not valid UTF-8 ({error.reason})", f"{subject} item {number}", at)
            at = end
        self.at = at
        return found

    def alignment(self, metadata: dict[str, Plain], types: dict[str, str]) -> int:
        value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if types.get(ALIGNMENT_KEY, "u32") != "u32" or not isinstance(value, int):
            self.refuse(f"the type is {types[ALIGNMENT_KEY]} instead of u32", ALIGNMENT_KEY)
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            self.refuse(f"{value} is not a power of two up to {MAX_ALIGNMENT}", ALIGNMENT_KEY)
        return value

    def info(self, number: int) -> GgufTensor:
        """Returns one tensor, its offset still counted from the start of the data section."""
        start = self.at
        name = self.text(f"name of tensor {number}")
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            self.refuse(
                f"has {len(name.encode())} bytes instead of 1 to {MAX_NAME_BYTES}", f"name of tensor {number}", start
            )
        if name in self.names:
            self.refuse("the name occurs twice", f"tensor {name!r}", start)
        self.names.add(name)
        subject = f"tensor {name!r}"
        dims = self.u32(subject)
        if not 0 < dims <= MAX_DIMS:
            self.refuse(f"{dims} dimensions instead of 1 to {MAX_DIMS}", subject, self.at - 4)
        shape = tuple(reversed([self.u64(subject) for _ in range(dims)]))
        if not all(shape) or prod(shape) > MAX_BYTES:
            self.refuse(f"shape {shape} is empty or overflows", subject, start)
        type_name, nbytes = self.tensor_type(subject, shape)
        return GgufTensor(name, type_name, shape, self.u64(subject), nbytes)

    def tensor_type(self, subject: str, shape: tuple[int, ...]) -> tuple[str, int]:
        kind = self.u32(subject)
        if kind not in BLOCKS_BY_ID:
            where = f"{self.path} at byte {self.at - 4}"
            raise UnsupportedError(f"{subject}: ggml type {kind} is not known, so neither is its size", where=where)
        block = BLOCKS_BY_ID[kind]
        if shape[-1] % block.weights:
            what = f"rows of {shape[-1]} are not whole {block.name} blocks of {block.weights}"
            self.refuse(what, subject, self.at - 4)
        nbytes = prod(shape[:-1]) * row_bytes(block.name, shape[-1])
        if nbytes > MAX_BYTES:
            self.refuse(f"{nbytes} bytes overflow", subject, self.at - 4)
        return block.name, nbytes


def _place(
    path: Path, infos: list[GgufTensor], data_start: int, alignment: int, size: int
) -> tuple[dict[str, GgufTensor], int]:
    """Returns the tensors with offsets from the start of the file, and where the last one's padding ends."""
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for info in infos:
        start = data_start + info.offset
        if info.offset % alignment:
            raise _misplaced(path, info, f"offset {info.offset} is not a multiple of {alignment}")
        if info.offset != expected:
            offence = "overlaps the tensor before it" if info.offset < expected else "leaves a gap before it"
            raise _misplaced(path, info, f"offset {info.offset} {offence}; {expected} is the next free one")
        if start + info.nbytes > size:
            raise _misplaced(path, info, f"its {info.nbytes} bytes from {start} end past the file's {size}: it is cut")
        tensors[info.name] = GgufTensor(info.name, info.type_name, info.shape, start, info.nbytes)
        expected += -(-info.nbytes // alignment) * alignment
    return tensors, data_start + expected


def _misplaced(path: Path, info: GgufTensor, what: str) -> IntegrityError:
    return IntegrityError(f"tensor {info.name!r}: {what}", where=path)
