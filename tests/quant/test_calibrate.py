"""The calibration pass: two models side by side as the decoder has them, and statistics as summed by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stock_types import random_checkpoint
from torch.nn import functional

from llmx.errors import IntegrityError
from llmx.models.decoder import embed, head, layer
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps, gated, run
from llmx.quant import calibrate, calibrate_experts, inputs
from llmx.quant.calibrate import Calibration, PairedOps, Solver, walk
from llmx.quant.inputs import Batch, MatrixInputs, Value, batches
from llmx.quant.statistics import Statistics
from llmx.quant.workers import workers

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
SHARED = ROOT.parent / "shared" / "models"
COUNT, LENGTH, EVERY = 7, 24, 3  # sequences, their tokens, and which of them are held out
MATRICES = frozenset(
    ("embedding", "head", "q", "k", "v", "o", "gate", "up", "down", "expert_gate", "expert_up", "expert_down")
)

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128, "activation_function": "gelu_new", "n_inner": 96}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "llama-biases": SMALL | {"attention_bias": True, "mlp_bias": True},
    "mistral": SMALL | {"model_type": "mistral", "sliding_window": 10},
    "mixtral": SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen3": SMALL | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3moe": SMALL | {"num_experts_per_tok": 2} | QWEN3_MOE,
    "gemma3": SMALL
    | {"model_type": "gemma3_text", "sliding_window": 10, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
    | {"hidden_activation": "gelu_pytorch_tanh"},
    "phi3": SMALL | {"model_type": "phi3", "original_max_position_embeddings": 128},
    "gpt2": GPT2 | {"model_type": "gpt2", "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2},
}
TRAINED = (
    "stories260k-llama",
    "tiny-gemma3",
    "tiny-gpt2",
    "tiny-llama3rope",
    "tiny-mixtral",
    "tiny-phi3",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-qwen3moe",
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """opened(name): a small random model of a family, or a trained one where those are."""
    folder = tmp_path_factory.mktemp("models")

    def run_(name: str) -> Model:
        if name in FAMILIES:
            if not (folder / name).is_dir():
                random_checkpoint(folder / name, FAMILIES[name])
            return open_model(folder / name)
        path = EXAMPLE if name == EXAMPLE.name else SHARED / name
        if not path.is_dir():
            pytest.skip(f"{path} is not here")
        return open_model(path)

    return run_


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Every row on four bits."""
    step = values.abs().amax(-1, keepdim=True) / 7
    return torch.where(step > 0, (values / step).round() * step, values)


@dataclass
class Nothing:
    """Quantizes nothing and remembers what it was asked."""

    asked: dict[tuple[str, int | None], MatrixInputs] = field(default_factory=dict)

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        self.asked[weight.spec.name, expert] = inputs
        return None

    def table(self, weight: Weight) -> torch.Tensor | None:
        return None


@dataclass
class Rounding(Nothing):
    """Replaces every matrix by its rounded one."""

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        super().matrix(weight, expert, inputs)
        rows = weight.spec.shape[-2]
        return rounded(torch.from_numpy(weight.read(rows * (expert or 0), rows * ((expert or 0) + 1))))

    def table(self, weight: Weight) -> torch.Tensor | None:
        return rounded(torch.from_numpy(weight.read()))


@dataclass
class Measuring(Nothing):
    """Asks for all statistics at once, as a solver does, and quantizes nothing or rounds."""

    rounds: bool = True
    found: dict[tuple[str, int | None], Statistics] = field(default_factory=dict)

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        self.found[weight.spec.name, expert] = inputs.statistics()
        super().matrix(weight, expert, inputs)
        return Rounding().matrix(weight, expert, inputs) if self.rounds else None

    def table(self, weight: Weight) -> torch.Tensor | None:
        return Rounding().table(weight) if self.rounds else None


