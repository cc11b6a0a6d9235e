"""The JSON files of a TensorRT-LLM checkpoint: what the loaders learn of the model and of its quantization."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from llmx.errors import UnsupportedError
from llmx.exporters.trtllm_ranks import FUSED_MLP, SHARDED_EMBEDDING, Mesh
from llmx.exporters.trtllm_types import TrtllmMix
from llmx.models.architecture import Activation, Architecture, Rope

DTYPES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16"}
ELSEWHERE = "--layout hf"
WINDOWS = "max_attention_window_size"
FLOAT8: Mapping[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
# The class that TensorRT-LLM's MODEL_MAP knows a family by.
CLASSES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATIONS: Mapping[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
GATED_IN_ONE = "swiglu"  # silu of one half of a product's outputs, times the other half
NORMALIZED, AS_THEY_ARE = 1, 0  # MoeConfig.ExpertScaleNormalizationMode: shares of the chosen experts


def written(told: Mapping[str, Any]) -> bytes:
    """JSON as the files hold it."""
    return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()


def producer() -> dict[str, str]:
    return {"name": "llmx", "version": metadata.version("llmx")}


def quantization(mix: TrtllmMix, cache: str | None, group: int | None, excluded: Sequence[str]) -> dict[str, Any]:
    """`quantization` of hf_quant_config.json and of a per-rank config.json. cache: quant_algo of the cache."""
    told: dict[str, Any] = {"quant_algo": mix.algorithm, "kv_cache_quant_algo": cache}
    if group is not None:
        told |= {"group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    if mix.algorithm is not None:
        told["exclude_modules"] = list(excluded)
    return told


# ── the layout of Hugging Face's names ───────────────────────────────────────────────────────────────────────────────


def hf_quant_config(told: Mapping[str, Any]) -> bytes:
    """hf_quant_config.json. told: what `quantization` gives."""
    return written({"producer": producer(), "quantization": told})


def hf_config(config: Mapping[str, Any], a: Architecture, told: Mapping[str, Any], floats: str) -> bytes:
    """config.json: the checkpoint's own, the type of its floats, and the quantization in both spellings of ModelOpt.

    A head_dim of null is filled in: Edge-LLM takes every head_dim that stands there for a number.
    """
    dtype: dict[str, Any] = {"torch_dtype": DTYPES[floats], "dtype": DTYPES[floats]}
    if config.get("head_dim", a.head_dim) is None:
        dtype["head_dim"] = a.head_dim
    if told["quant_algo"] is None and told["kv_cache_quant_algo"] is None:
        return written({**config, **dtype})
    inline = {"quant_method": "modelopt", "producer": producer(), **told, "ignore": told.get("exclude_modules", [])}
    if told["quant_algo"] == "FP8":
        inline["config_groups"] = {"group_0": {"input_activations": FLOAT8, "weights": FLOAT8, "targets": ["Linear"]}}
    if told["kv_cache_quant_algo"] == "FP8":
        inline["kv_cache_scheme"] = FLOAT8
    return written({**config, **dtype, "quantization_config": inline})


# ── one file a rank ──────────────────────────────────────────────────────────────────────────────────────────────────


def rank_config(a: Architecture, mesh: Mesh, told: Mapping[str, Any], floats: str) -> bytes:
    """config.json of a per-rank checkpoint.

    Raises: UnsupportedError naming what TensorRT-LLM's own model of this family does not compute.
    """
    problems = [problem for check in _CHECKS if (problem := check(a)) is not None]
    if problems:
        raise UnsupportedError(
            f"TensorRT-LLM's own {CLASSES[a.family]} cannot compute this model", problems=problems, fix=ELSEWHERE
        )
    shared = {
        "producer": producer(),
        "architecture": CLASSES[a.family],
        "dtype": DTYPES[floats],
        "logits_dtype": "float32",
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "hidden_size": a.hidden,
        "head_size": a.head_dim,
        "intermediate_size": a.intermediate,
        "vocab_size": a.vocab,
        "norm_epsilon": a.norm_eps,
        "hidden_act": ACTIVATIONS[a.activation],
        "max_position_embeddings": a.context_length,
        "position_embedding_type": "rope_gpt_neox" if a.rope is not None else "learned_absolute",
        "qk_layernorm": any(spec.role == "q_norm" for spec in a.tensors),
        "tie_word_embeddings": a.tied,
        "use_parallel_embedding": a.family in SHARDED_EMBEDDING and mesh.tp > 1,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": mesh.ranks, "tp_size": mesh.tp, "pp_size": mesh.pp},
        "quantization": told,
    }
    rotary = {} if a.rope is None else {"rotary_base": a.rope.theta, "rotary_scaling": _scaling(a.rope)}
    return written({**shared, **rotary, **_windows(a), **_OWN.get(a.family, _llama)(a)})


def _windows(a: Architecture) -> dict[str, Any]:
    """The positions that each layer looks back at, as whoever runs the engine has to give them; gemma has its own keys.

    TensorRT-LLM's classes read no such key; `llmx validate` does.
    """
    if "sliding" not in a.layer_kinds or a.family in SHARDED_EMBEDDING:
        return {}
    sizes = {"sliding": a.sliding_window, "full": a.context_length}
    return {WINDOWS: [sizes[kind] for kind in a.layer_kinds]}


def _scaling(rope: Rope) -> dict[str, Any] | None:
    """`rotary_scaling`, in the words of Hugging Face's rope_scaling."""
    if rope.kind in ("default", "longrope"):
        return None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
    told = {key: getattr(rope, key) for key in keys if getattr(rope, key) is not None}
    if rope.original_context is not None:
        told["original_max_position_embeddings"] = rope.original_context
    return {"type": rope.kind, "rope_type": rope.kind, **told}


