"""The starts of quant/searches.py, found again: each adds most to those before it.

    python bench/starts.py [NAME …]

For many sub-blocks (Student's t of 4 to 60 degrees of freedom, half of each with a log-normal importance) the error of
every start of a raster is measured, least squares over the scale included. Then starts are taken one after another,
each time the one that lowers the mean of the least error most. Printed: how far that mean is above the raster's own
least after 1, 2, 4, … starts, and the starts in that order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from llmx.quant import affine, integer, symmetric
from llmx.quant.lanes import LANES, load, workspace
from llmx.quant.nonlinear import LINEAR, UNEVEN

Array = np.ndarray[Any, Any]
f32 = np.float32


@dataclass(frozen=True)
class Job:
    """search(work, start, scale, other) fills work.error, less Σwx² unless `whole`. sizes: (weights, how many)."""

    search: Callable[[Any, Array, Array, Array], None]
    raster: tuple[Any, ...]
    spread: float
    sizes: tuple[tuple[int, int], ...]
    group: int = 0  # weights over which σ is taken; 0: the sub-block's own
    whole: bool = False


def _steps(start: float, stop: float, step: float) -> list[float]:
    return [round(float(value), 4) for value in np.arange(start, stop + step / 2, step)]


def _signs(values: list[float]) -> tuple[float, ...]:
    return tuple(sign * value for value in values for sign in (-1, 1))


def _affine(top: int) -> Callable[[Any, Array, Array, Array], None]:
    return lambda work, start, scale, other: affine.search(work, f32(top), False, start, 0, scale, other)


def _symmetric(kind: int, low: int, high: int) -> Callable[[Any, Array, Array, Array], None]:
    return lambda work, start, scale, other: symmetric.search(
        work, kind, f32(low), f32(high), start.reshape(-1), 0, scale
    )


def _integer(low: int, high: int, free: bool, positive: bool) -> Callable[[Any, Array, Array, Array], None]:
    fine = high - low > 64
    return lambda work, start, scale, other: integer.search(
        work, (f32(low), f32(high)), free, positive, fine, start, 0, 0, scale, other
    )


_SUBS = ((16, 24000),)
_BLOCKS = ((32, 24000),)
_MIXED = ((32, 8192), (128, 4096), (2048, 256))
JOBS = {
    "Q2_K": Job(_affine(3), tuple(product(_steps(-1.2, 1.6, 0.1), _steps(0.4, 1.15, 0.05))), 2, _SUBS, 256),
    "Q4_K": Job(_affine(15), tuple(product(_steps(-3, 3, 0.2), _steps(0.65, 1.15, 0.05))), 10, _BLOCKS, 256),
    "Q5_K": Job(_affine(31), tuple(product(_steps(-7, 4, 0.25), _steps(0.75, 1.2, 0.05))), 3, _BLOCKS, 256),
    "Q3_K": Job(_symmetric(LINEAR, -4, 3), _signs(_steps(2, 5, 0.05)), 2, _SUBS, 256),
    "Q4_0": Job(_symmetric(LINEAR, -8, 7), _signs(_steps(4, 9.9, 0.1)), 1.65, _BLOCKS),
    "Q5_0": Job(_symmetric(LINEAR, -16, 15), _signs(_steps(7, 19, 0.2)), 1.65, _BLOCKS),
    "Q6_K": Job(_symmetric(LINEAR, -32, 31), _signs(_steps(12, 36, 0.25)), 0.3, _SUBS, 256),
    "Q8_0": Job(_integer(-127, 127, False, False), _signs(_steps(100, 130, 0.5)), 10, _BLOCKS, whole=True),
    "IQ4": Job(_symmetric(UNEVEN, 0, 0), _signs(_steps(66, 158, 2)), 2, _BLOCKS),
    "int2-sym": Job(_integer(-2, 1, False, False), _signs(_steps(0.8, 9, 0.1)), 3, _MIXED),
    "int2-pos": Job(_integer(-2, 1, False, True), tuple(_steps(0.8, 9, 0.1)), 3, _MIXED),
    "int2-zp": Job(_integer(0, 3, True, True), tuple(product(_steps(-1, 8, 0.2), _steps(0.3, 1.2, 0.1))), 10, _MIXED),
    "int3-sym": Job(_integer(-4, 3, False, False), _signs(_steps(2, 15, 0.1)), 3, _MIXED),
    "int3-pos": Job(_integer(-4, 3, False, True), tuple(_steps(2, 15, 0.1)), 3, _MIXED),
    "int3-zp": Job(_integer(0, 7, True, True), tuple(product(_steps(-2, 13, 0.5), _steps(0.5, 1.2, 0.05))), 10, _MIXED),
    "int4-sym": Job(_integer(-8, 7, False, False), _signs(_steps(4, 24, 0.2)), 3, _MIXED),
    "int4-pos": Job(_integer(-8, 7, False, True), tuple(_steps(4, 24, 0.1)), 3, _MIXED),
    "int4-zp": Job(_integer(0, 15, True, True), tuple(product(_steps(-4, 16, 0.5), _steps(0.6, 1.2, 0.1))), 10, _MIXED),
    "int8-sym": Job(_integer(-127, 127, False, True), tuple(_steps(90, 170, 1)), 10, _MIXED, whole=True),
    "int8-zp": Job(
        _integer(0, 255, True, True), tuple(product(_steps(-40, 60, 2.5), _steps(0.95, 1.05, 0.05))), 10, _MIXED,
        whole=True,
    ),
}  # fmt: skip


def errors(job: Job, size: int, count: int) -> Array:
    """f64[sub-blocks, starts]: the weighted error over the weighted energy."""
    random = np.random.default_rng(0)
    quarter = count // 4 // LANES * LANES * size
    values = np.concatenate([random.standard_t(df, quarter) for df in (4, 8, 15, 60)]).astype(np.float32)
    importance = np.exp(random.normal(0, 1, values.size)).astype(np.float32)
    importance.reshape(4, 2, -1)[:, 0] = 1
    work, scale, other = workspace(size), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    starts = np.array(job.raster, np.float32).reshape(len(job.raster), 1, -1)
    found = np.empty((values.size // size, len(starts)))
    for first in range(0, len(found), LANES):
        load(values, importance, first, LANES, job.group or size, f32(job.spread), work)
        energy = (work.w.astype(np.float64) * work.x.astype(np.float64) ** 2).sum(0)
        for number, start in enumerate(starts):
            job.search(work, start, scale, other)
            found[first : first + LANES, number] = work.error + (0 if job.whole else energy)
        found[first : first + LANES] /= energy[:, None]
    return found


def chosen(job: Job, count: int) -> tuple[list[Any], list[float]]:
    """(starts in order, mean least error after each, over the raster's own)."""
    parts = [errors(job, size, many) for size, many in job.sizes]
    parts = [part / part.min(1).mean() for part in parts]
    least = [np.full(len(part), np.inf) for part in parts]
    starts, ratios = [], []
    for _ in range(count):
        means = sum(np.minimum(best[:, None], part).mean(0) for best, part in zip(least, parts, strict=True))
        number = int(means.argmin())
        least = [np.minimum(best, part[:, number]) for best, part in zip(least, parts, strict=True)]
        starts.append(job.raster[number])
        ratios.append(float(means[number]) / len(parts))
    return starts, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=(*JOBS, []), metavar="NAME", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--count", type=int, default=24, help="how many starts")
    options = parser.parse_args()
    for name in options.names or JOBS:
        starts, ratios = chosen(JOBS[name], options.count)
        marks = [f"{k}: {ratios[k - 1]:.4f}" for k in (1, 2, 4, 8, 16, 32, 64) if k <= len(ratios)]
        print(f"{name}  {'  '.join(marks)}\n    {starts}", flush=True)


if __name__ == "__main__":
    main()