@dataclass
class Recorder(TorchOps):
    """The decoder's own operations, weights rounded or not, with a record of what passes through them."""

    rounds: bool = False
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    streams: list[torch.Tensor] = field(default_factory=list)  # the residual stream before each addition
    chosen: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # weights, experts

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        values = torch.from_numpy(weight.read())
        if self.rounds and weight.spec.role in MATRICES and weight.spec.part == "weight":
            values = rounded(values)
        return values[start:stop]

    def embed(self, indices: torch.Tensor, table: Weight) -> torch.Tensor:
        return self._load(table)[indices]

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        self.inputs[weight.spec.name] = x[0]
        return super().linear(x, weight, bias)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.streams.append(a[0])
        return super().add(a, b)

    def experts(self, x: torch.Tensor, router: Weight, *arguments: Any, **options: Any) -> torch.Tensor:
        self.inputs[router.spec.name] = x[0]
        return super().experts(x, router, *arguments, **options)

    def route(self, rows: torch.Tensor, router: Weight, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.chosen[router.spec.name] = super().route(rows, router, **options)
        return self.chosen[router.spec.name]


def sampled(model: Model, count: int = COUNT, length: int = LENGTH) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, model.architecture.vocab, (count, length)).tolist()


def judged(number: int) -> bool:
    return number % EVERY == EVERY - 1


def paired(model: Model, parts: Sequence[Batch], solver: Solver) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The walk's two logits of every batch."""
    with workers(2) as pool, torch.inference_mode():
        ops = PairedOps(model, parts, solver, pool, device="cpu", store=None)
        tokens = Value(lambda batch: (parts[batch].tokens,) * 2)
        positions = Value(lambda batch: (torch.arange(parts[batch].tokens.shape[1]),) * 2)
        hidden = ops.enter(embed(model, ops, tokens, positions))
        for index in range(model.architecture.layers):
            hidden = layer(model, ops, index, hidden, positions)
            ops.settle(hidden)
        logits = head(model, ops, hidden)
        return [logits.at(batch) for batch in range(len(parts))]


def measured(model: Model, *, rounds: bool = True, threads: int = 2, store: Any = None) -> Measuring:
    solver = Measuring(rounds=rounds)
    with workers(threads) as pool:
        walk(model, Calibration(batches(sampled(model), EVERY), store=store), solver, pool)
    return solver


def recorded(model: Model) -> list[tuple[Recorder, Recorder]]:
    """(float, rounded) for every sequence."""
    made = []
    for tokens in sampled(model):
        both = Recorder(), Recorder(rounds=True)
        for ops in both:
            run(model, tokens, ops)
        made.append(both)
    return made


def close(found: torch.Tensor | np.ndarray[Any, Any], expected: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 2e-4 * np.abs(b).max())


# The two streams.


@pytest.mark.parametrize("name", [*FAMILIES, *TRAINED])
def test_both_streams_are_those_of_the_decoder(name: str, opened: Any) -> None:
    model = opened(name)
    parts = batches(sampled(model), EVERY)
    for batch, (exact, moved) in zip(parts, paired(model, parts, Rounding()), strict=True):
        for row, tokens in enumerate(batch.tokens.tolist()):
            assert close(exact[row], run(model, tokens))
            assert close(moved[row], run(model, tokens, Recorder(rounds=True)))


@pytest.mark.parametrize("name", [*FAMILIES, *TRAINED])
def test_with_nothing_quantized_both_streams_are_one(name: str, opened: Any) -> None:
    model = opened(name)
    parts = batches(sampled(model, 3), 0)
    solver = Nothing()
    for exact, moved in paired(model, parts, solver):
        assert torch.equal(exact, moved)
        if not any(model.architecture.sparse_layers):
            assert moved is exact  # computed once
    solved = MATRICES if model.architecture.tied else MATRICES - {"embedding"}
    matrices = {s.name for s in model.architecture.tensors if s.part == "weight" and s.role in solved}
    assert {matrix for matrix, _ in solver.asked} == matrices


def test_every_nth_sequence_is_held_out_and_none_is_lost() -> None:
    ids = [[number] * 100 for number in range(60)]
    parts = batches(ids, 5)
    fitted = [row[0] for part in parts if not part.held_out for row in part.tokens.tolist()]
    kept = [row[0] for part in parts if part.held_out for row in part.tokens.tolist()]
    assert kept == list(range(4, 60, 5))
    assert sorted(fitted + kept) == list(range(60))
    assert max(part.tokens.numel() for part in parts) <= inputs.BATCH_TOKENS
    assert not any(part.held_out for part in batches(ids, 0))


