"""Importance matrices: the mean square of each input column of a weight, per expert, over a calibration text.

llama-imatrix has written two kinds of file, and users have both.

The GGUF kind: general.type = "imatrix", imatrix.datasets ([str]), imatrix.chunk_count and imatrix.chunk_size (u32);
for each weight NAME two F32 tensors:

    NAME.in_sum2   [experts, cols]   sum over tokens of the squared inputs
    NAME.counts    [experts, 1]      tokens that the expert saw

The legacy kind, little-endian, without a magic number:

    i32 number of entries
    each entry:  i32 length, name | i32 calls | i32 number of values | f32[values], the means times calls
    i32 chunks | i32 length, name of the data set                      (may be absent)

Here the experts of a weight lie one after another and are not counted: an entry is read as one row.

Source: llama.cpp's llama-imatrix and llama-quantize, b11549.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats.gguf_reader import GgufFile, read_gguf
from llmx.formats.gguf_values import MAGIC, MAX_NAME_BYTES, array, text, u32
from llmx.formats.gguf_writer import TensorInfo, layout

KIND = "imatrix"
SUMS, COUNTS = ".in_sum2", ".counts"
KEY_TYPES = {"imatrix.datasets": "[str]", "imatrix.chunk_count": "u32", "imatrix.chunk_size": "u32"}
MAX_FILE_BYTES = 2**32  # the largest models' take about 1.5 GB
MAX_COUNT = 2**53
INT = struct.Struct("<i")
MIN_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4  # name length, name, calls, number of values, one value


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Mean squares f32[experts, cols] for each GGUF tensor name, and what they were measured on.

    Where an expert saw no token its row is 1 everywhere (llama-quantize does the same), and it is reported by
    `entries_without_data`. counts: tokens (GGUF kind) or calls (legacy kind) behind each row. chunk_size: tokens, 0
    where the file does not say.
    """

    entries: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    @property
    def entries_without_data(self) -> dict[str, tuple[int, ...]]:
        """Returns, for each tensor with such experts, the numbers of the experts that saw no token."""
        empty = {name: tuple(np.flatnonzero(counts == 0).tolist()) for name, counts in self.counts.items()}
        return {name: experts for name, experts in empty.items() if experts}

    def rows(self, name: str, experts: int, cols: int) -> np.ndarray | None:
        """Returns f32[experts, cols] for a weight of that many experts and columns; None when it was not measured.

        Raises: IntegrityError when the entry was measured on a weight of another shape.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry.shape not in ((experts, cols), (1, experts * cols)):
            what = f"{name}: {entry.size} importance values for {experts} x {cols} columns"
            raise IntegrityError(what, fix="use an importance matrix made from this model")
        return entry.reshape(experts, cols)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Returns the importance matrix in a file of either kind.

    Raises: IntegrityError for a damaged file, UnsupportedError for a GGUF file of another kind, UsageError for none.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such importance matrix", where=path)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise IntegrityError(f"a file of {size} bytes is no importance matrix", where=path)
    with path.open("rb") as file:
        begins_as_gguf = file.read(len(MAGIC)) == MAGIC
    return _from_gguf(read_gguf(path)) if begins_as_gguf else _from_legacy(path)


def write_imatrix(
    path: str | Path,
    sums: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    *,
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Writes the GGUF kind: for each weight f32[experts, cols] sums of squares and the tokens each expert saw.

    The file appears whole or not at all. The same sums give the same bytes, whatever their order: llama-imatrix's.
    """
    names = sorted(sums)
    assert names == sorted(counts), "every sum has its counts"
    data: dict[str, np.ndarray] = {}
    for name in names:
        data[name + SUMS] = np.ascontiguousarray(sums[name], "<f4")
        data[name + COUNTS] = np.asarray(counts[name], "<f4").reshape(len(sums[name]), 1)
    metadata = {
        "general.type": text(KIND),
        "imatrix.datasets": array("str", datasets),
        "imatrix.chunk_count": u32(chunk_count),
        "imatrix.chunk_size": u32(chunk_size),
    }
    planned = layout(metadata, [TensorInfo(name, "F32", _ggml_shape(values)) for name, values in data.items()])
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(planned.header)
        for name, values in data.items():
            file.seek(planned.placements[name].offset)
            file.write(values.tobytes())
        file.truncate(planned.size)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _from_gguf(file: GgufFile) -> ImportanceMatrix:
    path = file.paths[0]
    kind = file.metadata.get("general.type", "model")
    if kind != KIND:
        raise UnsupportedError(f"this GGUF file is a {kind}, not an importance matrix", where=path)
    problems = [
        f"{key} is {file.types.get(key, 'missing')} instead of {wanted}"
        for key, wanted in KEY_TYPES.items()
        if file.types.get(key) != wanted
    ]
    # Other suffixes are no part of the importance; llama.cpp passes over them too.
    names = {name.removesuffix(end) for name in file.tensors for end in (SUMS, COUNTS) if name.endswith(end)}
    entries: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for name in sorted(names):
        offence = _pair_offence(file, name)
        if offence is not None:
            problems.append(f"{name}: {offence}")
            continue
        counts[name] = np.floor(_values(file, name + COUNTS).astype(np.float64) + 0.5).astype(np.int64)
        summed = _values(file, name + SUMS).reshape(len(counts[name]), -1)
        entries[name] = _means(summed, counts[name])
    if not names:
        problems.append("it has no entries")
    if problems:
        raise IntegrityError("the importance matrix is damaged", where=path, problems=problems)
    datasets = tuple(str(each) for each in file.metadata["imatrix.datasets"])  # pyright: ignore[reportGeneralTypeIssues]
    chunks, size = file.metadata["imatrix.chunk_count"], file.metadata["imatrix.chunk_size"]
    return ImportanceMatrix(entries, counts, datasets, int(chunks), int(size))  # pyright: ignore[reportArgumentType]


