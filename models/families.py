"""Every architecture llmx knows, as data: config keys, tensor names and shapes. The one place to add a model.

A variant is another record with a few fields replaced. Sources: each family's configuration and modeling files in
transformers, whose defaults for absent keys are used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llmx.errors import UnsupportedError
from llmx.models.architecture import Architecture, Role
from llmx.models.config import Setting, setting, with_defaults
from llmx.models.family import (
    Family,
    Redundant,
    TensorRule,
    all_sliding,
    fill_in,
    late_sliding,
    patterned_sliding,
)
from llmx.models.rope_config import RopeRule

# ── config keys ──────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA_SETTINGS: dict[str, Setting] = {
    "layers": setting("num_hidden_layers", "count", 32),
    "hidden": setting("hidden_size", "count", 4096),
    "heads": setting("num_attention_heads", "count", 32),
    "kv_heads": setting("num_key_value_heads", "count", None),
    "head_dim": setting("head_dim", "count", None),
    "intermediate": setting("intermediate_size", "count", 11008),
    "vocab": setting("vocab_size", "count", 32000),
    "context_length": setting("max_position_embeddings", "count", 2048),
    "original_context": setting("original_max_position_embeddings", "count", None),
    "norm_eps": setting("rms_norm_eps", "positive", 1e-6),
    "activation": setting("hidden_act", "text", "silu"),
    "tied": setting("tie_word_embeddings", "flag", False),
    "layer_types": setting("layer_types", "texts", None),
}
WINDOW_SETTINGS = {"sliding_window": setting("sliding_window", "count", None)}
BIAS_SETTINGS = {"attention_bias": setting("attention_bias", "flag", False)}
MLP_BIAS_SETTINGS = {"mlp_bias": setting("mlp_bias", "flag", False)}
QWEN_WINDOW_SETTINGS = {
    "sliding_window": setting("sliding_window", "count", 4096, nullable=True),
    "use_sliding_window": setting("use_sliding_window", "flag", False),
    "max_window_layers": setting("max_window_layers", "natural", 28),
}
EXPERT_SETTINGS = {
    "experts": setting("num_local_experts num_experts", "count", 8),
    "experts_used": setting("num_experts_per_tok", "count", 2),
}

# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_LAYER = "{prefix}layers.{layer}."
_ATTENTION = _LAYER + "self_attn."

_OUTSIDE = (
    TensorRule("embedding", "{prefix}embed_tokens.weight", ("vocab", "hidden")),
    TensorRule("final_norm", "{prefix}norm.weight", ("hidden",)),
    TensorRule("head", "lm_head.weight", ("vocab", "hidden"), when="untied"),
)
_NORMS = (
    TensorRule("attention_norm", _LAYER + "input_layernorm.weight", ("hidden",)),
    TensorRule("ffn_norm", _LAYER + "post_attention_layernorm.weight", ("hidden",)),
)
_GEMMA_NORMS = (
    TensorRule("attention_norm", _LAYER + "input_layernorm.weight", ("hidden",)),
    TensorRule("attention_post_norm", _LAYER + "post_attention_layernorm.weight", ("hidden",)),
    TensorRule("ffn_norm", _LAYER + "pre_feedforward_layernorm.weight", ("hidden",)),
    TensorRule("ffn_post_norm", _LAYER + "post_feedforward_layernorm.weight", ("hidden",)),
)
_QK_NORMS = (
    TensorRule("q_norm", _ATTENTION + "q_norm.weight", ("head_dim",)),
    TensorRule("k_norm", _ATTENTION + "k_norm.weight", ("head_dim",)),
)


def _attention(qkv_bias: str, o_bias: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule("q", _ATTENTION + "q_proj.weight", ("q", "hidden"), bias=qkv_bias),
        TensorRule("k", _ATTENTION + "k_proj.weight", ("kv", "hidden"), bias=qkv_bias),
        TensorRule("v", _ATTENTION + "v_proj.weight", ("kv", "hidden"), bias=qkv_bias),
        TensorRule("o", _ATTENTION + "o_proj.weight", ("hidden", "q"), bias=o_bias),
    )


def _mlp(bias: str, when: str = "always") -> tuple[TensorRule, ...]:
    return (
        TensorRule("gate", _LAYER + "mlp.gate_proj.weight", ("ffn", "hidden"), when=when, bias=bias),
        TensorRule("up", _LAYER + "mlp.up_proj.weight", ("ffn", "hidden"), when=when, bias=bias),
        TensorRule("down", _LAYER + "mlp.down_proj.weight", ("hidden", "ffn"), when=when, bias=bias),
    )


def _experts(block: str, gate: str, up: str, down: str) -> tuple[TensorRule, ...]:
    """One matrix an expert, and the router, which is called `gate` in every family here."""
    expert = _LAYER + block + ".experts.{expert}."
    wide, narrow = ("experts", "expert_ffn", "hidden"), ("experts", "hidden", "expert_ffn")
    return (
        TensorRule("router", _LAYER + block + ".gate.weight", ("experts", "hidden"), when="sparse"),
        TensorRule("expert_gate", expert + gate + ".weight", wide, when="sparse"),
        TensorRule("expert_up", expert + up + ".weight", wide, when="sparse"),
        TensorRule("expert_down", expert + down + ".weight", narrow, when="sparse"),
    )


# transformers 5 holds experts in memory like this; checkpoints saved without its reverse conversion look so too.
_FUSED_EXPERTS = (
    TensorRule("router", _LAYER + "mlp.gate.weight", ("experts", "hidden"), when="sparse"),
    TensorRule(
        "expert_gate",
        _LAYER + "mlp.experts.gate_up_proj",
        ("experts", "expert_ffn", "hidden"),
        when="sparse",
        after=(),
    ),
    TensorRule(
        "expert_up",
        _LAYER + "mlp.experts.gate_up_proj",
        ("experts", "expert_ffn", "hidden"),
        when="sparse",
        after=("expert_ffn",),
    ),
    TensorRule("expert_down", _LAYER + "mlp.experts.down_proj", ("experts", "hidden", "expert_ffn"), when="sparse"),
)
_PHI3_LAYERS = (
    TensorRule("q", _ATTENTION + "qkv_proj.weight", ("q", "hidden"), after=()),
    TensorRule("k", _ATTENTION + "qkv_proj.weight", ("kv", "hidden"), after=("q",)),
    TensorRule("v", _ATTENTION + "qkv_proj.weight", ("kv", "hidden"), after=("q", "kv")),
    TensorRule("o", _ATTENTION + "o_proj.weight", ("hidden", "q")),
    TensorRule("gate", _LAYER + "mlp.gate_up_proj.weight", ("ffn", "hidden"), after=()),
    TensorRule("up", _LAYER + "mlp.gate_up_proj.weight", ("ffn", "hidden"), after=("ffn",)),
    TensorRule("down", _LAYER + "mlp.down_proj.weight", ("hidden", "ffn")),
)
_BLOCK = "{prefix}h.{layer}."


def _conv1d(role: Role, source: str, *shape: str, after: tuple[str, ...] | None = None) -> TensorRule:
    """GPT-2's Conv1D: stored [in, out], always with a bias."""
    return TensorRule(role, _BLOCK + source + ".weight", shape, bias="always", transpose=True, after=after)


