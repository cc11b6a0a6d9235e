"""Which weights to set to zero, and what the others must then be: SparseGPT's elimination, made exact afterwards.

    eliminate   columns one after another with U of H⁻¹ = Uᵀ U: of each group of four the pair whose loss costs least,
                x_Sᵀ [(H⁻¹)_SS]⁻¹ x_S, made up for by the columns not yet passed
    settle      the least squares of what is kept, M ∘ (H (v − w*)) = 0 for every row, by conjugate gradients
    exchange    zeros for kept weights that are worth less than what they would win; not in rows that lose by it

The elimination leaves each kept weight as it was when its column was passed; settling takes a quarter to a third off
its loss, four exchanges another eighth. None goes uphill. Arrays are f32[columns, rows]: rows are independent.

Sources: SparseGPT, arXiv 2301.00774, algorithm 1 (there with the score w² / U_jj², each weight alone); Wanda,
arXiv 2306.11695, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch

from llmx.quant.sparsity import Pattern
from llmx.quant.workers import spans

Tensor = torch.Tensor
BLOCK = 128  # columns eliminated before the others hear of it, and of which a share is taken; whole groups
STEPS = 10  # of conjugate gradients between exchanges: 20 and 40 left the loss as it was to three digits


@dataclass(frozen=True, slots=True)
class Pruned:
    """A sparse matrix. value: f32[out, in]; kept: bool[out, in], where it may differ from zero.

    method, share, held_out, candidates, seconds: as in a Solution, before anything is rounded.
    """

    value: Tensor
    kept: Tensor
    method: str
    share: float
    held_out: float
    candidates: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Order:
    """order: the columns, group by group, from the heaviest to the lightest group; upper: f32[in, in], U so ordered."""

    order: Tensor
    upper: Tensor

    def inverse_diagonal(self) -> Tensor:
        """f32[in]: the diagonal of H⁻¹, the columns as they lie in the matrix."""
        return self.upper.square().sum(0)[torch.argsort(self.order)]


def ordered(hessian: Tensor, pattern: Pattern) -> Order | None:
    """U of a damped Hessian in float64; None where it is not positive definite."""
    size = pattern.group or 1
    heavy = hessian.diagonal().reshape(-1, size).sum(1)
    groups = torch.argsort(heavy, descending=True, stable=True)
    order = (groups[:, None] * size + torch.arange(size, device=hessian.device)).reshape(-1)
    sorted_ = hessian[order][:, order].double()
    # H = V Vᵀ with V upper is the Cholesky factor of H turned round; U = V⁻¹.
    lower, failed = torch.linalg.cholesky_ex(sorted_.flip(0, 1))
    if int(failed) != 0:
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return Order(order, torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float().contiguous())


def eliminate(target: Tensor, factor: Order, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(kept bool, value f32), [columns, rows]: the target with what the pattern asks set to zero."""
    w = target[factor.order]
    kept = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    for block in spans(len(w), BLOCK):
        upper = factor.upper[block, block]
        error = torch.empty_like(w[block])
        chosen = None if pattern.group else _of_share(w[block], upper, pattern)
        for group in spans(len(error), pattern.group or 1):
            inside = slice(block.start + group.start, block.start + group.stop)
            corner = upper[group, group]
            kept[inside] = _of_group(w[inside], corner, pattern) if chosen is None else chosen[group]
            for j in range(inside.start, inside.stop):
                at = j - block.start
                error[at] = torch.where(kept[j], 0.0, w[j]) / upper[at, at]
                w[j + 1 : block.stop].addr_(upper[at, at + 1 :], error[at], alpha=-1)
        w[block.stop :].addmm_(factor.upper[block, block.stop :].T, error, alpha=-1)
    back = torch.argsort(factor.order)
    kept = kept[back]
    return kept, torch.where(kept, w[back], 0.0)


def _of_group(w: Tensor, upper: Tensor, pattern: Pattern) -> Tensor:
    """bool[group, rows]: all but the set whose elimination costs least. upper: its corner of U."""
    sets = _sets(pattern.group, pattern.group - pattern.kept, w.device)
    inverse = upper.T @ upper  # of the columns from here on, as far as it concerns the group
    cost = torch.linalg.inv(inverse[sets[:, :, None], sets[:, None, :]].double()).float()
    x = w[sets]
    least = (x * (cost @ x)).sum(1).argmin(0)
    return torch.ones_like(w, dtype=torch.bool).scatter_(0, sets[least].T, False)


def _of_share(w: Tensor, upper: Tensor, pattern: Pattern) -> Tensor:
    """bool[block, rows]: all but the share with the lowest w² / U_jj², each weight counted alone."""
    score = (w / upper.diagonal()[:, None]).square().reshape(-1)
    kept = torch.ones(score.shape, dtype=torch.bool, device=w.device)
    kept[torch.argsort(score, stable=True)[: pattern.pruned(len(score))]] = False
    return kept.reshape(w.shape)


def _sets(size: int, count: int, device: torch.device) -> Tensor:
    """i64[sets, count]: every choice of `count` places of a group."""
    return torch.tensor(list(combinations(range(size), count)), device=device)


def settle(value: Tensor, target: Tensor, hessian: Tensor, kept: Tensor, steps: int) -> Tensor:
    """The kept weights moved towards their least squares by so many steps of conjugate gradients, each downhill."""
    weight = hessian.diagonal()[:, None]
    gradient = torch.where(kept, hessian @ (target - value), 0.0)
    direction = gradient / weight
    size = (gradient * direction).sum(0)
    for _ in range(steps):
        moved = torch.where(kept, hessian @ direction, 0.0)
        step = size / (direction * moved).sum(0).clamp_min(1e-30)
        value = value + step * direction
        gradient = gradient - step * moved
        scaled = gradient / weight
        before, size = size, (gradient * scaled).sum(0)
        direction = scaled + size / before.clamp_min(1e-30) * direction
    return value


def exchange(
    kept: Tensor, value: Tensor, target: Tensor, hessian: Tensor, factor: Order, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """(kept, value) with other zeros in the rows that then, settled, lose less; as many of every group as before.

    A weight that is kept is worth w² c, one that is not g² / c, g its slope. c is H_jj where the others stay as they
    are, and 1 / (H⁻¹)_jj where they are free; half of them are, so it is the geometric mean. (With either alone fewer
    rows got better, by less: layers of a trained model lost 2 and 11 % more than with the mean.)
    """
    worth = (hessian.diagonal() / factor.inverse_diagonal()).sqrt()[:, None]
    slope = hessian @ (value - target)
    scores = torch.where(kept, value.square() * worth, slope.square() / worth)
    chosen = _highest(scores, kept, pattern.group or len(value))
    moved = settle(torch.where(chosen, value, 0.0), target, hessian, chosen, STEPS)
    better = _losses(moved, target, hessian) < _losses(value, target, hessian)
    return torch.where(better, chosen, kept), torch.where(better, moved, value)


def _highest(scores: Tensor, kept: Tensor, group: int) -> Tensor:
    """bool[columns, rows]: of every group the places of the highest scores, as many as were kept there."""
    grouped = scores.reshape(-1, group, scores.shape[1])
    order = torch.argsort(grouped, dim=1, descending=True, stable=True)
    numbers = torch.arange(group, device=scores.device)[None, :, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, numbers)
    counts = kept.reshape(grouped.shape).sum(1, keepdim=True)
    return (rank < counts).reshape(scores.shape)


def _losses(value: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """f32[rows]"""
    error = value - target
    return (error * (hessian @ error)).sum(0)
