"""The decoder against transformers in float32: every family and every rope kind, on random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_cases import CASES, VOCAB, kl, random_tokens, reference_logits, save  # noqa: E402

from llmx.errors import UsageError  # noqa: E402
from llmx.models import decoder  # noqa: E402
from llmx.models.architecture import Architecture, Rope  # noqa: E402
from llmx.models.model import Model, open_model  # noqa: E402
from llmx.models.ops_torch import KeyValueCache, TorchOps, run  # noqa: E402

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "models"
MAX_DIFFERENCE = 1e-4
MAX_KL = 1e-9


def _assert_equal(reference: np.ndarray, ours: np.ndarray) -> None:
    assert ours.dtype == np.float32 and ours.shape == reference.shape
    assert np.abs(reference - ours).max() < MAX_DIFFERENCE
    assert kl(reference, ours) < MAX_KL


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference = save(case, tmp_path)
    tokens = random_tokens(case.length)
    _assert_equal(reference_logits(reference, tokens), decoder.logits(open_model(tmp_path), tokens))


FAULTS: dict[str, tuple[str, Callable[[Architecture], Architecture]]] = {
    "window longer by one": ("mistral past its window", lambda a: replace(a, sliding_window=12)),
    "gemma's gain without its one": ("gemma3", lambda a: replace(a, norm_offset=0.0)),
    "one rope for all layers": ("gemma3", lambda a: replace(a, local_rope=None)),
    "embedding not scaled": ("gemma3", lambda a: replace(a, embedding_scale=1.0)),
    "router not normalized": ("mixtral", lambda a: replace(a, normalize_router=False)),
    "llama3 scaling dropped": ("llama, llama3 rope", lambda a: replace(a, rope=Rope(32, 1000.0))),
    "yarn without its attention factor": ("llama, yarn", lambda a: _with_rope(a, attention_factor=1.0)),
    "longrope with short factors only": (
        "llama, longrope past its context",
        lambda a: _with_rope(a, original_context=4096),
    ),
}


def _with_rope(architecture: Architecture, **changes: Any) -> Architecture:
    assert architecture.rope is not None
    return replace(architecture, rope=replace(architecture.rope, **changes))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_catches_planted_faults(fault: str, tmp_path: Path) -> None:
    name, spoil = FAULTS[fault]
    reference = save(CASES[name], tmp_path)
    model, tokens = open_model(tmp_path), random_tokens(CASES[name].length)
    spoiled = Model(spoil(model.architecture), model.checkpoint)
    assert kl(reference_logits(reference, tokens), decoder.logits(spoiled, tokens)) > 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral past its window", "gemma3", "mixtral", "gpt2", "llama, yarn"])
def test_decoding_through_the_cache_equals_one_pass(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save(case, tmp_path)
    model, tokens = open_model(tmp_path), random_tokens(40)
    ops = TorchOps(cache=KeyValueCache(), keep=True)
    pieces = [run(model, tokens[:20], ops), run(model, tokens[20:30], ops)]
    pieces += [run(model, [token], ops) for token in tokens[30:]]
    assert np.abs(np.concatenate(pieces) - decoder.logits(model, tokens)).max() < MAX_DIFFERENCE


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_saved_as_one_tensor_give_the_same_logits(name: str, tmp_path: Path) -> None:
    reference = save(CASES[name], tmp_path)
    tokens = random_tokens(40)
    apart = decoder.logits(open_model(tmp_path), tokens)
    reference.save_pretrained(tmp_path, save_original_format=False)
    model = open_model(tmp_path)
    assert model.weight("layers.0.expert_up.weight").spec.source.names == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert np.array_equal(decoder.logits(model, tokens), apart)


def test_layers_can_be_streamed_one_by_one_and_in_batches(tmp_path: Path) -> None:
    save(CASES["qwen3"], tmp_path)
    model, ops = open_model(tmp_path), TorchOps()
    batch = [random_tokens(12), random_tokens(24)[12:]]
    positions = torch.arange(12)
    with torch.inference_mode():
        hidden = decoder.embed(model, ops, torch.tensor(batch), positions)
        for index in range(model.architecture.layers):
            hidden = decoder.layer(model, ops, index, hidden, positions)
        ours = decoder.head(model, ops, hidden).numpy()
    for row, tokens in zip(ours, batch, strict=True):
        assert np.abs(row - decoder.logits(model, tokens)).max() < MAX_DIFFERENCE


def test_a_large_matrix_is_multiplied_in_blocks_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CASES["llama"], tmp_path)
    model, tokens = open_model(tmp_path), random_tokens(10)
    whole = decoder.logits(model, tokens)
    monkeypatch.setattr("llmx.models.ops_torch.BLOCK_ELEMENTS", 160)
    assert np.abs(decoder.logits(model, tokens) - whole).max() < 1e-5


@pytest.mark.parametrize("tokens", [[], [-1], [VOCAB]])
def test_ids_outside_the_vocabulary_are_refused(tokens: list[int], tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path)
    with pytest.raises(UsageError, match="0 to 95"):
        decoder.logits(open_model(tmp_path), tokens)


def test_more_tokens_than_learned_positions_are_refused(tmp_path: Path) -> None:
    save(CASES["gpt2"], tmp_path)
    with pytest.raises(UsageError, match="128 positions"):
        decoder.logits(open_model(tmp_path), random_tokens(129))


def _older_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """The config as transformers 4 wrote it."""
    config = {key: value for key, value in config.items() if key != "layer_types"}
    config["torch_dtype"] = config.pop("dtype", "float32")
    rope = config.pop("rope_parameters")
    nested = "full_attention" in rope
    full = dict(rope["full_attention"] if nested else rope)
    config["rope_theta"] = full.pop("rope_theta")
    if nested:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    if "partial_rotary_factor" in full:
        config["partial_rotary_factor"] = full.pop("partial_rotary_factor")
    kind = full.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **full}
    return config


OLDER = (
    "llama",
    "llama, llama3 rope",
    "llama, yarn",
    "qwen2, yarn",
    "gemma3",
    "phi3, part of a head turned",
    "phi3, longrope past its context",
    "mixtral",
)


@pytest.mark.parametrize("name", OLDER)
def test_older_configs_describe_the_same_architecture(name: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path)
    newer = open_model(tmp_path).architecture
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_older_spelling(json.loads(path.read_text()))))
    assert open_model(tmp_path).architecture == newer


def _shared_models() -> list[Path]:
    found = sorted(path.parent for path in SHARED.glob("*/config.json"))
    return [*found, ROOT / "examples" / "tiny-qwen3"]


@pytest.mark.parametrize("folder", _shared_models(), ids=lambda folder: folder.name)
def test_trained_checkpoints_equal_transformers(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not here")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model: Model = open_model(folder)
    tokens = np.random.default_rng(5).integers(3, model.architecture.vocab, 160).tolist()
    _assert_equal(reference_logits(reference, tokens), decoder.logits(model, tokens))
