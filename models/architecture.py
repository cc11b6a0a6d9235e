"""The records that describe a model: what every exporter, the decoder and the quantizer read instead of config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
LayerKind = Literal["full", "sliding"]
Role = Literal[
    "embedding",
    "position_embedding",
    "head",
    "final_norm",
    "attention_norm",
    "attention_post_norm",
    "ffn_norm",
    "ffn_post_norm",
    "q_norm",
    "k_norm",
    "q",
    "k",
    "v",
    "o",
    "gate",
    "up",
    "down",
    "router",
    "expert_gate",
    "expert_up",
    "expert_down",
]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding. `dim` is the number of rotated elements of a head (the first ones)."""

    dim: int
    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3
    attention_factor: float | None = None  # yarn, longrope: multiplies cos and sin
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] | None = None  # longrope, f32[dim / 2]
    long_factor: tuple[float, ...] | None = None  # longrope, f32[dim / 2]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor comes from in the checkpoint.

    names: one checkpoint tensor; several are stacked on a new leading axis (experts).
    transpose: the checkpoint stores [in, out] (GPT-2's Conv1D).
    rows: half-open range of the output axis after the transpose, for slices of fused tensors; None is all of it.
        The output axis is the last but one ([out, in]; [experts, out, in] in one tensor), or a vector's only one.
    """

    names: tuple[str, ...]
    transpose: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One canonical tensor: `shape` is [out], [out, in] or [experts, out, in]."""

    name: str  # "layers.3.q.weight": "layers.{layer}.{role}.{part}", or "{role}.{part}" outside the layers
    role: Role
    part: Literal["weight", "bias"]
    layer: int | None
    shape: tuple[int, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family's record with one checkpoint's numbers filled in."""

    family: str  # config.json's model_type
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int  # rows of the embedding, padding rows included
    context_length: int
    norm: NormKind
    norm_eps: float
    norm_offset: float  # added to the stored norm gain (gemma: 1)
    activation: Activation
    gated: bool  # gate and up (SwiGLU, GeGLU), not a plain two-matrix MLP
    tied: bool  # the head is the embedding
    rope: Rope | None
    local_rope: Rope | None  # for sliding layers where it differs (gemma3)
    sliding_window: int | None
    layer_kinds: tuple[LayerKind, ...]
    embedding_scale: float
    attention_scale: float
    experts: int
    experts_used: int
    expert_intermediate: int
    normalize_router: bool  # the chosen experts' weights sum to one
    sparse_layers: tuple[bool, ...]  # which layers are mixtures of experts
    tensors: tuple[TensorSpec, ...]
