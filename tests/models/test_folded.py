"""Folded models: the weights that the arithmetic says, the function of the model they were folded into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from llmx.exporters.gguf_families import gguf_family  # noqa: E402
from llmx.exporters.gguf_tensors import entries, passes_through, read_rows, release_rows  # noqa: E402
from llmx.formats.safetensors import write_safetensors  # noqa: E402
from llmx.models.families import describe  # noqa: E402
from llmx.models.folded import Fold, FoldedModel  # noqa: E402
from llmx.models.model import Model, check_finite, open_model  # noqa: E402
from llmx.models.ops_torch import run  # noqa: E402
from llmx.quant.transforms import Folds, pairs  # noqa: E402

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "models"
TRAINED = (
    *("stories260k-llama", "stories42m-llama", "tiny-llama3rope", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3"),
    *("tiny-phi3", "tiny-mixtral", "tiny-qwen3moe", "tiny-gpt2"),
)
LARGEST_DIFFERENCE = 1e-4  # of the largest logit: float32 rounding, and nothing else

SMALL = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MADE: dict[str, dict[str, Any]] = {
    "llama with every bias": {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama with one head of keys": {**SMALL, "model_type": "llama", "num_key_value_heads": 1, "head_dim": 16},
    "mistral": {**SMALL, "model_type": "mistral"},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "qwen3_moe, its first layer dense": {
        **{**SMALL, "model_type": "qwen3_moe", "head_dim": 8, "mlp_only_layers": [0]},
        **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    },
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 3},
    "gemma3_text": {
        **{**SMALL, "model_type": "gemma3_text", "head_dim": 8},
        **{"sliding_window": 9, "query_pre_attn_scalar": 8},
    },
    "phi3": {**SMALL, "model_type": "phi3"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 48, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64},
}


def make_model(folder: Path, config: Mapping[str, Any]) -> Model:
    """A random checkpoint of this architecture, F32."""
    random = np.random.default_rng(11)
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in describe(config).tensors:
        shape = spec.shape[1:] if len(spec.source.names) > 1 else spec.shape
        if spec.source.rows is not None:  # the last slice of a fused tensor ends where the tensor does
            shape = (spec.source.rows[1], *shape[1:])
        shapes |= dict.fromkeys(spec.source.names, shape[::-1] if spec.source.transpose else shape)
    stored = []
    for name, shape in shapes.items():
        spread = 0.5 if len(shape) == 1 else 1.5 / np.sqrt(SMALL["hidden_size"])
        values = (random.standard_normal(shape) * spread).astype(np.float32)
        stored.append((name, "F32", shape, [values.data.cast("B")]))
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", stored)
    return open_model(folder)


def random_folds(model: Model, seed: int) -> Folds:
    """Scales between 1/8 and 8 for every pair."""
    random = np.random.default_rng(seed)
    return Folds({p: np.exp2(random.uniform(-3, 3, p.shape)).astype(np.float32) for p in pairs(model.architecture)})


def difference(model: Model, other: Model, tokens: list[int]) -> float:
    """The largest difference of the logits, as a share of the largest logit."""
    wanted, found = run(model, tokens), run(other, tokens)
    return float(np.abs(wanted - found).max() / np.abs(wanted).max())


def some_tokens(model: Model, count: int = 24) -> list[int]:
    return np.random.default_rng(3).integers(3, model.architecture.vocab, count).tolist()


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_folds_leave_the_logits_of_every_architecture(name: str, seed: int, tmp_path: Path) -> None:
    model = make_model(tmp_path, MADE[name])
    folded = random_folds(model, seed).applied(model)
    assert difference(model, folded, some_tokens(model)) < LARGEST_DIFFERENCE


@pytest.mark.parametrize("folder", [*(SHARED / name for name in TRAINED), ROOT / "examples" / "tiny-qwen3"], ids=str)
def test_random_folds_leave_the_logits_of_trained_models(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not here")
    model = open_model(folder)
    folded = random_folds(model, 5).applied(model)
    assert difference(model, folded, some_tokens(model)) < LARGEST_DIFFERENCE


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe, its first layer dense", "llama with every bias"])
def test_folds_compose(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, MADE[name])
    first, second = random_folds(model, 1), random_folds(model, 2)
    twice = second.applied(first.applied(model))
    once = Folds({pair: first.scales[pair] * second.scales[pair] for pair in first.scales}).applied(model)
    for weight in once.weights():
        assert twice.weight(weight.spec.name).read() == pytest.approx(weight.read(), rel=1e-5, abs=1e-6)
    assert difference(model, twice, some_tokens(model)) < LARGEST_DIFFERENCE


def test_weights_are_multiplied_by_column_and_divided_by_row(tmp_path: Path) -> None:
    model = make_model(tmp_path, MADE["mixtral"])
    random = np.random.default_rng(0)
    shared, own = (random.uniform(0.5, 2, shape).astype(np.float32) for shape in ((24,), (3, 36)))
    folded = FoldedModel(model, {"layers.1.expert_up.weight": Fold(columns=shared, rows=own)})
    weight, plain = folded.weight("layers.1.expert_up.weight"), model.weight("layers.1.expert_up.weight")
    wanted = plain.read().reshape(3, 36, 24) * shared / own[:, :, None]
    assert weight.read() == pytest.approx(wanted.reshape(-1, 24), rel=1e-6)
    for start, stop in ((0, 1), (30, 80), (36, 72), (107, 108)):
        assert np.array_equal(weight.read(start, stop), weight.read()[start:stop])


def test_a_norm_gain_is_divided_with_its_offset_and_its_bias_without(tmp_path: Path) -> None:
    scales = np.linspace(0.5, 3, 24, dtype=np.float32)
    (tmp_path / "gemma").mkdir()
    gemma = make_model(tmp_path / "gemma", MADE["gemma3_text"])
    gain = FoldedModel(gemma, {"layers.0.ffn_norm.weight": Fold(rows=scales)}).weight("layers.0.ffn_norm.weight")
    wanted = (gemma.weight("layers.0.ffn_norm.weight").read() + 1) / scales - 1
    assert gain.read() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    (tmp_path / "gpt2").mkdir()
    gpt2 = make_model(tmp_path / "gpt2", MADE["gpt2"])
    bias = FoldedModel(gpt2, {"layers.0.ffn_norm.bias": Fold(rows=scales)}).weight("layers.0.ffn_norm.bias")
    assert bias.read() == pytest.approx(gpt2.weight("layers.0.ffn_norm.bias").read() / scales, rel=1e-6)


def test_a_folded_weight_is_described_as_before_but_reads_float32(tmp_path: Path) -> None:
    model = open_model(ROOT / "examples" / "tiny-qwen3")
    folded = random_folds(model, 3).applied(model)
    assert [weight.spec for weight in folded.weights()] == [weight.spec for weight in model.weights()]
    assert folded.has("layers.0.q.weight") and not folded.has("layers.0.q.bias")
    for weight in folded.weights():
        plain = model.weight(weight.spec.name)
        assert (weight.rows, weight.cols, weight.nbytes) == (plain.rows, plain.cols, plain.nbytes)
        if weight is not plain:
            assert weight.dtype == "F32"
            assert np.array_equal(weight.read_raw(1), weight.read(1))
            assert weight.read_raw().dtype == np.float32
    assert folded.weight("embedding.weight") is model.weight("embedding.weight")


def test_the_scan_for_bad_values_sees_the_folded_ones(tmp_path: Path) -> None:
    model = make_model(tmp_path, MADE["qwen2"])
    name = "layers.0.down.weight"
    scales = np.ones(36, np.float32)
    scales[7] = 1e30
    found = check_finite(FoldedModel(model, {name: Fold(columns=scales)}).weight(name))
    assert found.first_bad is None
    assert found.largest == np.abs(model.weight(name).read()[:, 7]).max() * np.float32(1e30)


@pytest.mark.parametrize("name", ["phi3", "gemma3_text", "mixtral"])
def test_the_exporter_reads_a_folded_model(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, MADE[name])
    folded = random_folds(model, 4).applied(model)
    for entry in entries(model.architecture, gguf_family(model.architecture), model.architecture.vocab):
        rows = read_rows(folded, entry, 0, entry.rows, raw=passes_through(folded, entry, "F32"))
        release_rows(folded, entry, 0, entry.rows)
        assert rows.dtype == np.float32 and rows.shape == (entry.rows, entry.columns)
        wanted = np.concatenate([folded.weight(piece.spec.name).read().ravel() for piece in entry.pieces] or [rows])
        if all(piece.transform == "none" for piece in entry.pieces):
            assert np.array_equal(rows.ravel(), wanted.ravel())


def test_a_scale_that_is_not_positive_and_a_tensor_that_is_not_there_are_our_own_bugs(tmp_path: Path) -> None:
    model = make_model(tmp_path, MADE["qwen2"])
    with pytest.raises(AssertionError, match="positive"):
        FoldedModel(model, {"layers.0.q.weight": Fold(columns=np.zeros(24, np.float32))})
    with pytest.raises(AssertionError, match="no_such"):
        FoldedModel(model, {"no_such.weight": Fold()})
