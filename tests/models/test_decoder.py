"""The decoder against transformers in float32: every family and every rope kind, on random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llmx.errors import UsageError  # noqa: E402
from llmx.models import decoder  # noqa: E402
from llmx.models.architecture import Architecture, Rope  # noqa: E402
from llmx.models.model import Model, open_model  # noqa: E402
from llmx.models.ops_torch import KeyValueCache, TorchOps, run  # noqa: E402

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "models"
MAX_DIFFERENCE = 1e-4
MAX_KL = 1e-9
VOCAB, CONTEXT = 96, 64

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 5}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration class and its arguments; `length` goes past every window and original context."""

    family: str
    changes: Mapping[str, Any]
    length: int = 80


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


CASES: dict[str, Case] = {
    "llama": Case("Llama", {}),
    "llama, tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama, all biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head size apart from hidden / heads": Case("Llama", {"head_dim": 16}),
    "llama, one head of keys": Case("Llama", {"num_key_value_heads": 1}),
    "llama, exact gelu": Case("Llama", {"hidden_act": "gelu"}),
    "llama, linear rope": Case("Llama", _rope(rope_type="linear", factor=2.5, rope_theta=5000.0)),
    "llama, dynamic rope past its context": Case("Llama", _rope(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "llama, dynamic rope within its context": Case("Llama", _rope(rope_type="dynamic", factor=2.0), length=40),
    "llama, llama3 rope": Case(
        "Llama",
        {
            "head_dim": 32,
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
                rope_theta=1000.0,
            ),
        },
    ),
    "llama, yarn": Case("Llama", {"head_dim": 32, **_rope(**YARN)}),
    "llama, yarn with every option": Case(
        "Llama",
        {
            "head_dim": 32,
            **_rope(**YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False),
        },
    ),
    "llama, yarn with its attention factor": Case("Llama", _rope(**YARN, attention_factor=1.2)),
    "llama, longrope past its context": Case("Llama", _rope(**LONGROPE)),
    "llama, longrope within its context": Case("Llama", _rope(**LONGROPE, factor=3.0), length=20),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral past its window": Case("Mistral", {"sliding_window": 11}),
    "qwen2": Case("Qwen2", {}),
    "qwen2, its later layers slide": Case(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen2, yarn": Case("Qwen2", {"hidden_size": 64, **_rope(**YARN)}),
    "qwen3": Case("Qwen3", {"head_dim": 16}),
    "qwen3, its later layers slide": Case(
        "Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen3_moe": Case("Qwen3Moe", {"head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True, **EXPERTS}),
    "qwen3_moe, shares as they are": Case("Qwen3Moe", {"moe_intermediate_size": 24, **EXPERTS}),
    "qwen3_moe, one layer dense by name": Case(
        "Qwen3Moe", {"moe_intermediate_size": 24, "mlp_only_layers": [0], **EXPERTS}
    ),
    "qwen3_moe, every other layer sparse": Case(
        "Qwen3Moe", {"moe_intermediate_size": 24, "decoder_sparse_step": 2, **EXPERTS}
    ),
    "qwen3_moe past its window": Case(
        "Qwen3Moe", {"moe_intermediate_size": 24, "use_sliding_window": True, "sliding_window": 9, **EXPERTS}
    ),
    "mixtral": Case("Mixtral", EXPERTS),
    "mixtral past its window": Case("Mixtral", {**EXPERTS, "sliding_window": 9}),
    "gemma3": Case(
        "Gemma3Text",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3, linear rope on its full layers": Case(
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "phi3": Case("Phi3", {}),
    "phi3 past its window": Case("Phi3", {"sliding_window": 9}),
    "phi3, part of a head turned": Case(
        "Phi3", {"hidden_size": 64, **_rope(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)}
    ),
    "phi3, longrope past its context": Case("Phi3", {"original_max_position_embeddings": 24, **_rope(**LONGROPE)}),
    "phi3, longrope within its context": Case(
        "Phi3", {"original_max_position_embeddings": 24, **_rope(**LONGROPE)}, length=20
    ),
    "gpt2": Case("GPT2", GPT2),
    "gpt2, untied, inner size given": Case("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "gpt2, scores not scaled": Case("GPT2", {**GPT2, "scale_attn_weights": False}),
}


def _save(case: Case, folder: Path) -> Any:
    """The transformers model, its random checkpoint saved in `folder`."""
    arguments = dict(case.changes) if case.family == "GPT2" else {**SMALL, **case.changes}
    torch.manual_seed(7)
    suffix = "LMHeadModel" if case.family == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{case.family}Config")(**arguments)
    name = case.family.removesuffix("Text") if case.family == "Gemma3Text" else case.family
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that mistakes would hide
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return model


def _reference(model: Any, tokens: Sequence[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def _kl(reference: np.ndarray, ours: np.ndarray) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, ours))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _assert_equal(reference: np.ndarray, ours: np.ndarray) -> None:
    assert ours.dtype == np.float32 and ours.shape == reference.shape
    assert np.abs(reference - ours).max() < MAX_DIFFERENCE
    assert _kl(reference, ours) < MAX_KL


def _tokens(count: int) -> list[int]:
    return np.random.default_rng(3).integers(3, VOCAB, count).tolist()


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference = _save(case, tmp_path)
    tokens = _tokens(case.length)
    _assert_equal(_reference(reference, tokens), decoder.logits(open_model(tmp_path), tokens))


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
    reference = _save(CASES[name], tmp_path)
    model, tokens = open_model(tmp_path), _tokens(CASES[name].length)
    spoiled = Model(spoil(model.architecture), model.checkpoint)
    assert _kl(_reference(reference, tokens), decoder.logits(spoiled, tokens)) > 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral past its window", "gemma3", "mixtral", "gpt2", "llama, yarn"])
def test_decoding_through_the_cache_equals_one_pass(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _save(case, tmp_path)
    model, tokens = open_model(tmp_path), _tokens(40)
    ops = TorchOps(cache=KeyValueCache(), keep=True)
    pieces = [run(model, tokens[:20], ops), run(model, tokens[20:30], ops)]
    pieces += [run(model, [token], ops) for token in tokens[30:]]
    assert np.abs(np.concatenate(pieces) - decoder.logits(model, tokens)).max() < MAX_DIFFERENCE


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_saved_as_one_tensor_give_the_same_logits(name: str, tmp_path: Path) -> None:
    reference = _save(CASES[name], tmp_path)
    tokens = _tokens(40)
    apart = decoder.logits(open_model(tmp_path), tokens)
    reference.save_pretrained(tmp_path, save_original_format=False)
    model = open_model(tmp_path)
    assert model.weight("layers.0.expert_up.weight").spec.source.names == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert np.array_equal(decoder.logits(model, tokens), apart)


def test_layers_can_be_streamed_one_by_one_and_in_batches(tmp_path: Path) -> None:
    _save(CASES["qwen3"], tmp_path)
    model, ops = open_model(tmp_path), TorchOps()
    batch = [_tokens(12), _tokens(24)[12:]]
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
    _save(CASES["llama"], tmp_path)
    model, tokens = open_model(tmp_path), _tokens(10)
    whole = decoder.logits(model, tokens)
    monkeypatch.setattr("llmx.models.ops_torch.BLOCK_ELEMENTS", 160)
    assert np.abs(decoder.logits(model, tokens) - whole).max() < 1e-5


@pytest.mark.parametrize("tokens", [[], [-1], [VOCAB]])
def test_ids_outside_the_vocabulary_are_refused(tokens: list[int], tmp_path: Path) -> None:
    _save(CASES["llama"], tmp_path)
    with pytest.raises(UsageError, match="0 to 95"):
        decoder.logits(open_model(tmp_path), tokens)


def test_more_tokens_than_learned_positions_are_refused(tmp_path: Path) -> None:
    _save(CASES["gpt2"], tmp_path)
    with pytest.raises(UsageError, match="128 positions"):
        decoder.logits(open_model(tmp_path), _tokens(129))


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
    _save(CASES[name], tmp_path)
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
    _assert_equal(_reference(reference, tokens), decoder.logits(model, tokens))
