"""What llama.cpp expects of each family: names, transforms and metadata, as one table.

To add a family: give it a row in FAMILIES. A row says which architecture name the file carries, which canonical
tensors make which GGUF tensor, what is done to their rows, and what the runtime takes for granted (so that a model
that needs something else is refused instead of computed wrongly).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmx.errors import UnsupportedError
from llmx.models.architecture import Architecture, Role, Rope

# none: rows as they are. rope_q, rope_k: rows of each head permuted for llama.cpp's interleaved rotation.
# gain: the norm's offset is added, because llama.cpp multiplies by the stored gain alone.
Transform = Literal["none", "rope_q", "rope_k", "gain"]

# GGUF tensor name -> the roles that make it, their rows one after the other.
TensorNames = Mapping[str, tuple[Role, ...]]

_COMMON: TensorNames = {
    "attn_norm": ("attention_norm",),
    "attn_q": ("q",),
    "attn_k": ("k",),
    "attn_v": ("v",),
    "attn_output": ("o",),
    "attn_q_norm": ("q_norm",),
    "attn_k_norm": ("k_norm",),
    "post_attention_norm": ("attention_post_norm",),
    "ffn_norm": ("ffn_norm",),
    "ffn_gate_inp": ("router",),
    "ffn_gate_exps": ("expert_gate",),
    "ffn_up_exps": ("expert_up",),
    "ffn_down_exps": ("expert_down",),
    "ffn_gate": ("gate",),
    "ffn_up": ("up",),
    "ffn_down": ("down",),
    "post_ffw_norm": ("ffn_post_norm",),
}
_FUSED_ATTENTION: TensorNames = {
    **{name: roles for name, roles in _COMMON.items() if name not in ("attn_q", "attn_k", "attn_v")},
    "attn_qkv": ("q", "k", "v"),
}
_FUSED_ATTENTION_AND_GATE: TensorNames = {
    **{name: roles for name, roles in _FUSED_ATTENTION.items() if name != "ffn_gate"},
    "ffn_up": ("gate", "up"),
}
OUTSIDE_LAYERS: TensorNames = {
    "token_embd": ("embedding",),
    "position_embd": ("position_embedding",),
    "output_norm": ("final_norm",),
    "output": ("head",),
}

# Roles that stay F32 in any file: the quantizer of llama.cpp leaves them, and the loader may insist on it.
KEPT_FLOAT: frozenset[Role] = frozenset(
    {
        "attention_norm",
        "attention_post_norm",
        "ffn_norm",
        "ffn_post_norm",
        "final_norm",
        "q_norm",
        "k_norm",
        "router",
        "position_embedding",
    }
)


def _plain_scale(a: Architecture) -> float:
    return a.head_dim**-0.5


def _gemma3_scale(a: Architecture) -> float:
    # llama.cpp tells the 27B model by its 62 layers and takes hidden // heads there.
    return (a.hidden // a.heads) ** -0.5 if a.layers == 62 else a.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """One row: how a family is written, and what the runtime computes for it."""

    arch: str
    names: TensorNames = field(default_factory=lambda: _COMMON)
    transforms: Mapping[Role, Transform] = field(default_factory=dict)
    rope_kinds: frozenset[str] = frozenset({"default", "linear", "dynamic", "yarn"})
    activation: str = "silu"
    attention_scale: Callable[[Architecture], float] = _plain_scale
    biased_roles: frozenset[Role] = frozenset()
    window: bool = False  # the runtime applies the sliding window
    partial_rotation: bool = False
    experts: Literal["none", "optional", "required"] = "none"
    large_type: bool = False  # 80 layers make it llama.cpp's "70B"
    cut_padding_rows: bool = False  # embedding rows past the vocabulary are not written


_ROTATED: Mapping[Role, Transform] = {"q": "rope_q", "k": "rope_k"}
_ALL_BIASED: frozenset[Role] = frozenset({"q", "k", "v", "o", "up", "down", "attention_norm", "ffn_norm", "final_norm"})
_LLAMA = GgufFamily(
    "llama",
    transforms=_ROTATED,
    rope_kinds=frozenset({"default", "linear", "dynamic", "yarn", "llama3", "longrope"}),
    biased_roles=frozenset({"q", "k", "v", "o", "gate", "up", "down"}),
    experts="optional",
    large_type=True,
)
_NORM_GAINS: Mapping[Role, Transform] = {
    "attention_norm": "gain",
    "attention_post_norm": "gain",
    "ffn_norm": "gain",
    "ffn_post_norm": "gain",
    "final_norm": "gain",
    "q_norm": "gain",
    "k_norm": "gain",
}

FAMILIES: Mapping[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": GgufFamily("qwen2", biased_roles=frozenset({"q", "k", "v"}), large_type=True),
    "qwen3": GgufFamily("qwen3"),
    "qwen3_moe": GgufFamily("qwen3moe", experts="required"),
    "gemma3_text": GgufFamily(
        "gemma3",
        transforms=_NORM_GAINS,
        rope_kinds=frozenset({"default", "linear"}),
        activation="gelu_tanh",
        attention_scale=_gemma3_scale,
        window=True,
        cut_padding_rows=True,
    ),
    "phi3": GgufFamily(
        "phi3",
        names=_FUSED_ATTENTION_AND_GATE,
        rope_kinds=frozenset({"default", "linear", "yarn", "longrope"}),
        partial_rotation=True,
    ),
    "gpt2": GgufFamily(
        "gpt2",
        names=_FUSED_ATTENTION,
        activation="gelu_tanh",
        biased_roles=_ALL_BIASED,
    ),
}


def is_stock_yarn(rope: Rope) -> bool:
    """Whether this YaRN has the correction range that llama.cpp's graphs compute themselves (they read no other)."""
    return rope.beta_fast in (None, 32.0) and rope.beta_slow in (None, 1.0) and rope.truncate


