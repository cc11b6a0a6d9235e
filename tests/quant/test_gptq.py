"""GPTQ on frozen scales: as the plain elimination does it, in whatever order columns are solved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmx.formats.ggml_decode import decode
from llmx.formats.ggml_packers import pack
from llmx.quant.gptq import damped, factorize, gptq
from llmx.quant.grid import GRIDS, grid
from llmx.quant.protocol import Grid
from llmx.quant.state import Rows

COLS, ROWS = 256, 6
NAMES = (*GRIDS, "int4-g32-zp", "int4-g128-sym", "int8-channel-sym", "mxfp4", "nvfp4", "fp8-channel-float32")
Doubles = np.ndarray[Any, np.dtype[np.float64]]


def weights(seed: int = 0, rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(6, (rows, cols)).astype(np.float32))


def hessian(seed: int = 1, cols: int = COLS, tokens: int = 700) -> torch.Tensor:
    """Of correlated inputs with some channels far larger than the others."""
    random = np.random.default_rng(seed)
    mix = np.eye(cols) + 0.2 * random.standard_normal((cols, cols)) / np.sqrt(cols) * 8
    x = random.standard_normal((tokens, cols)) @ mix * np.exp(random.normal(0, 0.7, cols))
    return torch.from_numpy((x.T @ x).astype(np.float32))


def frozen(kind: Grid, weight: torch.Tensor, by: torch.Tensor) -> Rows:
    bound = kind.bound(weight.numpy())
    scales = bound.fit(weight.numpy(), by.diagonal().numpy())
    return Rows(bound, scales, len(weight), torch.device("cpu"))


def loss(weight: torch.Tensor, value: torch.Tensor, by: torch.Tensor) -> Doubles:
    """f64[rows], value as Rows has it: [columns, rows]."""
    error = weight.double().numpy() - value.T.double().numpy()
    return (error @ by.double().numpy() * error).sum(1)


def plain(weight: torch.Tensor, by: torch.Tensor, rows: Rows) -> Doubles:
    """f64[rows, cols]: optimal brain surgeon, column by column, each eliminated from the inverse Hessian in full.

    Source: GPTQ, arXiv 2210.17323, equations 2 and 3; no Cholesky, no blocks, no float32.
    """
    scale, offset = (part.T.double().numpy() for part in rows.columns())
    kind = rows.grid
    table = kind.levels[kind.allowed[0] : kind.allowed[1] + 1].astype(np.float64)
    w, inverse = weight.double().numpy().copy(), np.linalg.inv(by.double().numpy())
    value = np.empty_like(w)
    for j in np.argsort(-by.diagonal().numpy(), kind="stable"):
        choice = np.abs(scale[:, j, None] * table + offset[:, j, None] - w[:, j, None]).argmin(-1)
        value[:, j] = scale[:, j] * table[choice] + offset[:, j]
        w -= ((w[:, j] - value[:, j]) / inverse[j, j])[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return value


@pytest.mark.parametrize("name", NAMES)
def test_the_codes_are_those_of_the_plain_elimination_in_float64(name: str) -> None:
    weight, by = weights(), damped(hessian(), 0.01)
    rows = frozen(grid(name, COLS), weight, by)
    factor = factorize(by)
    assert factor is not None
    gptq(weight.T.contiguous(), factor, rows)
    expected, found = plain(weight, by, rows), rows.value().T.double().numpy()
    # A tie that float32 breaks otherwise changes all columns solved after it, in its row alone.
    alike = np.isclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()).all(1)
    assert alike.sum() >= ROWS - 1
    assert np.allclose(loss(weight, rows.value(), by)[alike], loss(weight, torch.from_numpy(expected.T), by)[alike])


@pytest.mark.parametrize("name", NAMES)
def test_it_loses_less_than_rounding_to_the_nearest(name: str) -> None:
    weight, by = weights(), damped(hessian(), 0.01)
    rows = frozen(grid(name, COLS), weight, by)
    rows.set_codes(rows.grid.round(weight.numpy(), rows.scales))
    rounded = loss(weight, rows.value(), by)
    factor = factorize(by)
    assert factor is not None
    gptq(weight.T.contiguous(), factor, rows)
    assert loss(weight, rows.value(), by).sum() < 0.9 * rounded.sum()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_the_value_and_knows_no_order(name: str) -> None:
    weight, by = weights(), damped(hessian(), 0.01)
    rows = frozen(grid(name, COLS), weight, by)
    factor = factorize(by)
    assert factor is not None
    assert not torch.equal(factor.order, torch.arange(COLS))
    gptq(weight.T.contiguous(), factor, rows)
    codes, value = rows.codes(), rows.value().T.numpy()
    assert codes.min() >= rows.grid.allowed[0] and codes.max() <= rows.grid.allowed[1]
    assert np.allclose(rows.grid.decode(rows.scales, codes).reshape(ROWS, COLS), value, rtol=1e-6, atol=1e-7)
    if name in GRIDS:
        stored = decode(name, pack(name, rows.scales, codes).reshape(ROWS, -1))
        assert np.allclose(stored, value, rtol=1e-6, atol=1e-7)
    again = Rows(rows.grid, rows.scales, ROWS, rows.device)
    again.set_codes(codes)
    assert torch.equal(again.value(), rows.value())


def test_columns_in_another_order_get_the_same_codes() -> None:
    weight, by = weights(), damped(hessian(), 0.01)
    moved = torch.from_numpy(np.random.default_rng(5).permutation(COLS))
    kind = grid("int4-channel-sym", COLS)  # one scale a row, so that columns may change places
    found = []
    for order in (torch.arange(COLS), moved):
        turned = by[order][:, order].contiguous()
        rows = frozen(kind, weight[:, order].contiguous(), turned)
        rows.scales = frozen(kind, weight, by).scales
        factor = factorize(turned)
        assert factor is not None
        gptq(weight[:, order].T.contiguous(), factor, rows)
        found.append(rows.value().T)
    assert (found[0][:, moved] == found[1]).float().mean() > 0.99


def test_more_columns_than_a_block_that_do_not_fill_the_last_one() -> None:
    cols = 288
    weight, by = weights(cols=cols), damped(hessian(cols=cols, tokens=900), 0.01)
    rows = frozen(grid("int4-g32-zp", cols), weight, by)
    factor = factorize(by)
    assert factor is not None
    gptq(weight.T.contiguous(), factor, rows)
    alike = np.isclose(rows.value().T.numpy(), plain(weight, by, rows), rtol=1e-5, atol=1e-6).all(1)
    assert alike.sum() >= ROWS - 1


def test_the_factor_is_of_the_inverse_with_the_heaviest_columns_first() -> None:
    by = damped(hessian(), 0.01)
    factor = factorize(by)
    assert factor is not None
    diagonal = by.diagonal()[factor.order]
    assert (diagonal[1:] <= diagonal[:-1]).all()
    inverse = np.linalg.inv(by.double().numpy())[factor.order][:, factor.order]
    upper = factor.upper.double().numpy()
    assert np.allclose(upper.T @ upper, inverse, rtol=1e-3, atol=1e-5 * np.abs(inverse).max())
    assert np.array_equal(upper, np.triu(upper))


def test_damping_adds_a_share_of_the_mean_and_gives_a_column_that_saw_nothing_the_mean() -> None:
    by = hessian()
    by[7], by[:, 7] = 0, 0
    mean = float(by.diagonal().double().mean())
    added = (damped(by, 0.03) - by).diagonal().numpy()
    assert added[7] == pytest.approx(mean, rel=1e-5)
    assert np.allclose(np.delete(added, 7), 0.03 * mean, rtol=0.05, atol=0.03 * mean * 0.2)
    assert torch.isfinite(damped(torch.zeros_like(by), 0.01)).all()
    assert factorize(damped(torch.zeros_like(by), 0.01)) is not None


def test_a_hessian_that_is_not_positive_definite_has_no_factor() -> None:
    by = hessian()
    by[3, 3] = -by[3, 3]
    assert factorize(by) is None


@pytest.mark.parametrize("tokens", [1, 40])
def test_fewer_tokens_than_columns_still_give_codes(tokens: int) -> None:
    weight, by = weights(), damped(hessian(tokens=tokens), 0.01)
    rows = frozen(grid("Q4_K", COLS), weight, by)
    factor = factorize(by)
    assert factor is not None
    gptq(weight.T.contiguous(), factor, rows)
    assert torch.isfinite(rows.value()).all()
    assert rows.value().abs().max() < 4 * weight.abs().max()