def _has(a: Architecture, role: str, part: str) -> bool:
    return any(spec.role == role and spec.part == part for spec in a.tensors)


def _llama(a: Architecture) -> dict[str, Any]:
    told: dict[str, Any] = {"attn_bias": _has(a, "q", "bias"), "mlp_bias": _has(a, "down", "bias")}
    return told if not a.experts else {**told, **_experts(a)}


def _experts(a: Architecture) -> dict[str, Any]:
    mode = NORMALIZED if a.normalize_router else AS_THEY_ARE
    return {
        "hidden_act": GATED_IN_ONE,
        "intermediate_size": a.expert_intermediate,
        "moe": {"num_experts": a.experts, "top_k": a.experts_used, "normalization_mode": mode},
    }


def _qwen(a: Architecture) -> dict[str, Any]:
    told: dict[str, Any] = {"attn_bias": _has(a, "q", "bias"), "mlp_bias": False, "qwen_type": a.family}
    told |= {"seq_length": a.context_length, "use_logn_attn": False}
    if not a.experts:
        return told
    dense = [layer for layer, sparse in enumerate(a.sparse_layers) if not sparse]
    return {
        **told,
        **_experts(a),
        "intermediate_size": a.intermediate,
        "moe_intermediate_size": a.expert_intermediate,
        "moe_shared_expert_intermediate_size": 0,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
    }


def _gemma(a: Architecture) -> dict[str, Any]:
    assert a.rope is not None, "gemma turns keys"
    local = a.local_rope or a.rope
    return {
        "attn_bias": _has(a, "q", "bias"),
        "mlp_bias": False,
        "inter_layernorms": True,
        "query_pre_attn_scalar": round(a.attention_scale**-2, 6),
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window": a.sliding_window,
        "_sliding_window_pattern": _pattern(a),
        "rope_local_base_freq": local.theta,
    }


def _phi(a: Architecture) -> dict[str, Any]:
    assert a.rope is not None, "phi turns keys"
    told: dict[str, Any] = {"hidden_act": GATED_IN_ONE, "rotary_pct": a.rope.dim / a.head_dim}
    if a.rope.kind == "longrope":
        told |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": a.rope.original_context,
            "longrope_scaling_short_factors": list(a.rope.short_factor or ()),
            "longrope_scaling_long_factors": list(a.rope.long_factor or ()),
        }
    return told


def _gpt(a: Architecture) -> dict[str, Any]:
    return {"gpt_variant": "gpt2", "bias": True, "q_scaling": 1.0, "hidden_act": "gelu_new"}


_OWN: Mapping[str, Callable[[Architecture], dict[str, Any]]] = {
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen,
    "gemma3_text": _gemma,
    "phi3": _phi,
    "gpt2": _gpt,
}
"""Family -> what only its model class reads; the others' is llama's."""


def _pattern(a: Architecture) -> int | None:
    """Every so many layers one is full; None where that is not how they alternate."""
    for every in range(1, a.layers + 2):
        kinds = tuple("sliding" if (layer + 1) % every else "full" for layer in range(a.layers))
        if kinds == a.layer_kinds:
            return every
    return None


def _no_longrope(a: Architecture) -> str | None:
    return "LongRoPE" if a.rope is not None and a.rope.kind == "longrope" and a.family not in FUSED_MLP else None


def _no_bias(a: Architecture) -> str | None:
    return "a bias in attention.dense" if a.family.startswith("qwen") and _has(a, "o", "bias") else None


def _no_other_pattern(a: Architecture) -> str | None:
    irregular = a.family in _OWN and _OWN[a.family] is _gemma and _pattern(a) is None
    return "sliding layers that follow no pattern of every nth" if irregular else None


def _no_scaling(a: Architecture) -> str | None:
    return "attention without its scale" if a.family == "gpt2" and a.attention_scale == 1.0 else None


_CHECKS = (_no_longrope, _no_bias, _no_other_pattern, _no_scaling)


def layout_notes(a: Architecture, layout: str, cache: str | None) -> list[str]:
    """What a user should know of a model in this layout."""
    notes = []
    if layout == "hf" and a.family == "gpt2":
        notes.append("TensorRT-LLM reads GPT-2 in its own layout alone: --layout ranks")
    if layout == "hf" and cache == "INT8":
        notes.append("TensorRT-LLM on PyTorch and Edge-LLM have no INT8 cache: it is for --layout ranks")
    if layout == "ranks" and a.sliding_window is not None and a.family not in SHARDED_EMBEDDING:
        notes.append(
            f"the window of {a.sliding_window} positions is given when the engine runs: max_attention_window_size"
        )
    return notes
