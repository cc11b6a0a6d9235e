"""What rounding a tensor costs: KL(float ‖ float with some tensors rounded), measured on the model itself.

All trials walk the decoder side by side, so a layer's weights are read once and one layer is in memory at a time:

    float     h0 ─ layer 0 ── h1 ─ layer 1 ── h2 ─ … ─ head ─ p
    trial A   └─── layer 0' ─ a1 ─ layer 1 ── a2 ─ … ─ head ─ a      KL(p ‖ a): a tensor of layer 0 rounded
    trial B                   └─── layer 1' ─ b2 ─ … ─ head ─ b      KL(p ‖ b): a tensor of layer 1 rounded

A trial costs nothing before its first rounded tensor; logits exist for a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmx.errors import UnsupportedError, UsageError
from llmx.formats.ggml_decode import decode
from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.models.decoder import embed, head, layer
from llmx.models.model import Model, Weight
from llmx.models.ops_torch import TorchOps
from llmx.quant.floats import FLOATS
from llmx.quant.grid import encode, grid
from llmx.quant.inputs import BATCH_TOKENS, flat
from llmx.quant.protocol import Floats
from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
Trial = Mapping[str, str]  # canonical name -> the type that it is rounded to; every other tensor stays float
Importance = Mapping[str, Floats]  # canonical name -> mean squared inputs, f32[cols] or f32[experts, cols]

KEPT_FLOAT: frozenset[Role] = frozenset({"router", "position_embedding"})  # small matrices that decide much
HELD_BYTES = 512 << 20  # of all trials' hidden states at once
LOGITS = 1 << 21  # of one thread at once: with their float64 copies about 100 MiB
ROUNDED = 1 << 16  # weights rounded at a time: they stay in a core's cache
SAMPLE = 1 << 19  # weights of a tensor that its squared errors are compared on


@dataclass(slots=True)
class HeldOps(TorchOps):
    """TorchOps over weights that are in memory: canonical name -> f32[rows, cols], experts under each other."""

    keep: bool = True
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> Tensor:
        return self.held[weight.spec.name][start:stop]


def candidates(architecture: Architecture) -> tuple[TensorSpec, ...]:
    """The tensors that may be rounded, in the architecture's order: matrices, no norms, routers or positions."""
    return tuple(spec for spec in architecture.tensors if len(spec.shape) > 1 and spec.role not in KEPT_FLOAT)


def measure(
    model: Model,
    tokens: Tensor,
    grids: Mapping[str, Sequence[str]],
    workers: Workers,
    importance: Importance | None = None,
    *,
    exact: bool = False,
) -> dict[str, dict[str, float]]:
    """{canonical name: {type: KL in nats a token}} of rounding that tensor alone, for the types that `grids` lists.

    tokens: i64[sequences, length]. exact: run the model for every type; otherwise for each tensor's coarsest type
    alone, and the others follow from their squared errors, weighted by importance: for small errors the KL is linear
    in them (the linearity theorem, HIGGS, arXiv 2411.17525). In a mixture of experts an error also
    flips routes, and a token's route flips once however many tensors are rounded: the exact losses of fine types then
    add up to more than the whole, the scaled ones to about the whole. The same numbers for any number of threads.
    Raises: UsageError for a tensor that is no candidate, a type that is unknown or does not divide the tensor's rows.
    """
    importance = importance or {}
    pairs = [(name, type_name) for name, types in grids.items() for type_name in types]
    _check(model, pairs)
    if exact:
        trials = [{name: type_name} for name, type_name in pairs]
        found = divergence(model, tokens, trials, workers, importance)
        lost = dict(zip(pairs, found, strict=True))
        return {name: {type_name: lost[name, type_name] for type_name in types} for name, types in grids.items()}
    names = [name for name, types in grids.items() if types]
    errors = dict(zip(names, workers.map(lambda n: _errors(model.weight(n), grids[n], importance), names), strict=True))
    coarse = {name: max(grids[name], key=errors[name].__getitem__) for name in names}
    found = divergence(model, tokens, [{name: coarse[name]} for name in names], workers, importance)
    kl = dict(zip(names, found, strict=True))
    return {
        name: {type_name: _scaled(kl[name], errors[name][type_name], errors[name][coarse[name]]) for type_name in types}
        for name, types in grids.items()
    }


