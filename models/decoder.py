"""The one forward pass: an Architecture walked over a small protocol of operations.

Whoever implements `Ops` gets every architecture: `ops_torch.py` computes, an exporter may record a graph instead, so a
tensor here is whatever the implementation calls one. Shapes: batch B, positions T, hidden H, heads N, head size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from llmx.models.architecture import Activation, Architecture, NormKind, Rope
from llmx.models.model import Model, Weight

Tensor = TypeVar("Tensor")


class Ops(Protocol[Tensor]):
    """What a decoder is made of. Weights are handed over unread: the implementation decides how to hold them."""

    def embed(self, indices: Tensor, table: Weight) -> Tensor:
        """[…, H]: the table's rows at integer indices […]."""
        ...

    def norm(
        self, x: Tensor, gain: Weight, bias: Weight | None, *, kind: NormKind, eps: float, offset: float
    ) -> Tensor:
        """The last axis normalized, times (gain + offset), plus bias."""
        ...

    def linear(self, x: Tensor, weight: Weight, bias: Weight | None) -> Tensor:
        """x @ weight.T + bias; weight is [out, in]."""
        ...

    def add(self, a: Tensor, b: Tensor) -> Tensor: ...

    def multiply(self, a: Tensor, b: Tensor) -> Tensor: ...

    def scale(self, x: Tensor, factor: float) -> Tensor: ...

    def activation(self, x: Tensor, kind: Activation) -> Tensor: ...

    def split_heads(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, N·D] -> [B, N, T, D]."""
        ...

    def merge_heads(self, x: Tensor) -> Tensor:
        """[B, N, T, D] -> [B, T, N·D]."""
        ...

    def rope(self, x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
        """[B, N, T, D], the first rope.dim elements turned: element i pairs with i + rope.dim / 2."""
        ...

    def attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """[B, N, T, D]: causal attention of q over cached and new k, v [B, kv heads, T, D].

        A query sees `window` positions, its own among them; None is all. What is cached, and where, is the
        implementation's business; `layer` tells the caches apart.
        """
        ...

    def experts(
        self,
        x: Tensor,
        router: Weight,
        matrices: tuple[Weight, Weight, Weight],
        *,
        used: int,
        normalize: bool,
        activation: Activation,
    ) -> Tensor:
        """[B, T, H]: softmax over the router's outputs, the `used` largest taken (and scaled to sum to one if
        `normalize`), and their gated MLPs (gate, up, down, each [experts, out, in]) added with these weights."""
        ...


def embed(model: Model, ops: Ops[Tensor], tokens: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [B, T, H] of integer tokens [B, T] at integer positions [T]."""
    architecture = model.architecture
    hidden = ops.embed(tokens, model.weight("embedding.weight"))
    if architecture.embedding_scale != 1.0:
        hidden = ops.scale(hidden, architecture.embedding_scale)
    if model.has("position_embedding.weight"):
        hidden = ops.add(hidden, ops.embed(positions, model.weight("position_embedding.weight")))
    return hidden


