"""A classic TensorRT-LLM checkpoint as a transformers checkpoint: what its own config.json says, and nothing else.

    config.json of TensorRT-LLM ── keys translated ── configuration of transformers ── names and shapes of its model
    ranks ── put together under those names, see trtllm_ranks.py

So a number that is wrong there is computed with, and the checks of the conversion see it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, LlmxError, UnsupportedError
from llmx.models.architecture import Architecture
from llmx.models.checkpoint import Checkpoint, CheckpointSource, CheckpointTensor
from llmx.models.families import describe
from llmx.models.model import Model
from llmx.validate.trtllm_folder import Folder

Config = Mapping[str, Any]
SILU = {"swiglu": "silu"}
NORMALIZED = 1  # MoeConfig.ExpertScaleNormalizationMode: shares of the chosen experts
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class _Named(Checkpoint):
    """The names and shapes of a model's tensors, without their values."""

    __slots__ = ()

    def __init__(self, folder: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder, self.config, self.generation_config = folder, config, {}
        self.source = CheckpointSource(str(folder), None, folder.name)
        self.tensors = {name: CheckpointTensor("F32", shape) for name, shape in shapes.items()}


def as_transformers(folder: Folder, target: Path) -> Model:
    """The model that the folder's config.json describes, without weights; its configuration is written into target.

    Raises: UnsupportedError for a class that is not known; IntegrityError for a configuration that makes no model.
    """
    name = folder.config.get("architecture")
    if name not in CLASSES:
        raise UnsupportedError(f"nothing here emulates TensorRT-LLM's {name}", where=folder.path)
    model_type, translated = CLASSES[name]
    from huggingface_hub.errors import StrictDataclassError

    try:
        shapes = _saved(model_type, translated(folder.config), target)
        told = json.loads((target / "config.json").read_text(encoding="utf-8"))
        named = _Named(folder.path, told, shapes)
        return Model(_architecture(told, named), named)
    except (KeyError, TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise IntegrityError(f"config.json makes no {name}: {error}", where=folder.path) from error


def _architecture(told: Config, named: Checkpoint) -> Architecture:
    try:
        return describe(told, named.tensors)
    except LlmxError as error:
        raise ValueError(error.one_line) from error


def _saved(model_type: str, told: Config, target: Path) -> dict[str, tuple[int, ...]]:
    """Writes the configuration of transformers; returns the names and shapes of its model's tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(model_type, **told)
    config.save_pretrained(target)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _common(told: Config) -> dict[str, Any]:
    return {
        **NO_TOKENS,
        "hidden_size": told["hidden_size"],
        "intermediate_size": told["intermediate_size"],
        "num_hidden_layers": told["num_hidden_layers"],
        "num_attention_heads": told["num_attention_heads"],
        "num_key_value_heads": told["num_key_value_heads"],
        "head_dim": told["head_size"],
        "vocab_size": told["vocab_size"],
        "rms_norm_eps": told["norm_epsilon"],
        "hidden_act": SILU.get(told["hidden_act"], told["hidden_act"]),
        "max_position_embeddings": told["max_position_embeddings"],
        "tie_word_embeddings": told.get("tie_word_embeddings", False),
        "rope_parameters": _rope(told),
    }


def _rope(told: Config) -> dict[str, Any]:
    scaling = told.get("rotary_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    return {"rope_type": kind, "rope_theta": told["rotary_base"], **rest}


def _llama(told: Config) -> dict[str, Any]:
    return {**_common(told), "attention_bias": told.get("attn_bias", False), "mlp_bias": told.get("mlp_bias", False)}


def _windows(told: Config) -> list[int] | None:
    """What each layer looks back at, where any looks back at less than the context; see exporters/trtllm_config.py."""
    found = told.get("max_attention_window_size")
    return None if found is None or min(found) >= told["max_position_embeddings"] else list(found)


def _one_window(told: Config) -> dict[str, Any]:
    """`sliding_window` of a model whose layers all slide. Raises: ValueError where some do and some do not."""
    windows = _windows(told)
    if windows is not None and len(set(windows)) > 1:
        raise ValueError("its layers have several windows, and this model's have one")
    return {"sliding_window": None if windows is None else windows[0]}


def _late_windows(told: Config) -> dict[str, Any]:
    """The same of Qwen's models, any of whose layers may slide."""
    windows = _windows(told)
    if windows is None:
        return {}
    kinds = {True: "sliding_attention", False: "full_attention"}
    return {
        "use_sliding_window": True,
        "sliding_window": min(windows),
        "max_window_layers": sum(size > min(windows) for size in windows),
        "layer_types": [kinds[size == min(windows)] for size in windows],
    }


def _mistral(told: Config) -> dict[str, Any]:
    return {**_common(told), **_one_window(told)}


def _mixtral(told: Config) -> dict[str, Any]:
    moe = told["moe"]
    return {**_mistral(told), "num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["top_k"]}


def _qwen2(told: Config) -> dict[str, Any]:
    return {**{key: value for key, value in _common(told).items() if key != "head_dim"}, **_late_windows(told)}


def _qwen3(told: Config) -> dict[str, Any]:
    return {**_common(told), "attention_bias": told.get("attn_bias", False), **_late_windows(told)}


def _qwen3_moe(told: Config) -> dict[str, Any]:
    moe = told["moe"]
    window = _one_window(told)
    return {
        **_common(told),
        "attention_bias": told.get("attn_bias", False),
        **window,
        "use_sliding_window": window["sliding_window"] is not None,
        "num_experts": moe["num_experts"],
        "num_experts_per_tok": moe["top_k"],
        "norm_topk_prob": moe["normalization_mode"] == NORMALIZED,
        "moe_intermediate_size": told["moe_intermediate_size"],
        "mlp_only_layers": told.get("mlp_only_layers", []),
        "decoder_sparse_step": told.get("decoder_sparse_step", 1),
    }


def _gemma3(told: Config) -> dict[str, Any]:
    every = told["_sliding_window_pattern"]
    kinds = ["sliding_attention", "full_attention"]
    local = {"rope_type": "default", "rope_theta": told["rope_local_base_freq"]}
    common = {key: value for key, value in _common(told).items() if key != "hidden_act"}
    return {
        **common,
        "hidden_activation": told["hidden_act"],
        "attention_bias": told.get("attn_bias", False),
        "query_pre_attn_scalar": _whole(told["query_pre_attn_scalar"]),
        "sliding_window": told["sliding_window"],
        "layer_types": [kinds[(layer + 1) % every == 0] for layer in range(told["num_hidden_layers"])],
        "rope_parameters": {"full_attention": _rope(told), "sliding_attention": local},
    }


def _whole(number: float) -> float | int:
    """transformers takes a whole number where one is meant."""
    return int(number) if number == int(number) else number


def _phi3(told: Config) -> dict[str, Any]:
    rope = {**_rope(told), "partial_rotary_factor": told.get("rotary_pct", 1.0)}
    if told.get("position_embedding_type") == "long_rope":
        rope |= {
            "rope_type": "longrope",
            "short_factor": told["longrope_scaling_short_factors"],
            "long_factor": told["longrope_scaling_long_factors"],
            "original_max_position_embeddings": told["original_max_position_embeddings"],
        }
    common = {key: value for key, value in _common(told).items() if key != "head_dim"}
    found = {**common, "rope_parameters": rope, **_one_window(told)}
    if "original_max_position_embeddings" in told:
        found["original_max_position_embeddings"] = told["original_max_position_embeddings"]
    return found


def _gpt2(told: Config) -> dict[str, Any]:
    return {
        **NO_TOKENS,
        "n_embd": told["hidden_size"],
        "n_inner": told["intermediate_size"],
        "n_layer": told["num_hidden_layers"],
        "n_head": told["num_attention_heads"],
        "n_positions": told["max_position_embeddings"],
        "vocab_size": told["vocab_size"],
        "layer_norm_epsilon": told["norm_epsilon"],
        "activation_function": told["hidden_act"],
        "tie_word_embeddings": told.get("tie_word_embeddings", True),
    }


CLASSES: Mapping[object, tuple[str, Callable[[Config], dict[str, Any]]]] = {
    # TensorRT-LLM's class -> transformers' model type, and the way from the one's configuration to the other's
    "LlamaForCausalLM": ("llama", _llama),
    "MistralForCausalLM": ("mistral", _mistral),
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
    "Gemma3ForCausalLM": ("gemma3_text", _gemma3),
    "Phi3ForCausalLM": ("phi3", _phi3),
    "GPT2LMHeadModel": ("gpt2", _gpt2),
}
