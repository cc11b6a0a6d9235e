"""Rotary position tables, computed in float32 steps as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llmx.models.architecture import Rope, RopeKind


def inverse_frequencies(rope: Rope, length: int) -> np.ndarray:
    """f32[dim / 2], radians a position, for a sequence of `length` positions (dynamic and longrope depend on it)."""
    return FREQUENCIES[rope.kind](rope, length)


def rope_tables(rope: Rope, positions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each f32[positions, dim / 2], attention factor included.

    positions: integers [positions]. length: of the whole sequence, cached positions included.
    """
    angles = positions.astype(np.float32)[:, None] * inverse_frequencies(rope, length)[None, :]
    scale = np.float32(1.0 if rope.attention_factor is None else rope.attention_factor)
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32) * scale, np.sin(wide).astype(np.float32) * scale


def _powers(rope: Rope, theta: float | None = None) -> np.ndarray:
    """f32[dim / 2] theta ** (2 i / dim), RoFormer, https://arxiv.org/abs/2104.09864, section 3.4.2."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return np.power(float(rope.theta if theta is None else theta), exponents.astype(np.float64)).astype(np.float32)


def _default(rope: Rope, length: int) -> np.ndarray:
    return np.float32(1) / _powers(rope)


def _linear(rope: Rope, length: int) -> np.ndarray:
    """Positions divided by the factor: https://arxiv.org/abs/2306.15595."""
    return np.float32(1) / _powers(rope) / np.float32(rope.factor)


def _dynamic(rope: Rope, length: int) -> np.ndarray:
    """Dynamic NTK: past the original context the base grows with the length (YaRN paper, section 3.3)."""
    assert rope.original_context is not None
    stretch = rope.factor * max(length, rope.original_context) / rope.original_context - (rope.factor - 1)
    return np.float32(1) / _powers(rope, rope.theta * stretch ** (rope.dim / (rope.dim - 2)))


def _llama3(rope: Rope, length: int) -> np.ndarray:
    """Llama 3.1: long waves are divided by the factor, short ones kept, the ones between blended."""
    assert rope.original_context is not None and rope.low_freq_factor is not None and rope.high_freq_factor is not None
    plain = _default(rope, length)
    turns = np.float32(rope.original_context) * plain / np.float32(2 * math.pi)  # in the original context
    smooth = (turns - np.float32(rope.low_freq_factor)) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return (np.float32(1) - smooth) * plain / np.float32(rope.factor) + smooth * plain


def _yarn(rope: Rope, length: int) -> np.ndarray:
    """YaRN, https://arxiv.org/abs/2309.00071, section 3.2: a ramp between interpolated and plain frequencies."""
    assert rope.original_context is not None and rope.beta_fast is not None and rope.beta_slow is not None
    original, theta, dim = rope.original_context, rope.theta, rope.dim

    def dim_of(turns: float) -> float:  # the element pair that turns so often within the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    plain = np.float32(1) / _powers(rope)
    interpolated = np.float32(1) / (np.float32(rope.factor) * _powers(rope))
    return interpolated * ramp + plain * (np.float32(1) - ramp)


def _longrope(rope: Rope, length: int) -> np.ndarray:
    """LongRoPE, https://arxiv.org/abs/2402.13753: searched factors, another set past the original context."""
    assert rope.original_context is not None and rope.short_factor is not None and rope.long_factor is not None
    factors = rope.long_factor if length > rope.original_context else rope.short_factor
    return np.float32(1) / (np.array(factors, dtype=np.float32) * _powers(rope))


FREQUENCIES: dict[RopeKind, Callable[[Rope, int], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
