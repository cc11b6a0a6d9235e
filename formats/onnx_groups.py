"""Bytes of weights as whole numbers in groups, as onnxruntime's MatMulNBits takes them. No scale is computed here.

A row of `cols` weights is cut into groups of `group` neighbours, or is one group itself (`channel`). The last group may
be short of weights: it is filled up with codes that stand for zero. A row of k groups, as llmx keeps it:

    | codes: k · ceil(group · bits / 8) bytes | scales: k · 4 or 2 bytes | zero points: ceil(k · bits / 8), if any |

Rows under each other make a matrix of bytes, of which B, scales and zero_points of MatMulNBits are three ranges of
columns. Codes and zero points count from 0 and lie in their bytes from the low bits up:

    8 bits    byte 0 = c0                 byte 1 = c1
    4 bits    byte 0 = c1 c0              byte 1 = c3 c2                    high bits left, low bits right
    2 bits    byte 0 = c3 c2 c1 c0        byte 1 = c7 c6 c5 c4

    value = scale · (code − zero point),    the zero point 2^(bits−1) where none is stored

Scales are little-endian. Source: MatMulNBits in onnxruntime's ContribOperators.md, 1.32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Store:
    """How a scale is stored: its bytes, and the way there and back; u8[rows, k · nbytes] and f32[rows, k]."""

    nbytes: int
    put: Callable[[Floats], Bytes]
    take: Callable[[Bytes], Floats]


def _put_bfloat16(scales: Floats) -> Bytes:
    return (scales.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def _take_bfloat16(data: Bytes) -> Floats:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


STORES: dict[str, Store] = {
    "float32": Store(4, lambda s: s.astype("<f4", copy=False).view(np.uint8), lambda d: d.view("<f4").astype("f4")),
    "float16": Store(2, lambda s: s.astype("<f2").view(np.uint8), lambda d: d.view("<f2").astype(np.float32)),
    "bfloat16": Store(2, _put_bfloat16, _take_bfloat16),
}
"""Keyed by the type's name."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """The columns of the kept rows that hold each part."""

    codes: slice
    scales: slice
    zero_points: slice | None


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """How rows are kept. bits: 2, 4 or 8. group: weights of one, None for whole rows. store: of STORES."""

    bits: int
    group: int | None
    store: str
    zero_points: bool

    def group_weights(self, cols: int) -> int:
        """Weights of a group."""
        return self.group or cols

    def groups(self, cols: int) -> int:
        """Groups of a row, a short one included."""
        return -(-cols // self.group_weights(cols))

    def group_bytes(self, cols: int) -> int:
        """Bytes of a group's codes."""
        return _packed(self.group_weights(cols), self.bits)

    def ranges(self, cols: int) -> Ranges:
        """Where the parts of a row lie."""
        count = self.groups(cols)
        codes = count * self.group_bytes(cols)
        scales = codes + count * STORES[self.store].nbytes
        zeros = slice(scales, scales + _packed(count, self.bits)) if self.zero_points else None
        return Ranges(slice(0, codes), slice(codes, scales), zeros)

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row."""
        ranges = self.ranges(cols)
        return (ranges.zero_points or ranges.scales).stop


@dataclass(frozen=True, slots=True)
class Parts:
    """What an operator takes: codes u8[rows, groups, bytes], scales f32[rows, groups], zero_points u8[rows, bytes].

    Codes and zero points are packed, and views of the rows where strides allow it."""

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None


@dataclass(frozen=True, slots=True)
class Groups:
    """Numbers: codes u8[rows, cols], scales f32[rows, groups], values that the store holds, zero_points like scales."""

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None = None


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack_bits(values: Bytes, bits: int) -> Bytes:
    """u8[..., ceil(n · bits / 8)]: values (u8[..., n], below 2^bits) in their bytes; the bits left over are zero."""
    if bits == 8:
        return values
    per_byte = 8 // bits
    missing = -values.shape[-1] % per_byte
    if missing:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], missing), np.uint8)], axis=-1)
    packed = values[..., ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= values[..., place::per_byte] << np.uint8(bits * place)
    return packed


def unpack_bits(data: Bytes, bits: int, count: int) -> Bytes:
    """u8[..., count]: the exact inverse of `pack_bits`."""
    if bits == 8:
        return data[..., :count]
    per_byte = 8 // bits
    values = np.empty((*data.shape[:-1], data.shape[-1] * per_byte), np.uint8)
    for place in range(per_byte):
        values[..., place::per_byte] = (data >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1)
    return values[..., :count]


def pack(layout: GroupLayout, groups: Groups, out: Bytes | None = None) -> Bytes:
    """u8[rows, row bytes]. `out`, if given, is written and returned; it may be a view."""
    rows, cols = groups.codes.shape
    ranges = layout.ranges(cols)
    data = np.empty((rows, layout.row_bytes(cols)), np.uint8) if out is None else out
    filled = _filled(layout, groups).reshape(rows, layout.groups(cols), layout.group_weights(cols))
    data[:, ranges.codes] = pack_bits(filled, layout.bits).reshape(rows, -1)
    data[:, ranges.scales] = STORES[layout.store].put(np.ascontiguousarray(groups.scales, np.float32))
    if ranges.zero_points is not None:
        assert groups.zero_points is not None, "a layout with zero points is given some"
        data[:, ranges.zero_points] = pack_bits(groups.zero_points, layout.bits)
    return data


def _filled(layout: GroupLayout, groups: Groups) -> Bytes:
    """The codes of whole groups: a short last one is filled up with what stands for zero."""
    rows, cols = groups.codes.shape
    missing = layout.groups(cols) * layout.group_weights(cols) - cols
    if not missing:
        return groups.codes
    middle = np.full((rows, 1), 1 << layout.bits >> 1, np.uint8)
    zero = middle if groups.zero_points is None else groups.zero_points[:, -1:]
    return np.concatenate([groups.codes, np.repeat(zero, missing, axis=1)], axis=1)


def parts(layout: GroupLayout, data: Bytes, cols: int) -> Parts:
    """What MatMulNBits takes of kept rows (u8[rows, row bytes]).

    Raises: IntegrityError where a row has not the bytes of `cols` weights.
    """
    rows, size = data.shape
    if size != layout.row_bytes(cols):
        raise IntegrityError(
            f"a row of {cols} weights in {layout.bits}-bit groups takes {layout.row_bytes(cols)} bytes, not {size}"
        )
    ranges = layout.ranges(cols)
    scales = STORES[layout.store].take(np.ascontiguousarray(data[:, ranges.scales]))
    zeros = None if ranges.zero_points is None else data[:, ranges.zero_points]
    return Parts(data[:, ranges.codes].reshape(rows, layout.groups(cols), -1), scales, zeros)


def unpack(layout: GroupLayout, data: Bytes, cols: int) -> Groups:
    """The exact inverse of `pack`. Raises: as `parts`."""
    found = parts(layout, data, cols)
    codes = unpack_bits(found.codes, layout.bits, layout.group_weights(cols)).reshape(len(data), -1)[:, :cols]
    zeros = None if found.zero_points is None else unpack_bits(found.zero_points, layout.bits, layout.groups(cols))
    return Groups(np.ascontiguousarray(codes), found.scales, zeros)