def gguf_family(architecture: Architecture) -> GgufFamily:
    """The row of this architecture, after making sure that llama.cpp computes what the checkpoint means.

    Raises: UnsupportedError listing everything that the runtime would compute otherwise.
    """
    a = architecture
    family = FAMILIES.get(a.family)
    if family is None:
        raise UnsupportedError(
            f"GGUF export does not know the family {a.family!r}", fix=f"known families: {', '.join(FAMILIES)}"
        )
    problems = _what_the_runtime_cannot_do(a, family)
    if problems:
        raise UnsupportedError(
            f"llama.cpp's {family.arch!r} graph cannot compute this {a.family} checkpoint",
            problems=problems,
            fix="export to another format, or change the checkpoint",
        )
    return family


def _what_the_runtime_cannot_do(a: Architecture, family: GgufFamily) -> list[str]:
    problems = []
    if a.activation != family.activation:
        problems.append(f"activation {a.activation}; the graph has {family.activation}")
    expected_scale = family.attention_scale(a)
    if not math.isclose(a.attention_scale, expected_scale, rel_tol=1e-6):
        problems.append(f"attention scale {a.attention_scale:.6g}; the graph has {expected_scale:.6g}")
    for rope in filter(None, (a.rope, a.local_rope)):
        if rope.kind not in family.rope_kinds:
            problems.append(f"rope scaling {rope.kind!r}; the graph has {', '.join(sorted(family.rope_kinds))}")
        if rope.kind == "yarn" and not is_stock_yarn(rope) and "llama3" not in family.rope_kinds:
            problems.append("YaRN with beta_fast, beta_slow or truncate of its own; the graph has 32, 1 and true")
        if rope.dim != a.head_dim and not family.partial_rotation:
            problems.append(f"rotation of {rope.dim} of {a.head_dim} elements a head; the graph rotates all")
    if a.local_rope is not None and a.local_rope.kind != "default":
        problems.append("scaled rope in sliding layers; the graph scales full layers only")
    if family.experts == "required" and not all(a.sparse_layers):
        problems.append("layers without experts; the graph has experts in all")
    if any(a.sparse_layers) and (family.experts == "none" or not all(a.sparse_layers)):
        problems.append("experts in some layers")
    if any(a.sparse_layers) and not a.normalize_router:
        problems.append("router weights that are not normalized (norm_topk_prob false); the graph normalizes them")
    biased = {t.role for t in a.tensors if t.part == "bias"}
    if unexpected := sorted(biased - family.biased_roles):
        problems.append(f"biases on {', '.join(unexpected)}")
    if family.arch == "phi3" and a.head_dim * a.heads != a.hidden:
        problems.append(f"{a.heads} heads of {a.head_dim} in a hidden size of {a.hidden}")
    return problems
