"""Fits for grids with a scale and a minimum: value = scale · code − minimum, codes 0 … top. Here: Q4_1 and Q5_1.

For given codes the scale and minimum of least Σw(x − scale · q + minimum)² solve two linear equations in
Σw, Σwx, Σwq, Σwq², Σwqx, and the error follows from the same five sums: one pass over a sub-block scores a candidate
and improves it (Lloyd's step). `search` is shared with the k-quants.
"""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, affine_sums, f32, load, reciprocal


@compiled
def solve(w, wx, q, qq, qx, signed):
    """(scale, minimum) of least error for given codes; unless signed, minimum ≥ 0. scale ≥ 0 always."""
    mean = q / w
    curvature = qq - mean * q
    s = max((qx - mean * wx) / curvature, f32(0)) if curvature > f32(1e-6) * qq else f32(0)
    m = (s * q - wx) / w
    if m >= f32(0) or signed:
        return s, m
    return (max(qx / qq, f32(0)) if qq > f32(0) else f32(0)), f32(0)


@compiled
def loss(s, m, w, wx, q, qq, qx):
    """Σw(x − s·q + m)² less Σwx²."""
    return s * (s * qq - f32(2) * (m * q + qx)) + m * (m * w + f32(2) * wx)


@compiled
def _keep_better(work, signed, scale, minimum):
    """Where the codes tried last, with their best scale and minimum, beat the best so far: keep all three."""
    for lane in range(LANES):
        w, wx = work.total[0, lane], work.total[1, lane]
        q, qq, qx = work.sums[0, lane], work.sums[1, lane], work.sums[2, lane]
        s, m = solve(w, wx, q, qq, qx, signed)
        error = loss(s, m, w, wx, q, qq, qx)
        if error < work.error[lane]:
            work.error[lane], scale[lane], minimum[lane] = error, s, m
            work.best[0, lane], work.best[1, lane], work.best[2, lane] = q, qq, qx


@compiled
def _range(x, signed, low, width):
    """Fill low and width (f32[LANES]) with each sub-block's lowest weight and its range; with 0 in it unless signed."""
    for lane in range(LANES):
        low[lane] = x[0, lane] if signed else min(x[0, lane], f32(0))
        width[lane] = x[0, lane] if signed else max(x[0, lane], f32(0))
    for i in range(1, x.shape[0]):
        for lane in range(LANES):
            low[lane] = min(low[lane], x[i, lane])
            width[lane] = max(width[lane], x[i, lane])
    for lane in range(LANES):
        width[lane] -= low[lane]


@compiled
def search(work, top, signed, starts, lloyd, scale, minimum):
    """Fill scale and minimum (f32[LANES]): each sub-block's own best, from every start and `lloyd` refits of the best.

    starts: f32[k, 2]; the range of the weights is laid on top + starts[k, 0] steps, the minimum on starts[k, 1] of
    the lowest weight.
    """
    low, width = np.empty(LANES, f32), np.empty(LANES, f32)
    _range(work.x, signed, low, width)
    work.error[:] = f32(0)
    work.best[:] = f32(0)
    scale[:] = f32(0)
    minimum[:] = f32(0)
    for k in range(starts.shape[0]):
        for lane in range(LANES):
            work.inverse[lane] = (top + starts[k, 0]) * reciprocal(width[lane])
            work.offset[lane] = -low[lane] * starts[k, 1]
        affine_sums(work.x, work.w, work.inverse, work.offset, top, work.sums)
        _keep_better(work, signed, scale, minimum)
    for _ in range(lloyd):
        for lane in range(LANES):
            work.inverse[lane] = reciprocal(scale[lane])
            work.offset[lane] = minimum[lane]
        affine_sums(work.x, work.w, work.inverse, work.offset, top, work.sums)
        _keep_better(work, signed, scale, minimum)


@compiled
def fit_blocks(values, importance, work, top, spread, starts, lloyd, d_out, offset_out):
    """Fill d_out and offset_out (f32[blocks], not rounded yet; value = d · code + offset), one pair a block."""
    size = work.x.shape[0]
    count = values.size // size
    scale, minimum = np.empty(LANES, f32), np.empty(LANES, f32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, size, f32(spread), work)
        search(work, f32(top), True, starts, lloyd, scale, minimum)
        for lane in range(lanes):
            d_out[first + lane] = scale[lane]
            offset_out[first + lane] = -minimum[lane]
