"""Which weights to set to zero, and what the others must then be: SparseGPT's elimination, made exact afterwards.

    eliminate   columns one after another with U of H⁻¹ = Uᵀ U: of each group of four the pair whose loss costs least,
                x_Sᵀ [(H⁻¹)_SS]⁻¹ x_S, made up for by the columns not yet passed
    settle      the least squares of what is kept, M ∘ (H (v − w*)) = 0 for every row, by conjugate gradients
    exchange    every group once: the best pair and its best values, the other groups fixed, under the whole Hessian

The elimination leaves each kept weight as it was when its column was passed; settling takes a quarter to a third off
its loss. Exchanging and settling in turn never go uphill. Arrays are f32[columns, rows]: rows are independent.

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
    # One more in every block, so that rounding down leaves no matrix with too few.
    count = min(pattern.pruned(len(score)) + 1, len(score))
    kept[torch.argsort(score, stable=True)[:count]] = False
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


def exchange(value: Tensor, target: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """(kept, value) after every group has taken the set of weights, and the values, that lower the loss most."""
    size = pattern.group
    sets = _sets(size, pattern.kept, value.device)
    value, gradient = value.clone(), hessian @ (value - target)
    kept = torch.empty(value.shape, dtype=torch.bool, device=value.device)
    for block in spans(len(value), BLOCK):
        own, slope, before = hessian[block, block], gradient[block].clone(), value[block].clone()
        places = torch.arange(len(own), device=value.device).reshape(-1, size)
        corners = own[places[:, :, None], places[:, None, :]]
        solved = torch.linalg.inv(corners[:, sets[:, :, None], sets[:, None, :]].double()).float()
        now = before.clone()
        for number, group in enumerate(spans(len(own), size)):
            wanted = (corners[number] @ now[group] - slope[group])[sets]
            found = solved[number] @ wanted  # f32[sets, kept, rows]: the best values of each set
            best = (wanted * found).sum(1).argmax(0)
            places_kept = sets[best].T
            chosen = found.gather(0, best.expand(1, pattern.kept, -1))[0]
            new = torch.zeros_like(now[group]).scatter_(0, places_kept, chosen)
            slope.addmm_(own[:, group], new - now[group])
            now[group] = new
            inside = slice(block.start + group.start, block.start + group.stop)
            kept[inside] = torch.zeros_like(new, dtype=torch.bool).scatter_(0, places_kept, True)
        value[block] = now
        gradient.addmm_(hessian[:, block], now - before)
    return kept, value
