"""Descent on any grid: no step raises the loss, moves are scored exactly, and super-scales are least squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.formats.ggml_decode import decode
from llmx.formats.ggml_packers import BlockScales, pack
from llmx.quant.gptq import damped
from llmx.quant.grid import GRIDS, grid
from llmx.quant.refine import Descent, refine
from llmx.quant.state import Rows

ROWS = 5
NAMES = (
    *GRIDS,
    "int4-g32-zp",
    "int4-g128-sym",
    "int4-g64-pos",
    "int8-channel-sym",
    "mxfp4",
    "nvfp4",
    "fp8-channel-float32",
)
# Where the float super-scale of a block is stored as a float of its own, so that its best value is a formula.
LINEAR = ("Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1", "IQ4_NL", "Q3_K", "Q6_K", "IQ4_XS", "int4-g128-sym", "int4-g32-zp")
STEPS: dict[str, Callable[[Descent], None]] = {
    "codes": Descent.sweep_codes,
    "scales": Descent.move_scales,
    "supers": Descent.refit_supers,
}
# `.contiguous()` of a slice of rows is a view: descend_block moves it, and addmm_ moves it again.
Doubles = np.ndarray[Any, np.dtype[np.float64]]


def start(name: str, seed: int, cols: int = 256, far: float = 0.05) -> Descent:
    """Rounded rows whose scales are a little off, so that every step has something to do."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((cols + 60, cols)) @ (np.eye(cols) + 0.1 * random.standard_normal((cols, cols)))
    x *= np.exp(random.normal(0, 0.5, cols))
    hessian = damped(torch.from_numpy((x.T @ x / cols).astype(np.float32)), 0.01)
    weight = random.standard_t(6, (ROWS, cols)).astype(np.float32)
    kind = grid(name, cols).bound(weight)
    scales = kind.fit(weight, hessian.diagonal().numpy(), "fast")
    scales = kind.with_super(scales, scales.d.astype(np.float32) * np.float32(1 + far), scales.offset)
    rows = Rows(kind, scales, ROWS, torch.device("cpu"))
    rows.set_codes(kind.round(weight, scales))
    return Descent(rows, torch.from_numpy(weight).T.contiguous(), hessian)


def lost(descent: Descent, scales: BlockScales | None = None) -> Doubles:
    """f64[rows]: the damped loss, from what would be stored."""
    rows = descent.rows
    value = rows.grid.decode(scales or rows.scales, rows.codes()).reshape(ROWS, -1).astype(np.float64)
    error = value - descent.target.T.double().numpy()
    return (error @ descent.hessian.double().numpy() * error).sum(1)