def divergence(
    model: Model,
    tokens: Tensor,
    trials: Sequence[Trial],
    workers: Workers,
    importance: Importance | None = None,
) -> tuple[float, ...]:
    """The KL of each trial in nats a token: its tensors are rounded to the nearest, together.

    tokens: i64[sequences, length]. Raises: as `measure`.
    """
    _check(model, (pair for trial in trials for pair in trial.items()))
    sequences, length = tokens.shape
    state = len(trials) * length * model.architecture.hidden * 4
    together = max(1, min(HELD_BYTES // max(state, 1), BATCH_TOKENS // length))
    with torch.inference_mode():
        parts = [
            _Walk(model, tokens[part], trials, importance or {}, workers).run() for part in spans(sequences, together)
        ]
    return tuple(float(total) / tokens.numel() for total in np.sum(parts, axis=0))


def _scaled(kl: float, error: float, coarse: float) -> float:
    return kl * (error / coarse) if coarse > 0 else 0.0


def _check(model: Model, pairs: Iterable[tuple[str, str]]) -> None:
    shapes = {spec.name: spec.shape for spec in candidates(model.architecture)}
    problems = []
    for name, type_name in pairs:
        if name not in shapes:
            problems.append(f"{name} is no matrix that may be rounded")
        elif type_name not in FLOATS:
            try:
                grid(type_name, shapes[name][-1])
            except UnsupportedError as error:
                problems.append(f"{name}: {error.what}")
    if problems:
        raise UsageError("these tensors cannot be rounded as asked", problems=problems)


class _Walk:
    """The trials on one group of sequences."""

    def __init__(
        self, model: Model, tokens: Tensor, trials: Sequence[Trial], importance: Importance, workers: Workers
    ) -> None:
        self._model, self._tokens, self._trials = model, tokens, trials
        self._importance, self._workers = importance, workers
        self._positions = torch.arange(tokens.shape[1])
        self._states: list[Tensor | None] = [None] * len(trials)  # None: what the float model has

    def run(self) -> np.ndarray:
        """f64[trials]: KL summed over the positions."""
        architecture = self._model.architecture
        hidden = embed(self._model, TorchOps(), self._tokens, self._positions)
        self._embed()
        for index in range(architecture.layers):
            hidden = self._layer(index, hidden)
        return self._head(hidden)

    def _embed(self) -> None:
        name = "embedding.weight"
        touched = [number for number, trial in enumerate(self._trials) if name in trial]
        if not touched:
            return
        exact = self._read(("embedding.weight", "position_embedding.weight"))

        def start(number: int) -> Tensor:
            ops = HeldOps(held=self._replaced(exact, self._trials[number]))
            return embed(self._model, ops, self._tokens, self._positions)

        for number, state in zip(touched, self._workers.map(start, touched), strict=True):
            self._states[number] = state

    def _layer(self, index: int, hidden: Tensor) -> Tensor:
        """The float model's next hidden states; those of the trials that differ from it are moved on as well."""
        exact = self._read(spec.name for spec in self._model.architecture.tensors if spec.layer == index)
        float_ops = HeldOps(held=exact)
        moved = [n for n, trial in enumerate(self._trials) if self._states[n] is not None or exact.keys() & trial]

        def advance(number: int | None) -> Tensor:
            state = None if number is None else self._states[number]
            ops = float_ops if number is None else HeldOps(held=self._replaced(exact, self._trials[number]))
            return layer(self._model, ops, index, hidden if state is None else state, self._positions)

        after, *states = self._workers.map(advance, (None, *moved))
        for number, state in zip(moved, states, strict=True):
            self._states[number] = state
        return after

    def _head(self, hidden: Tensor) -> np.ndarray:
        name = "embedding.weight" if self._model.architecture.tied else "head.weight"
        exact = self._read((name, "final_norm.weight", "final_norm.bias"))
        ops = HeldOps(held=exact)
        totals = np.zeros(len(self._trials))
        moved = [n for n, trial in enumerate(self._trials) if self._states[n] is not None and name not in trial]
        totals[moved] = self._compare(ops, hidden, ops, [self._states[number] for number in moved])
        for number, trial in enumerate(self._trials):
            if name in trial:  # one after another: a rounded head may be the largest tensor of all
                own = HeldOps(held=self._replaced(exact, trial))
                totals[number] = self._compare(ops, hidden, own, [self._states[number]])[0]
        return totals

    def _compare(self, ops: TorchOps, hidden: Tensor, own: TorchOps, states: Sequence[Tensor | None]) -> np.ndarray:
        """f64[states]: KL between the logits of hidden under ops and of each state under own."""
        others = [flat(hidden if state is None else state) for state in states]
        if not others:
            return np.zeros(0)
        exact = flat(hidden)

        def of_span(part: slice) -> list[float]:
            expected = self._log_shares(ops, exact[part])
            shares = expected.exp()
            return [float((shares * (expected - self._log_shares(own, other[part]))).sum()) for other in others]

        step = max(1, LOGITS // self._model.architecture.vocab)
        return np.sum(self._workers.map(of_span, spans(len(exact), step)), axis=0)

    def _log_shares(self, ops: TorchOps, hidden: Tensor) -> Tensor:
        """f64[positions, vocab]: in float32 the sum's own rounding would outweigh the KL of 8 bits."""
        return torch.log_softmax(head(self._model, ops, hidden).double(), dim=-1)

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """f32[rows, cols] of those that the model has."""
        weights = [self._model.weight(name) for name in names if self._model.has(name)]
        values = {weight.spec.name: torch.from_numpy(weight.read()) for weight in weights}
        for weight in weights:
            weight.release()
        return values

    def _replaced(self, exact: Mapping[str, Tensor], trial: Trial) -> dict[str, Tensor]:
        """The weights with those of the trial rounded."""
        own = {}
        for name in exact.keys() & trial:
            spec = self._model.weight(name).spec
            own[name] = torch.from_numpy(rounded(exact[name].numpy(), spec, trial[name], self._importance.get(name)))
        return {**exact, **own}


def rounded(weight: Floats, spec: TensorSpec, type_name: str, importance: Floats | None = None) -> Floats:
    """f32[rows, cols]: the tensor as that type stores it, rounded to the nearest on the best scales found.

    weight: f32[rows, cols], experts under each other. importance: f32[cols] or f32[experts, cols].
    """
    result = np.empty_like(weight)
    height = spec.shape[-2]
    for start in range(0, len(weight), height):
        part = slice(start, start + height)
        _round_rows(weight[part], type_name, _own(importance, start // height), result[part])
    return result


def _own(importance: Floats | None, expert: int) -> Floats | None:
    """The importance of one expert; None also for an expert that no token has reached."""
    if importance is None:
        return None
    own = importance if importance.ndim == 1 else importance[expert]
    return own if own.any() else None


def _round_rows(weight: Floats, type_name: str, importance: Floats | None, out: Floats) -> None:
    own = None if type_name in FLOATS else grid(type_name, weight.shape[1]).bound(weight)
    for part in spans(len(weight), max(1, ROUNDED // weight.shape[1])):
        rows = np.ascontiguousarray(weight[part])
        if own is None:
            out[part] = decode(type_name, encode(type_name, rows))
        else:
            scales = own.fit(rows, importance)
            out[part] = own.decode(scales, own.round(rows, scales)).reshape(rows.shape)


def _errors(weight: Weight, types: Sequence[str], importance: Importance) -> dict[str, float]:
    """{type: Σ importance · (w − ŵ)²} over rows at even distances."""
    height = weight.spec.shape[-2]
    count = max(1, SAMPLE // (weight.cols * (weight.rows // height)))
    columns = importance.get(weight.spec.name)
    errors = dict.fromkeys(types, 0.0)
    for start in range(0, weight.rows, height):
        own = _own(columns, start // height)
        step = max(1, -(-height // count))
        rows = np.concatenate([weight.read(row, row + 1) for row in range(start, start + height, step)])
        counts = np.full(weight.cols, 1.0 if columns is None else 0.0) if own is None else own.astype(np.float64)
        for type_name in types:
            result = np.empty_like(rows)
            _round_rows(rows, type_name, own, result)
            errors[type_name] += float(((rows.astype(np.float64) - result) ** 2 @ counts).sum())
    weight.release()
    return errors
