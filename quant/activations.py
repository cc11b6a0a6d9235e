"""Inputs of matrices in 8 bits: on one scale for all of them, measured beforehand, or on a scale of every row's own.

    static    uint8    value = scale · (code − zero point)       codes and zero point 0 … 255
              int8     value = scale · code                      codes −128 … 127; 127 is the end of the range
              fp8      value = scale · E4M3                      magnitudes up to 448; 448 is the end of the range
    by row             value = max|row| / 127 · level            levels −127 … 127

Static codes are laid over a part of the range that the inputs were seen in. What lies outside is clipped: a few values
are far from all others, and a range with them in it makes every step coarser. The part is the one of least squared
error: both ends are drawn in alike, then each by itself, unless zero has to be in the middle (int8, fp8).

                low                                          high
    ─────┼───────┼·····│···········│···········│·····┼────────┼──────
        seen    kept          zero is a code        kept     seen
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np

from llmx.quant.protocol import Floats

Kind = Literal["uint8", "int8", "fp8"]
Rounding = Literal["uint8", "int8", "fp8", "float", "by row"]

TOP = 255  # the largest code
INT8_LOW, INT8_TOP = -128, 127
FP8_TOP, FP8_BITS, FP8_LOWEST = 448.0, 4, -5  # leading bits; the exponent, as frexp counts it, of the smallest normal
LEVELS, MIDDLE = 127, 128  # of a row, on either side of zero; the code of zero there
PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)  # of both ends together
FINER = (1.25, 1.1, 0.9, 0.8, 0.65)  # of one end, once both together are settled


@dataclass(frozen=True, slots=True)
class InputScale:
    """A static quantization of inputs. scale > 0, zero_point 0 … 255, and 0 where zero is in the middle."""

    scale: float
    zero_point: int
    kind: Kind = "uint8"


UNIT = InputScale(1 / LEVELS, MIDDLE)
"""Of a row divided by its largest magnitude; and of inputs that are still to be measured, in a plan."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of a matrix's inputs. rows: f32[n, in]. counts: f32[n, 1], how many rows each one stands for.

    largest: f32[in], of the magnitudes of every column; low ≤ 0 and high ≥ 0: the ends of all that was seen.
    """

    rows: Floats
    counts: Floats
    largest: Floats
    low: float
    high: float

    def divided(self, columns: Floats) -> Sample:
        """The same inputs, their columns divided by positive scales f32[in]. Ends: of the rows that are here."""
        rows = self.rows / columns
        low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        return Sample(rows, self.counts, self.largest / columns, low, high)


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs to choose scales on, and others to judge them by: on its own tokens a static range is never left."""

    fitted: Sample
    judged: Sample

    def divided(self, columns: Floats) -> Samples:
        """The same inputs, their columns divided by positive scales f32[in]."""
        return Samples(self.fitted.divided(columns), self.judged.divided(columns))


class Quantizer(Protocol):
    """How inputs are rounded."""

    def __call__(self, inputs: Samples) -> Floats:
        """f32[n, in]: what the codes of the judged rows stand for."""
        ...


def affine(low: float, high: float) -> InputScale:
    """The scale whose codes reach from low ≤ 0 to high ≥ 0; zero is one of its values."""
    scale = (high - low) / TOP or 1.0
    return InputScale(scale, round(-low / scale))


def _symmetric(low: float, high: float) -> InputScale:
    """The int8 scale that reaches as far as the farther end."""
    return InputScale(max(-low, high) / INT8_TOP or 1.0, 0, "int8")


def _float8(low: float, high: float) -> InputScale:
    """The fp8 scale that reaches as far as the farther end."""
    return InputScale(max(-low, high) / FP8_TOP or 1.0, 0, "fp8")


def rounded(values: Floats, scale: InputScale) -> Floats:
    """f32[…]: what the codes of the values stand for."""
    return _CODES[scale.kind].rounded(values, np.float32(scale.scale), np.float32(scale.zero_point))


