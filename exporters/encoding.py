"""How the rows of a quantized weight are kept, whatever the format: the grid they are solved on, and their bytes.

    scales, codes ── pack ── u8[rows, row bytes] ── decode ── f32[rows, cols]
    f32[rows, cols] ── encode (rounded to the nearest on fitted scales) ── u8[rows, row bytes]

There are three kinds: the blocks of ggml (llmx.formats.ggml_packers), under ggml's names; whole numbers in groups
(llmx.formats.onnx_groups), under the names of their grids: int4-g32-zp-float32, int8-channel-sym; and FP8
(llmx.formats.float8_rows): fp8-channel-float32, fp8-tensor-float32.

Where a whole tensor shares its scale, `bound` fixes it first:

    fp8-tensor-float32    f32[all rows, cols] ── bound ── encode, some rows at a time
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats import float8_rows, ggml_decode, ggml_packers, onnx_groups
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_packers import BlockScales
from llmx.formats.onnx_groups import GroupLayout, Groups
from llmx.quant import grid as grids
from llmx.quant.groups import GROUPS, KINDS, integer_grid
from llmx.quant.microscaling import Fp8Grid
from llmx.quant.protocol import Effort, Floats, Grid
from llmx.quant.stores import STORES

Bytes = NDArray[np.uint8]
GROUP_BITS: tuple[int, ...] = (2, 4, 8)  # that MatMulNBits takes
CHUNK = 1 << 16  # weights encoded or decoded at a time: they stay in the core's own cache


class Encoding(Protocol):
    """How rows are kept. Once it is bound, everything that is done with a row is done with it alone: any cut of rows
    makes the same bytes."""

    @property
    def name(self) -> str: ...

    @property
    def shared(self) -> bool:
        """Whether a tensor shares what `bound` fixes; if not, nothing has to be bound."""
        ...

    def bound(self, weight: Floats, importance: Floats | None = None) -> Encoding:
        """This encoding with what the whole tensor f32[rows, cols] shares fixed from it; itself where `shared` is
        false. A stacked tensor's experts are tensors of their own. importance: as in `encode`."""
        ...

    def solvable(self, cols: int) -> bool:
        """Whether `grid` has one for rows of so many weights."""
        ...

    def grid(self, cols: int) -> Grid:
        """What rows of so many weights are solved on.

        Raises: UnsupportedError where a row is no whole number of its blocks, or the weights are kept as floats.
        """
        ...

    def limit(self, cols: int) -> float:
        """The largest |weight| that can be kept."""
        ...

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row. Raises: UnsupportedError where the layout cannot hold a row of so many weights."""
        ...

    def bits(self, cols: int) -> float:
        """Bits per weight as stored, scales included."""
        ...

    def pack(self, scales: BlockScales, codes: Bytes, out: Bytes | None = None) -> Bytes:
        """u8[rows, row bytes] of the grid's scales and codes (u8[rows, cols]). `out`, if given, is written and
        returned; it may be a view."""
        ...

    def decode(self, data: Bytes, cols: int) -> Floats:
        """f32[rows, cols]: what the bytes stand for. Raises: IntegrityError where a row has other bytes."""
        ...

    def encode(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> Bytes:
        """u8[rows, row bytes]: weight (f32[rows, cols]) rounded to the nearest on the best scales found.

        importance: f32[cols], the mean square of each input. What a tensor shares and nobody bound is fixed from
        these rows. Raises: IntegrityError for NaN, infinity, a weight too large, a broken importance.
        """
        ...


@dataclass(frozen=True, slots=True)
class BlockEncoding:
    """A ggml type: blocks one after another, or floats."""

    name: str
    shared = False

    def bound(self, weight: Floats, importance: Floats | None = None) -> Encoding:
        return self

    def solvable(self, cols: int) -> bool:
        return self.name in grids.GRIDS and cols % BLOCKS[self.name].weights == 0

    def grid(self, cols: int) -> Grid:
        return grids.grid(self.name, cols)

    def limit(self, cols: int) -> float:
        return grids.largest_weight(self.name)

    def row_bytes(self, cols: int) -> int:
        return row_bytes(self.name, cols)

    def bits(self, cols: int) -> float:
        return BLOCKS[self.name].bits

    def pack(self, scales: BlockScales, codes: Bytes, out: Bytes | None = None) -> Bytes:
        blocks = codes.reshape(-1, BLOCKS[self.name].weights)
        packed = ggml_packers.pack(self.name, scales, blocks).reshape(len(codes), -1)
        if out is None:
            return packed
        out[:] = packed
        return out

    def decode(self, data: Bytes, cols: int) -> Floats:
        values = ggml_decode.decode(self.name, data)
        if values.shape[1] != cols:
            raise IntegrityError(f"a row holds {values.shape[1]} {self.name} weights, not {cols}")
        return values

    def encode(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> Bytes:
        return grids.encode(self.name, weight, importance, effort=effort)


@dataclass(frozen=True, slots=True)
class GroupEncoding:
    """Whole numbers in groups. Rows of any length can be kept; a grid takes whole groups."""

    name: str
    layout: GroupLayout
    shared = False

    def bound(self, weight: Floats, importance: Floats | None = None) -> Encoding:
        return self

    def solvable(self, cols: int) -> bool:
        return cols % self.layout.group_weights(cols) == 0

    def grid(self, cols: int) -> Grid:
        return grids.grid(self.name, cols)

    def limit(self, cols: int) -> float:
        return self._fitted(cols).limit()

    def row_bytes(self, cols: int) -> int:
        return self.layout.row_bytes(cols)

    def bits(self, cols: int) -> float:
        return 8 * self.row_bytes(cols) / cols

    def pack(self, scales: BlockScales, codes: Bytes, out: Bytes | None = None) -> Bytes:
        rows = len(codes)
        zeros = None if scales.mins is None else scales.mins.astype(np.uint8, copy=False).reshape(rows, -1)
        stored = scales.d.astype(np.float32, copy=False).reshape(rows, -1)
        return onnx_groups.pack(self.layout, Groups(codes, stored, zeros), out)

    def decode(self, data: Bytes, cols: int) -> Floats:
        values = np.empty((len(data), cols), np.float32)
        group, middle = self.layout.group_weights(cols), np.float32(1 << self.layout.bits >> 1)
        for part in _chunks(len(data), cols):
            found = onnx_groups.unpack(self.layout, data[part], cols)
            zeros = middle if found.zero_points is None else _wide(found.zero_points.astype(np.float32), group, cols)
            np.subtract(found.codes, zeros, out=values[part], dtype=np.float32)
            values[part] *= _wide(found.scales, group, cols)
        return values

    def encode(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> Bytes:
        rows, cols = weight.shape
        _check(self, weight, importance)
        grid, data = self._fitted(cols), np.empty((rows, self.row_bytes(cols)), np.uint8)
        missing = -cols % grid.weights
        if importance is not None and missing:  # with the mean, so that the others count as before
            importance = np.concatenate([importance, np.full(missing, importance.mean(), np.float32)])
        for part in _chunks(rows, cols):
            values = np.pad(weight[part], ((0, 0), (0, missing))) if missing else np.ascontiguousarray(weight[part])
            scales = grid.fit(values, importance, effort)
            codes = grid.round(values, scales).reshape(values.shape)[:, :cols]
            self.pack(scales, codes, data[part])
        return data

    def _fitted(self, cols: int) -> Grid:
        """The grid, also of rows whose last group is short."""
        return grids.FACTORIES[self.name](cols)


@dataclass(frozen=True, slots=True)
class Float8Encoding:
    """FP8 (E4M3) with a float32 scale, one a row or one for the tensor. tensor: that one, 0 until it is bound."""

    name: str
    shared: bool
    tensor: float = 0.0

    def bound(self, weight: Floats, importance: Floats | None = None) -> Encoding:
        if not self.shared:
            return self
        _check(self, weight, importance)
        found = self.grid(weight.shape[1]).bound(weight, importance)
        assert isinstance(found, Fp8Grid), "a grid that is bound is of its own kind"
        return replace(self, tensor=found.tensor)

    def solvable(self, cols: int) -> bool:
        return True

    def grid(self, cols: int) -> Grid:
        return Fp8Grid(self.name, cols, self.shared, self.tensor)

    def limit(self, cols: int) -> float:
        return self.grid(cols).limit()

    def row_bytes(self, cols: int) -> int:
        return float8_rows.row_bytes(cols)

    def bits(self, cols: int) -> float:
        return 8 * self.row_bytes(cols) / cols

    def pack(self, scales: BlockScales, codes: Bytes, out: Bytes | None = None) -> Bytes:
        return float8_rows.pack(codes, scales.d.astype(np.float32, copy=False), out)

    def decode(self, data: Bytes, cols: int) -> Floats:
        values = np.empty((len(data), cols), np.float32)
        for part in _chunks(len(data), cols):
            values[part] = float8_rows.decode(data[part], cols)
        return values

    def encode(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> Bytes:
        rows, cols = weight.shape
        _check(self, weight, importance)
        grid, data = self.grid(cols), np.empty((rows, self.row_bytes(cols)), np.uint8)
        grid = grid if self.tensor else grid.bound(weight, importance)
        for part in _chunks(rows, cols):
            values = np.ascontiguousarray(weight[part])
            scales = grid.fit(values, importance, effort)
            self.pack(scales, grid.round(values, scales), data[part])
        return data


def _check(kept: GroupEncoding | Float8Encoding, weight: Floats, importance: Floats | None) -> None:
    """Raise IntegrityError for weights that cannot be kept, and for a broken importance."""
    largest, limit = float(np.abs(weight).max(initial=0.0)), kept.limit(weight.shape[1])
    if not largest <= limit:  # NaN is not
        told = f"{largest:.6g}, and the largest that {kept.name} can store is {limit:.6g}"
        raise IntegrityError(
            f"the weight holds {told if np.isfinite(largest) else 'NaN or infinity'}",
            fix="store the tensor as F32, or repair the checkpoint",
        )
    if importance is not None:
        grids.check_importance(importance, weight.shape[1])


def _chunks(rows: int, cols: int) -> list[slice]:
    step = max(1, CHUNK // cols)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _wide(of_groups: Floats, group: int, cols: int) -> Floats:
    """f32[rows, cols] of one number a group."""
    return np.repeat(of_groups, group, axis=1)[:, :cols]


def _group_encoding(bits: int, group: int | None, kind: str, store: str) -> GroupEncoding:
    name = integer_grid(bits, group or GROUPS[0], kind, store, channel=group is None).name
    return GroupEncoding(name, GroupLayout(bits, group, store, kind == "zp"))


GROUP_ENCODINGS: dict[str, GroupEncoding] = {
    made.name: made
    for made in (_group_encoding(*choice) for choice in product(GROUP_BITS, (*GROUPS, None), KINDS, STORES))
}
"""Whole numbers in groups, keyed by the name of the grid."""

FLOAT8_ENCODINGS: dict[str, Float8Encoding] = {
    made.name: made
    for made in (Float8Encoding("fp8-channel-float32", shared=False), Float8Encoding("fp8-tensor-float32", shared=True))
}
"""FP8, keyed by the name of the grid."""

ENCODINGS: dict[str, Encoding] = {
    **{name: BlockEncoding(name) for name in grids.ENCODABLE},
    **GROUP_ENCODINGS,
    **FLOAT8_ENCODINGS,
}
"""Every encoding, keyed by name."""

SOLVABLE: frozenset[str] = frozenset((*grids.GRIDS, *GROUP_ENCODINGS, *FLOAT8_ENCODINGS))
"""Those with scales and codes, which a solver can choose."""


def encoding(name: str) -> Encoding:
    """The encoding of that name. Raises: UnsupportedError naming the choices."""
    if name not in ENCODINGS:
        raise UnsupportedError(
            f"weights cannot be kept as {name}",
            fix=f"one of {', '.join((*grids.ENCODABLE, *FLOAT8_ENCODINGS))}, {group_names()}",
        )
    return ENCODINGS[name]


def group_names() -> str:
    """The names of GROUP_ENCODINGS in one line of words."""
    groups = "|".join((*(f"g{size}" for size in GROUPS), "channel"))
    return f"int{{{'|'.join(map(str, GROUP_BITS))}}}-{{{groups}}}-{{{'|'.join(KINDS)}}}[-bfloat16|-float32]"


def fitting(name: str, cols: int) -> str:
    """`name`, or the same with the largest smaller group that divides rows of `cols` weights, where its own does not.

    Where no group does, `name`: the last group of every row is filled up. Raises: UsageError for a name that is no
    encoding in groups.
    """
    wanted = GROUP_ENCODINGS.get(name)
    if wanted is None:
        raise UsageError(f"{name} is no encoding in groups")
    size = wanted.layout.group
    if size is None or cols % size == 0:
        return name
    stem, _, rest = name.split("-", 2)
    dividing = [group for group in GROUPS if group < size and cols % group == 0]
    return f"{stem}-g{max(dividing)}-{rest}" if dividing else name
