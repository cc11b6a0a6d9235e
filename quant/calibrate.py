"""The calibration pass: the one decoder walked over every batch at once, float and quantized model side by side.

Here a tensor of the forward pass is a `Value`: its pair (float, quantized) for every batch, computed only when somebody
needs it. A matrix is solved when the walk first meets it, on the inputs that the already quantized part of the model
gives it, so every layer is solved to repair what the layers before it lost. Only the inputs of matrices and the
residual stream are held, one layer's at a time; where all statistics are known already, nothing is computed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from llmx.models.architecture import Activation, Architecture, NormKind, Role, Rope
from llmx.models.decoder import embed, head, layer
from llmx.models.model import Model, Weight
from llmx.models.ops_torch import ACTIVATIONS, TorchOps
from llmx.quant.statistics import Inputs, Statistics, statistics
from llmx.quant.workers import Workers

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]  # float, quantized: the same object where nothing has been quantized yet


class Solver(Protocol):
    """Who turns matrices into quantized ones during the walk."""

    def matrix(self, weight: Weight, expert: int | None, statistics: Callable[[], Statistics]) -> Tensor | None:
        """The quantized weights f32[out, in] of a matrix or one of its experts; None leaves it as it is."""
        ...

    def table(self, weight: Weight) -> Tensor | None:
        """The quantized embedding f32[vocab, hidden]; None leaves it as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of equal length. tokens: i64[sequences, length]. held_out: to judge on, not to fit on."""

    tokens: Tensor
    held_out: bool


class Value:
    """One tensor of the forward pass, for every batch."""

    __slots__ = ("_compute", "_kept", "statistics")

    def __init__(self, compute: Callable[[int], Pair]) -> None:
        self._compute: Callable[[int], Pair] | None = compute
        self._kept: list[Pair] | None = None
        self.statistics: object = None  # of the matrices that have this input

    def at(self, batch: int) -> Pair:
        if self._kept is not None:
            return self._kept[batch]
        assert self._compute is not None
        return self._compute(batch)

    def keep(self, count: int, workers: Workers) -> None:
        """Compute every batch now and hold it; what it was computed from is let go."""
        if self._kept is None:
            self._kept = workers.map(self.at, range(count))
            self._compute = None


def both(pair: Pair, work: Callable[[Tensor], Tensor]) -> Pair:
    """work on both, once where they are the same."""
    first = work(pair[0])
    return first, first if pair[1] is pair[0] else work(pair[1])


def paired(a: Pair, b: Pair, work: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    first = work(a[0], b[0])
    return first, first if a[1] is a[0] and b[1] is b[0] else work(a[1], b[1])


class PairedOps:
    """The decoder's operations over Values."""

    def __init__(self, model: Model, batches: Sequence[Batch], solver: Solver, workers: Workers, device: str) -> None:
        self._architecture: Architecture = model.architecture
        self._batches, self._solver, self._workers = batches, solver, workers
        self._torch = TorchOps(device=device)
        self._device = device
        self._residuals: list[Value] = []  # the residual stream after each addition, the newest last
        self._has_post_norm = any(spec.role in ("attention_post_norm", "ffn_post_norm") for spec in model.architecture.tensors)

    def embed(self, indices: Value, table: Weight) -> Value:
        solved = self._solver.table(table) if table.spec.role == "embedding" else None

        def rows(batch: int) -> Pair:
            ids = indices.at(batch)[0]
            exact = self._torch.embed(ids, table)
            return exact, exact if solved is None else solved[ids]

        return Value(rows)

    def norm(self, x: Value, gain: Weight, bias: Weight | None, *, kind: NormKind, eps: float, offset: float) -> Value:
        def normed(values: Tensor) -> Tensor:
            return self._torch.norm(values, gain, bias, kind=kind, eps=eps, offset=offset)

        return Value(lambda batch: both(x.at(batch), normed))

    def linear(self, x: Value, weight: Weight, bias: Weight | None) -> Value:
        exact = self._load(weight)
        residual = self._residuals[-1] if self._writes_residual(weight.spec.role) else None
        solved = self._solver.matrix(weight, None, lambda: self._statistics(x, residual))
        rounded = exact if solved is None else solved
        shift = None if bias is None else self._load(bias)[0]

        def product(batch: int) -> Pair:
            a, b = x.at(batch)
            first = functional.linear(a, exact, shift)
            return first, first if b is a and rounded is exact else functional.linear(b, rounded, shift)

        return Value(product)

    def add(self, a: Value, b: Value) -> Value:
        return self.enter(Value(lambda batch: paired(a.at(batch), b.at(batch), torch.add)))

    def multiply(self, a: Value, b: Value) -> Value:
        return Value(lambda batch: paired(a.at(batch), b.at(batch), torch.mul))

    def scale(self, x: Value, factor: float) -> Value:
        return Value(lambda batch: both(x.at(batch), lambda values: values * factor))

    def activation(self, x: Value, kind: Activation) -> Value:
        return Value(lambda batch: both(x.at(batch), ACTIVATIONS[kind]))

    def split_heads(self, x: Value, heads: int) -> Value:
        return Value(lambda batch: both(x.at(batch), lambda values: self._torch.split_heads(values, heads)))

    def merge_heads(self, x: Value) -> Value:
        return Value(lambda batch: both(x.at(batch), self._torch.merge_heads))

    def rope(self, x: Value, positions: Value, rope: Rope) -> Value:
        def turned(batch: int) -> Pair:
            places = positions.at(batch)[0]
            return both(x.at(batch), lambda values: self._torch.rope(values, places, rope))

        return Value(turned)

    def attention(
        self, layer: int, q: Value, k: Value, v: Value, *, positions: Value, scale: float, window: int | None
    ) -> Value:
        def attended(batch: int) -> Pair:
            places = positions.at(batch)[0]

            def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                return self._torch.attention(
                    layer, queries, keys, values, positions=places, scale=scale, window=window
                )

            (q0, q1), (k0, k1), (v0, v1) = q.at(batch), k.at(batch), v.at(batch)
            first = attend(q0, k0, v0)
            return first, first if q1 is q0 and k1 is k0 and v1 is v0 else attend(q1, k1, v1)

        return Value(attended)

    def enter(self, residual: Value) -> Value:
        """Notes that this is the residual stream from here on."""
        self._residuals.append(residual)
        return residual

    def _writes_residual(self, role: Role) -> bool:
        """Whether the matrix is added to the residual stream as it is: a norm between would change its error."""
        return role in ("o", "down") and not self._has_post_norm

    def _statistics(self, x: Value, residual: Value | None) -> Statistics:
        """Of the matrices with this input, gathered once."""
        if x.statistics is None:
            count = len(self._batches)
            for passed in self._residuals:  # in order, so that each is computed from the one before it
                passed.keep(count, self._workers)
            del self._residuals[:-1]
            x.keep(count, self._workers)
            x.statistics = statistics([self._inputs(n, x, residual) for n in range(count)], self._workers)
        assert isinstance(x.statistics, Statistics)
        return x.statistics

    def _inputs(self, number: int, x: Value, residual: Value | None) -> Inputs:
        a, b = x.at(number)
        error = None
        if residual is not None:
            exact, moved = residual.at(number)
            error = None if moved is exact else _flat(exact) - _flat(moved)
        flat = _flat(a)
        return Inputs(flat, flat if b is a else _flat(b), error, held_out=self._batches[number].held_out)

    def _load(self, weight: Weight) -> Tensor:
        values = torch.from_numpy(weight.read()).to(self._device)
        weight.release()
        return values


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def walk(model: Model, batches: Sequence[Batch], solver: Solver, workers: Workers, device: str = "cpu") -> None:
    """Walk the whole model; every matrix goes through the solver once, in the order of the forward pass."""
    ops = PairedOps(model, batches, solver, workers, device)
    tokens = Value(lambda batch: (batches[batch].tokens,) * 2)
    positions = Value(lambda batch: (torch.arange(batches[batch].tokens.shape[1], device=device),) * 2)
    with torch.inference_mode():
        hidden = ops.enter(embed(model, ops, tokens, positions))
        for index in range(model.architecture.layers):
            hidden = layer(model, ops, index, hidden, positions)
        head(model, ops, hidden)