def _in_uint8(values: Floats, scale: np.float32, zero: np.float32) -> Floats:
    codes = np.rint(values / scale) + zero
    return (np.clip(codes, 0, TOP, out=codes) - zero) * scale


def _in_int8(values: Floats, scale: np.float32, zero: np.float32) -> Floats:
    codes = np.rint(values / scale)
    return np.clip(codes, INT8_LOW, INT8_TOP, out=codes) * scale


def _in_fp8(values: Floats, scale: np.float32, zero: np.float32) -> Floats:
    """Each to a multiple of the step that E4M3 has where it is: four leading bits, fewer below the smallest normal."""
    inside = np.clip(values / scale, -FP8_TOP, FP8_TOP)
    step = np.ldexp(np.float32(1), np.maximum(np.frexp(inside)[1], FP8_LOWEST) - FP8_BITS)
    return np.rint(inside / step) * step * scale


def rounded_by_row(values: Floats) -> Floats:
    """f32[…, in]: what the levels of the rows stand for."""
    largest = np.abs(values).max(-1, keepdims=True)
    levels = np.rint(values / np.where(largest > 0, largest, 1) * np.float32(LEVELS))
    return levels * (largest / np.float32(LEVELS))


def best_scale(inputs: Sample, kind: Kind = "uint8") -> InputScale:
    """The static scale of least squared error."""
    codes = _CODES[kind]

    def loss(ends: Ends) -> float:
        error = rounded(inputs.rows, codes.scale(*ends)) - inputs.rows
        return float(np.square(error, out=error).sum(1, dtype=np.float64) @ inputs.counts[:, 0])

    best = min(((inputs.low * part, inputs.high * part) for part in PARTS), key=loss)
    for moved in codes.moves:
        best = min((best, *(moved(best, inputs, part) for part in FINER)), key=loss)
    return codes.scale(*best)


Ends = tuple[float, float]


def _low(ends: Ends, inputs: Sample, part: float) -> Ends:
    return max(ends[0] * part, inputs.low), ends[1]


def _high(ends: Ends, inputs: Sample, part: float) -> Ends:
    return ends[0], min(ends[1] * part, inputs.high)


def _both(ends: Ends, inputs: Sample, part: float) -> Ends:
    return max(ends[0] * part, inputs.low), min(ends[1] * part, inputs.high)


@dataclass(frozen=True, slots=True)
class _Codes:
    """scale: whose codes reach from end to end. rounded: of values, scale, zero point. moves: of the ends, once both
    together are settled."""

    scale: Callable[[float, float], InputScale]
    rounded: Callable[[Floats, np.float32, np.float32], Floats]
    moves: tuple[Callable[[Ends, Sample, float], Ends], ...]


_CODES: Mapping[Kind, _Codes] = {
    "uint8": _Codes(affine, _in_uint8, (_low, _high)),
    "int8": _Codes(_symmetric, _in_int8, (_both,)),
    "fp8": _Codes(_float8, _in_fp8, (_both,)),
}


def whole_range(low: float, high: float, kind: Kind) -> InputScale:
    """The static scale whose codes reach from low ≤ 0 to high ≥ 0."""
    return _CODES[kind].scale(low, high)


def _static(inputs: Samples, kind: Kind) -> Floats:
    """The best static scale for the fitted rows."""
    return rounded(inputs.judged.rows, best_scale(inputs.fitted, kind))


QUANTIZERS: Mapping[Rounding, Quantizer] = {
    "uint8": partial(_static, kind="uint8"),
    "int8": partial(_static, kind="int8"),
    "fp8": partial(_static, kind="fp8"),
    "float": lambda inputs: inputs.judged.rows,
    "by row": lambda inputs: rounded_by_row(inputs.judged.rows),
}
"""Keyed by how inputs are rounded: on a static scale, which is the best for the fitted rows, not at all, or by row."""
