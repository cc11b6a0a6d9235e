"""What a solver does to the stored scales of ggml's blocks: small legal moves, a mix of two, new super-scales.

All of it is arithmetic on BlockScales and knows no block type: which fields are there says what may move.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmx.formats.ggml_packers import BlockScales
from llmx.quant.stores import replaced, to_half

Floats = NDArray[np.float32]
FACTORS = (1 - 2.0**-6, 1 + 2.0**-6)  # of a float16 scale: sixteen of its steps, a ninth of a weight's at level 7
_SHIFTS = (-0.125, 0.125)  # of a float16 minimum, in steps of the scale
_PAIRS = tuple((up, right) for up in (-1, 0, 1) for right in (-1, 0, 1) if (up, right) != (0, 0))


def moved(integers: NDArray[Any], by: int, limits: tuple[int, int]) -> NDArray[Any]:
    """The integers plus `by`, kept in limits."""
    return np.clip(integers.astype(np.int16) + by, *limits).astype(integers.dtype)


def move_pairs(scales: BlockScales, limit: int) -> tuple[BlockScales, ...]:
    """The eight moves of (scale, minimum) by −1, 0, 1, both kept in 0 … limit."""
    assert scales.scales is not None
    assert scales.mins is not None
    up = {by: moved(scales.scales, by, (0, limit)) for by in (-1, 0, 1)}
    right = {by: moved(scales.mins, by, (0, limit)) for by in (-1, 0, 1)}
    return tuple(replace(scales, scales=up[a], mins=right[b]) for a, b in _PAIRS)


def move_integers(scales: BlockScales, limits: tuple[int, int]) -> tuple[BlockScales, ...]:
    """The integer scales one down and one up, kept in limits."""
    assert scales.scales is not None
    return tuple(replace(scales, scales=moved(scales.scales, by, limits)) for by in (-1, 1))


def move_floats(scales: BlockScales) -> tuple[BlockScales, ...]:
    """d times 1 ± 2⁻⁶ and, where there is one, the minimum moved by d / 8 down and up; float16 both."""
    d = scales.d.astype(np.float32)
    moves = [replace(scales, d=to_half(d * np.float32(factor))) for factor in FACTORS]
    if scales.offset is not None:
        offset = scales.offset.astype(np.float32)
        moves += [replace(scales, offset=to_half(offset + d * np.float32(shift))) for shift in _SHIFTS]
    return tuple(moves)


def _picked(mask: NDArray[np.bool_], other: NDArray[Any] | None, own: NDArray[Any] | None) -> NDArray[Any] | None:
    if own is None or other is None:
        return own
    return np.where(mask, other, own)


def merge(scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
    """scales, with what belongs to a sub-block taken from other where mask (bool[n, subs]) holds.

    That is its integers; in a type without integer scales the block is its own sub-block, and d and offset are taken.
    """
    mins = _picked(mask, other.mins, scales.mins)
    if scales.scales is not None:
        return replace(scales, scales=_picked(mask, other.scales, scales.scales), mins=mins)
    whole = mask.reshape(-1)
    offset = _picked(whole, other.offset, scales.offset)
    return BlockScales(np.where(whole, other.d, scales.d), offset, None, mins)


def with_super(scales: BlockScales, d: Floats, offset: Floats | None) -> BlockScales:
    """scales with d and, where one is stored and given, offset (f32[n]) replaced, rounded to float16.

    Beside unsigned minima neither may be negative. What is not finite leaves the old value in place.
    """
    low = -np.inf if scales.mins is None else 0.0
    new = replace(scales, d=to_half(replaced(d, scales.d, low)))
    if offset is None or scales.offset is None:
        return new
    return replace(new, offset=to_half(replaced(offset, scales.offset, low)))


def basis(scales: BlockScales, levels: Floats) -> tuple[Floats, Floats | None]:
    """(first, second), f32[n, weights]: the weights are d · first + offset · second. levels: f32[n, weights]."""
    first = levels
    if scales.scales is not None:
        subs = scales.scales.shape[1]
        first = (levels.reshape(len(levels), subs, -1) * scales.scales[:, :, None]).reshape(levels.shape)
    if scales.offset is None:
        return first, None
    if scales.mins is None:
        return first, np.ones_like(levels)
    mins = -scales.mins.astype(np.float32)
    return first, np.repeat(mins, levels.shape[1] // mins.shape[1], axis=1)
