"""A checkpoint seen through its architecture: canonical tensors, read lazily as float32 or as the stored bits."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.safetensors import BITS, shorten
from llmx.models.architecture import Architecture, TensorSpec
from llmx.models.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from llmx.models.families import FAMILIES, describe

COMPARED_BYTES = 64 << 20  # of each of two tensors; a decoded one is made anew for each piece
SCAN_BYTES = 8 << 20  # of one chunk of a scan; small enough to stay in a core's cache neighbourhood


def _copy_f32(bits: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out.view(np.uint32), bits)


def _widen_f16(bits: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, bits.view(np.float16))


def _widen_bf16(bits: np.ndarray, out: np.ndarray) -> None:
    """bfloat16 is the upper half of a float32; shifting in place is many times faster than through a temporary."""
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)


@dataclass(frozen=True, slots=True)
class StoredFloat:
    """A stored dtype: the numpy types of its bits, the bits of infinity, and the way from bits to float32."""

    bits: type[np.unsignedinteger]
    signed: type[np.signedinteger]
    infinity: int
    widen: Callable[[np.ndarray, np.ndarray], None]


FLOATS: dict[str, StoredFloat] = {
    "F32": StoredFloat(np.uint32, np.int32, 0x7F800000, _copy_f32),
    "F16": StoredFloat(np.uint16, np.int16, 0x7C00, _widen_f16),
    "BF16": StoredFloat(np.uint16, np.int16, 0x7F80, _widen_bf16),
}


@dataclass(frozen=True, slots=True)
class Scan:
    """What a look at every value found. first_bad: flat index of the first NaN or infinity, row-major, or None.

    largest: the largest magnitude of the finite values up to there, so that overflow of f16 (65504) can be told.
    """

    first_bad: int | None
    largest: float


class Weight:
    """One canonical tensor as a matrix f32[rows, cols]: a vector is one row, experts lie under each other.

    Reads are safe from any thread.
    """

    __slots__ = ("_checkpoint", "_stored", "cols", "dtype", "rows", "spec")

    def __init__(self, spec: TensorSpec, checkpoint: Checkpoint) -> None:
        self.spec = spec
        self._checkpoint = checkpoint
        self._stored: CheckpointTensor = checkpoint.tensors[spec.source.names[0]]
        self.dtype = self._stored.dtype  # "F32", "F16" or "BF16", as stored
        self.cols = spec.shape[-1]
        self.rows = int(np.prod(spec.shape[:-1], dtype=np.int64)) if len(spec.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.rows * self.cols * np.dtype(FLOATS[self.dtype].bits).itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """f32[stop - start, cols], a fresh array of these rows."""
        stop = self.rows if stop is None else stop
        result = np.empty((stop - start, self.cols), dtype=np.float32)
        for place, bits in self.views(start, stop):
            FLOATS[self.dtype].widen(bits, result[place : place + len(bits)])
        return result

    def read_raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The stored bits of these rows, a fresh array: f32[stop - start, cols] for F32, u16[…] for F16 and BF16."""
        stop = self.rows if stop is None else stop
        result = np.empty((stop - start, self.cols), dtype=FLOATS[self.dtype].bits)
        for place, bits in self.views(start, stop):
            result[place : place + len(bits)] = bits
        return result.view(np.float32) if self.dtype == "F32" else result

    def views(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(row of the result, the stored bits [rows, cols]): the pieces that make up these rows."""
        assert 0 <= start <= stop <= self.rows
        for name, low, high, place in self._pieces(start, stop):
            yield place, self._piece(name, low, high)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Hand the pages of these rows back to the system (a transposed tensor: of all rows)."""
        for name, low, high, _ in self._pieces(start, self.rows if stop is None else stop):
            if self.spec.source.transpose:
                self._checkpoint.release(name)
            else:
                row = self.cols * np.dtype(FLOATS[self.dtype].bits).itemsize
                self._checkpoint.release(name, low * row, high * row)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int, int]]:
        """(checkpoint tensor, its rows from, to, place in the result) that together are rows start to stop."""
        source = self.spec.source
        matrix = self.spec.shape[-2] if len(self.spec.shape) > 1 else 1  # rows of one expert, or of all
        if len(self.spec.shape) == 1:  # a vector's slice is of its only row, see _piece
            yield source.names[0], 0, 1, 0
            return
        stored = self._stored.shape[-2] if not source.transpose else self._stored.shape[-1]
        offset = 0 if source.rows is None else source.rows[0]
        row = start
        while row < stop:
            expert, inside = divmod(row, matrix)
            count = min(matrix - inside, stop - row)
            stacked = len(source.names) > 1
            low = offset + inside + (0 if stacked else expert * stored)
            yield source.names[expert if stacked else 0], low, low + count, row - start
            row += count

    def _piece(self, name: str, low: int, high: int) -> np.ndarray:
        """bits[high - low, cols]"""
        bits, source = FLOATS[self.dtype].bits, self.spec.source
        if len(self.spec.shape) == 1:
            first, last = source.rows or (0, self.cols)
            return self._checkpoint.bytes(name).view(bits)[first:last].reshape(1, -1)
        if source.transpose:
            return self._checkpoint.bytes(name).view(bits).reshape(self._stored.shape)[:, low:high].T
        row = self.cols * np.dtype(bits).itemsize
        return self._checkpoint.bytes(name, low * row, high * row).view(bits).reshape(-1, self.cols)


