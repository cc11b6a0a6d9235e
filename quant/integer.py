"""Fits of groups of any size to whole codes: value = scale · (code − zero), zero fixed or any code. Q8_0; INT4, INT8.

For given levels q = code − zero the best scale is Σwqx / Σwq². With few levels the error follows from the same two
sums. With 8 bits it is so small beside Σwx² that float32 would lose it in the difference: there the residual is summed
itself, at the scale tried, and the step to the best scale follows from e = x − scale · q:

    Σw(x − (scale + t) · q)² = Σwe² − 2t · Σwqe + t² · Σwq²,    least at t = Σwqe / Σwq²
"""

from __future__ import annotations

import numpy as np

from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, f32, load, reciprocal


@compiled
def _between_sums(x, w, inverse, low, high, sums):
    """sums[1], sums[2] = Σwq², Σwqx for the levels q = round(x · inverse), kept in low … high (f32[LANES])."""
    sums[:] = f32(0)
    for i in range(0, x.shape[0], 4):
        for lane in range(LANES):
            r, a, b = inverse[lane], low[lane], high[lane]
            x0, x1, x2, x3 = x[i, lane], x[i + 1, lane], x[i + 2, lane], x[i + 3, lane]
            q0 = min(max(np.rint(x0 * r), a), b)
            q1 = min(max(np.rint(x1 * r), a), b)
            q2 = min(max(np.rint(x2 * r), a), b)
            q3 = min(max(np.rint(x3 * r), a), b)
            w0, w1, w2, w3 = w[i, lane] * q0, w[i + 1, lane] * q1, w[i + 2, lane] * q2, w[i + 3, lane] * q3
            sums[1, lane] += (w0 * q0 + w1 * q1) + (w2 * q2 + w3 * q3)
            sums[2, lane] += (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3)


@compiled
def _residual_sums(x, w, inverse, scale, low, high, sums):
    """sums = Σwe², Σwq², Σwqe for the same levels q and e = x − scale · q."""
    sums[:] = f32(0)
    for i in range(0, x.shape[0], 2):
        for lane in range(LANES):
            r, a, b, s = inverse[lane], low[lane], high[lane], scale[lane]
            x0, x1 = x[i, lane], x[i + 1, lane]
            q0 = min(max(np.rint(x0 * r), a), b)
            q1 = min(max(np.rint(x1 * r), a), b)
            e0, e1 = x0 - s * q0, x1 - s * q1
            w0, w1 = w[i, lane] * e0, w[i + 1, lane] * e1
            sums[0, lane] += w0 * e0 + w1 * e1
            sums[1, lane] += w[i, lane] * (q0 * q0) + w[i + 1, lane] * (q1 * q1)
            sums[2, lane] += w0 * q0 + w1 * q1


@compiled
def _score(work, low, high, fine, error, scale):
    """Fill scale with the best for the levels nearest at work.inverse, and error with its error (less Σwx², or all)."""
    if fine:
        for lane in range(LANES):
            scale[lane] = reciprocal(work.inverse[lane])
        _residual_sums(work.x, work.w, work.inverse, scale, low, high, work.sums)
        for lane in range(LANES):
            qq = work.sums[1, lane]
            step = work.sums[2, lane] / qq if qq > f32(0) else f32(0)
            scale[lane] += step
            error[lane] = work.sums[0, lane] - step * work.sums[2, lane]
    else:
        _between_sums(work.x, work.w, work.inverse, low, high, work.sums)
        for lane in range(LANES):
            qq = work.sums[1, lane]
            scale[lane] = work.sums[2, lane] / qq if qq > f32(0) else f32(0)
            error[lane] = -scale[lane] * work.sums[2, lane]


@compiled
def _try(work, tried, top, fine, scale, zero):
    """Where the best scale for zero points `tried` at work.inverse beats the best so far: keep both."""
    low, high = np.empty(LANES, f32), np.empty(LANES, f32)
    error, found = np.empty(LANES, f32), np.empty(LANES, f32)
    for lane in range(LANES):
        low[lane], high[lane] = -tried[lane], top - tried[lane]
    _score(work, low, high, fine, error, found)
    for lane in range(LANES):
        if error[lane] < work.error[lane]:
            work.error[lane], scale[lane], zero[lane] = error[lane], found[lane], tried[lane]


@compiled
def _spans(x, free, positive, low, width):
    """Fill low and width (f32[LANES]) with the lowest weight and the range, 0 in it; unless free, width is the weight
    of largest magnitude, without its sign where scales are positive."""
    low[:] = f32(0)
    width[:] = f32(0)
    for i in range(x.shape[0]):
        for lane in range(LANES):
            value = x[i, lane]
            low[lane] = min(low[lane], value)
            if free:
                width[lane] = max(width[lane], value)
            else:
                width[lane] = value if abs(value) > abs(width[lane]) else width[lane]
    for lane in range(LANES):
        if free:
            width[lane] -= low[lane]
        elif positive:
            width[lane] = abs(width[lane])


@compiled
def search(work, levels, free, positive, fine, starts, lloyd, loops, scale, zero):
    """Fill scale and zero (f32[LANES]): each group's best from every start, `lloyd` refits and `loops` moves of zero.

    levels: (low, high) without a zero point. starts: f32[k, 2] as in affine.search where zero is free, else f32[k, 1]:
    the level on which the weight of largest magnitude is put.
    """
    low, width, tried = np.empty(LANES, f32), np.empty(LANES, f32), np.empty(LANES, f32)
    top = levels[1] - levels[0]
    _spans(work.x, free, positive, low, width)
    work.error[:] = f32(np.inf)
    scale[:] = f32(0)
    zero[:] = -levels[0]
    tried[:] = -levels[0]
    for k in range(starts.shape[0]):
        for lane in range(LANES):
            if free:
                work.inverse[lane] = (top + starts[k, 0]) * reciprocal(width[lane])
                shifted = -low[lane] * starts[k, starts.shape[1] - 1] * work.inverse[lane]
                tried[lane] = min(max(np.rint(shifted), f32(0)), top)
            else:
                work.inverse[lane] = starts[k, 0] * reciprocal(width[lane])
        _try(work, tried, top, fine, scale, zero)
    for _ in range(lloyd):
        _again(work, f32(0), top, fine, scale, zero)
    for _ in range(loops):
        _again(work, f32(-1), top, fine, scale, zero)
        _again(work, f32(1), top, fine, scale, zero)


@compiled
def _again(work, by, top, fine, scale, zero):
    """Try the codes nearest at the best scale, with the zero point moved `by`."""
    tried = np.empty(LANES, f32)
    for lane in range(LANES):
        work.inverse[lane] = reciprocal(scale[lane])
        tried[lane] = min(max(zero[lane] + by, f32(0)), top)
    _try(work, tried, top, fine, scale, zero)


@compiled
def fit_groups(
    values, importance, work, low, high, free, positive, fine, spread, starts, lloyd, loops, scale_out, zero_out
):
    """Fill scale_out (f32[groups], not rounded yet) and, where zero is free, zero_out (u8[groups])."""
    size = work.x.shape[0]
    count = values.size // size
    levels = f32(low), f32(high)
    scale, zero = np.empty(LANES, f32), np.empty(LANES, f32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, size, f32(spread), work)
        search(work, levels, free, positive, fine, starts, lloyd, loops, scale, zero)
        for lane in range(lanes):
            scale_out[first + lane] = scale[lane]
            if free:
                zero_out[first + lane] = np.uint8(zero[lane])
