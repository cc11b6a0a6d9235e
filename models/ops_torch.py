"""The decoder's operations in torch, float32, weights read when they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from llmx.errors import UsageError
from llmx.models.architecture import Activation, NormKind, Rope
from llmx.models.decoder import forward
from llmx.models.model import Model, Weight
from llmx.models.rope import rope_tables

BLOCK_ELEMENTS = 32 << 20  # of a weight held in float32 at once: 128 MiB

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(x @ gate.T) · (x @ up.T): what the down projection of a gated MLP is given."""
    return ACTIVATIONS[activation](functional.linear(x, gate)) * functional.linear(x, up)


def _rms_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
    return normed if bias is None else normed + bias


def _layer_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return functional.layer_norm(x, gain.shape, gain, bias, eps)


NORMS: dict[NormKind, Callable[..., torch.Tensor]] = {"rms": _rms_norm, "layer": _layer_norm}


@dataclass(slots=True)
class KeyValueCache:
    """Keys and values of past positions, a layer each: f32[B, kv heads, past, D]."""

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions held by every layer."""
        return min((keys.shape[2] for keys, _ in self.layers.values()), default=0)

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, the new ones last."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k, v = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        self.layers[layer] = (k, v)
        return k, v


@dataclass(slots=True)
class TorchOps:
    """Ops over torch tensors. cache: keys and values of past positions, for decoding step by step.

    keep: hold the float32 weights after their first use (for many passes over a small model).
    """

    cache: KeyValueCache | None = None
    keep: bool = False
    device: str = "cpu"
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def embed(self, indices: torch.Tensor, table: Weight) -> torch.Tensor:
        if self.keep:
            return self._load(table)[indices]
        # Only the rows in use: a table of 262144 rows would be most of a small model.
        unique, places = torch.unique(indices, return_inverse=True)
        rows = np.concatenate([table.read(row, row + 1) for row in unique.tolist()])
        table.release()
        return torch.from_numpy(rows).to(self.device)[places]

    def norm(
        self, x: torch.Tensor, gain: Weight, bias: Weight | None, *, kind: NormKind, eps: float, offset: float
    ) -> torch.Tensor:
        shift = None if bias is None else self._load(bias)[0]
        return NORMS[kind](x, self._load(gain)[0] + offset, shift, eps)

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        parts = [functional.linear(x, block) for block in self._blocks(weight)]
        result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return result if bias is None else result + self._load(bias)[0]

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def activation(self, x: torch.Tensor, kind: Activation) -> torch.Tensor:
        return ACTIVATIONS[kind](x)

    def split_heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        batch, positions, width = x.shape
        return x.view(batch, positions, heads, width // heads).transpose(1, 2)

    def merge_heads(self, x: torch.Tensor) -> torch.Tensor:
        batch, heads, positions, size = x.shape
        return x.transpose(1, 2).reshape(batch, positions, heads * size)

    def rope(self, x: torch.Tensor, positions: torch.Tensor, rope: Rope) -> torch.Tensor:
        tables = rope_tables(rope, positions.cpu().numpy(), int(positions.max()) + 1)
        cos, sin = (torch.from_numpy(table).to(self.device) for table in tables)
        first, second, rest = x.split((rope.dim // 2, rope.dim // 2, x.shape[-1] - rope.dim), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        positions: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if self.cache is not None:
            k, v = self.cache.extend(layer, k, v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        # Keys lie at consecutive positions that end with the newest query's.
        keys = torch.arange(k.shape[2], device=self.device) + int(positions[-1]) + 1 - k.shape[2]
        distance = positions[:, None] - keys[None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)

    def experts(
        self,
        x: torch.Tensor,
        router: Weight,
        matrices: tuple[Weight, Weight, Weight],
        *,
        used: int,
        normalize: bool,
        activation: Activation,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.route(rows, router, used=used, normalize=normalize)
        result = torch.zeros_like(rows)
        for expert in chosen.unique().tolist():
            row, place = torch.where(chosen == expert)
            gate, up, down = (self.expert(matrix, expert) for matrix in matrices)
            states = gated(rows[row], gate, up, activation)
            result.index_add_(0, row, functional.linear(states, down) * weights[row, place, None])
        return result.view(x.shape)

    def route(
        self, rows: torch.Tensor, router: Weight, *, used: int, normalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights f32[rows, used], experts i64[rows, used]) that the router gives each row f32[rows, H]."""
        shares = functional.softmax(functional.linear(rows, self._load(router)), dim=-1)
        weights, chosen = torch.topk(shares, used, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True) if normalize else weights), chosen

    def expert(self, weight: Weight, expert: int) -> torch.Tensor:
        """f32[out, in] of one expert."""
        out = weight.spec.shape[1]
        return self._load(weight, expert * out, (expert + 1) * out)

    def _blocks(self, weight: Weight) -> Iterator[torch.Tensor]:
        step = weight.rows if self.keep else max(1, BLOCK_ELEMENTS // weight.cols)
        for start in range(0, weight.rows, step):
            yield self._load(weight, start, min(start + step, weight.rows))

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """f32[stop - start, cols] of the weight's rows."""
        if self.keep:
            if weight.spec.name not in self._kept:
                self._kept[weight.spec.name] = torch.from_numpy(weight.read()).to(self.device)
                weight.release()
            return self._kept[weight.spec.name][start:stop]
        block = torch.from_numpy(weight.read(start, stop)).to(self.device)
        weight.release(start, stop)
        return block


@torch.inference_mode()
def run(model: Model, tokens: Sequence[int], ops: TorchOps | None = None) -> np.ndarray:
    """f32[tokens, vocab]: logits of one sequence; with a cache in `ops`, of its continuation.

    Raises: UsageError for an id outside the vocabulary, no token at all, or more positions than the model has learned.
    """
    ops = ops or TorchOps()
    past = ops.cache.length if ops.cache is not None else 0
    architecture = model.architecture
    if not tokens or min(tokens) < 0 or max(tokens) >= architecture.vocab:
        raise UsageError(f"Token ids must be given and lie in 0 to {architecture.vocab - 1}.")
    if architecture.rope is None and past + len(tokens) > architecture.context_length:
        raise UsageError(f"This model has learned {architecture.context_length} positions; the text has more.")
    ids = torch.tensor([list(tokens)], device=ops.device)
    positions = torch.arange(past, past + len(tokens), device=ops.device)
    return forward(model, ops, ids, positions)[0].cpu().numpy()
