"""A mixture of experts in the calibration pass: each expert is solved on the tokens that the quantized model sends it.

Token t reaches the experts e that its own router chose, with shares ŝ_e, so expert e is judged by ŝ_e² ‖error‖². What
the layer's output lacks altogether, r = h − ĥ + Σ_float s_e y_e − Σ_quantized ŝ_e y_e (y_e of the float experts), is
spread over the token's experts with the least change, c_e = r ŝ_e / Σ ŝ², and added to the target of each down matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from llmx.errors import IntegrityError
from llmx.models.architecture import Activation
from llmx.models.model import Weight
from llmx.models.ops_torch import TorchOps, gated
from llmx.quant.inputs import Batch, MatrixInputs, StatisticsStore, Value, flat
from llmx.quant.statistics import Inputs
from llmx.quant.workers import Workers

Tensor = torch.Tensor
MINIMUM_TOKENS = 64  # an expert that fewer fitted tokens reach is solved on all tokens of the layer
Solve = Callable[[Weight, int | None, MatrixInputs], Tensor | None]
Tokens = Sequence[tuple[Tensor, Tensor]]  # of each batch: (rows i64[n], shares f32[n, 1])
Gather = Callable[[Tokens], list[Inputs]]


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """matrices: gate, up, down, each [experts, out, in]."""

    router: Weight
    matrices: tuple[Weight, Weight, Weight]
    used: int
    normalize: bool
    activation: Activation

    @property
    def experts(self) -> int:
        return self.matrices[0].spec.shape[0]


@dataclass(slots=True)
class _Routed:
    """One batch inside the layer. x, x̂: f32[tokens, H]; shares, chosen of both models: [tokens, used]."""

    x: Tensor
    quantized: Tensor
    shares: Tensor
    chosen: Tensor
    float_shares: Tensor
    float_chosen: Tensor
    held_out: bool
    output: Tensor  # of the float model
    same: Tensor  # Σ ŝ y: the float experts where the quantized model's router sends tokens
    moved: Tensor  # of the quantized model
    lacking: Tensor | None = None  # r

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """(rows i64[n], shares f32[n, 1]) of the quantized model's tokens."""
        return _rows_of(expert, self.chosen, self.shares)