_GPT2_TENSORS = (
    TensorRule("embedding", "{prefix}wte.weight", ("vocab", "hidden")),
    TensorRule("position_embedding", "{prefix}wpe.weight", ("context", "hidden")),
    TensorRule("attention_norm", _BLOCK + "ln_1.weight", ("hidden",), bias="always"),
    _conv1d("q", "attn.c_attn", "hidden", "hidden", after=()),
    _conv1d("k", "attn.c_attn", "hidden", "hidden", after=("hidden",)),
    _conv1d("v", "attn.c_attn", "hidden", "hidden", after=("hidden", "hidden")),
    _conv1d("o", "attn.c_proj", "hidden", "hidden"),
    TensorRule("ffn_norm", _BLOCK + "ln_2.weight", ("hidden",), bias="always"),
    _conv1d("up", "mlp.c_fc", "ffn", "hidden"),
    _conv1d("down", "mlp.c_proj", "hidden", "ffn"),
    TensorRule("final_norm", "{prefix}ln_f.weight", ("hidden",), bias="always"),
    TensorRule("head", "lm_head.weight", ("vocab", "hidden"), when="untied"),
)
_TIED_HEAD = Redundant(r"lm_head\.weight", "a second copy of the tied embedding", copy_of="embedding", when="tied")
_ROTARY = Redundant(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config")
_GPT2_MASKS = Redundant(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", "the causal mask, not a weight")

# ── the families ─────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA = Family(
    "llama",
    settings={**LLAMA_SETTINGS, **BIAS_SETTINGS, **MLP_BIAS_SETTINGS},
    tensors=(*_OUTSIDE, *_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp("mlp_bias")),
    redundant=(_TIED_HEAD, _ROTARY),
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    settings=with_defaults(
        {**LLAMA_SETTINGS, **WINDOW_SETTINGS},
        kv_heads=8,
        intermediate=14336,
        context_length=4096 * 32,
        sliding_window=4096,
    ),
    tensors=(*_OUTSIDE, *_NORMS, *_attention("never", "never"), *_mlp("never")),
    window=all_sliding,
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    settings=with_defaults(
        {**LLAMA_SETTINGS, **QWEN_WINDOW_SETTINGS}, vocab=151936, intermediate=22016, kv_heads=32, context_length=32768
    ),
    tensors=(*_OUTSIDE, *_NORMS, *_attention("always", "never"), *_mlp("never")),
    window=late_sliding,
    listed_windows=True,
)
QWEN3 = replace(
    QWEN2,
    model_type="qwen3",
    settings=with_defaults({**QWEN2.settings, **BIAS_SETTINGS}, head_dim=128),
    tensors=(*_OUTSIDE, *_NORMS, *_QK_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp("never")),
)
QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    settings={
        **with_defaults(
            {**QWEN3.settings, **EXPERT_SETTINGS},
            hidden=2048,
            intermediate=6144,
            layers=24,
            kv_heads=4,
            head_dim=None,
            experts=128,
            experts_used=8,
        ),
        "expert_intermediate": setting("moe_intermediate_size", "count", 768),
        "normalize_router": setting("norm_topk_prob", "flag", False),
        "sparse_step": setting("decoder_sparse_step", "count", 1),
        "dense_layers": setting("mlp_only_layers", "indices", None),
    },
    tensors=(
        *_OUTSIDE,
        *_NORMS,
        *_QK_NORMS,
        *_attention("attention_bias", "attention_bias"),
        *_mlp("never", when="dense"),
    ),
    alternatives=((_experts("mlp", "gate_proj", "up_proj", "down_proj"), _FUSED_EXPERTS),),
    window=all_sliding,
    listed_windows=False,
)
MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    settings=with_defaults({**MISTRAL.settings, **EXPERT_SETTINGS}, sliding_window=None, norm_eps=1e-5),
    tensors=(*_OUTSIDE, *_NORMS, *_attention("never", "never")),
    alternatives=((_experts("block_sparse_moe", "w1", "w3", "w2"), _FUSED_EXPERTS),),
    rope=RopeRule(theta=1_000_000.0),
)
GEMMA3_TEXT = replace(
    LLAMA,
    model_type="gemma3_text",
    settings={
        **with_defaults(
            {**LLAMA_SETTINGS, **WINDOW_SETTINGS, **BIAS_SETTINGS},
            vocab=262_208,
            hidden=2304,
            intermediate=9216,
            layers=26,
            heads=8,
            kv_heads=4,
            head_dim=256,
            context_length=131_072,
            sliding_window=4096,
            tied=True,
        ),
        "activation": setting("hidden_activation", "text", "gelu_pytorch_tanh"),
        "attention_scale_base": setting("query_pre_attn_scalar", "positive", 256),
        "sliding_pattern": setting("sliding_window_pattern", "count", 6),
    },
    tensors=(*_OUTSIDE, *_GEMMA_NORMS, *_QK_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp("never")),
    rope=RopeRule(theta=1_000_000.0, local_theta=10_000.0),
    window=patterned_sliding,
    listed_windows=True,
    fixed={
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "hidden_act": ("gelu_pytorch_tanh",),
    },
    norm_offset=1.0,
    scaled_embedding=True,
)
PHI3 = replace(
    LLAMA,
    model_type="phi3",
    settings=with_defaults(
        {**LLAMA_SETTINGS, **WINDOW_SETTINGS},
        vocab=32064,
        hidden=3072,
        intermediate=8192,
        context_length=4096,
        original_context=4096,
        norm_eps=1e-5,
    ),
    tensors=(*_OUTSIDE, *_NORMS, *_PHI3_LAYERS),
    # Early Phi-3 configs call LongRoPE "su" or "yarn".
    rope=RopeRule(partial=True, kinds=("default", "longrope"), aliases={"su": "longrope", "yarn": "longrope"}),
    window=all_sliding,
)
GPT2 = Family(
    "gpt2",
    settings={
        "layers": setting("n_layer num_hidden_layers", "count", 12),
        "hidden": setting("n_embd hidden_size", "count", 768),
        "heads": setting("n_head num_attention_heads", "count", 12),
        "intermediate": setting("n_inner", "count", None),
        "vocab": setting("vocab_size", "count", 50257),
        "context_length": setting("n_positions max_position_embeddings", "count", 1024),
        "norm_eps": setting("layer_norm_epsilon", "positive", 1e-5),
        "activation": setting("activation_function", "text", "gelu_new"),
        "tied": setting("tie_word_embeddings", "flag", True),
        "scaled_attention": setting("scale_attn_weights", "flag", True),
    },
    tensors=_GPT2_TENSORS,
    rope=None,
    fixed={"scale_attn_by_inverse_layer_idx": (False,)},
    prefixes=("transformer.", ""),
    redundant=(_TIED_HEAD, _GPT2_MASKS),
    norm="layer",
    gated=False,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN3_MOE, MIXTRAL, GEMMA3_TEXT, PHI3, GPT2)
}

# Families that are near one of these, and what to do instead.
NEIGHBOURS: dict[str, str] = {
    "gemma3": "this is the model with its vision tower; llmx exports the text model (model_type gemma3_text)",
    "qwen2_moe": "the shared expert of Qwen2-MoE is not implemented",
    "phi": "only phi3 is implemented",
    "gemma": "only gemma3_text is implemented",
    "gemma2": "only gemma3_text is implemented",
}


def describe(config: Mapping[str, Any], tensor_names: Iterable[str] | None = None) -> Architecture:
    """The architecture that config.json describes.

    tensor_names: the checkpoint's; they decide between spellings (prefixes, fused experts). None takes the usual one.
    Raises: UnsupportedError for an unknown family, or naming every key that llmx does not know or implement;
    IntegrityError for values that no model has.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        note = NEIGHBOURS.get(str(model_type))
        raise UnsupportedError(
            f"The architecture {model_type!r} is not supported" + (f": {note}." if note else "."),
            where="config.json: model_type",
            fix=f"Supported: {known}. A family is added as one record in models/families.py.",
        )
    return fill_in(FAMILIES[model_type], config, frozenset(tensor_names or ()))
