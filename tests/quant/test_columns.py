"""The two loops over columns: each column to its nearest level, and what that does to the others, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.quant.columns import Levels, descend_block, gptq_block
from llmx.quant.grid import GRIDS, grid
from llmx.quant.state import Rows

COLUMNS, ROWS = 24, 7
NAMES = ("Q4_K", "Q6_K", "IQ4_NL", "MXFP4", "int4-g32-zp", "int8-channel-sym", "fp8-channel-float32")
every_name = pytest.mark.parametrize("name", NAMES)


def levels(name: str) -> Levels:
    kind = grid(name, 256)
    return Rows(kind, kind.fit(np.ones((1, 256), np.float32)), 1, torch.device("cpu")).levels


def allowed(name: str) -> np.ndarray[Any, Any]:
    kind = grid(name, 256)
    return kind.levels[kind.allowed[0] : kind.allowed[1] + 1].astype(np.float64)


def problem(seed: int, name: str) -> dict[str, torch.Tensor]:
    """Weights, scales and offsets of columns, and a positive definite Hessian with its upper factor."""
    random = np.random.default_rng(seed)
    reach = float(np.abs(allowed(name)).max())
    x = random.standard_normal((4 * COLUMNS, COLUMNS))
    hessian = x.T @ x / len(x) + 0.01 * np.eye(COLUMNS)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    made = {
        "w": random.standard_normal((COLUMNS, ROWS)),
        "scale": random.uniform(1.5, 3, (COLUMNS, ROWS)) / reach * random.choice([-1, 1], (COLUMNS, ROWS)),
        "offset": random.uniform(-0.3, 0.3, (COLUMNS, ROWS)),
        "hessian": hessian,
        "factor": factor,
    }
    return {key: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for key, value in made.items()}


def double(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.double().numpy()


@pytest.mark.parametrize("name", [*GRIDS, *NAMES])
def test_levels_are_those_that_may_be_stored_in_ascending_order(name: str) -> None:
    found, expected = levels(name), allowed(name)
    assert np.array_equal(np.asarray(found.table), expected)
    assert (found.low, found.high) == (expected[0], expected[-1])
    if len(found.middles):
        assert np.allclose(np.asarray(found.middles), (expected[1:] + expected[:-1]) / 2)
    else:
        assert (np.diff(expected) == 1).all()


@every_name
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_with_an_identity_each_weight_gets_its_nearest_level(name: str, seed: int) -> None:
    made = problem(seed, name)
    level, error = gptq_block(made["w"].clone(), torch.eye(COLUMNS), made["scale"], made["offset"], levels(name))
    scale, offset, w = (double(made[key]) for key in ("scale", "offset", "w"))
    distances = np.abs(scale[..., None] * allowed(name) + offset[..., None] - w[..., None])
    chosen = np.abs(scale * double(level) + offset - w)
    assert set(np.unique(level.numpy())) <= set(allowed(name).astype(np.float32))
    assert (chosen <= distances.min(-1) + 1e-6 * np.abs(scale)).all()
    assert np.allclose(double(error), w - (scale * double(level) + offset), atol=1e-5)


@every_name
def test_a_block_of_gptq_is_the_plain_loop(name: str) -> None:
    made = problem(1, name)
    level, error = gptq_block(made["w"].clone(), made["factor"], made["scale"], made["offset"], levels(name))
    w, scale, offset, factor = (double(made[key]) for key in ("w", "scale", "offset", "factor"))
    table, lost = allowed(name), np.empty_like(w)
    for j in range(COLUMNS):
        choice = np.abs(scale[j, :, None] * table + offset[j, :, None] - w[j, :, None]).argmin(-1)
        assert np.array_equal(level[j].numpy(), table[choice].astype(np.float32)), j
        lost[j] = (w[j] - (scale[j] * table[choice] + offset[j])) / factor[j, j]
        w[j + 1 :] -= factor[j, j + 1 :, None] * lost[j]
    assert np.allclose(double(error), lost, atol=1e-4)


@every_name
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_sweep_lowers_the_loss_and_keeps_value_and_change_true(name: str, seed: int) -> None:
    made = problem(seed, name)
    level, _ = gptq_block(made["w"].clone(), torch.eye(COLUMNS), made["scale"], made["offset"], levels(name))
    before = made["scale"] * level + made["offset"]
    value, gradient = before.clone(), made["hessian"] @ (before - made["w"])
    change = descend_block(value, gradient, made["hessian"], made["scale"], made["offset"], levels(name), level)
    assert np.allclose(double(change), double(value) - double(before), atol=1e-5)
    assert np.allclose(double(value), double(made["scale"]) * double(level) + double(made["offset"]), atol=1e-5)

    def loss(values: torch.Tensor) -> np.ndarray[Any, Any]:
        error = double(values) - double(made["w"])
        return (error * (double(made["hessian"]) @ error)).sum(0)

    assert (loss(value) <= loss(before) * (1 + 1e-5) + 1e-6).all()


@every_name
def test_a_scale_of_zero_leaves_the_offset_and_nothing_that_is_not_finite(name: str) -> None:
    made = problem(2, name)
    made["scale"][3] = 0
    made["scale"][:, 2] = 0
    level, error = gptq_block(made["w"].clone(), made["factor"], made["scale"], made["offset"], levels(name))
    assert torch.isfinite(error).all()
    assert set(np.unique(level.numpy())) <= set(allowed(name).astype(np.float32))
    value = made["scale"] * level + made["offset"]
    gradient = made["hessian"] @ (value - made["w"])
    change = descend_block(value, gradient, made["hessian"], made["scale"], made["offset"], levels(name), level)
    assert torch.isfinite(value).all()
    assert not change[3].any() and not change[:, 2].any()
