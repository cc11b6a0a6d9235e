"""The fit of Q2_K, Q4_K and Q5_K: value = d · scale · code − dmin · min over super-blocks of 256 weights.

Each sub-block is first solved alone (affine.search). Then d and dmin are chosen as float16, and the integers are moved
together by ±1 with the true error, codes redone, of each of the nine moves; d and dmin are refitted to the codes by
two linear equations, and kept where the true error falls. So the rounding of all four is inside the search.
"""

from __future__ import annotations

import numpy as np

from llmx.quant.affine import loss, search
from llmx.quant.compiled import compiled
from llmx.quant.lanes import LANES, affine_sums, best_step, f32, half, load, reciprocal


@compiled
def _move(value, by, limit):
    return min(max(value + by, f32(0)), limit)


@compiled
def _measure(work, top, d, dmin, scales, mins, error):
    """Fill error (f32[LANES]) with the true error, less Σwx², of the given integers, and work.sums with their sums."""
    for lane in range(LANES):
        work.inverse[lane] = reciprocal(d[lane] * scales[lane])
        work.offset[lane] = dmin[lane] * mins[lane]
    affine_sums(work.x, work.w, work.inverse, work.offset, top, work.sums)
    for lane in range(LANES):
        q, qq, qx = work.sums[0, lane], work.sums[1, lane], work.sums[2, lane]
        s, m = d[lane] * scales[lane], work.offset[lane]
        error[lane] = loss(s, m, work.total[0, lane], work.total[1, lane], q, qq, qx)


@compiled
def _move_integers(work, top, limit, d, dmin, scales, mins):
    """Move every sub-block's two integers to the best of their nine neighbours; work.error and work.best are theirs."""
    tried_scales, tried_mins, error = np.empty(LANES, f32), np.empty(LANES, f32), np.empty(LANES, f32)
    best_scales, best_mins = np.zeros(LANES, f32), np.zeros(LANES, f32)
    work.error[:] = f32(np.inf)
    for k in range(9):
        up, right = f32(k // 3 - 1), f32(k % 3 - 1)
        for lane in range(LANES):
            tried_scales[lane] = _move(scales[lane], up, limit)
            tried_mins[lane] = _move(mins[lane], right, limit)
        _measure(work, top, d, dmin, tried_scales, tried_mins, error)
        for lane in range(LANES):
            if error[lane] < work.error[lane]:
                work.error[lane] = error[lane]
                best_scales[lane], best_mins[lane] = tried_scales[lane], tried_mins[lane]
                work.best[0, lane] = work.sums[0, lane]
                work.best[1, lane] = work.sums[1, lane]
                work.best[2, lane] = work.sums[2, lane]
    scales[:] = best_scales
    mins[:] = best_mins


@compiled
def _least_squares(work, lanes, scales, mins, d, dmin):
    """(d, dmin) of least error for the codes of the super-block in `lanes`, as float16."""
    aa, ab, bb, ax, bx = f32(0), f32(0), f32(0), f32(0), f32(0)
    for lane in range(lanes[0], lanes[1]):
        a, b = scales[lane], mins[lane]
        aa += a * a * work.best[1, lane]
        ab += a * b * work.best[0, lane]
        bb += b * b * work.total[0, lane]
        ax += a * work.best[2, lane]
        bx += b * work.total[1, lane]
    determinant = aa * bb - ab * ab
    if determinant > f32(1e-5) * aa * bb:
        d, dmin = (ax * bb - ab * bx) / determinant, (ab * ax - aa * bx) / determinant
    elif aa > f32(0):
        d = (ax + dmin * ab) / aa
    return half(max(d, f32(0))), half(max(dmin, f32(0)))


@compiled
def _refit(work, top, subs, scales, mins, d, dmin):
    """Replace d and dmin by the least-squares ones for the codes at hand where the true error falls."""
    new_d, new_dmin, error = np.empty(LANES, f32), np.empty(LANES, f32), np.empty(LANES, f32)
    for start in range(0, LANES, subs):
        stop = start + subs
        pair = _least_squares(work, (start, stop), scales, mins, d[start], dmin[start])
        new_d[start:stop], new_dmin[start:stop] = pair[0], pair[1]
    _measure(work, top, new_d, new_dmin, scales, mins, error)
    for start in range(0, LANES, subs):
        gain = f32(0)
        for lane in range(start, start + subs):
            gain += error[lane] - work.error[lane]
        if gain < f32(0):
            d[start : start + subs] = new_d[start : start + subs]
            dmin[start : start + subs] = new_dmin[start : start + subs]


@compiled
def _start_integers(work, limit, subs, scales, mins, d, dmin):
    """Turn the sub-blocks' own scales and minima into a first d and dmin and integers in 0 … limit, in place."""
    curvature = np.empty(LANES, f32)
    for lane in range(LANES):  # of the error over the scale, the minimum free to follow
        q = work.best[0, lane]
        curvature[lane] = max(work.best[1, lane] - q * q / work.total[0, lane], f32(0))
    for start in range(0, LANES, subs):
        stop = start + subs
        d[start:stop] = best_step(scales, curvature, f32(0), limit, start, stop)
        dmin[start:stop] = best_step(mins, work.total[0], f32(0), limit, start, stop)
    for lane in range(LANES):
        scales[lane] = min(np.rint(scales[lane] * reciprocal(d[lane])), limit)
        mins[lane] = min(np.rint(mins[lane] * reciprocal(dmin[lane])), limit)


@compiled
def fit_super(
    values, importance, work, top, limit, spread, starts, lloyd, loops, d_out, dmin_out, scales_out, mins_out
):
    """Fill d_out, dmin_out (f32[blocks], float16 values), scales_out, mins_out (i8[blocks, subs]) for whole blocks.

    limit: the largest integer scale. loops: rounds of moves, with a refit between two. d, dmin: f32[LANES], equal
    within a super-block.
    """
    subs = scales_out.shape[1]
    count = values.size // work.x.shape[0]
    top, limit = f32(top), f32(limit)
    scales, mins, d, dmin = np.empty(LANES, f32), np.empty(LANES, f32), np.empty(LANES, f32), np.empty(LANES, f32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        load(values, importance, first, lanes, 256, f32(spread), work)
        search(work, top, False, starts, lloyd, scales, mins)
        _start_integers(work, limit, subs, scales, mins, d, dmin)
        for loop in range(loops):
            _move_integers(work, top, limit, d, dmin, scales, mins)
            if loop + 1 < loops:
                _refit(work, top, subs, scales, mins, d, dmin)
        for lane in range(lanes):
            block = (first + lane) // subs
            d_out[block], dmin_out[block] = d[lane], dmin[lane]
            scales_out[block, lane % subs] = np.int8(scales[lane])
            mins_out[block, lane % subs] = np.int8(mins[lane])
