"""Bytes of one block of each quantized ggml type: pack and unpack, exact inverses. No scale is computed here.

A block is fields at fixed offsets. Every field that is not a float16 is made of *bit planes*: `bits` bits of each of
its integers, from bit `shift` up, woven into bytes in stretches. One stretch takes `run` bytes and serves
run * 8 / bits integers; integer k of the stretch lies in byte k % run, at bit bits * (k // run):

    bits = 4, run = 4:     byte   0       1       2       3
                                 k4|k0   k5|k1   k6|k2   k7|k3        high bits left, low bits right

    bits = 2, run = 32:    byte 0 = k96 k64 k32 k0,  byte 1 = k97 k65 k33 k1,  …,  byte 31 = k127 k95 k63 k31

The layouts, byte offsets above the fields (f16 is little-endian; h = the bits that do not fit the plane before):

    Q4_0    0 d:f16 | 2 codes[16]                                  Q4_1    0 d:f16 | 2 m:f16 | 4 codes[16]
    Q5_0    0 d:f16 | 2 code_h[4] | 6 codes[16]                    Q5_1    0 d:f16 | 2 m:f16 | 4 code_h[4] | 8 codes[16]
    Q8_0    0 d:f16 | 2 codes[32]                                  IQ4_NL  0 d:f16 | 2 codes[16]
    Q2_K    0 scale,min[16] | 16 codes[64] | 80 d:f16 | 82 dmin:f16
    Q3_K    0 code_h[32] | 32 codes[64] | 96 scales[8] | 104 scale_h[4] | 108 d:f16
    Q4_K    0 d:f16 | 2 dmin:f16 | 4 scale,min[12] | 16 codes[128]
    Q5_K    0 d:f16 | 2 dmin:f16 | 4 scale,min[12] | 16 code_h[32] | 48 codes[128]
    Q6_K    0 codes[128] | 128 code_h[64] | 192 scales[16] | 208 d:f16
    IQ4_XS  0 d:f16 | 2 scale_h[2] | 4 scales[4] | 8 codes[128]
    MXFP4   0 d:E8M0 | 1 codes[16]                                 NVFP4   0 scales:UE4M3[4] | 4 codes[32]

E8M0, UE4M3 and the E2M1 codes of MXFP4 and NVFP4 are drawn in `microfloats.py`. What multiplies a whole NVFP4 tensor
is not in its blocks: a GGUF file holds it as the tensor's `.scale`.

Source: the block structures of llama.cpp's `ggml-common.h` and its dequantization, b11549.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmx.errors import UnsupportedError
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.microfloats import E2M1_BITS, E2M1_CODES, E8M0_HALVED, e8m0_bytes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The scales of `n` blocks, exactly as stored; everything of a block but its codes.

    d: f16[n], or f32[n] where it is stored as something else: half of what MXFP4's E8M0 byte stands for, as ggml has
    it; the tensor's own scale of NVFP4, which is not in the blocks (1 when unpacked). offset: like d, the super-scale
    of the mins (k-quants' dmin) or the minimum itself (m of Q4_1, Q5_1). scales: i8[n, subs], the sub-blocks' integer
    scales, signed where the type's are, or NVFP4's UE4M3 bytes. mins: i8[n, subs], 0 … 63; or the integer zero points
    of grids that have such. None where the type has no such field.
    """

    d: NDArray[np.floating]
    offset: NDArray[np.floating] | None = None
    scales: NDArray[np.int8] | None = None
    mins: NDArray[np.integer] | None = None


