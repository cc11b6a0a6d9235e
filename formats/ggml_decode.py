"""From the bytes of a ggml tensor back to floats, bit for bit as llama.cpp does it.

    value = d · scale · level[code] − offset · min        k-quants and IQ4_XS; types without a min have no second term
    value = d · level[code] + offset                      Q4_1, Q5_1
    value = d · float[scale] · level[code]                NVFP4, float[scale] half of the UE4M3 byte's value

d · scale and d · scale · level are exact in float32 up to at most one rounding, so the order of the factors is free.
Source: the dequantize_row functions of llama.cpp's `ggml-quants.c`, b11549.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_packers import LAYOUTS, BlockScales, unpack
from llmx.formats.microfloats import E2M1_DOUBLED, UE4M3

Floats = NDArray[np.float32]


def _levels(low: int, count: int) -> Floats:
    levels = np.arange(low, low + count, dtype=np.float32)
    levels.flags.writeable = False
    return levels


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_IQ4.flags.writeable = False

LEVELS: dict[str, Floats] = {
    "Q2_K": _levels(0, 4),
    "Q4_K": _levels(0, 16),
    "Q5_K": _levels(0, 32),
    "Q4_1": _levels(0, 16),
    "Q5_1": _levels(0, 32),
    "Q3_K": _levels(-4, 8),
    "Q6_K": _levels(-32, 64),
    "Q4_0": _levels(-8, 16),
    "Q5_0": _levels(-16, 32),
    "Q8_0": _levels(-128, 256),
    "IQ4_NL": _IQ4,
    "IQ4_XS": _IQ4,
    "MXFP4": E2M1_DOUBLED,
    "NVFP4": E2M1_DOUBLED,
}
"""What each code of a type stands for before it is scaled: f32[codes], keyed by type name."""


def _halved_ue4m3() -> Floats:
    """f32[256]: half of what a UE4M3 byte stands for, as ggml reads it: 0x7F is zero and bit 7 means nothing."""
    halved = np.zeros(256, np.float32)
    halved[:127] = halved[128:255] = UE4M3 / 2
    halved[255] = 240
    halved.flags.writeable = False
    return halved


_FLOAT_SCALES: dict[str, Floats] = {"NVFP4": _halved_ue4m3()}
"""f32[256]: what the byte of a sub-block's scale stands for, in the types where it is a float."""


def expand(type_name: str, scales: BlockScales) -> tuple[Floats, Floats | None]:
    """(scale, offset) of every sub-block, f32[n, subs]: value = scale · level + offset; None where a type has none."""
    with np.errstate(invalid="ignore", over="ignore"):  # a foreign file may hold inf or NaN; it decodes to what it says
        d = scales.d.astype(np.float32)[:, None]
        scale = d if scales.scales is None else d * _factors(type_name, scales.scales)
        if scales.offset is None:
            return scale, None
        offset = scales.offset.astype(np.float32)[:, None]
        return scale, offset if scales.mins is None else -(offset * scales.mins)


def _factors(type_name: str, scales: NDArray[np.int8]) -> NDArray[Any]:
    floats = _FLOAT_SCALES.get(type_name)
    return scales if floats is None else floats[scales.view(np.uint8)]


def decode_codes(type_name: str, scales: BlockScales, codes: NDArray[np.uint8]) -> Floats:
    """f32[n, block weights]: the weights that n blocks of that type stand for. codes: u8[n, block weights]."""
    scale, offset = expand(type_name, scales)
    weights = LEVELS[type_name][codes].reshape(len(codes), scale.shape[1], -1)
    with np.errstate(invalid="ignore", over="ignore"):
        weights *= scale[:, :, None]
        if offset is not None:
            weights += offset[:, :, None]
    return weights.reshape(codes.shape)


def _decode_f16(data: NDArray[np.uint8]) -> Floats:
    with np.errstate(invalid="ignore"):
        return data.view("<f2").astype(np.float32)


def _decode_bf16(data: NDArray[np.uint8]) -> Floats:
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


_FLOATS: dict[str, Callable[[NDArray[np.uint8]], Floats]] = {
    "F32": lambda data: data.view("<f4").astype(np.float32),
    "F16": _decode_f16,
    "BF16": _decode_bf16,
}


def decode(type_name: str, data: NDArray[np.uint8]) -> Floats:
    """f32[rows, cols]: the weights in data (u8[rows, row bytes]).

    Raises UnsupportedError for a type without a decoder, IntegrityError where a row is no whole number of blocks.
    """
    if type_name not in LAYOUTS and type_name not in _FLOATS:
        choices = ", ".join((*_FLOATS, *LAYOUTS))
        raise UnsupportedError(f"llmx cannot decode {type_name}", fix=f"it decodes {choices}")
    block = BLOCKS[type_name]
    rows, size = data.shape
    if size % block.bytes:
        raise IntegrityError(f"a row of {size} bytes is no whole number of {type_name} blocks of {block.bytes} bytes")
    data = np.ascontiguousarray(data)
    if type_name in _FLOATS:
        return _FLOATS[type_name](data)
    cols = size // block.bytes * block.weights
    return decode_codes(type_name, *unpack(type_name, data.reshape(-1, block.bytes))).reshape(rows, cols)
