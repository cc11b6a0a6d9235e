"""From weights and chosen scales to codes: the nearest level of every weight, element by element, in numba."""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import f32, reciprocal
from llmx.quant.nonlinear import MIDPOINTS, nearest_e4m3


@compiled
def round_affine(values, scale, offset, top, codes):
    """Fill codes (u8[subs, size]) with round((value − offset) / scale) in 0 … top.

    values: f32[subs, size]; scale, offset: f32[subs].
    """
    top = f32(top)
    for sub in range(values.shape[0]):
        r, m = reciprocal(scale[sub]), offset[sub]
        for i in range(values.shape[1]):
            codes[sub, i] = np.uint8(min(max(np.rint((values[sub, i] - m) * r), f32(0)), top))


@compiled
def round_linear(values, scale, low, high, zero, codes):
    """Fill codes (u8[subs, size]) with round(value / scale) in low … high, plus zero (the code of 0)."""
    low, high, zero = f32(low), f32(high), f32(zero)
    for sub in range(values.shape[0]):
        r = reciprocal(scale[sub])
        for i in range(values.shape[1]):
            codes[sub, i] = np.uint8(min(max(np.rint(values[sub, i] * r), low), high) + zero)


@compiled
def round_shifted(values, scale, zero, top, codes):
    """Fill codes (u8[groups, size]) with round(value / scale) + zero in 0 … top. zero: u8[groups]."""
    top = f32(top)
    for group in range(values.shape[0]):
        r, z = reciprocal(scale[group]), f32(zero[group])
        for i in range(values.shape[1]):
            codes[group, i] = np.uint8(min(max(np.rint(values[group, i] * r) + z, f32(0)), top))


@compiled
def round_uneven(values, scale, codes):
    """Fill codes (u8[subs, size]) with the number of the IQ4 level nearest to value / scale."""
    for sub in range(values.shape[0]):
        r = reciprocal(scale[sub])
        for i in range(values.shape[1]):
            v = values[sub, i] * r
            code = np.uint8(0)
            for k in range(15):
                code += np.uint8(v > MIDPOINTS[k])
            codes[sub, i] = code


@compiled
def round_e2m1(values, scale, codes):
    """Fill codes (u8[groups, size]) with the code of the E2M1 level nearest to value / scale; code 7 is zero."""
    for group in range(values.shape[0]):
        r = reciprocal(scale[group])
        for i in range(values.shape[1]):
            v = values[group, i] * r
            a = abs(v)
            place = (
                np.uint8(np.rint(min(a, f32(4)))) + np.uint8(a > f32(5)) + np.uint8(a > f32(7)) + np.uint8(a > f32(10))
            )
            codes[group, i] = np.uint8(7) + place if v > f32(0) else np.uint8(7) - place


@compiled
def round_e4m3(values, scale, codes):
    """Fill codes (u8[groups, size]) with the code of the E4M3 value nearest to value / scale; code 126 is zero.

    A value's place among the positive ones is its byte: exponent and mantissa, cut out of the float32.
    """
    rounded = np.empty(values.shape[1], f32)
    bits = rounded.view(np.uint32)
    for group in range(values.shape[0]):
        r = reciprocal(scale[group])
        for i in range(values.shape[1]):
            rounded[i] = nearest_e4m3(abs(values[group, i] * r))
        for i in range(values.shape[1]):
            small = rounded[i] < f32(2.0**-6)
            place = (
                np.int32(rounded[i] * f32(512)) if small else np.int32(bits[i] >> np.uint32(20)) - np.int32(120 << 3)
            )
            codes[group, i] = np.uint8(126 + place if values[group, i] * r > f32(0) else 126 - place)


@compiled
def largest_magnitude(values):
    """The largest |value| of values (f32[n]); NaN counts as above infinity. Compared as integers, which orders both."""
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return largest