class StoredField(Protocol):
    """Some bits of a field's integers and where they lie in a block."""

    def put(self, values: Bytes, blocks: Bytes) -> None: ...

    def take(self, blocks: Bytes, values: Bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Plane:
    """`bits` bits of every integer of a field, from bit `shift` up, in the `size` bytes from byte `at`."""

    at: int
    size: int
    bits: int
    run: int
    shift: int = 0

    def put(self, values: Bytes, blocks: Bytes) -> None:
        """Write this plane of values (u8[n, count]) into blocks (u8[n, block bytes])."""
        if self.bits == 8:
            blocks[:, self.at : self.at + self.size] = values
            return
        per_byte = 8 // self.bits
        mask = (1 << self.bits) - 1
        stretches = values.reshape(len(values), self.size // self.run, per_byte, self.run)
        woven = (stretches[:, :, 0] >> self.shift) & mask
        for k in range(1, per_byte):
            woven |= ((stretches[:, :, k] >> self.shift) & mask) << (self.bits * k)
        blocks[:, self.at : self.at + self.size] = woven.reshape(len(values), self.size)

    def take(self, blocks: Bytes, values: Bytes) -> None:
        """Add this plane's bits of blocks to values (u8[n, count], zero where this plane's bits go)."""
        if self.bits == 8:
            values |= blocks[:, self.at : self.at + self.size]
            return
        per_byte = 8 // self.bits
        mask = (1 << self.bits) - 1
        woven = blocks[:, self.at : self.at + self.size].reshape(len(blocks), self.size // self.run, self.run)
        stretches = values.reshape(len(values), self.size // self.run, per_byte, self.run)
        for k in range(per_byte):
            stretches[:, :, k] |= ((woven >> (self.bits * k)) & mask) << self.shift


class SixBitPairs:
    """The eight 6-bit scales s and eight 6-bit mins m of Q4_K and Q5_K: the one field that is not made of planes.

    values = s0 … s7 m0 … m7; in the block, j = 0 … 3:

        byte  4 + j     s[j + 4] bits 4-5 | s[j]
        byte  8 + j     m[j + 4] bits 4-5 | m[j]
        byte 12 + j     m[j + 4] bits 0-3 | s[j + 4] bits 0-3
    """

    __slots__ = ()

    def put(self, values: Bytes, blocks: Bytes) -> None:
        """Write values (u8[n, 16]) into blocks."""
        fields = values.reshape(-1, 2, 2, 4)  # [n, s or m, first or last four, j]
        low, high = fields[:, :, 0], fields[:, :, 1]
        blocks[:, 4:12] = (low | (high >> 4) << 6).reshape(-1, 8)
        blocks[:, 12:16] = (high[:, 0] & 15) | (high[:, 1] & 15) << 4

    def take(self, blocks: Bytes, values: Bytes) -> None:
        """Write the 6-bit integers of blocks into values (u8[n, 16])."""
        first = blocks[:, 4:12].reshape(-1, 2, 4)
        last = blocks[:, 12:16]
        fields = values.reshape(-1, 2, 2, 4)
        fields[:, :, 0] = first & 63
        fields[:, 0, 1] = (last & 15) | (first[:, 0] >> 6) << 4
        fields[:, 1, 1] = (last >> 4) | (first[:, 1] >> 6) << 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields of one block lie. A stored integer is the field's value + its bias, modulo 256.

    d is an E8M0 byte where d_e8m0 holds, and not in the block where it is None. e2m1: codes are stored as E2M1 bits.
    """

    d: int | None
    codes: tuple[Plane, ...]
    offset: int | None = None
    scales: tuple[StoredField, ...] = ()
    subs: int = 1
    has_mins: bool = False
    scale_bias: int = 0
    code_bias: int = 0
    d_e8m0: bool = False
    e2m1: bool = False

    @property
    def integers(self) -> int:
        """Stored sub-block integers a block: scales, and mins after them."""
        return self.subs * (2 if self.has_mins else 1)


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(d=0, codes=(Plane(2, 16, 4, 16),)),
    "Q4_1": Layout(d=0, offset=2, codes=(Plane(4, 16, 4, 16),)),
    "Q5_0": Layout(d=0, codes=(Plane(6, 16, 4, 16), Plane(2, 4, 1, 1, shift=4))),
    "Q5_1": Layout(d=0, offset=2, codes=(Plane(8, 16, 4, 16), Plane(4, 4, 1, 1, shift=4))),
    # Code 128 is the value 0; the file holds the value itself, two's complement.
    "Q8_0": Layout(d=0, codes=(Plane(2, 32, 8, 32),), code_bias=128),
    "IQ4_NL": Layout(d=0, codes=(Plane(2, 16, 4, 16),)),
    "Q2_K": Layout(
        d=80, offset=82, subs=16, has_mins=True, scales=(Plane(0, 16, 4, 16),), codes=(Plane(16, 64, 2, 32),)
    ),
    "Q3_K": Layout(
        d=108,
        subs=16,
        scale_bias=32,
        scales=(Plane(96, 8, 4, 8), Plane(104, 4, 2, 4, shift=4)),
        codes=(Plane(32, 64, 2, 32), Plane(0, 32, 1, 32, shift=2)),
    ),
    "Q4_K": Layout(d=0, offset=2, subs=8, has_mins=True, scales=(SixBitPairs(),), codes=(Plane(16, 128, 4, 32),)),
    "Q5_K": Layout(
        d=0,
        offset=2,
        subs=8,
        has_mins=True,
        scales=(SixBitPairs(),),
        codes=(Plane(48, 128, 4, 32), Plane(16, 32, 1, 32, shift=4)),
    ),
    "Q6_K": Layout(
        d=208, subs=16, scales=(Plane(192, 16, 8, 16),), codes=(Plane(0, 128, 4, 64), Plane(128, 64, 2, 32, shift=4))
    ),
    "IQ4_XS": Layout(
        d=0,
        subs=8,
        scale_bias=32,
        scales=(Plane(4, 4, 4, 1), Plane(2, 2, 2, 1, shift=4)),
        codes=(Plane(8, 128, 4, 16),),
    ),
    "MXFP4": Layout(d=0, d_e8m0=True, codes=(Plane(1, 16, 4, 16),), e2m1=True),
    "NVFP4": Layout(d=None, subs=4, scales=(Plane(0, 4, 8, 4),), codes=(Plane(4, 32, 4, 8),), e2m1=True),
}
"""The byte layout of every type that has scales, keyed by type name."""


def layout(type_name: str) -> Layout:
    """The layout of that type. Raises UnsupportedError, naming the choices."""
    if type_name not in LAYOUTS:
        raise UnsupportedError(f"{type_name} blocks cannot be packed or unpacked", fix=f"one of {', '.join(LAYOUTS)}")
    return LAYOUTS[type_name]


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").reshape(-1)


def _put_float(values: NDArray[np.floating], blocks: Bytes, at: int, e8m0: bool = False) -> None:
    if e8m0:
        blocks[:, at] = e8m0_bytes(values.astype(np.float32, copy=False))
    else:
        blocks[:, at : at + 2] = values.astype("<f2", copy=False).view(np.uint8).reshape(-1, 2)


def _stored(form: Layout, codes: Bytes) -> Bytes:
    if form.e2m1:
        return E2M1_BITS[codes]
    return codes ^ np.uint8(form.code_bias) if form.code_bias else codes


def pack(type_name: str, scales: BlockScales, codes: Bytes, out: Bytes | None = None) -> Bytes:
    """u8[n, block bytes]: n blocks of that type from their scales and codes (u8[n, block weights]).

    A code counts the type's levels from the lowest, 0 up. `out`, if given, is written and returned; it may be a view.
    """
    form = layout(type_name)
    blocks = np.empty((len(codes), BLOCKS[type_name].bytes), np.uint8) if out is None else out
    if form.d is not None:
        _put_float(scales.d, blocks, form.d, form.d_e8m0)
    if form.offset is not None and scales.offset is not None:
        _put_float(scales.offset, blocks, form.offset)
    if form.scales and scales.scales is not None:
        fields = (scales.scales, scales.mins) if form.has_mins and scales.mins is not None else (scales.scales,)
        integers = np.concatenate(fields, axis=1).view(np.uint8) + np.uint8(form.scale_bias)
        for field in form.scales:
            field.put(integers, blocks)
    stored = _stored(form, codes)
    for plane in form.codes:
        plane.put(stored, blocks)
    return blocks


def _d(form: Layout, blocks: Bytes) -> NDArray[np.floating]:
    if form.d is None:
        return np.ones(len(blocks), np.float32)
    return E8M0_HALVED[blocks[:, form.d]] if form.d_e8m0 else _half(blocks, form.d)


def unpack(type_name: str, blocks: Bytes) -> tuple[BlockScales, Bytes]:
    """The scales and the codes (u8[n, block weights]) of blocks (u8[n, block bytes]): the exact inverse of `pack`."""
    form = layout(type_name)
    blocks = np.ascontiguousarray(blocks)
    codes = np.zeros((len(blocks), BLOCKS[type_name].weights), np.uint8)
    for plane in form.codes:
        plane.take(blocks, codes)
    if form.code_bias:
        codes ^= np.uint8(form.code_bias)
    if form.e2m1:
        codes = E2M1_CODES[codes]
    d = _d(form, blocks)
    offset = None if form.offset is None else _half(blocks, form.offset)
    if not form.scales:
        return BlockScales(d, offset), codes
    integers = np.zeros((len(blocks), form.integers), np.uint8)
    for field in form.scales:
        field.take(blocks, integers)
    signed = (integers - np.uint8(form.scale_bias)).view(np.int8)
    mins = np.ascontiguousarray(signed[:, form.subs :]) if form.has_mins else None
    return BlockScales(d, offset, np.ascontiguousarray(signed[:, : form.subs]), mins), codes