def layer(model: Model, ops: Ops[Tensor], index: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states after layer `index`."""
    branch = _norm(model, ops, f"layers.{index}.attention_norm", hidden)
    branch = _attention(model, ops, index, branch, positions)
    hidden = ops.add(hidden, _optional_norm(model, ops, f"layers.{index}.attention_post_norm", branch))
    branch = _norm(model, ops, f"layers.{index}.ffn_norm", hidden)
    feed_forward = _experts if model.architecture.sparse_layers[index] else _mlp
    branch = feed_forward(model, ops, index, branch)
    return ops.add(hidden, _optional_norm(model, ops, f"layers.{index}.ffn_post_norm", branch))


def head(model: Model, ops: Ops[Tensor], hidden: Tensor) -> Tensor:
    """Logits [B, T, vocab] of the last layer's hidden states."""
    normed = _norm(model, ops, "final_norm", hidden)
    return ops.linear(normed, model.weight("embedding.weight" if model.architecture.tied else "head.weight"), None)


def forward(model: Model, ops: Ops[Tensor], tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits [B, T, vocab] of integer tokens [B, T] at integer positions [T]."""
    hidden = embed(model, ops, tokens, positions)
    for index in range(model.architecture.layers):
        hidden = layer(model, ops, index, hidden, positions)
    return head(model, ops, hidden)


def logits(model: Model, tokens: Sequence[int]) -> np.ndarray:
    """f32[tokens, vocab], computed by torch in float32 from weights read one after another.

    Raises: UsageError for an id outside the vocabulary, or more tokens than learned positions.
    """
    from llmx.models.ops_torch import run

    return run(model, tokens)


def _attention(model: Model, ops: Ops[Tensor], index: int, x: Tensor, positions: Tensor) -> Tensor:
    architecture, stem = model.architecture, f"layers.{index}"
    heads = {"q": architecture.heads, "k": architecture.kv_heads, "v": architecture.kv_heads}
    states = {role: ops.split_heads(_linear(model, ops, f"{stem}.{role}", x), count) for role, count in heads.items()}
    sliding = architecture.layer_kinds[index] == "sliding"
    rope = _rope_of(architecture, sliding)
    for role in ("q", "k"):
        states[role] = _optional_norm(model, ops, f"{stem}.{role}_norm", states[role])
        if rope is not None:
            states[role] = ops.rope(states[role], positions, rope)
    mixed = ops.attention(
        index,
        states["q"],
        states["k"],
        states["v"],
        positions=positions,
        scale=architecture.attention_scale,
        window=architecture.sliding_window if sliding else None,
    )
    return _linear(model, ops, f"{stem}.o", ops.merge_heads(mixed))


def _rope_of(architecture: Architecture, sliding: bool) -> Rope | None:
    return architecture.local_rope if sliding and architecture.local_rope is not None else architecture.rope


def _mlp(model: Model, ops: Ops[Tensor], index: int, x: Tensor) -> Tensor:
    architecture, stem = model.architecture, f"layers.{index}"
    up = _linear(model, ops, f"{stem}.up", x)
    if architecture.gated:
        gate = ops.activation(_linear(model, ops, f"{stem}.gate", x), architecture.activation)
        return _linear(model, ops, f"{stem}.down", ops.multiply(gate, up))
    return _linear(model, ops, f"{stem}.down", ops.activation(up, architecture.activation))


def _experts(model: Model, ops: Ops[Tensor], index: int, x: Tensor) -> Tensor:
    architecture, stem = model.architecture, f"layers.{index}"
    gate, up, down = (model.weight(f"{stem}.expert_{name}.weight") for name in ("gate", "up", "down"))
    return ops.experts(
        x,
        model.weight(f"{stem}.router.weight"),
        (gate, up, down),
        used=architecture.experts_used,
        normalize=architecture.normalize_router,
        activation=architecture.activation,
    )


def _linear(model: Model, ops: Ops[Tensor], stem: str, x: Tensor) -> Tensor:
    return ops.linear(x, model.weight(f"{stem}.weight"), _bias(model, stem))


def _norm(model: Model, ops: Ops[Tensor], stem: str, x: Tensor) -> Tensor:
    architecture = model.architecture
    gain = model.weight(f"{stem}.weight")
    return ops.norm(
        x,
        gain,
        _bias(model, stem),
        kind=architecture.norm,
        eps=architecture.norm_eps,
        offset=architecture.norm_offset,
    )


def _optional_norm(model: Model, ops: Ops[Tensor], stem: str, x: Tensor) -> Tensor:
    return _norm(model, ops, stem, x) if model.has(f"{stem}.weight") else x


def _bias(model: Model, stem: str) -> Weight | None:
    return model.weight(f"{stem}.bias") if model.has(f"{stem}.bias") else None
