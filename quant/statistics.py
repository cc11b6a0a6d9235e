"""What a solver knows of a matrix's inputs: second moments of the calibration tokens, fitted and held out.

For a matrix W with float inputs x and quantized inputs x̂ (the same tokens in the partly quantized model), and r, the
error h − ĥ of the residual stream that the matrix's output is added to (0 for matrices that do not write it):

    hessian  Ĥ = Σ x̂ x̂ᵀ          drift  D = Σ (x − x̂) x̂ᵀ          residual  R = Σ r x̂ᵀ

    Σ ‖W x + r − Ŵ x̂‖² = tr(E Ĥ Eᵀ) + 2 ⟨E, W D + R⟩ + constant,   E = W − Ŵ

Source of the asymmetric target: GPTAQ, arXiv 2504.02692; the residual's error is added to it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
TILE = {"cpu": 256, "cuda": 1 << 20}  # columns of a moment that one worker sums: a GPU works on all at once


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over one set of tokens. hessian, drift: f32[in, in]; residual: f32[out, in] or None; tokens: their count.

    drift is None where the inputs are the float model's own.
    """

    hessian: Tensor
    drift: Tensor | None
    residual: Tensor | None
    tokens: int

    def pull(self, weight: Tensor, rows: slice = slice(None)) -> Tensor | None:
        """f32[rows, in]: those rows of W D + R, the pull towards repairing what came before; None without any."""
        pulled = None if self.drift is None else weight[rows] @ self.drift
        if self.residual is not None:
            own = self.residual[rows]
            pulled = own if pulled is None else pulled + own
        return pulled

    def plus(self, other: Moments) -> Moments:
        """The moments over both sets."""

        def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return a if b is None else b if a is None else a + b

        return Moments(
            self.hessian + other.hessian,
            added(self.drift, other.drift),
            added(self.residual, other.residual),
            self.tokens + other.tokens,
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments to fit on and moments to judge on. squares: f32[in], Σ x² of the float inputs over all tokens.

    pooled: an expert that too few tokens reached was given all tokens of its layer instead.
    """

    fitted: Moments
    held_out: Moments
    squares: Tensor
    pooled: bool = False

    @property
    def tokens(self) -> int:
        return self.fitted.tokens + self.held_out.tokens


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch of a matrix's inputs. x, x̂: f32[tokens, in]; r: f32[tokens, out] or None; weights: f32[tokens, 1].

    weights: how much each token's error counts (a router's squared share), None for 1.
    """

    float_: Tensor
    quantized: Tensor
    residual: Tensor | None = None
    weights: Tensor | None = None
    held_out: bool = False


class Later(Sequence[Inputs]):
    """Batches of inputs that are made when they are asked for, so that one of them is in memory at a time.

    held_out: of each, whether it is. make: the batch of a number.
    """

    __slots__ = ("_held_out", "_make", "_numbers")

    def __init__(
        self, make: Callable[[int], Inputs], held_out: Sequence[bool], numbers: Sequence[int] | None = None
    ) -> None:
        self._make, self._held_out = make, held_out
        self._numbers = range(len(held_out)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Inputs:  # type: ignore[override]
        return self._make(self._numbers[place])

    def those(self, held_out: bool) -> Later:
        """The held-out ones, or the others; none of them is made."""
        return Later(self._make, self._held_out, [n for n in self._numbers if self._held_out[n] is held_out])


def those(batches: Sequence[Inputs], held_out: bool) -> Sequence[Inputs]:
    """The held-out batches, or the others."""
    if isinstance(batches, Later):
        return batches.those(held_out)
    return [batch for batch in batches if batch.held_out is held_out]


def moments(batches: Sequence[Inputs], workers: Workers) -> Moments:
    """The sums over these batches, in their order; the workers share the columns."""
    first = batches[0]
    size, device = first.quantized.shape[1], first.quantized.device
    drifts = any(batch.float_ is not batch.quantized for batch in batches)
    hessian = torch.zeros(size, size, device=device)
    drift = torch.zeros(size, size, device=device) if drifts else None
    residual = None if first.residual is None else torch.zeros(first.residual.shape[1], size, device=device)
    tiles, workers, tokens = spans(size, TILE[device.type]), workers.on(device), 0
    for batch in batches:
        tokens += len(batch.quantized)
        right = batch.quantized if batch.weights is None else batch.quantized * batch.weights
        moved = batch.float_ - batch.quantized if drifts else None

        def add(columns: slice, batch: Inputs = batch, right: Tensor = right, moved: Tensor | None = moved) -> None:
            hessian[:, columns].addmm_(batch.quantized.T, right[:, columns])
            if drift is not None and moved is not None:
                drift[:, columns].addmm_(moved.T, right[:, columns])
            if residual is not None and batch.residual is not None:
                residual[:, columns].addmm_(batch.residual.T, right[:, columns])

        workers.map(add, tiles)
    return Moments(hessian, drift, residual, tokens)


def statistics(batches: Sequence[Inputs], workers: Workers, *, pooled: bool = False) -> Statistics:
    """Fitted and held-out moments of a matrix's inputs, and the float inputs' squares.

    With no batch to hold out the judge sees what was fitted.
    """
    fit = those(batches, False) or batches
    judge = those(batches, True) or fit
    fitted = moments(fit, workers)
    judged = fitted if judge is fit else moments(judge, workers)
    return Statistics(fitted, judged, sum_of_squares(batches, workers), pooled)


def sum_of_squares(batches: Sequence[Inputs], workers: Workers) -> Tensor:
    """f32[in]: Σ x² of the float inputs, added batch by batch."""
    workers = workers.on(batches[0].float_.device)
    return torch.stack(workers.map(lambda number: batches[number].float_.square().sum(0), range(len(batches)))).sum(0)