def _ggml_shape(values: np.ndarray) -> tuple[int, ...]:
    """Returns the shape without the leading ones that ggml does not store."""
    return values.shape[1:] if values.shape[0] == 1 else values.shape


def _values(file: GgufFile, name: str) -> np.ndarray:
    return file.bytes(name).view("<f4")


def _pair_offence(file: GgufFile, name: str) -> str | None:
    """Returns what is wrong with the two tensors of an entry, or None."""
    missing = [end for end in (SUMS, COUNTS) if name + end not in file.tensors]
    if missing:
        return f"{missing[0]} is missing"
    if {file.tensors[name + end].type_name for end in (SUMS, COUNTS)} != {"F32"}:
        return "the values are not F32"
    if any(not _usable(_values(file, name + end)) for end in (SUMS, COUNTS)):
        return "a value is negative or not finite"
    if _values(file, name + COUNTS).max() > MAX_COUNT:
        return f"a count is above {MAX_COUNT}"
    sums, experts = (_values(file, name + end).size for end in (SUMS, COUNTS))
    return f"{sums} sums for {experts} experts" if sums % experts else None


def _usable(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all()) and bool((values >= 0).all())


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    means = np.ones(sums.shape, np.float32)
    np.divide(sums, counts[:, None].astype(np.float32), out=means, where=counts[:, None] > 0)
    return means


def _from_legacy(path: Path) -> ImportanceMatrix:
    reader = _Legacy(path, path.read_bytes())
    count = reader.number("number of entries")
    if not 0 < count <= reader.left // MIN_ENTRY_BYTES:
        reader.refuse(f"{count} entries cannot be in {reader.left} bytes; it is no importance matrix, or cut")
    entries: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for number in range(count):
        name, calls, values = reader.entry(number)
        if name in entries:
            reader.refuse(f"entry {name!r} occurs twice")
        # With no calls recorded the values stand as they are, as in llama-quantize.
        entries[name] = (values / np.float32(calls) if calls else values.copy()).reshape(1, -1)
        counts[name] = np.array([calls])
    chunks = reader.number("number of chunks") if reader.left else 0
    dataset = reader.text("data set", reader.left).decode("utf-8", "replace") if reader.left else ""
    if reader.left:
        reader.refuse(f"{reader.left} bytes follow the end")
    return ImportanceMatrix(entries, counts, (dataset,) if dataset else (), max(chunks, 0), 0)


class _Legacy:
    """A cursor over a legacy file; nothing is read past its end."""

    def __init__(self, path: Path, raw: bytes) -> None:
        self.path, self.raw, self.at = path, raw, 0

    @property
    def left(self) -> int:
        return len(self.raw) - self.at

    def refuse(self, what: str) -> NoReturn:
        raise IntegrityError(f"importance matrix: {what}", where=f"{self.path} at byte {self.at}")

    def take(self, count: int, subject: str) -> bytes:
        if not 0 <= count <= self.left:
            self.refuse(f"{subject}: {count} bytes wanted, {self.left} are left")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, subject: str) -> int:
        return INT.unpack(self.take(INT.size, subject))[0]

    def text(self, subject: str, longest: int) -> bytes:
        length = self.number(f"{subject}'s length")
        if not 0 <= length <= longest:
            self.refuse(f"{subject}: a length of {length} is not from 0 to {longest}")
        return self.take(length, subject)

    def entry(self, number: int) -> tuple[str, int, np.ndarray]:
        """Returns name, calls and f32[values], a view."""
        raw = self.text(f"name of entry {number}", MAX_NAME_BYTES)
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"the name of entry {number} is not UTF-8")
        calls, count = self.number(f"calls of {name!r}"), self.number(f"values of {name!r}")
        if not name or calls < 0 or count < 1:
            self.refuse(f"entry {number} is {name!r} with {calls} calls and {count} values")
        values = np.frombuffer(self.take(count * 4, f"values of {name!r}"), "<f4")
        if not _usable(values):
            self.refuse(f"{name!r}: a value is negative or not finite")
        return name, calls, values
