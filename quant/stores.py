"""The floats that scales are stored as: rounded to the nearest, saturating, so that a scale is always finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
HALF_MAX = 65504.0
_BF16_MAX = float(np.array([0x7F7F0000], np.uint32).view(np.float32)[0])


def to_half(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """values rounded to float16; what is too large becomes the largest."""
    return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16)


def _half(values: Floats) -> Floats:
    return to_half(values).astype(np.float32)


def _bf16(values: Floats) -> Floats:
    bits = np.clip(values.astype(np.float32, copy=False), -_BF16_MAX, _BF16_MAX).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _single(values: Floats) -> Floats:
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Store:
    """How a scale is stored. largest: the largest that is. rounded: f32[n] to f32[n], values that the type holds."""

    largest: float
    rounded: Callable[[Floats], Floats]


STORES: dict[str, Store] = {
    "float16": Store(HALF_MAX, _half),
    "bfloat16": Store(_BF16_MAX, _bf16),
    "float32": Store(float(np.finfo(np.float32).max), _single),
}
"""Keyed by the type's name."""


def replaced(new: Floats, old: NDArray[np.floating], low: float = -np.inf) -> Floats:
    """new where it is finite, else old; not below low."""
    return np.maximum(np.where(np.isfinite(new), new, old), low).astype(np.float32)
