"""Sparse matrices: the elimination is that of the paper, settling ends at the least squares, and zeros stay zeros."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from llmx.quant.gptq import damped
from llmx.quant.grid import grid
from llmx.quant.pruning import prune
from llmx.quant.refine import refine
from llmx.quant.solve import EFFORTS, Prepared, loss, solve
from llmx.quant.sparse import eliminate, exchange, ordered, settle
from llmx.quant.sparsity import crowded, find_pattern
from llmx.quant.state import Rows, zero_codes
from llmx.quant.statistics import Inputs, Statistics, statistics
from llmx.quant.workers import Workers, workers

COLS, OUT, TOKENS = 256, 24, 600
TWO = find_pattern("2:4")
HALF = find_pattern("50%")
FAST = EFFORTS["fast"]
GRIDS = (
    "Q4_0",
    "Q8_0",
    "Q6_K",
    "Q3_K",
    "int4-g128-sym",
    "int4-g32-zp",
    "int8-channel-pos",
    "fp8-channel-float32",
    "MXFP4",
)
both = pytest.mark.parametrize("pattern", [TWO, HALF], ids=["2:4", "50%"])


@pytest.fixture(scope="module")
def one() -> Iterator[Workers]:
    with workers(1) as pool:
        yield pool


def weights(seed: int = 0, out: int = OUT, cols: int = COLS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((out, cols)).astype(np.float32))


def known(pool: Workers, seed: int = 1, cols: int = COLS, drift: float = 0.1) -> Statistics:
    random = np.random.default_rng(seed)
    mix = (np.eye(cols) + random.standard_normal((cols, cols)) / np.sqrt(cols)) * np.exp(random.normal(0, 0.7, cols))
    parts = []
    for number in range(4):
        x = (random.standard_normal((TOKENS, cols)) @ mix).astype(np.float32)
        moved = x + drift * random.standard_normal(x.shape).astype(np.float32)
        first = torch.from_numpy(x)
        second = torch.from_numpy(moved) if drift else first
        parts.append(Inputs(first, second, held_out=number == 3))
    return statistics(parts, pool)


def hessian_of(pool: Workers, cols: int = COLS) -> torch.Tensor:
    return damped(known(pool, cols=cols).fitted.hessian, 0.01)


def cost(value: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> np.ndarray[Any, Any]:
    """f64[rows] of [columns, rows]."""
    error = (value - target).double().numpy()
    return (error * (hessian.double().numpy() @ error)).sum(0)


def test_of_one_group_the_elimination_leaves_the_best_pair_at_its_least_squares(one: Workers) -> None:
    hessian, target = hessian_of(one, 4), weights(cols=4).T.contiguous()
    factor = ordered(hessian, TWO)
    assert factor is not None
    kept, value = eliminate(target, factor, TWO)
    value = settle(value, target, hessian, kept, 8)
    h, t = hessian.double().numpy(), target.double().numpy()
    for row in range(OUT):
        best = np.inf
        for pair in combinations(range(4), 2):
            x, at = np.zeros(4), list(pair)
            x[at] = np.linalg.solve(h[np.ix_(at, at)], (h @ t[:, row])[at])
            best = min(best, (x - t[:, row]) @ h @ (x - t[:, row]))
        assert cost(value, target, hessian)[row] == pytest.approx(best, rel=1e-4)


def test_the_elimination_compensates_as_the_inverse_of_what_is_left_says(one: Workers) -> None:
    hessian, target = hessian_of(one), weights().T.contiguous()
    factor = ordered(hessian, TWO)
    assert factor is not None
    kept, value = eliminate(target, factor, TWO)
    h, w = hessian.double().numpy(), target.double().numpy().copy()
    order, mask = factor.order.numpy(), kept.numpy()
    for place, column in enumerate(order):  # optimal brain surgeon, one column after another, of those not yet passed
        left = order[place:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        gone = np.where(mask[column], 0.0, w[column])
        w[left] -= np.outer(inverse[:, 0] / inverse[0, 0], gone)
    assert np.abs(value.numpy() - np.where(mask, w, 0)).max() < 1e-3


@both
def test_settling_ends_where_no_kept_weight_has_a_slope(pattern: Any, one: Workers) -> None:
    hessian, target = hessian_of(one), weights().T.contiguous()
    factor = ordered(hessian, pattern)
    assert factor is not None
    kept, value = eliminate(target, factor, pattern)
    settled = settle(value, target, hessian, kept, 60)
    slope = torch.where(kept, hessian @ (settled - target), 0.0)
    assert float(slope.abs().max()) < 1e-3 * float((hessian @ target).abs().max())
    assert not settled[~kept].any()
    assert (cost(settled, target, hessian) <= cost(value, target, hessian) * (1 + 1e-5)).all()


@both
def test_an_exchange_never_goes_uphill_and_keeps_the_pattern(pattern: Any, one: Workers) -> None:
    hessian, target = hessian_of(one), weights().T.contiguous()
    factor = ordered(hessian, pattern)
    assert factor is not None
    kept = (torch.arange(COLS)[:, None] % 4 < 2).expand_as(target)  # a poor start: the first two of each group
    value = settle(torch.where(kept, target, 0.0), target, hessian, kept, 10)
    before, first = cost(value, target, hessian), cost(value, target, hessian).sum()
    for _ in range(3):
        kept, value = exchange(kept, value, target, hessian, factor, pattern)
        after = cost(value, target, hessian)
        assert (after <= before * (1 + 1e-5)).all()
        assert not value[~kept].any()
        assert (kept.sum(0) == COLS // 2).all() and (not pattern.group or crowded(value.T.numpy(), pattern) == 0)
        before = after
    assert before.sum() < 0.8 * first


def test_the_diagonal_of_the_inverse_is_that_of_the_inverse(one: Workers) -> None:
    hessian = hessian_of(one)
    factor = ordered(hessian, TWO)
    assert factor is not None
    expected = np.diagonal(np.linalg.inv(hessian.double().numpy()))
    assert np.allclose(factor.inverse_diagonal().numpy(), expected, rtol=1e-3)


@both
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_gives_as_many_zeros_as_were_asked_for(method: str, pattern: Any, one: Workers) -> None:
    weight = weights()
    found = prune(weight, Prepared(known(one)), pattern, method, FAST, one)
    assert not found.value[~found.kept].any()
    allowed = 0 if pattern.group else weight.numel() - pattern.pruned(weight.numel())
    assert crowded(found.value.numpy(), pattern) <= allowed
    if method != "sparsegpt":
        assert torch.equal(found.value[found.kept], weight[found.kept])


@both
def test_compensated_zeros_lose_less_than_the_published_baselines(pattern: Any, one: Workers) -> None:
    weight, statistics_ = weights(), known(one, drift=0)
    judged = statistics_.held_out
    lost = {
        method: loss(weight, prune(weight, Prepared(statistics_), pattern, method, FAST, one).value, judged, None)
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    assert lost["sparsegpt"] < 0.7 * lost["wanda"] and lost["wanda"] < lost["magnitude"], lost


def test_inputs_that_say_nothing_leave_wanda_and_say_so(one: Workers) -> None:
    empty = torch.zeros(COLS, COLS)
    statistics_ = known(one, drift=0)
    nothing = replace(statistics_, fitted=replace(statistics_.fitted, hessian=empty - torch.eye(COLS)))
    found = prune(weights(), Prepared(nothing), TWO, "sparsegpt", FAST, one)
    assert found.method == "wanda" and set(found.candidates) == {"wanda"}


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_leaves_every_zero_where_it_is(name: str, one: Workers) -> None:
    weight, prepared = weights(), Prepared(known(one))
    pruned = prune(weight, prepared, TWO, "sparsegpt", FAST, one)
    kind = grid(name, COLS)
    found = solve(weight, prepared, kind, FAST, one, pruned=pruned)
    decoded = kind.decode(found.scales, found.codes).reshape(OUT, COLS)
    assert not decoded[~pruned.kept.numpy()].any()
    assert np.allclose(decoded, found.value.numpy(), atol=1e-6)
    assert crowded(decoded, TWO) == 0


@pytest.mark.parametrize("name", ["Q4_0", "Q3_K", "int4-g32-zp", "fp8-channel-float32"])
def test_refinement_among_zeros_goes_downhill(name: str, one: Workers) -> None:
    weight, hessian = weights(), hessian_of(one)
    pruned = prune(weight, Prepared(known(one)), TWO, "sparsegpt", FAST, one)
    kind, values = grid(name, COLS), pruned.value.numpy()
    scales = kind.fit(values)
    rows = Rows(kind, scales, OUT, torch.device("cpu"), kept=pruned.kept.T.contiguous())
    rows.set_codes(kind.round(values, scales))
    target = pruned.value.T.contiguous()
    before = cost(rows.value(), target, hessian).sum()
    refine(rows, target, hessian, 3)
    assert cost(rows.value(), target, hessian).sum() < before
    assert not rows.value().T[~pruned.kept].any()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "IQ4_NL"])
def test_a_grid_without_an_exact_zero_has_no_code_for_it(name: str) -> None:
    kind = grid(name, COLS)
    assert zero_codes(kind, kind.fit(weights().numpy())) is None


def test_the_zeros_do_not_depend_on_the_number_of_threads() -> None:
    weight = weights(out=600)
    found = []
    for threads in (1, 3):
        with workers(threads) as pool:
            prepared = Prepared(known(pool))
            pruned = prune(weight, prepared, TWO, "sparsegpt", FAST, pool)
            solution = solve(weight, prepared, grid("Q4_0", COLS), FAST, pool, pruned=pruned)
            found.append((pruned.value.numpy().tobytes(), solution.codes.tobytes(), solution.scales.d.tobytes()))
    assert found[0] == found[1]
