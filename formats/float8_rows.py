"""Bytes of weights as FP8 (E4M3), as TensorRT and TensorRT-LLM take them. No scale is computed here.

A row of `cols` weights, as llmx keeps it. Where a whole tensor shares its scale, every row repeats it:

    | codes: cols bytes | scale: float32, little-endian: 4 bytes |

    byte    s e e e e m m m         value = scale · E4M3(byte);  0x7F and 0xFF are NaN and stand in no row

Source: OCP 8-bit Floating Point (OFP8) v1.0, table 1; `float8_e4m3fn` of torch and ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError
from llmx.formats.microfloats import E4M3, E4M3_BITS, E4M3_CODES

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
SCALE_BYTES = 4
_NAN = 0x7F  # with either sign


@dataclass(frozen=True, slots=True)
class Float8Rows:
    """bits: u8[rows, cols], E4M3 as it is stored; a view of the rows. scales: f32[rows]."""

    bits: Bytes
    scales: Floats


def row_bytes(cols: int) -> int:
    """Bytes of a row."""
    return cols + SCALE_BYTES


def pack(codes: Bytes, scales: Floats, out: Bytes | None = None) -> Bytes:
    """u8[rows, row bytes] of codes (u8[rows, cols], counted as llmx.formats.microfloats does) and scales f32[rows].

    `out`, if given, is written and returned; it may be a view.
    """
    rows, cols = codes.shape
    data = np.empty((rows, row_bytes(cols)), np.uint8) if out is None else out
    data[:, :cols] = E4M3_BITS[codes]
    data[:, cols:] = np.ascontiguousarray(scales, "<f4").reshape(rows, 1).view(np.uint8)
    return data


def parts(data: Bytes, cols: int) -> Float8Rows:
    """What a runtime takes of kept rows (u8[rows, row bytes]).

    Raises: IntegrityError where a row has not the bytes of `cols` weights, or holds NaN.
    """
    if data.shape[1] != row_bytes(cols):
        raise IntegrityError(f"a row of {cols} weights in FP8 takes {row_bytes(cols)} bytes, not {data.shape[1]}")
    bits = data[:, :cols]
    bad = np.argwhere(bits & np.uint8(_NAN) == _NAN)
    if len(bad):
        row, column = bad[0]
        raise IntegrityError(f"{len(bad)} weights in FP8 are NaN, the first in row {row}, column {column}")
    return Float8Rows(bits, np.ascontiguousarray(data[:, cols:]).view("<f4")[:, 0].astype(np.float32, copy=False))


def unpack(data: Bytes, cols: int) -> tuple[Bytes, Floats]:
    """(codes u8[rows, cols], scales f32[rows]): the inverse of `pack`. Raises: as `parts`."""
    found = parts(data, cols)
    return E4M3_CODES[found.bits], found.scales


def decode(data: Bytes, cols: int) -> Floats:
    """f32[rows, cols]: what kept rows stand for. Raises: as `parts`."""
    codes, scales = unpack(data, cols)
    return E4M3[codes] * scales[:, None]