@pytest.mark.parametrize(("count", "held_out"), [(4, [3]), (2, [1]), (1, [])])
def test_of_few_sequences_the_last_is_held_out_unless_it_is_the_only_one(count: int, held_out: list[int]) -> None:
    parts = batches([[number] * 32 for number in range(count)], 10)
    assert [row[0] for part in parts if part.held_out for row in part.tokens.tolist()] == held_out


# Statistics.


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral"])
def test_statistics_are_the_sums_over_all_tokens_from_the_first_on(name: str, opened: Any) -> None:
    model, found, runs = opened(name), measured(opened(name)).found, recorded(opened(name))
    first = 1 if model.has("position_embedding.weight") else 0  # additions before the layers
    for index in (0, 2):
        for place, role in ((None, "q"), (0, "o"), (None, "up"), (1, "down")):
            matrix = f"layers.{index}.{role}.weight"
            known = found[matrix, None]
            for held_out, part in ((False, known.fitted), (True, known.held_out)):
                pairs = [both for number, both in enumerate(runs) if judged(number) == held_out]
                x, moved = (torch.cat([both[side].inputs[matrix] for both in pairs]).double() for side in (0, 1))
                assert part.tokens == len(pairs) * LENGTH == len(x)
                assert close(part.hessian, moved.T @ moved)
                assert part.drift is not None
                assert close(part.drift, (x - moved).T @ moved)
                if place is None:
                    assert part.residual is None
                    continue
                at = first + 2 * index + place
                error = torch.cat([both[0].streams[at] - both[1].streams[at] for both in pairs]).double()
                assert part.residual is not None
                assert close(part.residual, error.T @ moved)
            assert close(known.squares, torch.cat([both[0].inputs[matrix] for both in runs]).double().square().sum(0))


def test_the_first_token_which_models_use_as_a_sink_counts_as_every_other(opened: Any) -> None:
    model = opened("llama")
    known = measured(model).found["layers.1.down.weight", None]
    runs = [both for number, both in enumerate(recorded(model)) if not judged(number)]
    moved = torch.cat([both[1].inputs["layers.1.down.weight"] for both in runs]).double()
    without = torch.cat([both[1].inputs["layers.1.down.weight"][1:] for both in runs]).double()
    assert close(known.fitted.hessian, moved.T @ moved)
    assert not close(known.fitted.hessian, without.T @ without)
    assert known.tokens == COUNT * LENGTH


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_matrices_with_one_input_share_its_statistics(name: str, opened: Any) -> None:
    asked = measured(opened(name)).asked
    q, k, v, o = (asked[f"layers.1.{role}.weight", None] for role in "qkvo")
    assert q is k is v and o is not q
    assert q.key == "layers.1.q"
    if name == "llama":
        gate, up, down = (asked[f"layers.1.{role}.weight", None] for role in ("gate", "up", "down"))
        assert gate is up and down is not up
    else:
        gate, up, down = (asked[f"layers.1.expert_{role}.weight", 2] for role in ("gate", "up", "down"))
        assert gate is up and down is not up
        assert (gate.key, down.key) == ("layers.1.expert_gate.2", "layers.1.expert_down.2")


@pytest.mark.parametrize("name", ["gemma3", "tiny-gemma3"])
def test_a_norm_after_the_matrix_leaves_no_residual_to_make_up_for(name: str, opened: Any) -> None:
    found = measured(opened(name)).found
    assert all(known.fitted.residual is None and known.held_out.residual is None for known in found.values())
    assert found["layers.1.o.weight", None].fitted.drift is not None


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_one_thread_and_two_sum_the_same(name: str, opened: Any) -> None:
    one, two = (measured(opened(name), threads=threads).found for threads in (1, 2))
    assert one.keys() == two.keys()
    for key, known in one.items():
        for part in ("fitted", "held_out"):
            first, second = getattr(known, part), getattr(two[key], part)
            assert torch.equal(first.hessian, second.hessian)
            assert (first.residual is None) == (second.residual is None)
            assert first.residual is None or torch.equal(first.residual, second.residual)
        assert torch.equal(known.squares, two[key].squares)


