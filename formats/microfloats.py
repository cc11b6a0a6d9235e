"""The small floats that weights and their scales are stored in, and the order in which llmx counts their codes.

    E2M1  (FP4)   s e e m            0  0.5  1  1.5  2  3  4  6
    E4M3  (FP8)   s e e e e m m m    subnormals of 2⁻⁹, then 2⁻⁶ … 448; 0x7F is NaN, and there is no infinity
    UE4M3 (scale) 0 e e e e m m m    E4M3 without a sign
    E8M0  (scale) e e e e e e e e    2^(byte − 127)

A grid's codes count its levels from the lowest. Stored bits are sign and magnitude, so both signs run outward from
zero; the second zero, −0, comes last, and no grid uses it:

    stored  F  E  …  9  0  1  …  7 | 8         code  0  1  …  6  7  8  …  14 | 15         E2M1
    level  −6 −4  … −½  0  ½  …  6 | 0

Source: OCP Microscaling Formats (MX) v1.0; OCP 8-bit Floating Point (OFP8) v1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def _fixed(values: NDArray[np.generic], dtype: type) -> NDArray:
    array = np.ascontiguousarray(values, dtype)
    array.flags.writeable = False
    return array


def _bits(magnitudes: int, sign: int) -> Bytes:
    """u8[2 · magnitudes]: the stored bits of every code."""
    outward = np.arange(magnitudes)
    return _fixed(np.concatenate([outward[:0:-1] | sign, outward, [sign]]), np.uint8)


def _codes(bits: Bytes, count: int) -> Bytes:
    """u8[count]: the code of every stored pattern; 0 where there is none (NaN)."""
    codes = np.zeros(count, np.uint8)
    codes[bits] = np.arange(len(bits))
    return _fixed(codes, np.uint8)


def _mirrored(magnitudes: NDArray[np.float64]) -> Floats:
    """f32[2 · n]: the level of every code. −0 is +0 here, as the runtimes decode it."""
    return _fixed(np.concatenate([-magnitudes[:0:-1], magnitudes, [0.0]]), np.float32)


def _e4m3(byte: NDArray[np.int64]) -> NDArray[np.float64]:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


UE4M3: Floats = _fixed(_e4m3(np.arange(127)), np.float32)
"""f32[127]: what the bytes 0 … 0x7E of an E4M3 scale stand for, ascending."""

E2M1_DOUBLED: Floats = _mirrored(np.array([0.0, 1, 2, 3, 4, 6, 8, 12]))
"""f32[16]: twice the value of every E2M1 code: whole numbers, as ggml has them, beside halved scales."""
E2M1_BITS: Bytes = _bits(8, 0x8)
"""u8[16]: the stored nibble of every code."""
E2M1_CODES: Bytes = _codes(E2M1_BITS, 16)
"""u8[16]: the code of every stored nibble."""

E4M3: Floats = _mirrored(_e4m3(np.arange(127)))
"""f32[254]: the value of every E4M3 code."""
E4M3_BITS: Bytes = _bits(127, 0x80)
"""u8[254]: the stored byte of every code."""
E4M3_CODES: Bytes = _codes(E4M3_BITS, 256)
"""u8[256]: the code of every stored byte; 0 for the two NaN."""

E8M0_HALVED: Floats = _fixed(2.0 ** (np.arange(256) - 128.0), np.float32)
"""f32[256]: half of what every E8M0 byte stands for. The last two are finite, as ggml reads them."""


def e8m0_bytes(halved: Floats) -> Bytes:
    """u8[n]: the E8M0 bytes of the scales whose halves (f32[n], powers of two, 2⁻¹²⁸ … 2¹²⁷) are given.

    A power of two is its exponent's bits alone; the two that are subnormal in float32 are one bit of the mantissa.
    """
    bits = halved.astype(np.float32, copy=False).view(np.uint32)
    return np.where(bits >> 23 == 0, bits >> 22, (bits >> 23) + 1).astype(np.uint8)
