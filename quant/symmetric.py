"""Fits for grids without a minimum: value = scale · level. Q3_K, Q6_K, IQ4_XS; Q4_0, Q5_0, Q8_0, IQ4_NL.

For given levels q the best scale is Σwqx / Σwq² and takes Σwx² down by (Σwqx)² / Σwq², so one pass over a sub-block both
scores a candidate and improves it. Levels are uneven where low = high = 0 (IQ4), else the integers low … high.
"""

from __future__ import annotations

import numpy as np

from llmx.quant.lanes import LANES, best_step, compiled, f32, half, linear_sums, load, reciprocal
from llmx.quant.nonlinear import uneven_sums


@compiled
def _sums(work, low, high):
    if low == high:
        uneven_sums(work.x, work.w, work.inverse, work.sums)
    else:
        linear_sums(work.x, work.w, work.inverse, low, high, work.sums)


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
def search(work, low, high, starts, lloyd, scale):
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
        _sums(work, low, high)
        _keep_better(work, scale)
    for _ in range(lloyd):
        for lane in range(LANES):
            work.inverse[lane] = reciprocal(scale[lane])
        _sums(work, low, high)
        _keep_better(work, scale)


@compiled
def _try_scales(work, low, high, d, subs, integer, move, chosen):
    """Score the integer scales moved by `move`; keep in `chosen`, with error and sums, where that is better."""
    limit_low, limit_high = chosen[1, 0], chosen[1, 1]
    for lane in range(LANES):
        work.inverse[lane] = reciprocal(d[lane // subs] * min(max(integer[lane] + move, limit_low), limit_high))
    _sums(work, low, high)
    for lane in range(LANES):
        moved = min(max(integer[lane] + move, limit_low), limit_high)
        s = d[lane // subs] * moved
        error = s * (s * work.sums[1, lane] - f32(2) * work.sums[2, lane])
        if error < work.error[lane]:
            work.error[lane] = error
            chosen[0, lane] = moved
            work.best[1, lane], work.best[2, lane] = work.sums[1, lane], work.sums[2, lane]


@compiled
def _refit(work, low, high, d, subs, integer):
    """Replace d by the least-squares one for the codes at hand where the real error, codes redone, falls."""
    trial = np.empty_like(d)
    for g in range(d.size):
        above, below = f32(0), f32(0)
        for lane in range(g * subs, (g + 1) * subs):
            above += integer[lane] * work.best[2, lane]
            below += integer[lane] * integer[lane] * work.best[1, lane]
        trial[g] = half(above / below) if below > f32(0) else d[g]
    for lane in range(LANES):
        work.inverse[lane] = reciprocal(trial[lane // subs] * integer[lane])
    _sums(work, low, high)
    for g in range(d.size):
        gain = f32(0)
        for lane in range(g * subs, (g + 1) * subs):
            s = trial[g] * integer[lane]
            gain += s * (s * work.sums[1, lane] - f32(2) * work.sums[2, lane]) - work.error[lane]
        if gain < f32(0):
            d[g] = trial[g]


@compiled
def fit_super(values, importance, work, low, high, limits, spread, starts, lloyd, loops, d_out, scales_out):
    """Fill d_out (f32[blocks], float16 values) and scales_out (i8[blocks, subs]) for values (f32[blocks · 256]).

    limits: the range of the integer scales. loops: rounds of ±1 on every integer scale and a refit of d.
    """
    subs = scales_out.shape[1]
    count = values.size // work.x.shape[0]
    low, high = f32(low), f32(high)
    scale = np.empty(LANES, f32)
    integer = np.empty(LANES, f32)
    chosen = np.zeros((2, LANES), f32)
    chosen[1, 0], chosen[1, 1] = f32(limits[0]), f32(limits[1])
    d = np.empty(LANES // subs, f32)
    for first in range(0, count, LANES):
        load(values, importance, first, min(LANES, count - first), 256, f32(spread), work)
        search(work, low, high, starts, lloyd, scale)
        for g in range(d.size):
            d[g] = best_step(scale, work.best[1], chosen[1, 0], chosen[1, 1], g * subs, (g + 1) * subs)
        for lane in range(LANES):
            rounded = np.rint(scale[lane] * reciprocal(d[lane // subs]))
            integer[lane] = min(max(rounded, chosen[1, 0]), chosen[1, 1])
        for loop in range(loops):
            work.error[:] = f32(np.inf)
            for move in (0, -1, 1):
                _try_scales(work, low, high, d, subs, integer, f32(move), chosen)
            integer[:] = chosen[0]
            if loop + 1 < loops:
                _refit(work, low, high, d, subs, integer)
        for lane in range(min(LANES, count - first)):
            block = (first + lane) // subs
            d_out[block] = d[lane // subs]
            scales_out[block, lane % subs] = np.int8(integer[lane])


@compiled
def fit_blocks(values, importance, work, low, high, spread, starts, lloyd, d_out):
    """Fill d_out (f32[blocks], float16 values) for values (f32[blocks · 32]): one scale a block, no super-block."""
    size = work.x.shape[0]
    count = values.size // size
    low, high = f32(low), f32(high)
    scale = np.empty(LANES, f32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, size, f32(spread), work)
        search(work, low, high, starts, lloyd, scale)
        for lane in range(lanes):
            d_out[first + lane] = half(scale[lane])