def test_squares_are_the_same_whether_all_statistics_are_asked_for_or_not(opened: Any) -> None:
    model = opened("llama")
    whole = measured(model, rounds=False).found

    class Squares(Nothing):
        def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
            squares, tokens = inputs.squares()
            known = whole[weight.spec.name, expert]
            assert torch.equal(squares, known.squares)
            assert tokens == known.tokens == COUNT * LENGTH
            return None

    with workers(2) as pool:
        walk(model, Calibration(batches(sampled(model), EVERY)), Squares(), pool)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "gpt2"])
def test_activations_of_past_layers_are_let_go_at_once(name: str, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Value]] = []

    class Tracked(Value):
        def __init__(self, compute: Any) -> None:
            super().__init__(compute)
            made.append(weakref.ref(self))

    held: list[int] = []

    class Counting(Measuring):
        def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
            if weight.spec.role == "q":
                alive = [value for reference in made if (value := reference()) is not None]
                held.append(sum(value._kept is not None for value in alive))
            return super().matrix(weight, expert, inputs)

    for module in (calibrate, calibrate_experts):
        monkeypatch.setattr(module, "Value", Tracked)
    model = opened(name)
    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        with workers(2) as pool:
            walk(model, Calibration(batches(sampled(model), EVERY)), Counting(), pool)
        alive = sum(reference() is not None for reference in made)
    finally:
        gc.enable()
    assert held[1:] == [1] * (model.architecture.layers - 1)  # the residual stream alone
    assert alive == 0


# Experts.


def reached(model: Model, index: int) -> list[int]:
    """Tokens that the float model's router sends each expert of a layer."""
    counts = np.zeros(model.architecture.experts, int)
    for both in recorded(model):
        chosen = both[0].chosen[f"layers.{index}.router.weight"][1]
        counts += np.bincount(chosen.reshape(-1).numpy(), minlength=len(counts))
    return counts.tolist()


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_an_expert_sees_the_tokens_that_are_sent_to_it(name: str, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_experts, "MINIMUM_TOKENS", 0)
    model = opened(name)
    found = measured(model, rounds=False).found
    for index in (0, 2):
        tokens = [found[f"layers.{index}.expert_up.weight", e].tokens for e in range(model.architecture.experts)]
        assert tokens == reached(model, index)
        assert sum(tokens) == COUNT * LENGTH * model.architecture.experts_used
    assert not any(known.pooled for known in found.values())


