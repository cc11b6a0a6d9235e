"""The inner loops that the ggml grids share, in numba: sub-blocks side by side in SIMD lanes.

LANES sub-blocks are transposed into x[size, LANES], so that a sum over a sub-block is an addition of rows: the compiler
needs no horizontal reduction and no licence to reorder floats. All is float32 in a fixed order, so results are the
same on every machine and however the rows are cut into chunks. Lanes past the last sub-block hold zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llmx.quant.compiled import compiled

f32 = np.float32
LANES = 64
_STEPS = 12  # candidates of best_step
TINY = f32(1e-30)  # below this a scale or an energy counts as zero: its inverse would leave float32
Array = np.ndarray[Any, Any]


class Work(NamedTuple):
    """What one batch of LANES sub-blocks needs: x, w f32[size, LANES]; the others f32[k, LANES]."""

    x: Array  # the weights
    w: Array  # the importance of each
    total: Array  # Σw, Σwx
    sums: Array  # Σwq, Σwq², Σwqx of the codes tried last
    best: Array  # the same of the best codes
    inverse: Array  # 1 / scale tried
    offset: Array  # minimum tried
    error: Array  # error of the best, less Σwx²


def workspace(size: int) -> Work:
    """An empty batch for sub-blocks of `size` weights."""
    rows = (size, size, 2, 3, 3)
    return Work(*(np.zeros((k, LANES), f32) for k in rows), *(np.zeros(LANES, f32) for _ in range(3)))


@compiled
def half(value):
    """The float16 nearest to value (ties to even, saturating), as a float32."""
    value = min(max(f32(value), f32(-65504)), f32(65504))
    if abs(value) < f32(2.0**-14):  # subnormal halves are the multiples of 2⁻²⁴, which is float32's step in [0.5, 1)
        magnitude = (abs(value) + f32(0.5)) - f32(0.5)
        return -magnitude if value < f32(0) else magnitude
    # Adding and taking away 2¹³ times the value leaves its eleven leading bits, rounded.
    shifted = value * f32(8193)
    return shifted - (shifted - value)


@compiled
def reciprocal(value):
    """1 / value, or 0 where that would be infinite."""
    return f32(1) / value if abs(value) > TINY else f32(0)


@compiled
def load(values, importance, first, count, group, spread, work):
    """Fill work with `count` sub-blocks of values (f32[weights], rows one after another) from number `first` on.

    w = importance · (spread + (x/σ)²), σ the root mean square of the `group` weights around. importance: f32[cols],
    or empty for ones.
    """
    x, w, energy = work.x, work.w, work.inverse
    size = x.shape[0]
    x[:, count:] = f32(0)
    w[:] = f32(1)
    for lane in range(count):
        base = (first + lane) * size
        for i in range(size):
            x[i, lane] = values[base + i]
        if importance.size:
            column = base % importance.size
            for i in range(size):
                w[i, lane] = importance[column + i]
    _inverse_energy(x, group // size, energy)
    _weigh(x, w, energy, spread, work.total)


@compiled
def _inverse_energy(x, lanes, energy):
    """Fill energy (f32[LANES]) with 1 / σ², the mean square taken over `lanes` neighbouring sub-blocks."""
    energy[:] = f32(0)
    for i in range(x.shape[0]):
        for lane in range(LANES):
            energy[lane] += x[i, lane] * x[i, lane]
    for start in range(0, LANES, lanes):
        mean = f32(0)
        for lane in range(start, start + lanes):
            mean += energy[lane]
        mean /= f32(lanes * x.shape[0])
        for lane in range(start, start + lanes):
            energy[lane] = reciprocal(mean)


@compiled
def _weigh(x, w, energy, spread, total):
    total[:] = f32(0)
    for i in range(x.shape[0]):
        for lane in range(LANES):
            value = x[i, lane]
            weight = w[i, lane] * (spread + value * value * energy[lane])
            w[i, lane] = weight
            total[0, lane] += weight
            total[1, lane] += weight * value


@compiled
def affine_sums(x, w, inverse, offset, top, sums):
    """sums = Σwq, Σwq², Σwqx for the codes q = round((x + offset) · inverse), kept in 0 … top.

    Four rows at a time, so that the running sums are loaded and stored once for four.
    """
    sums[:] = f32(0)
    for i in range(0, x.shape[0], 4):
        for lane in range(LANES):
            m, r = offset[lane], inverse[lane]
            x0, x1, x2, x3 = x[i, lane], x[i + 1, lane], x[i + 2, lane], x[i + 3, lane]
            q0 = min(max(np.rint((x0 + m) * r), f32(0)), top)
            q1 = min(max(np.rint((x1 + m) * r), f32(0)), top)
            q2 = min(max(np.rint((x2 + m) * r), f32(0)), top)
            q3 = min(max(np.rint((x3 + m) * r), f32(0)), top)
            w0, w1, w2, w3 = w[i, lane] * q0, w[i + 1, lane] * q1, w[i + 2, lane] * q2, w[i + 3, lane] * q3
            sums[0, lane] += (w0 + w1) + (w2 + w3)
            sums[1, lane] += (w0 * q0 + w1 * q1) + (w2 * q2 + w3 * q3)
            sums[2, lane] += (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3)


@compiled
def linear_sums(x, w, inverse, low, high, sums):
    """sums[1], sums[2] = Σwq², Σwqx for the levels q = round(x · inverse), kept in low … high."""
    sums[:] = f32(0)
    for i in range(0, x.shape[0], 4):
        for lane in range(LANES):
            r = inverse[lane]
            x0, x1, x2, x3 = x[i, lane], x[i + 1, lane], x[i + 2, lane], x[i + 3, lane]
            q0 = min(max(np.rint(x0 * r), low), high)
            q1 = min(max(np.rint(x1 * r), low), high)
            q2 = min(max(np.rint(x2 * r), low), high)
            q3 = min(max(np.rint(x3 * r), low), high)
            w0, w1, w2, w3 = w[i, lane] * q0, w[i + 1, lane] * q1, w[i + 2, lane] * q2, w[i + 3, lane] * q3
            sums[1, lane] += (w0 * q0 + w1 * q1) + (w2 * q2 + w3 * q3)
            sums[2, lane] += (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3)


@compiled
def best_step(wanted, curvature, low, high, start, stop):
    """The float16 step d (as float32) whose integers round(wanted / d) in low … high serve lanes start … stop best.

    The loss of a sub-block is curvature · (wanted − d · integer)². The largest |wanted| is put on low, if that is
    negative, else on high, and on up to a quarter less.
    """
    largest = f32(0)
    for lane in range(start, stop):
        if abs(wanted[lane]) > abs(largest):
            largest = wanted[lane]
    if abs(largest) < TINY:
        return f32(0)
    anchor = low if low < f32(0) else high
    # The candidates lie side by side, so that the loop over them is the one that runs in SIMD lanes.
    step, inverse, loss = np.empty(_STEPS, f32), np.empty(_STEPS, f32), np.zeros(_STEPS, f32)
    for k in range(_STEPS):
        step[k] = half(largest / (anchor * (f32(1) - f32(0.025) * f32(k))))
        inverse[k] = reciprocal(step[k])
    for lane in range(start, stop):
        value, weight = wanted[lane], curvature[lane]
        for k in range(_STEPS):
            miss = value - step[k] * min(max(np.rint(value * inverse[k]), low), high)
            loss[k] += weight * miss * miss
    best, least = f32(0), f32(np.inf)
    for k in range(_STEPS):
        if loss[k] < least:
            best, least = step[k], loss[k]
    return best
