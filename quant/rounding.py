"""From weights and chosen scales to codes: the nearest level of every weight, element by element, in numba."""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import f32, reciprocal
from llmx.quant.nonlinear import MIDPOINTS


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
def largest_magnitude(values):
    """The largest |value| of values (f32[n]); NaN counts as above infinity. Compared as integers, which orders both."""
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    return largest