def test_an_expert_that_too_few_tokens_reach_is_given_all_of_its_layer(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("mixtral")
    runs = [both[1] for number, both in enumerate(recorded(model)) if not judged(number)]
    chosen = torch.cat([ops.chosen["layers.0.router.weight"][1].reshape(-1) for ops in runs])
    fitted = torch.bincount(chosen, minlength=4).tolist()
    limit = sorted(fitted)[2]
    monkeypatch.setattr(calibrate_experts, "MINIMUM_TOKENS", limit)
    found = measured(model).found
    for expert, count in enumerate(fitted):
        for role in ("gate", "up", "down"):
            known = found[f"layers.0.expert_{role}.weight", expert]
            assert known.pooled == (count < limit)
            if known.pooled:
                assert known.tokens == COUNT * LENGTH
            else:
                assert known.fitted.tokens == count
    pooled = found["layers.0.expert_up.weight", fitted.index(min(fitted))]
    x = torch.cat([ops.inputs["layers.0.router.weight"] for ops in runs]).double()
    assert close(pooled.fitted.hessian, x.T @ x)


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe"])
def test_an_experts_tokens_weigh_as_the_square_of_their_share(
    name: str, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_experts, "MINIMUM_TOKENS", 0)
    model = opened(name)
    known = measured(model).found["layers.1.expert_gate.weight", 1]
    hessian = torch.zeros(64, 64, dtype=torch.float64)
    drift = torch.zeros_like(hessian)
    for number, (exact, moved) in enumerate(recorded(model)):
        if judged(number):
            continue
        shares, chosen = moved.chosen["layers.1.router.weight"]
        rows, place = torch.where(chosen == 1)
        x, y = (side.inputs["layers.1.router.weight"][rows].double() for side in (exact, moved))
        weighed = y * shares[rows, place, None].double().square()
        hessian += y.T @ weighed
        drift += (x - y).T @ weighed
    assert close(known.fitted.hessian, hessian)
    assert known.fitted.drift is not None
    assert close(known.fitted.drift, drift)


def test_what_a_layer_of_experts_lacks_is_spread_over_the_experts_of_each_token(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """r = h − ĥ + the float layer's output − what its experts would put out where the quantized router sends tokens."""
    monkeypatch.setattr(calibrate_experts, "MINIMUM_TOKENS", 0)
    model, index, expert = opened("mixtral"), 1, 2
    known = measured(model).found[f"layers.{index}.expert_down.weight", expert]
    router = f"layers.{index}.router.weight"
    names = [f"layers.{index}.expert_{role}.weight" for role in ("gate", "up", "down")]
    gate, up, down = (torch.from_numpy(model.weight(n).read()).view(*model.weight(n).spec.shape) for n in names)
    residual = torch.zeros(*down.shape[1:], dtype=torch.float64)
    for number, (exact, moved) in enumerate(recorded(model)):
        if judged(number):
            continue
        x, y = exact.inputs[router], moved.inputs[router]

        def output(shares: torch.Tensor, chosen: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            total = torch.zeros_like(x)
            for e in range(4):
                rows, place = torch.where(chosen == e)
                states = functional.linear(gated(x[rows], gate[e], up[e], "silu"), down[e])
                total[rows] += shares[rows, place, None] * states
            return total

        at = 2 * index + 1
        shares, chosen = moved.chosen[router]
        lacking = exact.streams[at] - moved.streams[at] + output(*exact.chosen[router]) - output(shares, chosen)
        rows, place = torch.where(chosen == expert)
        share = shares[rows, place, None]
        own = lacking[rows] * share / shares[rows].square().sum(-1, keepdim=True)
        states = gated(y[rows], rounded(gate[expert]), rounded(up[expert]), "silu")
        residual += own.double().T @ (states * share.square()).double()
    assert known.fitted.residual is not None
    assert close(known.fitted.residual, residual)


# Statistics that an earlier run kept.


@dataclass
class Kept:
    """A store in memory. loads: which were asked for and there."""

    complete: bool = False
    kept: dict[str, Statistics] = field(default_factory=dict)
    loads: list[str] = field(default_factory=list)
    saves: list[str] = field(default_factory=list)

    def load(self, key: str) -> Statistics | None:
        if key in self.kept:
            self.loads.append(key)
        return self.kept.get(key)

    def save(self, key: str, found: Statistics) -> None:
        self.saves.append(key)
        self.kept[key] = found


def same(one: Measuring, two: Measuring) -> bool:
    return one.found.keys() == two.found.keys() and all(
        torch.equal(known.fitted.hessian, two.found[key].fitted.hessian)
        and torch.equal(known.held_out.hessian, two.found[key].held_out.hessian)
        and torch.equal(known.squares, two.found[key].squares)
        and known.pooled == two.found[key].pooled
        for key, known in one.found.items()
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe"])
def test_a_run_with_all_statistics_computes_nothing(name: str, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = opened(name), Kept()
    first = measured(model, store=store)
    assert sorted(store.saves) == sorted(store.kept) and not store.loads
    store.complete = True
    for operation in ("norm", "attention", "embed", "route"):
        monkeypatch.setattr(TorchOps, operation, None)  # to be called is an error
    second = measured(model, store=store)
    assert same(first, second)
    assert len(store.saves) == len(store.kept)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe"])
@pytest.mark.parametrize("gone", ["layers.0.o", "layers.2.q", "every second"])
def test_a_run_cut_short_goes_on_to_the_same_statistics(name: str, gone: str, opened: Any) -> None:
    model, store = opened(name), Kept()
    first = measured(model, store=store)
    left = list(store.kept)[::2] if gone == "every second" else [key for key in store.kept if key != gone]
    again = Kept(kept={key: store.kept[key] for key in left})
    second = measured(model, store=again)
    assert same(first, second)
    assert set(again.saves) == set(store.kept) - set(left)


@pytest.mark.parametrize(("name", "key"), [("llama", "layers.1.o"), ("mixtral", "layers.1.expert_down.0")])
def test_statistics_that_should_be_there_and_are_not_are_an_error(name: str, key: str, opened: Any) -> None:
    model, store = opened(name), Kept()
    measured(model, store=store)
    store.complete = True
    del store.kept[key]
    with pytest.raises(IntegrityError, match="lack"):
        measured(model, store=store)
