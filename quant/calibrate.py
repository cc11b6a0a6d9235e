"""The calibration pass: the one decoder walked over every batch at once, float and quantized model side by side.

Here a tensor of the forward pass is a `Value`: its pair (float, quantized) for every batch, computed only when somebody
needs it. A matrix is solved when the walk first meets it, on the inputs that the already quantized part of the model
gives it, so every layer is solved to repair what the layers before it lost. Only the inputs of matrices and the
residual stream are held, one layer's at a time; where an earlier run kept all statistics, nothing is computed at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from llmx.errors import IntegrityError
from llmx.models.architecture import Activation, Architecture, NormKind, Role, Rope
from llmx.models.decoder import embed, head, layer
from llmx.models.model import Model, Weight
from llmx.models.ops_torch import ACTIVATIONS, TorchOps
from llmx.quant.calibrate_experts import ExpertMatrices, from_store, mixture
from llmx.quant.inputs import Batch, MatrixInputs, Pair, Shelf, StatisticsStore, Value, flat, gathered
from llmx.quant.statistics import Inputs
from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
READ_ROWS = 512  # of a weight read by one worker


class Solver(Protocol):
    """Who turns matrices into quantized ones during the walk. None leaves a matrix as it is."""

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> Tensor | None:
        """The quantized weights f32[out, in] of a matrix, or of one expert of a stacked one."""
        ...

    def table(self, weight: Weight) -> Tensor | None:
        """The quantized embedding f32[vocab, hidden]."""
        ...


Watch = Callable[[int, Sequence[Inputs], Sequence[Inputs]], None]
"""Sees what attention caches: the layer, its keys (after rope) and its values, f32[tokens, kv heads · D] a batch."""


def both(pair: Pair, work: Callable[[Tensor], Tensor]) -> Pair:
    """work on both, once where they are the same."""
    first = work(pair[0])
    return first, first if pair[1] is pair[0] else work(pair[1])


def each(pairs: Sequence[Pair], work: Callable[..., Tensor]) -> Pair:
    """work on all the float tensors, and on all the quantized ones unless they are the same."""
    first = work(*(a for a, _ in pairs))
    return first, first if all(b is a for a, b in pairs) else work(*(b for _, b in pairs))


def _alike(values: Tensor) -> Pair:
    return values, values


def _never() -> Value:
    """A value that a walk over known statistics does not need."""

    def compute(_: int) -> Pair:
        raise IntegrityError("the kept statistics lack some matrices", fix="remove their folder and run again")

    return Value(compute)


class PairedOps:
    """The decoder's operations over Values."""

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        solver: Solver,
        workers: Workers,
        *,
        device: str,
        store: StatisticsStore | None,
        watch: Watch | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self._watch, self._shelf = watch, shelf
        self._architecture: Architecture = model.architecture
        self._batches, self._solver, self._store = batches, solver, store
        self._readers, self._workers = workers, workers.on(device)
        self._known = store is not None and store.complete
        self._torch = TorchOps(device=device)
        self._device = device
        self._residuals: list[Value] = []  # the residual stream after each addition, the newest last
        roles = {spec.role for spec in model.architecture.tensors}
        # A norm between a matrix and the stream would change the error it is asked to make up for.
        self._post_normed = bool(roles & {"attention_post_norm", "ffn_post_norm"})

    def embed(self, indices: Value, table: Weight) -> Value:
        solved = self._solver.table(table) if table.spec.role == "embedding" else None
        solved = None if solved is None else solved.to(self._device)

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
        solved = self._solver.matrix(weight, None, self._inputs(x, weight))
        if self._known:
            return _never()
        exact = loaded(weight, self._readers, self._device)
        rounded = exact if solved is None else solved
        shift = None if bias is None else loaded(bias, self._readers, self._device)[0]

        def product(batch: int) -> Pair:
            a, b = x.at(batch)
            first = functional.linear(a, exact, shift)
            return first, first if b is a and rounded is exact else functional.linear(b, rounded, shift)

        return Value(product)

    def add(self, a: Value, b: Value) -> Value:
        return self.enter(Value(lambda batch: each((a.at(batch), b.at(batch)), torch.add)))

    def multiply(self, a: Value, b: Value) -> Value:
        return Value(lambda batch: each((a.at(batch), b.at(batch)), torch.mul))

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
                return self._torch.attention(layer, queries, keys, values, positions=places, scale=scale, window=window)

            return each((q.at(batch), k.at(batch), v.at(batch)), attend)

        if self._watch is not None:
            self._watch(layer, self._states(k), self._states(v))
        return Value(attended)

    def _states(self, x: Value) -> Sequence[Inputs]:
        """What is cached of each batch."""

        def states(number: int) -> Inputs:
            a, b = (flat(self._torch.merge_heads(part)) for part in x.at(number))
            return Inputs(a, b, held_out=self._batches[number].held_out)

        if self._shelf is not None:
            return gathered(states, self._batches, self._shelf)
        return self._workers.map(states, range(len(self._batches)))

    def experts(
        self,
        x: Value,
        router: Weight,
        matrices: tuple[Weight, Weight, Weight],
        *,
        used: int,
        normalize: bool,
        activation: Activation,
    ) -> Value:
        layer = ExpertMatrices(router, matrices, used, normalize, activation)
        if self._known:
            from_store(layer, self._solver.matrix, self._store, self._workers)
            return _never()
        self.settle(x)
        residual = None if self._post_normed else self._residuals[-1]
        return mixture(self._torch, x, residual, layer, self._batches, self._solver.matrix, self._store, self._workers)

    def enter(self, residual: Value) -> Value:
        """Notes that this is the residual stream from here on."""
        self._residuals.append(residual)
        return residual

    def settle(self, x: Value) -> None:
        """Hold x and the residual stream up to here, in order, so that each is computed from the one before it."""
        for passed in self._residuals:
            passed.keep(len(self._batches), self._workers, self._shelf)
        del self._residuals[:-1]
        x.keep(len(self._batches), self._workers, self._shelf)

    def _inputs(self, x: Value, weight: Weight) -> MatrixInputs:
        """What the solver may ask about the inputs of a matrix; matrices with one input share it."""
        if x.asked is None:
            residual = self._residuals[-1] if self._writes_residual(weight.spec.role) else None

            # Weak, because x holds what is asked of it: a circle would keep a layer's activations until some later day.
            own = weakref.ref(x)

            def gather() -> Sequence[Inputs]:
                found = own()
                assert found is not None, "a matrix's inputs are alive while it is solved"
                self.settle(found)
                return gathered(lambda number: self._batch_of(number, found, residual), self._batches, self._shelf)

            x.asked = MatrixInputs(weight.spec.name.removesuffix(".weight"), gather, self._store, self._workers)
        return x.asked

    def _writes_residual(self, role: Role) -> bool:
        return role in ("o", "down") and not self._post_normed

    def _batch_of(self, number: int, x: Value, residual: Value | None) -> Inputs:
        a, b = x.at(number)
        error = None
        if residual is not None:
            exact, moved = residual.at(number)
            error = None if moved is exact else flat(exact) - flat(moved)
        first = flat(a)
        return Inputs(first, first if b is a else flat(b), error, held_out=self._batches[number].held_out)


