"""Levels that are no whole steps, and the nearest of them without a table look-up, so that it runs in SIMD lanes.

LINEAR  the integers low … high
UNEVEN  the 16 levels of IQ4_NL and IQ4_XS       `kvalues_iq4nl` in llama.cpp's `ggml-common.h`
E2M1    0 1 2 3 4 6 8 12 and their negatives     FP4, doubled (llmx.formats.microfloats)
E4M3    ±0 … ±448, floats of three bits          FP8
"""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, f32, linear_sums

LINEAR, UNEVEN, E2M1, E4M3 = range(4)


@compiled
def nearest_uneven(v):
    """The level of IQ4_NL nearest to v: the lowest level, plus every gap whose midpoint v has passed."""
    q = f32(-127)
    q += f32(23) if v > f32(-115.5) else f32(0)
    q += f32(21) if v > f32(-93.5) else f32(0)
    q += f32(18) if v > f32(-74) else f32(0)
    q += f32(16) if v > f32(-57) else f32(0)
    q += f32(14) if v > f32(-42) else f32(0)
    q += f32(13) if v > f32(-28.5) else f32(0)
    q += f32(12) if v > f32(-16) else f32(0)
    q += f32(11) if v > f32(-4.5) else f32(0)
    q += f32(12) if v > f32(7) else f32(0)
    q += f32(12) if v > f32(19) else f32(0)
    q += f32(13) if v > f32(31.5) else f32(0)
    q += f32(15) if v > f32(45.5) else f32(0)
    q += f32(16) if v > f32(61) else f32(0)
    q += f32(20) if v > f32(79) else f32(0)
    q += f32(24) if v > f32(101) else f32(0)
    return q


MIDPOINTS = np.array([-115.5, -93.5, -74, -57, -42, -28.5, -16, -4.5, 7, 19, 31.5, 45.5, 61, 79, 101], f32)
"""Half-way between neighbouring levels: the code of v is how many of them v has passed."""


@compiled
def nearest_e2m1(a):
    """The doubled E2M1 level nearest to a, a ≥ 0: whole numbers to 4, then 6, 8, 12."""
    q = np.rint(min(a, f32(4)))
    q += f32(2) if a > f32(5) else f32(0)
    q += f32(2) if a > f32(7) else f32(0)
    q += f32(4) if a > f32(10) else f32(0)
    return q


@compiled
def nearest_e4m3(a):
    """The E4M3 value nearest to a, a ≥ 0 (ties to even)."""
    a = min(a, f32(448))
    small = np.rint(a * f32(512)) * f32(2.0**-9)  # subnormal: multiples of 2⁻⁹
    shifted = a * f32(2.0**20 + 1)  # adding and taking away 2²⁰ times the value leaves its four leading bits, rounded
    return small if a < f32(2.0**-6) else shifted - (shifted - a)


@compiled
def _uneven_sums(x, w, inverse, sums):
    for i in range(x.shape[0]):
        for lane in range(LANES):
            q = nearest_uneven(x[i, lane] * inverse[lane])
            wq = w[i, lane] * q
            sums[1, lane] += wq * q
            sums[2, lane] += wq * x[i, lane]


@compiled
def _e2m1_sums(x, w, inverse, sums):
    for i in range(x.shape[0]):
        for lane in range(LANES):
            v = x[i, lane] * inverse[lane]
            q = nearest_e2m1(abs(v))
            wq = w[i, lane] * q
            sums[1, lane] += wq * q
            sums[2, lane] += wq * (x[i, lane] if v > f32(0) else -x[i, lane])


@compiled
def _e4m3_sums(x, w, inverse, sums):
    for i in range(x.shape[0]):
        for lane in range(LANES):
            v = x[i, lane] * inverse[lane]
            q = nearest_e4m3(abs(v))
            wq = w[i, lane] * q
            sums[1, lane] += wq * q
            sums[2, lane] += wq * (x[i, lane] if v > f32(0) else -x[i, lane])


@compiled
def level_sums(kind, low, high, work):
    """work.sums[1], [2] = Σwq², Σwqx for the levels q nearest to x · inverse. low, high: of LINEAR levels."""
    if kind == LINEAR:
        linear_sums(work.x, work.w, work.inverse, low, high, work.sums)
        return
    work.sums[:] = f32(0)
    if kind == UNEVEN:
        _uneven_sums(work.x, work.w, work.inverse, work.sums)
    elif kind == E2M1:
        _e2m1_sums(work.x, work.w, work.inverse, work.sums)
    else:
        _e4m3_sums(work.x, work.w, work.inverse, work.sums)
