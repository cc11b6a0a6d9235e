"""Scales that move between neighbours: a channel divided where it is made and multiplied where it is read.

A pair is a producer, whose output channels can be divided by s, and the consumers, all of the matrices that read them
and whose columns are multiplied by s in turn: the float model stays the same, its quantized one does not. Which pairs
there are follows from the tensors' roles alone. Only what is exact is a pair: between them may lie what is linear in
each channel (attention mixes positions, not channels; a gate multiplies), never a norm or an activation.

Sources: AWQ, arXiv 2306.00978, section 3.2; SmoothQuant, arXiv 2211.10438, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.models.folded import Floats, Fold, FoldedModel
from llmx.models.model import Model

Places = dict[tuple[int | None, Role, str], TensorSpec]  # by layer, role and part


def _always(_: Architecture) -> bool:
    return True


def _gated(a: Architecture) -> bool:
    """The activation is on the gate, so that the down matrix is linear in the up matrix."""
    return a.gated


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """A pair by its roles. consumers: those that a layer has. heads: key-value heads, read once by every query head."""

    producer: Role
    consumers: tuple[Role, ...]
    when: Callable[[Architecture], bool] = _always
    heads: bool = False


RULES: tuple[ScaleRule, ...] = (
    ScaleRule("attention_norm", ("q", "k", "v")),
    ScaleRule("v", ("o",), heads=True),
    ScaleRule("ffn_norm", ("gate", "up", "router", "expert_gate", "expert_up")),
    ScaleRule("up", ("down",), when=_gated),
    ScaleRule("expert_up", ("expert_down",)),  # experts are always gated
)


@dataclass(frozen=True, slots=True)
class ScalePair:
    """One pair of a model. producer, consumers: canonical names without the part, "layers.3.v".

    shape: of its scales, (channels,) or (experts, channels). repeat: how many columns of a consumer read one channel;
    they lie `run` apart, as the head size is.
    """

    producer: str
    consumers: tuple[str, ...]
    shape: tuple[int, ...]
    repeat: int = 1
    run: int = 1

    @property
    def name(self) -> str:
        """ "layers.3.v -> o"."""
        return f"{self.producer} -> {', '.join(name.rpartition('.')[2] for name in self.consumers)}"

    def columns(self, scales: Floats) -> Floats:
        """f32[…, in] for the consumers' columns, of the channels' f32[…, channels]."""
        runs = scales.reshape(*scales.shape[:-1], -1, self.run)
        return np.repeat(runs, self.repeat, axis=-2).reshape(*scales.shape[:-1], -1)

    def channels(self, columns: NDArray[np.floating]) -> NDArray[np.floating]:
        """[…, channels]: the mean over the columns that read a channel, of […, in]."""
        lead = columns.shape[:-1]
        return columns.reshape(*lead, -1, self.repeat, self.run).mean(-2).reshape(*lead, -1)


def pairs(architecture: Architecture) -> tuple[ScalePair, ...]:
    """Every pair of the model, layer by layer."""
    places: Places = {(spec.layer, spec.role, spec.part): spec for spec in architecture.tensors}
    found = (
        _pair(architecture, layer, rule, places)
        for layer in range(architecture.layers)
        for rule in RULES
        if rule.when(architecture)
    )
    return tuple(pair for pair in found if pair is not None)


def _pair(a: Architecture, layer: int, rule: ScaleRule, places: Places) -> ScalePair | None:
    producer = places.get((layer, rule.producer, "weight"))
    consumers = [role for role in rule.consumers if (layer, role, "weight") in places]
    if producer is None or not consumers:
        return None
    shape = producer.shape[:-1] if len(producer.shape) > 1 else producer.shape  # [out, in], [experts, out, in], [out]
    names = tuple(f"layers.{layer}.{role}" for role in consumers)
    repeat = a.heads // a.kv_heads if rule.heads else 1
    return ScalePair(f"layers.{layer}.{rule.producer}", names, shape, repeat, a.head_dim if rule.heads else 1)


@dataclass(frozen=True, slots=True)
class Folds:
    """Scales of some pairs of a model: f32 of the pair's shape."""

    scales: Mapping[ScalePair, Floats]

    def tensors(self, model: Model) -> dict[str, Fold]:
        """The fold of every tensor that one of the pairs touches, by canonical name."""
        found: dict[str, Fold] = {}

        def add(name: str, fold: Fold) -> None:
            found[name] = found.get(name, Fold()).then(fold)

        for pair, scales in self.scales.items():
            assert scales.shape == pair.shape, f"{pair.name} has scales of shape {pair.shape}"
            for part in ("weight", "bias"):
                if model.has(f"{pair.producer}.{part}"):
                    add(f"{pair.producer}.{part}", Fold(rows=scales))
            for name in pair.consumers:
                add(f"{name}.weight", Fold(columns=pair.columns(scales)))
        return found

    def applied(self, model: Model) -> FoldedModel:
        """The model with these scales folded in: the same function, up to float32 rounding."""
        return FoldedModel(model, self.tensors(model))
