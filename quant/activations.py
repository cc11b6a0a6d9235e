"""Inputs of matrices in 8 bits: on one scale for all of them, measured beforehand, or on a scale of every row's own.

    static    value = scale · (code − zero point)       codes and zero point 0 … 255
    by row    value = max|row| / 127 · level            levels −127 … 127

Static codes are laid over a part of the range that the inputs were seen in. What lies outside is clipped: a few values
are far from all others, and a range with them in it makes every step coarser. The part is the one of least squared
error: both ends are drawn in alike, then each by itself.

                low                                          high
    ─────┼───────┼·····│···········│···········│·····┼────────┼──────
        seen    kept          zero is a code        kept     seen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmx.quant.protocol import Floats

TOP = 255  # the largest code
LEVELS, MIDDLE = 127, 128  # of a row, on either side of zero; the code of zero there
PARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)  # of both ends together
FINER = (1.25, 1.1, 0.9, 0.8, 0.65)  # of one end, once both together are settled


@dataclass(frozen=True, slots=True)
class InputScale:
    """A static quantization of inputs. scale > 0, zero_point 0 … 255."""

    scale: float
    zero_point: int


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


def rounded(values: Floats, scale: InputScale) -> Floats:
    """f32[…]: what the codes of the values stand for."""
    codes = np.rint(values / np.float32(scale.scale)) + np.float32(scale.zero_point)
    return (np.clip(codes, 0, TOP, out=codes) - np.float32(scale.zero_point)) * np.float32(scale.scale)


def rounded_by_row(values: Floats) -> Floats:
    """f32[…, in]: what the levels of the rows stand for."""
    largest = np.abs(values).max(-1, keepdims=True)
    levels = np.rint(values / np.where(largest > 0, largest, 1) * np.float32(LEVELS))
    return levels * (largest / np.float32(LEVELS))


def best_scale(inputs: Sample) -> InputScale:
    """The static scale of least squared error."""

    def loss(ends: tuple[float, float]) -> float:
        error = rounded(inputs.rows, affine(*ends)) - inputs.rows
        return float(np.square(error, out=error).sum(1, dtype=np.float64) @ inputs.counts[:, 0])

    best = min(((inputs.low * part, inputs.high * part) for part in PARTS), key=loss)
    for own in (_lows, _highs):
        best = min((best, *own(best, inputs)), key=loss)
    return affine(*best)


def _lows(ends: tuple[float, float], inputs: Sample) -> Sequence[tuple[float, float]]:
    return [(max(ends[0] * part, inputs.low), ends[1]) for part in FINER]


def _highs(ends: tuple[float, float], inputs: Sample) -> Sequence[tuple[float, float]]:
    return [(ends[0], min(ends[1] * part, inputs.high)) for part in FINER]


def static(inputs: Samples) -> Floats:
    """A Quantizer: the best static scale for the fitted rows."""
    return rounded(inputs.judged.rows, best_scale(inputs.fitted))


def by_row(inputs: Samples) -> Floats:
    """A Quantizer: every row's own scale."""
    return rounded_by_row(inputs.judged.rows)
