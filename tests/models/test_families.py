"""Describing a config: defaults as transformers has them, both spellings, and every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UnsupportedError
from llmx.models.architecture import Architecture, Rope
from llmx.models.config import IGNORED
from llmx.models.families import FAMILIES, NEIGHBOURS, describe

# Real configs as their makers published them, numbers and keys unchanged.
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
PHI3_MINI_128K = {
    "_name_or_path": "Phi-3-mini-128k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "su"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
GPT2_FIRST = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def _rope(config: Mapping[str, Any]) -> Rope:
    rope = describe(config).rope
    assert rope is not None
    return rope


def test_a_llama_config_of_transformers_4_is_described() -> None:
    architecture = describe(LLAMA_32_1B)
    assert (architecture.layers, architecture.kv_heads, architecture.head_dim) == (16, 8, 64)
    assert architecture.tied and not any(spec.role == "head" for spec in architecture.tensors)
    assert architecture.rope == Rope(
        64, 500000.0, "llama3", 32.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert len(architecture.tensors) == 2 + 16 * 9


def test_a_window_that_is_switched_off_is_none() -> None:
    architecture = describe(QWEN25)
    assert architecture.sliding_window is None and set(architecture.layer_kinds) == {"full"}
    assert {spec.role for spec in architecture.tensors if spec.part == "bias"} == {"q", "k", "v"}


def test_a_window_switched_on_begins_at_max_window_layers() -> None:
    architecture = describe({**QWEN25, "use_sliding_window": True})
    assert architecture.layer_kinds == ("full",) * 21 + ("sliding",) * 3
    assert architecture.sliding_window == 32768


def test_gemma_has_two_ropes_and_a_pattern_of_windows() -> None:
    architecture = describe(GEMMA3_1B)
    assert architecture.rope == Rope(256, 1e6) and architecture.local_rope == Rope(256, 1e4)
    assert architecture.layer_kinds[:7] == ("sliding",) * 5 + ("full", "sliding")
    assert architecture.embedding_scale == 1152**0.5 and architecture.norm_offset == 1.0
    assert architecture.tied and architecture.activation == "gelu_tanh"


def test_phi3_slices_its_fused_matrices_and_computes_its_attention_factor() -> None:
    architecture = describe(PHI3_MINI_128K)
    rope = architecture.rope
    assert rope is not None and rope.kind == "longrope" and rope.factor == 32.0 and rope.original_context == 4096
    assert rope.attention_factor == pytest.approx(1.19023807)
    rows = {spec.role: spec.source.rows for spec in architecture.tensors if spec.layer == 3}
    assert rows["k"] == (3072, 6144) and rows["v"] == (6144, 9216)
    assert rows["gate"] == (0, 8192) and rows["up"] == (8192, 16384) and rows["down"] is None
    assert architecture.sliding_window == 262144


def test_the_first_gpt2_config_takes_defaults_and_names_without_prefix() -> None:
    architecture = describe(GPT2_FIRST, ["wte.weight", "h.0.attn.c_attn.weight"])
    assert architecture.tied and architecture.rope is None and architecture.intermediate == 3072
    q = next(spec for spec in architecture.tensors if spec.name == "layers.0.q.weight")
    assert q.source.names == ("h.0.attn.c_attn.weight",) and q.source.transpose and q.source.rows == (0, 768)
    assert describe(GPT2_FIRST).tensors[0].source.names == ("transformer.wte.weight",)


def test_experts_are_found_under_either_spelling() -> None:
    config = {"model_type": "mixtral", **SMALL, "num_key_value_heads": 2}
    one_by_one = {spec.name: spec.source for spec in describe(config).tensors}
    assert len(one_by_one["layers.1.expert_up.weight"].names) == 8
    assert one_by_one["layers.1.expert_up.weight"].names[7] == "model.layers.1.block_sparse_moe.experts.7.w3.weight"
    fused = describe(config, ["model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj"])
    up = next(spec for spec in fused.tensors if spec.name == "layers.1.expert_up.weight")
    assert up.source.names == ("model.layers.1.mlp.experts.gate_up_proj",) and up.source.rows == (14336, 28672)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_absent_keys_take_the_defaults_of_transformers(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    ours = describe({"model_type": model_type})
    pairs = {
        "layers": theirs.num_hidden_layers,
        "hidden": theirs.hidden_size,
        "heads": theirs.num_attention_heads,
        "kv_heads": getattr(theirs, "num_key_value_heads", theirs.num_attention_heads),
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "vocab": theirs.vocab_size,
        "context_length": theirs.max_position_embeddings,
        "tied": theirs.tie_word_embeddings,
        "norm_eps": getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_epsilon", None)),
        "experts": getattr(theirs, "num_local_experts", 0),
        "experts_used": getattr(theirs, "num_experts_per_tok", 0),
    }
    assert {name: getattr(ours, name) for name in pairs} == pairs
    if model_type != "gpt2":
        assert ours.intermediate == theirs.intermediate_size
        rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        assert ours.rope is not None and ours.rope.theta == rope["rope_theta"]
    kinds = ["sliding" if "sliding" in kind else "full" for kind in getattr(theirs, "layer_types", None) or []]
    assert not kinds or list(ours.layer_kinds) == kinds


def test_both_spellings_of_a_config_are_one_architecture() -> None:
    newer = {
        key: value for key, value in LLAMA_32_1B.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")
    }
    newer["rope_parameters"] = {**LLAMA_32_1B["rope_scaling"], "rope_theta": 500000.0}
    newer["dtype"] = "bfloat16"
    assert describe(newer) == describe(LLAMA_32_1B)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts() -> None:
    scaling = {"type": "yarn", "original_max_position_embeddings": 2048}
    config = {"model_type": "llama", **SMALL, "max_position_embeddings": 8192, "rope_scaling": scaling}
    rope = _rope(config)
    assert rope.factor == 4.0 and rope.attention_factor == pytest.approx(1.1386294)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "soft-capped logits": ({**GEMMA3_1B, "final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    "soft-capped attention": ({**GEMMA3_1B, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "attention both ways": ({**GEMMA3_1B, "use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
    "scores scaled by layer": ({**GPT2_FIRST, "scale_attn_by_inverse_layer_idx": True}, "only false"),
    "cross attention": ({**GPT2_FIRST, "add_cross_attention": True}, "add_cross_attention"),
    "an unknown activation": ({**LLAMA_32_1B, "hidden_act": "relu2"}, "activation 'relu2'"),
    "an unknown key": ({**LLAMA_32_1B, "residual_multiplier": 0.2}, "residual_multiplier: 0.2 is a key llmx does not"),
    "an unknown rope": ({**LLAMA_32_1B, "rope_scaling": {"type": "mrope"}}, "rope type 'mrope'"),
    "an unknown rope key": (
        {**LLAMA_32_1B, "rope_scaling": {"type": "linear", "factor": 2.0, "sections": [1]}},
        "rope_parameters.sections",
    ),
    "a rope key that is missing": ({**LLAMA_32_1B, "rope_scaling": {"type": "linear"}}, "factor: needed by rope type"),
    "a rope that is no object": ({**LLAMA_32_1B, "rope_scaling": [1]}, "rope_scaling: an object"),
    "a gemma rope that is no object": ({**GEMMA3_1B, "rope_parameters": {"full_attention": [1]}}, "an object"),
    "a flat gemma rope": ({**GEMMA3_1B, "rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type"),
    "part of a llama head turned": ({**LLAMA_32_1B, "partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    "factors of a wrong count": (
        {**PHI3_MINI_128K, "rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}},
        "has 1 numbers, 48 are needed",
    ),
    "a phi3 rope that phi3 lacks": ({**PHI3_MINI_128K, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    "a quantized checkpoint": ({**QWEN25, "quantization_config": {"bits": 4}}, "quantization_config"),
    "a window on a llama": ({**LLAMA_32_1B, "sliding_window": 4096}, "sliding_window: 4096"),
    "a classifier": ({**LLAMA_32_1B, "architectures": ["LlamaForSequenceClassification"]}, "causal language model"),
    "classes that are no list": ({**LLAMA_32_1B, "architectures": {"a": 1}}, "architectures"),
    "layer types of a wrong count": ({**GEMMA3_1B, "layer_types": ["full_attention"]}, "26 entries"),
    "unknown layer types": ({**GEMMA3_1B, "layer_types": ["linear_attention"] * 26}, "linear_attention"),
    "layer types that mistral would not follow": (
        {"model_type": "mistral", **SMALL, "layer_types": ["full_attention", "sliding_attention"]},
        "disagrees with sliding_window",
    ),
    "sliding layers without a window": (
        {**QWEN25, "layer_types": ["sliding_attention"] * 24},
        "no sliding_window in use",
    ),
    "two spellings that differ": (
        {"model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 16},
        "two spellings",
    ),
    "more experts used than there are": (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 4},
        "4 experts a token",
    ),
    "one expert": ({"model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1}, "no mixture"),
    "heads that do not divide": ({**LLAMA_32_1B, "num_key_value_heads": 5}, "no multiple of 5"),
    "a hidden size that does not divide": ({"model_type": "gpt2", "n_embd": 70, "n_head": 12}, "70 is no multiple"),
    "a count that is a text": ({**LLAMA_32_1B, "hidden_size": "2048"}, "a whole number from 1 is expected"),
    "a count that is a flag": ({**LLAMA_32_1B, "num_hidden_layers": True}, "num_hidden_layers"),
    "a count that is huge": ({**LLAMA_32_1B, "num_hidden_layers": 10**9}, "no model"),
    "an eps of zero": ({**LLAMA_32_1B, "rms_norm_eps": 0}, "a number above 0"),
    "an eps beyond all floats": ({**LLAMA_32_1B, "rms_norm_eps": 10**400}, "a number above 0"),
    "a theta of one": ({**LLAMA_32_1B, "rope_theta": 1, "rope_scaling": None}, "rope_theta: 1 is no valid value"),
    "a factor beyond all floats": ({**LLAMA_32_1B, "rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_implemented_is_refused_by_key(name: str) -> None:
    config, message = UNSUPPORTED[name]
    with pytest.raises((UnsupportedError, IntegrityError)) as caught:
        describe(config)
    assert message in str(caught.value)


def test_every_problem_of_a_config_is_listed_at_once() -> None:
    config = {**LLAMA_32_1B, "alibi": True, "logit_scale": 0.5, "hidden_act": "x", "rope_scaling": {"type": "y"}}
    with pytest.raises(UnsupportedError) as caught:
        describe(config)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("value", [None, [], {}, ""])
def test_an_unknown_key_that_is_null_or_empty_changes_nothing(value: object) -> None:
    assert describe({**LLAMA_32_1B, "alibi": value}) == describe(LLAMA_32_1B)


def test_every_ignored_key_is_ignored_for_a_reason() -> None:
    assert all(len(reason) > 20 for reason in IGNORED.values())
    assert describe({**LLAMA_32_1B, **dict.fromkeys(IGNORED, None), **LLAMA_32_1B}) == describe(LLAMA_32_1B)
    mapped = {name for family in FAMILIES.values() for rule in family.settings.values() for name in rule.names}
    assert not mapped & set(IGNORED)


@pytest.mark.parametrize("model_type", ["gemma3", "falcon", None, ["llama"], 5])
def test_an_unknown_family_is_refused_with_the_known_ones(model_type: object) -> None:
    with pytest.raises(UnsupportedError, match="gemma3_text, gpt2, llama") as caught:
        describe({"model_type": model_type})
    assert model_type != "gemma3" or NEIGHBOURS["gemma3"] in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = ["type", "rope_type", "factor", "rope_theta", "long_factor", "original_max_position_embeddings"]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    base=st.sampled_from([LLAMA_32_1B, QWEN25, GEMMA3_1B, PHI3_MINI_128K, GPT2_FIRST]),
    data=st.data(),
)
def test_any_config_is_described_or_refused(base: dict[str, Any], data: st.DataObject) -> None:
    keys = [*base, "rope_parameters", "layer_types", "anything"]
    rope = st.dictionaries(st.sampled_from(ROPE_KEYS), st.sampled_from(["yarn", "linear"]) | JSON_VALUES)
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON_VALUES | rope, max_size=3))
    try:
        architecture = describe({**base, **changes})
    except LlmxError:
        return
    assert isinstance(architecture, Architecture)
