"""What rounding a tensor costs: as the decoder has it, the same for any threads, and good to allocate by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmx.errors import UsageError
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.ggml_decode import decode
from llmx.models import decoder
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps, run
from llmx.quant import sensitivity
from llmx.quant.allocate import Choice, allocate
from llmx.quant.grid import encode
from llmx.quant.sensitivity import candidates, divergence, measure, rounded
from llmx.quant.workers import workers

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-qwen3"
SHARED = ROOT.parent / "shared"
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(TINY)


@pytest.fixture(scope="module")
def tokens(model: Model) -> torch.Tensor:
    return sampled(model, sequences=3, length=32)


def sampled(model: Model, sequences: int, length: int) -> torch.Tensor:
    """i64[sequences, length] drawn from the model itself: what it is sure of and what not, as on real text."""
    numbers = np.random.default_rng(3)
    made = numbers.integers(3, model.architecture.vocab, (sequences, 1))
    with torch.inference_mode():
        ops = TorchOps(keep=True)
        while made.shape[1] < length:
            logits = decoder.forward(model, ops, torch.from_numpy(made), torch.arange(made.shape[1]))[:, -1]
            scores = logits.numpy() + numbers.gumbel(size=logits.shape)
            made = np.concatenate([made, scores.argmax(-1)[:, None]], axis=1)
    return torch.from_numpy(made)


class Rounded(TorchOps):
    """The decoder's own operations, with some tensors rounded when they are loaded."""

    types: dict[str, str]

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        values = weight.read()
        if weight.spec.name in self.types:
            type_name = self.types[weight.spec.name]
            values = decode(type_name, encode(type_name, values))
        return torch.from_numpy(values)[start:stop]


def reference(model: Model, tokens: torch.Tensor, types: dict[str, str]) -> float:
    ops = Rounded(keep=True)
    ops.types = types
    lost = 0.0
    for row in tokens.tolist():
        ours, exact = (torch.from_numpy(run(model, row, o)).double().log_softmax(-1) for o in (ops, TorchOps()))
        lost += float((exact.exp() * (exact - ours)).sum())
    return lost / tokens.numel()


def sizes(model: Model, types: tuple[str, ...]) -> dict[str, dict[str, int]]:
    weights = {spec.name: model.weight(spec.name) for spec in candidates(model.architecture)}
    return {
        name: {type_name: weight.rows * row_bytes(type_name, weight.cols) for type_name in types}
        for name, weight in weights.items()
    }


def test_norms_vectors_and_routers_are_never_candidates(model: Model) -> None:
    names = {spec.name for spec in candidates(model.architecture)}
    assert len(names) == 1 + 7 * model.architecture.layers
    assert {"embedding.weight", "layers.0.q.weight", "layers.3.down.weight"} < names
    assert not any("norm" in name for name in names)


@pytest.mark.parametrize(
    "types",
    [
        {"layers.1.v.weight": "Q3_K"},
        {"embedding.weight": "Q4_K"},  # the head too
        {"layers.0.q.weight": "Q4_K", "layers.0.o.weight": "Q8_0", "layers.3.down.weight": "Q2_K"},
        {"layers.2.up.weight": "F16", "layers.2.gate.weight": "MXFP4"},
    ],
    ids=", ".join,
)
def test_the_divergence_is_that_of_the_decoder_on_the_rounded_tensors(
    types: dict[str, str], model: Model, tokens: torch.Tensor
) -> None:
    with workers(2) as pool:
        (found,) = divergence(model, tokens, [types], pool)
    assert found == pytest.approx(reference(model, tokens, types), rel=1e-4, abs=1e-12)


def test_a_trial_that_rounds_nothing_or_loses_no_bit_costs_nothing(model: Model, tokens: torch.Tensor) -> None:
    with workers(1) as pool:
        trials = [{}, {"layers.0.q.weight": "BF16"}, {"embedding.weight": "F32"}]
        assert divergence(model, tokens, trials, pool) == (0.0, 0.0, 0.0)
        assert divergence(model, tokens, [], pool) == ()
        assert measure(model, tokens, {"layers.0.q.weight": ["BF16"], "layers.0.k.weight": []}, pool) == {
            "layers.0.q.weight": {"BF16": 0.0},
            "layers.0.k.weight": {},
        }


