"""Fits for grids without a minimum: value = scale · level. Q3_K, Q6_K, IQ4_XS; Q4_0, Q5_0, IQ4_NL; FP8.

For given levels q the best scale is Σwqx / Σwq² and takes Σwx² down by (Σwqx)² / Σwq², so one pass over a sub-block
both scores a candidate and improves it. kind says which levels (llmx.quant.nonlinear).
"""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, best_step, f32, half, load, reciprocal
from llmx.quant.nonlinear import level_sums


@compiled
def _keep_better(work, scale):
    """Where the codes tried last, with their best scale, beat the best so far: keep that scale and their sums."""
    for lane in range(LANES):
        qq, qx = work.sums[1, lane], work.sums[2, lane]
        s = qx / qq if qq > f32(0) else f32(0)
        if -s * qx < work.error[lane]:
            work.error[lane] = -s * qx
            scale[lane] = s
            work.best[1, lane], work.best[2, lane] = qq, qx


@compiled
def search(work, kind, low, high, starts, lloyd, scale):
    """Fill scale (f32[LANES]): each sub-block's own best scale, from every start and then `lloyd` refits of the best.

    starts: f32[k], the level on which the element of largest magnitude is put.
    """
    largest = np.zeros(LANES, f32)
    for i in range(work.x.shape[0]):
        for lane in range(LANES):
            value = work.x[i, lane]
            largest[lane] = value if abs(value) > abs(largest[lane]) else largest[lane]
    work.error[:] = f32(0)
    work.best[:] = f32(0)
    scale[:] = f32(0)
    for k in range(starts.size):
        for lane in range(LANES):
            work.inverse[lane] = starts[k] * reciprocal(largest[lane])
        level_sums(kind, low, high, work)
        _keep_better(work, scale)
    for _ in range(lloyd):
        for lane in range(LANES):
            work.inverse[lane] = reciprocal(scale[lane])
        level_sums(kind, low, high, work)
        _keep_better(work, scale)


@compiled
def _measure(work, kind, low, high, d, integers, error):
    """Fill error (f32[LANES]) with the true error, less Σwx², of the given integers, and work.sums with their sums."""
    for lane in range(LANES):
        work.inverse[lane] = reciprocal(d[lane] * integers[lane])
    level_sums(kind, low, high, work)
    for lane in range(LANES):
        s = d[lane] * integers[lane]
        error[lane] = s * (s * work.sums[1, lane] - f32(2) * work.sums[2, lane])


@compiled
def _move_integers(work, kind, low, high, limits, d, integers):
    """Move every integer scale to the best of itself and its two neighbours; work.error and work.best are theirs."""
    tried, best, error = np.empty(LANES, f32), np.zeros(LANES, f32), np.empty(LANES, f32)
    work.error[:] = f32(np.inf)
    for move in (0, -1, 1):
        for lane in range(LANES):
            tried[lane] = min(max(integers[lane] + f32(move), limits[0]), limits[1])
        _measure(work, kind, low, high, d, tried, error)
        for lane in range(LANES):
            if error[lane] < work.error[lane]:
                work.error[lane], best[lane] = error[lane], tried[lane]
                work.best[1, lane], work.best[2, lane] = work.sums[1, lane], work.sums[2, lane]
    integers[:] = best


@compiled
def _refit(work, kind, low, high, subs, integers, d):
    """Replace d by the least-squares one for the codes at hand where the true error, codes redone, falls."""
    trial, error = np.empty(LANES, f32), np.empty(LANES, f32)
    for start in range(0, LANES, subs):
        above, below = f32(0), f32(0)
        for lane in range(start, start + subs):
            above += integers[lane] * work.best[2, lane]
            below += integers[lane] * integers[lane] * work.best[1, lane]
        trial[start : start + subs] = half(above / below) if below > f32(0) else d[start]
    _measure(work, kind, low, high, trial, integers, error)
    for start in range(0, LANES, subs):
        gain = f32(0)
        for lane in range(start, start + subs):
            gain += error[lane] - work.error[lane]
        if gain < f32(0):
            d[start : start + subs] = trial[start : start + subs]


@compiled
def fit_super(values, importance, work, kind, low, high, limits, spread, starts, lloyd, loops, d_out, scales_out):
    """Fill d_out (f32[blocks], float16 values) and scales_out (i8[blocks, subs]) for values (f32[blocks · 256]).

    limits: the range of the integer scales. loops: rounds of moves of the integers, with a refit of d between two.
    d: f32[LANES], equal within a super-block.
    """
    subs = scales_out.shape[1]
    count = values.size // work.x.shape[0]
    low, high, limits = f32(low), f32(high), (f32(limits[0]), f32(limits[1]))
    integers, d = np.empty(LANES, f32), np.empty(LANES, f32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, 256, f32(spread), work)
        search(work, kind, low, high, starts, lloyd, integers)
        for start in range(0, LANES, subs):
            stop = start + subs
            d[start:stop] = best_step(integers, work.best[1], limits[0], limits[1], start, stop)
        for lane in range(LANES):
            integers[lane] = min(max(np.rint(integers[lane] * reciprocal(d[lane])), limits[0]), limits[1])
        for loop in range(loops):
            _move_integers(work, kind, low, high, limits, d, integers)
            if loop + 1 < loops:
                _refit(work, kind, low, high, subs, integers, d)
        for lane in range(lanes):
            d_out[(first + lane) // subs] = d[lane]
            scales_out[(first + lane) // subs, lane % subs] = np.int8(integers[lane])


@compiled
def fit_blocks(values, importance, work, kind, low, high, spread, starts, lloyd, d_out):
    """Fill d_out (f32[blocks]) for values (f32[blocks · size]): one scale a block, no super-block, not rounded yet."""
    size = work.x.shape[0]
    count = values.size // size
    low, high = f32(low), f32(high)
    scale = np.empty(LANES, f32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, size, f32(spread), work)
        search(work, kind, low, high, starts, lloyd, scale)
        for lane in range(lanes):
            d_out[first + lane] = scale[lane]
