"""The scales of a scaled artifact are found again, whatever else is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from llmx.models.folded import FoldedModel
from llmx.models.model import Model, Weight, open_model
from llmx.quant.transforms import Folds, pairs
from llmx.validate.scales import with_scales_of


def scaled(model: Model, seed: int = 0) -> FoldedModel:
    """The model with random scales, a factor of three either way, in every pair."""
    rng = np.random.default_rng(seed)
    scales = {pair: np.exp(rng.uniform(-1.1, 1.1, pair.shape)).astype(np.float32) for pair in pairs(model.architecture)}
    return Folds(scales).applied(model)


class Noisy(Model):
    """A model whose matrices are read with an error like rounding's, and some weights after a change."""

    def __init__(self, model: Model, error: float, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> None:
        super().__init__(model.architecture, model.checkpoint)
        self._weights = {w.spec.name: _NoisyWeight(w, error, changes.get(w.spec.name)) for w in model.weights()}


class _NoisyWeight(Weight):
    def __init__(self, weight: Weight, error: float, change: Callable[[np.ndarray], np.ndarray] | None) -> None:
        super().__init__(weight.spec, weight._checkpoint)
        values = weight.read()
        if len(weight.spec.shape) > 1:
            noise = np.random.default_rng(1).standard_normal(values.shape)
            values += (noise * error * np.sqrt(np.mean(values**2, axis=1, keepdims=True))).astype(np.float32)
        self.values = values if change is None else change(values)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.values[start:stop].copy()


def off(found: Model, artifact: Model) -> dict[str, float]:
    """||artifact - found|| / ||found|| of every tensor."""
    return {
        w.spec.name: float(np.linalg.norm(artifact.weight(w.spec.name).read() - w.read()) / np.linalg.norm(w.read()))
        for w in found.weights()
    }


@pytest.fixture(params=["tiny-qwen3", "tiny-qwen2", "tiny-mixtral", "tiny-gemma3", "tiny-gpt2", "stories260k-llama"])
def model(request: pytest.FixtureRequest, checkpoint_of: Callable[[str], Path]) -> Model:
    return open_model(checkpoint_of(request.param))


def test_scales_without_an_error_are_found_again(model):
    artifact = scaled(model)
    for name, distance in off(with_scales_of(model, artifact), artifact).items():
        assert distance < 2e-6, name


def test_a_model_without_scales_has_scales_of_one(model):
    for name, distance in off(with_scales_of(model, model), model).items():
        assert distance < 1e-6, name


def test_with_an_error_what_is_left_is_that_error(model):
    artifact = Noisy(scaled(model), 0.15, {})
    for name, distance in off(with_scales_of(model, artifact), artifact).items():
        vector = len(model.weight(name).spec.shape) == 1
        assert distance < (1e-5 if vector else 0.17), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.1.attention_norm.weight", lambda gain: gain * np.float32(1.5)),
        ("layers.1.ffn_norm.weight", lambda gain: np.where(np.arange(gain.size) < 9, gain * np.float32(3), gain)),
        ("layers.1.v.weight", lambda rows: np.where(np.arange(len(rows))[:, None] < 9, 0, rows)),
        ("layers.1.v.weight", lambda rows: np.where(np.arange(len(rows))[:, None] == 9, 4 * rows, rows)),
        ("layers.1.o.weight", lambda rows: np.roll(rows, 7, axis=1)),
        ("layers.1.down.weight", lambda rows: np.roll(rows, 7, axis=0)),
        ("layers.1.up.weight", lambda rows: rows[::-1]),
        ("layers.1.gate.weight", lambda rows: rows[::-1]),
    ],
    ids=[
        "gain",
        "part of a gain",
        "rows of v",
        "a larger row of v",
        "columns of o",
        "rows of down",
        "rows of up",
        "rows of gate",
    ],
)
def test_a_fault_stays_in_its_tensor(name, change, checkpoint_of):
    """The scale that its neighbours are judged by is taken from where it is not damaged."""
    model = open_model(checkpoint_of("tiny-qwen3"))
    artifact = Noisy(scaled(model), 0.05, {name: change})
    far = {key for key, distance in off(with_scales_of(model, artifact), artifact).items() if distance > 0.12}
    assert far == {name}


def test_folds_of_experts_are_each_experts_own(checkpoint_of):
    model = open_model(checkpoint_of("tiny-mixtral"))
    pair = next(pair for pair in pairs(model.architecture) if len(pair.shape) == 2)
    scales = np.exp(np.random.default_rng(0).uniform(-1, 1, pair.shape)).astype(np.float32)
    artifact = Folds({pair: scales}).applied(model)
    found = with_scales_of(model, artifact)
    up, expected = found.weight(f"{pair.producer}.weight").read(), artifact.weight(f"{pair.producer}.weight").read()
    np.testing.assert_allclose(up, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("role", ["v", "o", "up", "down", "attention_norm", "ffn_norm"])
def test_a_factor_of_a_whole_tensor_stays_in_it(role, checkpoint_of):
    """The two sides of a pair tell it alike; the scales that were searched are centred, and the factor moves them."""
    model = open_model(checkpoint_of("tiny-qwen3"))
    rng = np.random.default_rng(0)
    drawn = {pair: rng.uniform(-1, 1, pair.shape) for pair in pairs(model.architecture)}
    centred = {pair: np.exp(x - (x.max() + x.min()) / 2).astype(np.float32) for pair, x in drawn.items()}
    name = f"layers.1.{role}.weight"
    artifact = Noisy(Folds(centred).applied(model), 0.05, {name: lambda values: values * np.float32(1.1)})
    far = {key for key, distance in off(with_scales_of(model, artifact), artifact).items() if distance > 0.08}
    assert far == {name}


def test_exchanged_consumers_do_not_spoil_the_scale_of_their_norm(checkpoint_of):
    model = open_model(checkpoint_of("tiny-qwen3"))
    artifact = scaled(model)
    gate, up = (artifact.weight(f"layers.1.{role}.weight").read() for role in ("gate", "up"))
    changes = {"layers.1.gate.weight": lambda _: up, "layers.1.up.weight": lambda _: gate}
    bad = Noisy(artifact, 0.05, changes)
    far = {key for key, distance in off(with_scales_of(model, bad), bad).items() if distance > 0.12}
    assert far == set(changes)