class Model:
    """An architecture and the checkpoint it was found in; every tensor accounted for."""

    __slots__ = ("_weights", "architecture", "checkpoint")

    def __init__(self, architecture: Architecture, checkpoint: Checkpoint) -> None:
        self.architecture = architecture
        self.checkpoint = checkpoint
        self._weights = {spec.name: Weight(spec, checkpoint) for spec in architecture.tensors}

    def weight(self, name: str) -> Weight:
        """The tensor with this canonical name. Raises: KeyError."""
        return self._weights[name]

    def has(self, name: str) -> bool:
        return name in self._weights

    def weights(self) -> Iterator[Weight]:
        """Every tensor, in the architecture's order."""
        yield from self._weights.values()


def open_model(model: str | Path, revision: str | None = None) -> Model:
    """The model in a local folder or under a hub id, its tensors checked against its architecture by name and shape.

    Raises: what open_checkpoint and describe raise; IntegrityError listing every missing, left-over and wrongly shaped
    tensor; UnsupportedError for tensors that are not stored as F32, F16 or BF16.
    """
    checkpoint = open_checkpoint(model, revision)
    architecture = describe(checkpoint.config, checkpoint.tensors)
    check_tensors(architecture, checkpoint)
    return Model(architecture, checkpoint)


def check_finite(weight: Weight) -> Scan:
    """Look at every value once, on the stored bits, chunk by chunk, handing pages back."""
    kind = FLOATS[weight.dtype]
    step = max(1, SCAN_BYTES // (weight.cols * np.dtype(kind.bits).itemsize))
    if weight.spec.source.transpose:
        step = weight.rows  # every row of a transposed matrix touches every page
    largest = 0
    for start in range(0, weight.rows, step):
        stop = min(start + step, weight.rows)
        for place, bits in weight.views(start, stop):
            highest = _highest(bits, kind)
            if highest >= kind.infinity:
                flat = np.bitwise_and(bits, kind.bits(np.iinfo(kind.signed).max)).reshape(-1)
                first = int((flat >= kind.infinity).argmax())
                finite = int(flat[:first].max(initial=0))
                return Scan((start + place) * weight.cols + first, _value(max(largest, finite), weight.dtype))
            largest = max(largest, highest)
        weight.release(start, stop)
    return Scan(None, _value(largest, weight.dtype))


def _highest(bits: np.ndarray, kind: StoredFloat) -> int:
    """The bits of the largest magnitude. Floats of one sign are ordered as their bits are, so two maxima tell it."""
    sign = int(np.iinfo(kind.signed).max) + 1
    positive = int(bits.view(kind.signed).max(initial=0))
    highest = int(bits.max(initial=0))
    return max(positive, highest - sign if highest >= sign else 0)


def _value(bits: int, dtype: str) -> float:
    out = np.empty(1, dtype=np.float32)
    FLOATS[dtype].widen(np.array([bits], dtype=FLOATS[dtype].bits), out)
    return float(out[0])


@dataclass(frozen=True, slots=True)
class _Use:
    spec: TensorSpec
    shape: tuple[int, ...]  # of one checkpoint tensor, were it not sliced
    rows: tuple[int, int] | None


def check_tensors(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Every checkpoint tensor is used exactly once, whole, in its shape, or is redundant by name.

    Raises: IntegrityError, UnsupportedError as open_model.
    """
    uses = _uses(architecture)
    stored = checkpoint.tensors
    problems = [f"{name} is missing (needed for {uses[name][0].spec.name})" for name in uses if name not in stored]
    for name in uses:
        if name in stored:
            problems += _shape_problems(name, stored[name].shape, uses[name])
    left_over = [name for name in stored if name not in uses]
    problems += _left_over_problems(architecture, checkpoint, left_over)
    if problems:
        raise IntegrityError(
            f"The checkpoint's tensors are not those of its config.json ({architecture.family}).",
            where=checkpoint.folder,
            problems=shorten(problems),
        )
    _check_dtypes(architecture, checkpoint)


def _uses(architecture: Architecture) -> dict[str, list[_Use]]:
    uses: dict[str, list[_Use]] = {}
    for spec in architecture.tensors:
        stacked = "{expert}" if len(spec.source.names) > 1 else None
        shape = spec.shape[1:] if stacked else spec.shape
        shape = shape[::-1] if spec.source.transpose else shape
        for name in spec.source.names:
            uses.setdefault(name, []).append(_Use(spec, shape, spec.source.rows))
    return uses


def _shape_problems(name: str, stored: tuple[int, ...], uses: list[_Use]) -> list[str]:
    expected = uses[0].shape
    if uses[0].rows is not None:
        ranges = sorted(use.rows for use in uses if use.rows is not None)
        assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        axis = _output_axis(uses[0])
        expected = tuple(ranges[-1][1] if n == axis else size for n, size in enumerate(expected))
    else:
        assert len(uses) == 1
    return [] if stored == expected else [f"{name} has shape {list(stored)}, {list(expected)} is expected"]


def _output_axis(use: _Use) -> int:
    """The axis that `rows` slices: the last of a vector or a transposed matrix, else the last but one."""
    return len(use.shape) - (1 if len(use.shape) == 1 or use.spec.source.transpose else 2)


def _left_over_problems(architecture: Architecture, checkpoint: Checkpoint, names: list[str]) -> list[str]:
    facts: Mapping[str, bool] = {"always": True, "tied": architecture.tied}
    rules = [rule for rule in FAMILIES[architecture.family].redundant if facts[rule.when]]
    problems = []
    for name in names:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None:
            problems.append(f"{name} is left over: the architecture has no such tensor")
        elif rule.copy_of is not None:
            spec = next(spec for spec in architecture.tensors if spec.role == rule.copy_of and spec.part == "weight")
            if not _equal(checkpoint, name, spec.source.names[0]):
                problems.append(
                    f"{name} differs from {spec.source.names[0]}, which the config ties it to "
                    "(set tie_word_embeddings to false in config.json if it is a head of its own)"
                )
    return problems


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors hold the same bits; read in chunks."""
    if checkpoint.tensors.get(name) != checkpoint.tensors.get(other):
        return False
    held = checkpoint.tensors[name]
    size = math.prod(held.shape) * BITS[held.dtype] // 8
    for start in range(0, size, COMPARED_BYTES):
        stop = min(start + COMPARED_BYTES, size)
        if not np.array_equal(checkpoint.bytes(name, start, stop), checkpoint.bytes(other, start, stop)):
            return False
    return True


def _check_dtypes(architecture: Architecture, checkpoint: Checkpoint) -> None:
    problems = []
    for spec in architecture.tensors:
        found = {checkpoint.tensors[name].dtype for name in spec.source.names}
        if found - set(FLOATS):
            problems.append(f"{spec.source.names[0]} is stored as {', '.join(sorted(found))}")
        elif len(found) > 1:
            problems.append(f"the experts of {spec.name} are stored as {', '.join(sorted(found))}, not as one dtype")
    if problems:
        raise UnsupportedError(
            f"Weights must be stored as {', '.join(FLOATS)}.",
            where=checkpoint.folder,
            problems=shorten(problems),
            fix="Export from the original checkpoint, not from a quantized one.",
        )
