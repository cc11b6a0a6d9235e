"""One matrix solved: the target that repairs, the gate that keeps no worse one, and inputs that are hard on both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.formats.ggml_packers import pack
from llmx.quant.grid import GRIDS, grid
from llmx.quant.solve import EFFORTS, Prepared, Solution, SolveOptions, loss, solve, target
from llmx.quant.statistics import Inputs, Moments, Statistics, moments, statistics
from llmx.quant.workers import Workers, workers

COLS, OUT, TOKENS = 256, 40, 500
NAMES = (*GRIDS, "int4-g32-zp", "int4-g128-sym", "int8-channel-sym", "mxfp4", "nvfp4", "fp8-tensor-float32")
TRIES = SolveOptions(("rtn", "refined", "gptq"), shares=(0.03, 0.3), sweeps=1, effort="fast")
Doubles = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(scope="module")
def one() -> Iterator[Workers]:
    with workers(1) as pool:
        yield pool


def weights(seed: int = 0, out: int = OUT, cols: int = COLS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(6, (out, cols)).astype(np.float32))


def batches(
    seed: int = 1, *, drift: float = 0.1, residual: int = 0, cols: int = COLS, tokens: int = TOKENS
) -> list[Inputs]:
    """Four batches of correlated inputs with a few large channels; the last is held out."""
    random = np.random.default_rng(seed)
    mix = (np.eye(cols) + random.standard_normal((cols, cols)) / np.sqrt(cols)) * np.exp(random.normal(0, 0.5, cols))

    def single(values: Doubles) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))

    made = []
    for number in range(4):
        x = random.standard_normal((tokens, cols)) @ mix
        moved = x + drift * random.standard_normal((tokens, cols)) + drift * 0.3 * x
        error = 0.02 * x @ random.standard_normal((cols, residual))
        made.append(
            Inputs(
                single(x),
                single(moved) if drift else single(x),
                single(error) if residual else None,
                held_out=number == 3,
            )
        )
    return made if drift else [replace(batch, quantized=batch.float_) for batch in made]


def joined(parts: list[Inputs], held_out: bool) -> tuple[Doubles, Doubles, Doubles | None]:
    kept = [part for part in parts if part.held_out == held_out]
    x, moved = (np.concatenate([getattr(p, name).double().numpy() for p in kept]) for name in ("float_", "quantized"))
    if kept[0].residual is None:
        return x, moved, None
    return x, moved, np.concatenate([p.residual.double().numpy() for p in kept if p.residual is not None])


def squared(weight: torch.Tensor, value: torch.Tensor, parts: list[Inputs], held_out: bool = True) -> float:
    """Σ ‖W x + r − Ŵ x̂‖² over the tokens themselves, less what it is for Ŵ = W, as a share of Σ ‖W x̂‖²."""
    x, moved, error = joined(parts, held_out)
    w, v = weight.double().numpy(), value.double().numpy()
    wanted = x @ w.T + (0 if error is None else error)
    lost = ((wanted - moved @ v.T) ** 2).sum() - ((wanted - moved @ w.T) ** 2).sum()
    return float(lost / ((moved @ w.T) ** 2).sum())


def solved(name: str, weight: torch.Tensor, known: Statistics, options: SolveOptions, pool: Workers) -> Solution:
    return solve(weight, Prepared(known), grid(name, weight.shape[1]), options, pool)


def test_moments_are_the_sums_over_tokens(one: Workers) -> None:
    parts = batches(residual=OUT)
    random = np.random.default_rng(3)
    weighed = [
        replace(p, weights=torch.from_numpy(random.uniform(0, 1, (TOKENS, 1)).astype(np.float32))) for p in parts
    ]
    for given_ in (parts, weighed):
        found = moments(given_, one)
        x, moved, error, share = (
            np.concatenate([np.ones((TOKENS, 1)) if part is None else part.double().numpy() for part in column])
            for column in zip(*((p.float_, p.quantized, p.residual, p.weights) for p in given_), strict=True)
        )
        for sums, left in ((found.hessian, moved), (found.drift, x - moved), (found.residual, error)):
            assert sums is not None
            expected = left.T @ (moved * share)
            assert np.allclose(sums.numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        assert found.tokens == 4 * TOKENS


def test_inputs_that_have_not_moved_have_no_drift(one: Workers) -> None:
    found = statistics(batches(drift=0), one)
    assert found.fitted.drift is None and found.fitted.residual is None
    assert found.fitted.pull(weights()) is None
    assert (found.fitted.tokens, found.held_out.tokens, found.tokens) == (3 * TOKENS, TOKENS, 4 * TOKENS)


def test_with_nothing_held_out_the_judge_sees_what_was_fitted(one: Workers) -> None:
    found = statistics([replace(batch, held_out=False) for batch in batches()], one)
    assert found.held_out is found.fitted


def test_the_loss_is_that_of_the_outputs(one: Workers) -> None:
    parts, weight = batches(residual=OUT), weights()
    judged = statistics(parts, one).held_out
    value = weight + 0.05 * weights(9)
    energy = float((weight.double() @ judged.hessian.double() * weight.double()).sum())
    found = loss(weight, value, judged, judged.pull(weight)) / energy
    assert found == pytest.approx(squared(weight, value, parts), rel=1e-3)
    assert loss(weight, weight, judged, judged.pull(weight)) == 0


@pytest.mark.parametrize("residual", [0, OUT])
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_target_is_the_closed_formula_in_float64(residual: int, share: float, one: Workers) -> None:
    parts, weight = batches(residual=residual), weights()
    found, chosen, _ = target(weight, Prepared(statistics(parts, one)), (share,), one)
    x, moved, error = joined(parts, held_out=False)
    hessian, w = moved.T @ moved, weight.double().numpy()
    pull = w @ (x.T @ moved - hessian) + (0 if error is None else error.T @ moved)
    expected = w + pull @ np.linalg.inv(hessian + share * np.mean(np.diag(hessian)) * np.eye(COLS))
    assert chosen == share
    assert np.allclose(found.numpy(), expected, atol=1e-3 * np.abs(expected - w).max())
    assert np.abs(expected - w).max() > 0.05  # it moved at all


def test_the_target_takes_the_share_that_does_best_on_held_out_tokens(one: Workers) -> None:
    parts, weight = batches(residual=OUT, tokens=120), weights()
    prepared = Prepared(statistics(parts, one))
    shares = (1e-4, 0.01, 0.1, 1.0, 10.0)
    judged = {share: squared(weight, target(weight, prepared, (share,), one)[0], parts) for share in shares}
    assert target(weight, prepared, shares, one)[1] == min(judged, key=lambda share: judged[share])


def test_a_target_without_anything_to_repair_is_the_weight(one: Workers) -> None:
    weight = weights()
    found, _, lost = target(weight, Prepared(statistics(batches(drift=0), one)), (0.1,), one)
    assert found is weight and lost == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_the_best_on_held_out_tokens_and_never_worse_than_rounding(name: str, one: Workers) -> None:
    parts, weight = batches(residual=OUT), weights()
    found = solved(name, weight, statistics(parts, one), TRIES, one)
    assert set(found.candidates) == {"rtn", "refined", "gptq"}
    assert found.held_out == found.candidates[found.method] == min(found.candidates.values())
    assert found.held_out <= found.candidates["rtn"]
    assert found.held_out == pytest.approx(squared(weight, found.value, parts), rel=2e-3, abs=1e-5)
    bound = grid(name, COLS)
    assert np.allclose(bound.decode(found.scales, found.codes).reshape(OUT, COLS), found.value.numpy(), atol=1e-6)
    if name in GRIDS:
        assert pack(name, found.scales, found.codes).size % OUT == 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.sampled_from([3, 20, 200]), drift=st.sampled_from([0.0, 0.1, 1.0]))
def test_however_few_the_tokens_the_gate_holds(seed: int, tokens: int, drift: float) -> None:
    with workers(1) as pool:
        parts = batches(seed, tokens=tokens, drift=drift)
        found = solved("Q4_K", weights(seed, out=8), statistics(parts, pool), TRIES, pool)
    assert found.held_out <= found.candidates["rtn"]
    assert torch.isfinite(found.value).all()


def test_a_calibration_that_misleads_is_not_followed(one: Workers) -> None:
    misled = batches(5, drift=0.0, tokens=30)
    fresh = batches(6, drift=0.0, tokens=3000)
    known = Statistics(moments(misled[:3], one), moments(fresh, one), torch.ones(COLS))
    found = solved("Q4_K", weights(), known, replace(TRIES, methods=("rtn", "gptq")), one)
    assert found.candidates["gptq"] > found.candidates["rtn"]
    assert found.method == "rtn"


def test_repairs_are_left_out_where_they_are_not_wanted(one: Workers) -> None:
    parts, weight = batches(drift=1.0), weights()
    known = statistics(parts, one)
    moved = solved("Q8_0", weight, known, TRIES, one)
    kept = solved("Q8_0", weight, known, replace(TRIES, repairs=False), one)
    assert float((moved.value - weight).norm() / weight.norm()) > 0.05
    assert float((kept.value - weight).norm() / weight.norm()) < 0.05
    assert all(value >= 0 for value in kept.candidates.values())


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_XS", "nvfp4", "int4-g32-zp"])
@pytest.mark.parametrize("effort", EFFORTS)
def test_one_thread_and_two_find_the_same(name: str, effort: str) -> None:
    cols = 512
    parts, weight = batches(cols=cols, residual=600, tokens=100), weights(out=600, cols=cols)
    found = []
    for count in (1, 2):
        with workers(count) as pool:
            known = statistics(parts, pool)
            options = replace(EFFORTS[effort], sweeps=1, shares=(0.1,), effort="fast")  # type: ignore[index]
            found.append((known, solved(name, weight, known, options, pool)))
    for part in ("hessian", "drift", "residual"):
        assert torch.equal(getattr(found[0][0].fitted, part), getattr(found[1][0].fitted, part)), part
    first, second = found[0][1], found[1][1]
    assert np.array_equal(first.codes, second.codes)
    assert np.array_equal(first.scales.d, second.scales.d)
    assert first.candidates == second.candidates


# Inputs that are hard on a solver.


def known_of(hessian: torch.Tensor, drift: torch.Tensor | None = None) -> Statistics:
    made = Moments(hessian, drift, None, 100)
    return Statistics(made, made, hessian.diagonal().clamp_min(0))


def dead(count: int) -> torch.Tensor:
    x = batches(drift=0)[0].float_.clone()
    x[:, :count] = 0
    return x.T @ x


HARD = {
    "all zero": torch.zeros(COLS, COLS),
    "dead channels": dead(60),
    "one token": torch.ones(COLS, 1) @ torch.ones(1, COLS),
    "rank three": batches(drift=0)[0].float_[:3].T @ batches(drift=0)[0].float_[:3],
    "not positive definite": torch.eye(COLS) - 1.5 * torch.ones(COLS, COLS) / COLS,
    "tiny": torch.eye(COLS) * 1e-30,
    "huge": torch.eye(COLS) * 1e30,
    "one massive channel": torch.diag(torch.tensor([1e12] + [1.0] * (COLS - 1))),
}


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", "int4-g32-zp", "nvfp4"])
def test_codes_are_finite_whatever_the_inputs_were(name: str, kind: str, drift: bool, one: Workers) -> None:
    hessian, weight = HARD[kind], weights(out=8)
    found = solved(name, weight, known_of(hessian, hessian * 0.1 if drift else None), TRIES, one)
    assert torch.isfinite(found.value).all()
    assert np.isfinite(found.scales.d.astype(np.float32)).all()
    # Whatever was learnt from such inputs, it stays the same matrix.
    assert float((found.value - weight).norm() / weight.norm()) < 0.5


@pytest.mark.parametrize("name", ["Q4_K", "int4-g32-zp"])
def test_columns_that_saw_nothing_are_rounded_as_they_are(name: str, one: Workers) -> None:
    weight = weights(out=8)
    found = solved(name, weight, known_of(dead(60)), TRIES, one)
    error = (found.value - weight)[:, :60]
    assert float(error.norm() / weight[:, :60].norm()) < 0.2


def test_weights_of_zero_stay_zero(one: Workers) -> None:
    weight = weights(out=8)
    weight[3] = 0
    found = solved("Q4_K", weight, statistics(batches(drift=0), one), TRIES, one)
    assert not found.value[3].any()
    assert torch.isfinite(solved("Q4_K", torch.zeros(8, COLS), known_of(torch.eye(COLS)), TRIES, one).value).all()