def _rows_of(expert: int, chosen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    rows, place = torch.where(chosen == expert)
    return rows, shares[rows, place, None]


def mixture(
    ops: TorchOps,
    x: Value,
    residual: Value | None,
    layer: ExpertMatrices,
    batches: Sequence[Batch],
    solve: Solve,
    store: StatisticsStore | None,
    workers: Workers,
) -> Value:
    """The layer's output, its experts solved one after another; one expert's weights are in memory at a time."""

    def route(number: int) -> _Routed:
        a, b = (flat(part) for part in x.at(number))
        shares, chosen = ops.route(b, layer.router, used=layer.used, normalize=layer.normalize)
        float_shares, float_chosen = ops.route(a, layer.router, used=layer.used, normalize=layer.normalize)
        empty = [torch.zeros_like(a) for _ in range(3)]
        return _Routed(a, b, shares, chosen, float_shares, float_chosen, batches[number].held_out, *empty)

    routed = workers.map(route, range(len(batches)))
    for expert in range(layer.experts):
        _float_outputs(ops, layer, expert, routed, workers)
    if residual is not None:
        for number, batch in enumerate(routed):
            exact, moved = (flat(part) for part in residual.at(number))
            batch.lacking = exact - moved + batch.output - batch.same
    for expert in range(layer.experts):
        _solve_expert(ops, layer, expert, routed, solve, store, workers)
    shapes = [x.at(number)[0].shape for number in range(len(batches))]
    return Value(lambda number: (routed[number].output.view(shapes[number]), routed[number].moved.view(shapes[number])))


def from_store(layer: ExpertMatrices, solve: Solve, store: StatisticsStore | None, workers: Workers) -> None:
    """Solve every expert on statistics that an earlier run kept; no forward pass is made."""

    def missing() -> list[Inputs]:
        raise IntegrityError("the kept statistics lack some experts", fix="remove their folder and run again")

    gate, up, down = layer.matrices
    for expert in range(layer.experts):
        shared = MatrixInputs(_key(gate, expert), missing, store, workers)
        solve(gate, expert, shared)
        solve(up, expert, shared)
        solve(down, expert, MatrixInputs(_key(down, expert), missing, store, workers))


def _key(weight: Weight, expert: int) -> str:
    return f"{weight.spec.name.removesuffix('.weight')}.{expert}"


def _float_outputs(
    ops: TorchOps, layer: ExpertMatrices, expert: int, routed: Sequence[_Routed], workers: Workers
) -> None:
    gate, up, down = (ops.expert(matrix, expert) for matrix in layer.matrices)

    def add(batch: _Routed) -> None:
        for target, chosen, shares in (
            (batch.output, batch.float_chosen, batch.float_shares),
            (batch.same, batch.chosen, batch.shares),
        ):
            rows, share = _rows_of(expert, chosen, shares)
            states = gated(batch.x[rows], gate, up, layer.activation)
            target.index_add_(0, rows, functional.linear(states, down) * share)

    workers.map(add, routed)


def _solve_expert(
    ops: TorchOps,
    layer: ExpertMatrices,
    expert: int,
    routed: Sequence[_Routed],
    solve: Solve,
    store: StatisticsStore | None,
    workers: Workers,
) -> None:
    reached = [batch.tokens_of(expert) for batch in routed]
    pooled = (
        sum(len(rows) for batch, (rows, _) in zip(routed, reached, strict=True) if not batch.held_out) < MINIMUM_TOKENS
    )
    everything = [
        (torch.arange(len(b.x), device=b.x.device), torch.ones(len(b.x), 1, device=b.x.device)) for b in routed
    ]
    fitted_on = everything if pooled else reached
    exact = [ops.expert(matrix, expert) for matrix in layer.matrices]
    solved: list[Tensor] = []

    def ask(matrix: int, gather: Gather, inputs: MatrixInputs | None = None) -> MatrixInputs:
        weight = layer.matrices[matrix]
        inputs = inputs or MatrixInputs(
            _key(weight, expert),
            lambda: gather(fitted_on),
            store,
            workers,
            pooled=pooled,
            reached=lambda: gather(reached),
        )
        found = solve(weight, expert, inputs)
        solved.append(exact[matrix] if found is None else found)
        return inputs

    def inputs_of_gate(seen: Tokens) -> list[Inputs]:
        return [
            Inputs(batch.x[rows], batch.quantized[rows], None, share.square(), batch.held_out)
            for batch, (rows, share) in zip(routed, seen, strict=True)
        ]

    def inputs_of_down(seen: Tokens) -> list[Inputs]:
        def one(item: tuple[_Routed, tuple[Tensor, Tensor]]) -> Inputs:
            batch, (rows, share) = item
            states = gated(batch.x[rows], exact[0], exact[1], layer.activation)
            moved = gated(batch.quantized[rows], solved[0], solved[1], layer.activation)
            return Inputs(states, moved, _share_of_error(batch, rows, share), share.square(), batch.held_out)

        return workers.map(one, zip(routed, seen, strict=True))

    shared = ask(0, inputs_of_gate)
    ask(1, inputs_of_gate, shared)
    ask(2, inputs_of_down)

    def add(item: tuple[_Routed, tuple[Tensor, Tensor]]) -> None:
        batch, (rows, share) = item
        states = gated(batch.quantized[rows], solved[0], solved[1], layer.activation)
        batch.moved.index_add_(0, rows, functional.linear(states, solved[2]) * share)

    workers.map(add, zip(routed, reached, strict=True))


def _share_of_error(batch: _Routed, rows: Tensor, share: Tensor) -> Tensor | None:
    """f32[n, H]: this expert's part of what the layer's output lacks at these tokens."""
    if batch.lacking is None:
        return None
    return batch.lacking[rows] * share / batch.shares[rows].square().sum(-1, keepdim=True)
