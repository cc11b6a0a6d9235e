"""config.json of a classic TensorRT-LLM checkpoint: its numbers beside those of the checkpoint it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmx.models.architecture import Architecture, Rope
from llmx.models.model import Model
from llmx.validate.trtllm_folder import Folder

Number = Callable[[Architecture], Any]
ABSENT = "absent"


def _positions(a: Architecture) -> str:
    if a.rope is None:
        return "learned_absolute"
    return "long_rope" if a.rope.kind == "longrope" else "rope_gpt_neox"


# key -> what the architecture makes of it; a key that is not there is told like a wrong one.
NUMBERS: Mapping[str, Number] = {
    "num_hidden_layers": lambda a: a.layers,
    "num_attention_heads": lambda a: a.heads,
    "num_key_value_heads": lambda a: a.kv_heads,
    "hidden_size": lambda a: a.hidden,
    "head_size": lambda a: a.head_dim,
    "vocab_size": lambda a: a.vocab,
    "norm_epsilon": lambda a: a.norm_eps,
    "max_position_embeddings": lambda a: a.context_length,
    "qk_layernorm": lambda a: any(spec.role == "q_norm" for spec in a.tensors),
    "position_embedding_type": _positions,
}
OF_ROPE: Mapping[str, Number] = {
    "rotary_base": lambda a: None if a.rope is None else a.rope.theta,
    "rotary_pct": lambda a: None if a.rope is None else a.rope.dim / a.head_dim,
}
OF_EXPERTS: Mapping[str, Number] = {
    "num_experts": lambda a: a.experts,
    "top_k": lambda a: a.experts_used,
    "normalization_mode": lambda a: int(a.normalize_router),
}
OF_GEMMA: Mapping[str, Number] = {
    "query_pre_attn_scalar": lambda a: a.attention_scale**-2,
    "sliding_window": lambda a: a.sliding_window,
    "rope_local_base_freq": lambda a: None if a.local_rope is None else a.local_rope.theta,
}
IN_ONE = frozenset({"swiglu"})  # what silu is called where one matrix holds gate and up
ACTIVATIONS: Mapping[str, frozenset[str]] = {
    "silu": frozenset({"silu"}) | IN_ONE,
    "gelu": frozenset({"gelu"}),
    "gelu_tanh": frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_tanh"}),
}
ROPE_KEYS: Mapping[str, Callable[[Rope], Any]] = {
    "factor": lambda rope: rope.factor,
    "low_freq_factor": lambda rope: rope.low_freq_factor,
    "high_freq_factor": lambda rope: rope.high_freq_factor,
    "original_max_position_embeddings": lambda rope: rope.original_context,
}
NEAR = 1e-6  # relative: numbers that went through a square root


def config_differences(folder: Folder, model: Model) -> list[str]:
    """One clause for every number that is not what the checkpoint's config makes of it."""
    a, told = model.architecture, folder.config
    tables: list[tuple[str, Mapping[str, Number], Mapping[str, Any]]] = [("", NUMBERS, told)]
    if a.rope is not None:
        partial = {"rotary_base": OF_ROPE["rotary_base"]} if a.rope.dim == a.head_dim else OF_ROPE
        tables.append(("", partial, told))
    if a.experts:
        moe = told.get("moe")
        tables.append(("moe.", OF_EXPERTS, moe if isinstance(moe, dict) else {}))
    if a.local_rope is not None:
        tables.append(("", OF_GEMMA, told))
    found = [clause for prefix, table, values in tables for clause in _compared(a, prefix, table, values)]
    return [*found, *_width(a, told), *_activation(a, told), *_scaling(a, told), *_windows(a, told)]


def _compared(a: Architecture, prefix: str, table: Mapping[str, Number], told: Mapping[str, Any]) -> Iterator[str]:
    for key, number in table.items():
        wanted, found = number(a), told.get(key, ABSENT)
        if not _equal(found, wanted):
            yield f"{prefix}{key} is {found}, the checkpoint's {wanted}"


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(found, wanted, rel_tol=NEAR)
    return found == wanted


def _width(a: Architecture, told: Mapping[str, Any]) -> Iterator[str]:
    """The inner sizes: of a model whose every layer has experts, some classes call the expert's intermediate_size."""
    sizes = {"intermediate_size": {a.intermediate}}
    if any(a.sparse_layers):
        sizes = {"intermediate_size": {a.intermediate, a.expert_intermediate}}
        if "moe_intermediate_size" in told:
            sizes = {"intermediate_size": {a.intermediate}, "moe_intermediate_size": {a.expert_intermediate}}
    for key, wanted in sizes.items():
        if told.get(key) not in wanted:
            yield f"{key} is {told.get(key, ABSENT)}, the checkpoint's {' or '.join(map(str, sorted(wanted)))}"


def _activation(a: Architecture, told: Mapping[str, Any]) -> Iterator[str]:
    if told.get("hidden_act") not in ACTIVATIONS[a.activation]:
        yield f"hidden_act is {told.get('hidden_act', ABSENT)}, the checkpoint's {a.activation}"


def _scaling(a: Architecture, told: Mapping[str, Any]) -> Iterator[str]:
    """The rope's scaling, and the factors of LongRoPE."""
    rope, scaling = a.rope, told.get("rotary_scaling")
    if rope is None:
        return
    if rope.kind == "longrope":
        wanted = {"short": rope.short_factor, "long": rope.long_factor}
        for which, factors in wanted.items():
            if told.get(f"longrope_scaling_{which}_factors") != list(factors or ()):
                yield f"longrope_scaling_{which}_factors are not the checkpoint's"
        return
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else "default"
    if kind != rope.kind:
        yield f"rotary_scaling is {kind}, the checkpoint's {rope.kind}"
        return
    if isinstance(scaling, dict):
        for key, number in ROPE_KEYS.items():
            if (wanted := number(rope)) is not None and not _equal(
                scaling.get(key, 1.0 if key == "factor" else None), wanted
            ):
                yield f"rotary_scaling.{key} is {scaling.get(key, ABSENT)}, the checkpoint's {wanted}"


def _windows(a: Architecture, told: Mapping[str, Any]) -> Iterator[str]:
    """What each layer looks back at, where it is told: no class of TensorRT-LLM reads it."""
    sizes = {"sliding": a.sliding_window, "full": a.context_length}
    wanted, found = [sizes[kind] for kind in a.layer_kinds], told.get("max_attention_window_size")
    if found is not None and found != wanted:
        yield f"max_attention_window_size is {found}, the checkpoint's {wanted}"