def not_above(after: Doubles, before: Doubles) -> bool:
    return bool((after <= before * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(list(STEPS)))
def test_no_step_raises_the_loss_of_any_row(name: str, seed: int, order: list[str]) -> None:
    descent = start(name, seed)
    for step in order:
        before = lost(descent)
        STEPS[step](descent)
        assert not_above(lost(descent), before), step


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_stay_those_of_what_is_stored(name: str) -> None:
    descent = start(name, 3)
    for step in ("codes", "scales", "supers", "codes", "scales"):
        STEPS[step](descent)
        stored = descent.rows.grid.decode(descent.rows.scales, descent.rows.codes()).reshape(ROWS, -1).T
        assert np.allclose(descent.value.numpy(), stored, rtol=1e-5, atol=1e-5), step
        slope = descent.hessian.double() @ (torch.from_numpy(stored).double() - descent.target.double())
        assert np.allclose(descent.gradient.numpy(), slope.numpy(), atol=2e-4 * float(slope.abs().max() + 1)), step
    if name in GRIDS:
        packed = pack(name, descent.rows.scales, descent.rows.codes()).reshape(ROWS, -1)
        assert np.allclose(decode(name, packed), descent.value.T.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_refinement_gains_and_gains_more_with_more_sweeps(name: str) -> None:
    losses = []
    for sweeps in (0, 1, 3):
        descent = start(name, 4)
        refine(descent.rows, descent.target, descent.hessian, sweeps)
        losses.append(lost(descent).sum())
    begun = lost(start(name, 4)).sum()
    assert losses[0] < 0.95 * begun
    assert losses[2] <= losses[1] * 1.001 <= losses[0] * 1.002


def candidates(descent: Descent, sub: int) -> Iterator[tuple[BlockScales, Doubles]]:
    """Each legal move of one sub-block of every row, all others as they are, and the loss it would leave."""
    rows = descent.rows
    subs = rows.grid.weights // rows.grid.size
    mask = np.zeros((len(rows.scales.d), subs), bool)
    mask.reshape(ROWS, -1)[:, sub] = True
    for move in rows.grid.neighbours(rows.scales):
        merged = rows.grid.merge(rows.scales, move, mask)
        yield merged, lost(descent, merged)


@pytest.mark.parametrize("name", NAMES)
def test_each_sub_block_takes_the_move_that_brute_force_finds_best(name: str) -> None:
    plain, descent = start(name, 5), start(name, 5)
    size, weights = plain.rows.grid.size, plain.rows.grid.weights
    for sub in range(len(plain.target) // size):
        best, scales = lost(plain), plain.rows.scales
        for merged, loss in candidates(plain, sub):
            better = loss < best
            rows = np.broadcast_to(better[:, None], (ROWS, len(plain.target) // size))
            scales = plain.rows.grid.merge(scales, merged, rows.reshape(-1, weights // size))
            best = np.minimum(best, loss)
        plain.rows.scales = scales
    descent.move_scales()
    # Two moves that tie in float32 may be taken either way.
    assert np.allclose(lost(descent), lost(plain), rtol=2e-3)


@pytest.mark.parametrize("name", LINEAR)
def test_a_refit_is_the_least_squares_solution_as_it_is_stored(name: str) -> None:
    block = grid(name, 256).weights
    descent = start(name, 7, cols=block, far=0.2)
    rows = descent.rows
    first, second = rows.basis()
    root = np.linalg.cholesky(descent.hessian.double().numpy()).T
    expected = []
    for row in range(ROWS):
        columns = [part[:, row].double().numpy() for part in (first, second) if part is not None]
        expected.append(np.linalg.lstsq(root @ np.stack(columns, 1), root @ descent.target[:, row].numpy())[0])
    wanted = np.array(expected, np.float32)
    stored = rows.grid.with_super(rows.scales, wanted[:, 0], wanted[:, 1] if second is not None else None)
    best, before = lost(descent, stored), lost(descent)
    descent.refit_supers()
    assert (best < before).any()
    assert np.allclose(lost(descent), np.minimum(best, before), rtol=1e-3)
    assert np.allclose(descent.rows.scales.d[best < before], stored.d[best < before], rtol=2e-3)


@pytest.mark.parametrize("name", ["Q4_K", "Q2_K", "Q5_K"])
def test_a_refit_of_scale_and_minimum_together_leaves_no_slope(name: str) -> None:
    descent = start(name, 8, far=0.1)
    before = lost(descent)
    descent.refit_supers()
    assert not_above(lost(descent), before)
    assert lost(descent).sum() < before.sum()
    for first, second in [descent.rows.basis()]:
        assert second is not None
        slopes = [(part * descent.gradient).sum(0).abs() for part in (first, second)]
        scale = (first * (descent.hessian @ first)).sum(0) * torch.from_numpy(descent.rows.scales.d.astype(np.float32))
        assert all((slope < 0.02 * scale.abs()).all() for slope in slopes)


def test_a_scale_that_the_whole_tensor_shares_is_left_alone() -> None:
    descent = start("fp8-tensor-float32", 9, far=0.0)
    before = descent.rows.scales
    refine(descent.rows, descent.target, descent.hessian, 2)
    assert np.array_equal(before.d, descent.rows.scales.d)


@pytest.mark.parametrize("name", NAMES)
def test_zero_weights_and_zero_columns_stay_finite(name: str) -> None:
    descent = start(name, 10)
    descent.target[:, 1] = 0
    weight = np.ascontiguousarray(descent.target.T.numpy())
    kind = grid(name, 256).bound(weight)
    rows = Rows(kind, kind.fit(weight), ROWS, torch.device("cpu"))
    rows.set_codes(kind.round(weight, rows.scales))
    hessian = descent.hessian.clone()
    hessian[:40], hessian[:, :40] = 0, 0
    refine(rows, descent.target, damped(hessian, 0.01), 2)
    assert torch.isfinite(rows.value()).all()
    assert float((rows.value()[:, 1] ** 2).sum()) < 1e-3 * float((rows.value()[:, 0] ** 2).sum())