def test_the_result_is_the_same_for_any_number_of_threads_and_any_cut(
    model: Model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = {spec.name: ["Q4_K", "Q2_K"] for spec in candidates(model.architecture) if spec.layer in (None, 0, 3)}
    found = []
    for threads in (1, 3):
        with workers(threads) as pool:
            found.append(measure(model, tokens, grids, pool))
    assert found[0] == found[1]
    monkeypatch.setattr(sensitivity, "HELD_BYTES", 1)  # one sequence at a time
    monkeypatch.setattr(sensitivity, "LOGITS", 5 * model.architecture.vocab)
    with workers(2) as pool:
        cut = measure(model, tokens, grids, pool)
    for name, types in found[0].items():
        assert cut[name] == pytest.approx(types, rel=1e-4)


def test_one_measured_type_tells_the_others(model: Model, tokens: torch.Tensor) -> None:
    grids = {f"layers.{n}.{role}.weight": TYPES for n, role in ((0, "v"), (0, "up"), (2, "q"), (3, "down"))}
    with workers(2) as pool:
        exact = measure(model, tokens, grids, pool, exact=True)
        scaled = measure(model, tokens, grids, pool)
    for name in grids:
        assert scaled[name]["Q2_K"] == exact[name]["Q2_K"]
        for type_name in TYPES:
            assert scaled[name][type_name] == pytest.approx(exact[name][type_name], rel=0.7)
        assert list(scaled[name].values()) == sorted(scaled[name].values(), reverse=True)


def test_importance_moves_the_rounding_and_the_ratio(model: Model, tokens: torch.Tensor) -> None:
    name = "layers.0.down.weight"
    weight = model.weight(name)
    columns = np.exp(np.random.default_rng(1).normal(0, 1.5, weight.cols)).astype(np.float32)
    values = weight.read()
    plain, weighted = (rounded(values, weight.spec, "Q2_K", own) for own in (None, columns))

    def error(found: np.ndarray) -> float:
        return float((columns * (found - values) ** 2).sum())

    assert error(weighted) < error(plain)
    with workers(1) as pool:
        first, second = (measure(model, tokens, {name: TYPES}, pool, own)[name] for own in (None, {name: columns}))
    assert first != second


def test_mistakes_are_told_at_once(model: Model, tokens: torch.Tensor) -> None:
    grids = {
        "layers.0.attention_norm.weight": ["Q8_0"],
        "layers.0.q.weight": ["Q9", "int4-g1024-sym"],
        "nothing": ["Q8_0"],
    }
    with workers(1) as pool, pytest.raises(UsageError) as caught:
        measure(model, tokens, grids, pool)
    assert len(caught.value.problems) == 4


def test_grids_of_serving_engines_are_measured_alike(model: Model, tokens: torch.Tensor) -> None:
    types = ["int4-channel-sym", "int4-g64-sym", "nvfp4", "int8-channel-sym", "fp8-tensor-float32"]
    with workers(2) as pool:
        found = measure(model, tokens, {"layers.1.up.weight": types}, pool, exact=True)["layers.1.up.weight"]
    assert (
        found["int4-channel-sym"] > found["int4-g64-sym"] > found["fp8-tensor-float32"] > found["int8-channel-sym"] > 0
    )
    assert found["int4-channel-sym"] > found["nvfp4"] > found["fp8-tensor-float32"]


def test_the_sum_of_single_losses_foretells_the_loss_of_the_whole_and_allocation_beats_one_type(
    model: Model, tokens: torch.Tensor
) -> None:
    names = [spec.name for spec in candidates(model.architecture)]
    nbytes = sizes(model, TYPES)
    fresh = sampled(model, sequences=4, length=40)
    with workers(2) as pool:
        found = measure(model, tokens, dict.fromkeys(names, TYPES), pool)
        choices = {name: [Choice(t, nbytes[name][t], found[name][t]) for t in TYPES] for name in names}
        uniform = [dict.fromkeys(names, type_name) for type_name in ("Q3_K", "Q4_K")]
        chosen = [allocate(choices, sum(nbytes[name][t] for name, t in trial.items())) for trial in uniform]
        real = divergence(model, fresh, [*uniform, *chosen], pool)
    for trial, loss in zip(uniform, real[:2], strict=True):
        assert sum(found[name][t] for name, t in trial.items()) == pytest.approx(loss, rel=0.6)
    assert real[2] < 0.7 * real[0]
    assert real[3] < 0.7 * real[1]


def test_experts_are_rounded_as_one_tensor_each_with_its_own_importance() -> None:
    folder = SHARED / "models" / "tiny-mixtral"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    mixture = open_model(folder)
    assert not any(spec.role == "router" for spec in candidates(mixture.architecture))
    name = "layers.1.expert_down.weight"
    weight = mixture.weight(name)
    own = np.ones((weight.spec.shape[0], weight.cols), np.float32)
    own[0, 16:] = 1e-4
    own[1] = 0  # no token has reached it
    values = weight.read()
    height = weight.spec.shape[1]
    plain, weighted = (rounded(values, weight.spec, "Q3_K", i).reshape(-1, height, weight.cols) for i in (None, own))
    assert not np.array_equal(plain[0], weighted[0])
    assert np.array_equal(plain[1], weighted[1])
    tokens = sampled(mixture, sequences=2, length=24)
    with workers(2) as pool:
        found = measure(mixture, tokens, {name: ["Q3_K", "Q4_K"]}, pool, {name: own})
        (plain_loss,) = divergence(mixture, tokens, [{name: "Q3_K"}], pool)
    assert 0 < found[name]["Q4_K"] < found[name]["Q3_K"]
    assert plain_loss == pytest.approx(reference(mixture, tokens, {name: "Q3_K"}), rel=1e-4)
