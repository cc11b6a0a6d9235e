"""F32, F16 and BF16: rounded to the nearest, ties to even, as IEEE 754 has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmx.quant.compiled import compiled
from llmx.quant.lanes import f32


@compiled
def _round_bf16(bits, out):
    for i in range(bits.size):
        out[i] = np.uint16((bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled
def _round_f16(values, bits, out):
    for i in range(bits.size):
        sign = (bits[i] >> np.uint32(16)) & np.uint32(0x8000)
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        # Normal halves: drop 13 bits of the mantissa, to even, and move the exponent's zero from 127 to 15.
        normal = (magnitude + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
        # Subnormal halves count in 2⁻²⁴; adding 2²³ rounds to whole numbers.
        count = np.uint32(np.int32((abs(values[i]) * f32(2.0**24) + f32(2.0**23)) - f32(2.0**23)))
        small = magnitude < np.uint32(0x38800000)
        out[i] = np.uint16(sign | (count if small else normal - np.uint32(112 << 10)))


def _f32(weight: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    out[:] = weight.astype("<f4", copy=False).view(np.uint8)


def _f16(weight: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    rounded = np.empty(weight.shape, np.uint16)
    values = weight.reshape(-1)
    _round_f16(values, values.view(np.uint32), rounded.reshape(-1))
    out[:] = rounded.astype("<u2", copy=False).view(np.uint8)


def _bf16(weight: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    rounded = np.empty(weight.shape, np.uint16)
    _round_bf16(weight.reshape(-1).view(np.uint32), rounded.reshape(-1))
    out[:] = rounded.astype("<u2", copy=False).view(np.uint8)


@dataclass(frozen=True, slots=True)
class FloatType:
    """A type without blocks. limit: the largest |weight| that does not become infinite in it."""

    limit: float
    encode: Callable[[NDArray[np.float32], NDArray[np.uint8]], None]


_HALF_LIMIT = float(np.nextafter(np.float32(65520), np.float32(0)))  # 65520 is half-way to the float16 after the last
_BF16_LIMIT = float(np.array([0x7F7F7FFF], np.uint32).view(np.float32)[0])  # what is above rounds up to infinity

FLOATS: dict[str, FloatType] = {
    "F32": FloatType(float(np.finfo(np.float32).max), _f32),
    "F16": FloatType(_HALF_LIMIT, _f16),
    "BF16": FloatType(_BF16_LIMIT, _bf16),
}
