"""The decoder run twice, with the checkpoint's weights and with the artifact's, layer by layer, on some tokens.

    source      h0 ── layer 0 ── h1 ── layer 1 ── h2 ── …      inputs x of every matrix, kept for one layer
    artifact    ĥ0 ── layer 0 ── ĥ1 ── layer 1 ── ĥ2 ── …      its inputs x̂; after every layer ||ĥ − h|| / ||h||

What a matrix itself loses is told from what it was handed: its outputs are off by x̂ Ŵᵀ − x Wᵀ, and (x̂ − x) Wᵀ of that
comes from before it. Rounding adds an error that has nothing to do with the inputs; a solver's error takes away from
what came before. A damage does neither.

Weights are read when they are used, one layer at a time; the metadata is the checkpoint's on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from llmx.models import decoder
from llmx.models.architecture import Activation
from llmx.models.model import Model, Weight
from llmx.models.ops_torch import BLOCK_ELEMENTS, TorchOps, gated

Key = tuple[str, int | None]  # canonical name, and which expert


@dataclass(slots=True)
class OutputError:
    """Sums of squares over the outputs of one matrix.

    lost: of x̂ Ŵᵀ − x Wᵀ. handed: of (x̂ − x) Wᵀ. unit: what an error of variance 1 in every weight would add, were it
    as unrelated to the inputs as rounding is.
    """

    lost: float = 0.0
    handed: float = 0.0
    unit: float = 0.0

    def over_expected(self, variance: float) -> float:
        """Returns how far the outputs are off, over what was handed on and an error of that variance explain."""
        expected = self.handed + variance * self.unit
        return math.sqrt(self.lost / expected) if expected > 0 and math.isfinite(self.lost / expected) else 0.0


@dataclass(frozen=True, slots=True)
class Streams:
    """embedding, layers: ||artifact − source|| / ||source|| of the residual stream, infinite once it is not finite.

    outputs: canonical name -> what it does to its outputs.
    """

    embedding: float
    layers: tuple[float, ...]
    outputs: dict[str, OutputError]


@dataclass(slots=True)
class _Recorder(TorchOps):
    """Computes with the source's weights and keeps the inputs of every matrix.

    chosen: the router's name -> the experts i64[rows, used] of every row.
    """

    inputs: dict[Key, torch.Tensor] = field(default_factory=dict)
    chosen: dict[str, torch.Tensor] = field(default_factory=dict)

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        self.inputs[weight.spec.name, None] = x.reshape(-1, weight.cols)
        return TorchOps.linear(self, x, weight, bias)

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
        self.inputs[router.spec.name, None] = rows
        _, chosen = self.route(rows, router, used=used, normalize=normalize)
        self.chosen[router.spec.name] = chosen
        for (key, _), given in _expert_inputs(self, rows, chosen, matrices, activation):
            self.inputs[key] = given
        return TorchOps.experts(self, x, router, matrices, used=used, normalize=normalize, activation=activation)


def _expert_inputs(
    ops: TorchOps,
    rows: torch.Tensor,
    chosen: torch.Tensor,
    matrices: tuple[Weight, Weight, Weight],
    activation: Activation,
) -> list[tuple[tuple[Key, Weight], torch.Tensor]]:
    """((key, matrix), inputs) of the three matrices of every expert that some row has chosen."""
    found = []
    for expert in chosen.unique().tolist():
        own = rows[(chosen == expert).any(-1)]
        gate, up, down = matrices
        inner = gated(own, ops.expert(gate, expert), ops.expert(up, expert), activation)
        for matrix, given in ((gate, own), (up, own), (down, inner)):
            found.append((((matrix.spec.name, expert), matrix), given))
    return found


@dataclass(slots=True)
class _Measurer(TorchOps):
    """Computes with the artifact's weights, and measures every matrix beside the source's on the recorded inputs."""

    source: Model | None = None
    recorded: _Recorder = field(default_factory=_Recorder)
    outputs: dict[str, OutputError] = field(default_factory=dict)

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        self._measure((weight.spec.name, None), weight, x.reshape(-1, weight.cols))
        return TorchOps.linear(self, x, weight, bias)

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
        self._measure((router.spec.name, None), router, rows)
        # The source's choice on both sides, so that the same rows are compared.
        chosen = self.recorded.chosen[router.spec.name]
        for (key, matrix), given in _expert_inputs(self, rows, chosen, matrices, activation):
            self._measure(key, matrix, given)
        return TorchOps.experts(self, x, router, matrices, used=used, normalize=normalize, activation=activation)

    def _measure(self, key: Key, weight: Weight, x: torch.Tensor) -> None:
        assert self.source is not None, "a measurer has a source beside its artifact"
        name, expert = key
        other, before = self.source.weight(name), self.recorded.inputs[key]
        found = self.outputs.setdefault(name, OutputError())
        count = weight.rows if expert is None else weight.spec.shape[-2]
        first = count * (expert or 0)
        step = max(1, BLOCK_ELEMENTS // weight.cols)
        for start in range(first, first + count, step):
            stop = min(start + step, first + count)
            plain = torch.from_numpy(other.read(start, stop))
            expected = functional.linear(before, plain)
            found.handed += _square(functional.linear(x, plain) - expected)
            found.lost += _square(functional.linear(x, torch.from_numpy(weight.read(start, stop))) - expected)
        found.unit += count * _square(x)


def _square(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


@torch.inference_mode()
def compare(source: Model, artifact: Model, tokens: Sequence[int]) -> Streams:
    """Returns how far the artifact's weights take the residual stream from the source's, after every layer.

    Memory: the largest matrix of both in float32, and the inputs of one layer's matrices.
    """
    ids, positions = torch.tensor([list(tokens)]), torch.arange(len(tokens))
    recorder = _Recorder()
    measurer = _Measurer(source=source, recorded=recorder)
    h, other = decoder.embed(source, recorder, ids, positions), decoder.embed(artifact, measurer, ids, positions)
    errors = [_apart(h, other)]
    for index in range(source.architecture.layers):
        h = decoder.layer(source, recorder, index, h, positions)
        other = decoder.layer(artifact, measurer, index, other, positions)
        errors.append(_apart(h, other))
        recorder.inputs.clear()
        recorder.chosen.clear()
    decoder.head(source, recorder, h)
    decoder.head(artifact, measurer, other)
    return Streams(errors[0], tuple(errors[1:]), measurer.outputs)


def _apart(h: torch.Tensor, other: torch.Tensor) -> float:
    error = float((other - h).norm() / h.norm())
    return error if math.isfinite(error) else math.inf
