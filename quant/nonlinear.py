"""The 16 uneven levels of IQ4_NL and IQ4_XS: the nearest level without a table look-up, so that it runs in SIMD lanes.

Source of the levels: `kvalues_iq4nl` in llama.cpp's `ggml-common.h` (llmx.formats.ggml_decode.LEVELS).
"""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, f32


@compiled
def nearest_level(v):
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
def uneven_sums(x, w, inverse, sums):
    """sums[1], sums[2] = Σwq², Σwqx for the levels q nearest to x · inverse."""
    sums[:] = f32(0)
    for i in range(x.shape[0]):
        for lane in range(LANES):
            q = nearest_level(x[i, lane] * inverse[lane])
            wq = w[i, lane] * q
            sums[1, lane] += wq * q
            sums[2, lane] += wq * x[i, lane]
