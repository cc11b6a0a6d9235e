"""Fits of FP4 groups whose scale is itself a small float: the few stored scales that can serve are each tried.

No closed form helps where neighbouring scales are a factor of two (E8M0) or an eighth (E4M3) apart; the true error of a
candidate, its levels chosen anew, decides.
"""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, f32, load, reciprocal
from llmx.quant.nonlinear import level_sums


@compiled
def _smallest_unclipped(x, top, steps, place):
    """Fill place (i64[LANES]) with the number of the first step that reaches every weight of its group, or the last."""
    largest = np.zeros(LANES, f32)
    for i in range(x.shape[0]):
        for lane in range(LANES):
            largest[lane] = max(largest[lane], abs(x[i, lane]))
    for lane in range(LANES):
        place[lane] = min(np.searchsorted(steps, largest[lane] / top), steps.size - 1)


@compiled
def fit_steps(values, importance, work, kind, top, spread, steps, tries, out):
    """Fill out (u8[groups]) with the number of the best step of each group of values (f32[groups · size]).

    steps: f32[k], ascending, what the stored scales stand for. top: the largest level. tries: i64[t], from the smallest
    step that clips nothing.
    """
    size = work.x.shape[0]
    count = values.size // size
    place, best, tried = np.empty(LANES, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, size, f32(spread), work)
        _smallest_unclipped(work.x, f32(top), steps, place)
        work.error[:] = f32(np.inf)
        for k in range(tries.size):
            for lane in range(LANES):
                tried[lane] = min(max(place[lane] + tries[k], 0), steps.size - 1)
                work.inverse[lane] = reciprocal(steps[tried[lane]])
            level_sums(kind, f32(0), f32(0), work)
            for lane in range(LANES):
                s = steps[tried[lane]]
                error = s * (s * work.sums[1, lane] - f32(2) * work.sums[2, lane])
                if error < work.error[lane]:
                    work.error[lane], best[lane] = error, tried[lane]
        for lane in range(lanes):
            out[first + lane] = np.uint8(best[lane])


@compiled
def squared_error(values, importance, kind, scale, work):
    """Σw(x − scale · level)², less Σwx², over values (f32[n], rows that are groups), as a float64; the levels are the
    nearest. importance: w, f32[weights of a row], or empty for ones."""
    size = work.x.shape[0]
    total = 0.0
    for first in range(0, values.size // size, LANES):
        lanes = min(LANES, values.size // size - first)
        load(values, importance, first, lanes, size, f32(1), work)
        for i in range(size):  # `load` makes large weights count more
            work.w[i] = importance[i] if importance.size else f32(1)
        work.inverse[:] = reciprocal(scale)
        level_sums(kind, f32(0), f32(0), work)
        for lane in range(lanes):
            total += np.float64(scale * (scale * work.sums[1, lane] - f32(2) * work.sums[2, lane]))
    return total
