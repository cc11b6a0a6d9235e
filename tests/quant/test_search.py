"""The search for scales: its levels, its closed forms, and that no neighbour of what it finds is better."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.formats.ggml_decode import LEVELS
from llmx.quant.affine import loss, solve
from llmx.quant.compiled import compiled
from llmx.quant.ggml_grids import GGML_GRIDS
from llmx.quant.grid import GRIDS
from llmx.quant.lanes import best_step
from llmx.quant.nonlinear import MIDPOINTS, nearest_uneven
from llmx.quant.protocol import EFFORTS, Effort

f32 = np.float32


def test_the_uneven_levels_are_those_of_the_format() -> None:
    levels = LEVELS["IQ4_NL"]
    assert np.array_equal(MIDPOINTS, (levels[1:] + levels[:-1]) / 2)

    @compiled
    def nearest(values, out):
        for i in range(values.size):
            out[i] = nearest_uneven(values[i])

    values = np.concatenate([np.linspace(-200, 200, 3001, dtype=f32), levels])
    got = np.empty_like(values)
    nearest(values, got)
    assert np.array_equal(np.abs(values - got), np.abs(values[:, None] - levels).min(1))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), signed=st.booleans())
def test_the_closed_form_is_the_least_squares_solution_and_knows_its_error(seed: int, signed: bool) -> None:
    random = np.random.default_rng(seed)
    x, w = random.normal(0.3, 1, 32), random.uniform(0.1, 2, 32)
    q = np.clip(np.rint((x - x.min()) * 5), 0, 15)
    sums = (w.sum(), (w * x).sum(), (w * q).sum(), (w * q * q).sum(), (w * q * x).sum())
    s, m = solve(*map(f32, sums), signed)

    def error(scale: float, minimum: float) -> float:
        return float((w * (x - scale * q + minimum) ** 2).sum())

    assert loss(s, m, *map(f32, sums)) == pytest.approx(error(s, m) - (w * x * x).sum(), abs=1e-3)
    for near in ((s * 1.01, m), (s * 0.99, m), (s, m + 0.01), (s, m - 0.01 if signed else max(m - 0.01, 0))):
        assert error(*near) >= error(s, m) - 1e-5


def weighted_error(name: str, weight: np.ndarray, scales) -> np.ndarray:
    """f64[blocks, subs]: the error that the search minimizes (no importance)."""
    grid = GRIDS[name]
    blocks = weight.reshape(-1, grid.weights).astype(np.float64)
    square = blocks**2
    w = grid.spread[0] + square / square.mean(1, keepdims=True)
    lost = w * (blocks - grid.decode(scales, grid.round(weight, scales))) ** 2
    return lost.reshape(len(blocks), grid.weights // grid.size, -1).sum(-1)


@pytest.mark.parametrize(("effort", "share"), [("balanced", 0.01), ("best", 0.0)])
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_no_integer_scale_or_minimum_has_a_better_neighbour(name: str, effort: Effort, share: float) -> None:
    weight = np.random.default_rng(3).normal(0, 0.05, (16, 512)).astype(f32)
    scales = GRIDS[name].fit(weight, None, effort)
    found = weighted_error(name, weight, scales)
    top = GRIDS[name].integers
    low, high = (0, top) if isinstance(top, int) else top
    better = np.zeros(found.shape, bool)
    for field, by in (("scales", 1), ("scales", -1), ("mins", 1), ("mins", -1)):
        integers = getattr(scales, field)
        if integers is None:
            continue
        moved = np.clip(integers.astype(int) + by, low, high).astype(np.int8)
        neighbour = weighted_error(name, weight, dataclasses.replace(scales, **{field: moved}))
        better |= neighbour < found * (1 - 1e-3) - 1e-12
    assert better.mean() <= share


@pytest.mark.parametrize("name", [row.name for row in GGML_GRIDS])
def test_more_effort_lowers_the_error(name: str) -> None:
    weight = np.random.default_rng(5).standard_t(6, (32, 1024)).astype(f32)
    fast, balanced, best = (weighted_error(name, weight, GRIDS[name].fit(weight, None, e)).sum() for e in EFFORTS)
    assert best < balanced < fast


def test_the_step_of_a_super_block_is_a_float16_that_serves_its_heaviest_sub_block() -> None:
    wanted, heavy = np.zeros(64, f32), np.zeros(64, f32)
    wanted[:8] = np.linspace(0.001, 0.0631, 8, dtype=f32)
    heavy[:8] = 1e-6
    heavy[7] = 1
    step = best_step(wanted, heavy, f32(0), f32(63), 0, 8)
    assert step == np.float16(step)
    assert abs(step * round(float(wanted[7] / step)) - wanted[7]) < step / 10
    assert best_step(np.zeros(64, f32), heavy, f32(0), f32(63), 0, 8) == 0