def loaded(weight: Weight, workers: Workers, device: torch.device | str, start: int = 0, count: int = 0) -> Tensor:
    """f32[count, cols] of a weight's rows on the device, all rows where count is 0; the workers share the reading."""
    count = count or weight.rows
    pinned = torch.device(device).type == "cuda"  # the way to a GPU is short only from such memory
    values = torch.empty(count, weight.cols, pin_memory=pinned)
    rows = values.numpy()

    def read(part: slice) -> None:
        rows[part] = weight.read(start + part.start, start + part.stop)

    workers.map(read, spans(count, READ_ROWS))
    weight.release(start, start + count)
    return values.to(device)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token sequences to walk, in batches of one length. store: keeps statistics for a later run, or None.

    shelf: where activations are kept, None for in memory. A mixture of experts holds one layer's in memory anyway.
    """

    batches: tuple[Batch, ...]
    device: str = "cpu"
    store: StatisticsStore | None = None
    shelf: Shelf | None = None


def walk(model: Model, calibration: Calibration, solver: Solver, workers: Workers, watch: Watch | None = None) -> None:
    """Walk the whole model; every matrix goes through the solver once, in the order of the forward pass.

    watch: sees what every layer caches; with it no statistics may be kept, because then nothing is computed.
    """
    batches, device, shelf = calibration.batches, calibration.device, calibration.shelf
    ops = PairedOps(model, batches, solver, workers, device=device, store=calibration.store, watch=watch, shelf=shelf)
    tokens = Value(lambda batch: _alike(batches[batch].tokens))
    positions = Value(lambda batch: _alike(torch.arange(batches[batch].tokens.shape[1], device=device)))
    with torch.inference_mode():
        hidden = ops.enter(embed(model, ops, tokens, positions))
        for index in range(model.architecture.layers):
            hidden = layer(model, ops, index, hidden, positions)
            if calibration.store is None or not calibration.store.complete:
                ops.settle(hidden)  # lets the layer's weights go
        head(model, ops, hidden)
