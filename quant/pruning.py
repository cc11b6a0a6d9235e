"""One matrix made sparse: which weights stay, and what they become, judged on held-out tokens.

    magnitude   the largest |w| stay as they are
    wanda       the largest |w| ‖x‖ stay as they are                      arXiv 2306.11695, as published
    sparsegpt   the target that also repairs what earlier layers lost, eliminated, settled, exchanged (quant/sparse.py)

The first two move nothing. Of sparsegpt and wanda the better on held-out tokens is kept, by matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llmx.quant.gptq import damped
from llmx.quant.solve import Prepared, SolveOptions, loss, parts_of, target
from llmx.quant.sparse import STEPS, Order, Pruned, eliminate, exchange, ordered, settle
from llmx.quant.sparsity import Pattern, largest_kept
from llmx.quant.statistics import Statistics
from llmx.quant.workers import Workers

Tensor = torch.Tensor
Masked = tuple[Tensor, Tensor]  # kept bool, value f32, [out, in] each
LAST_STEPS = 20  # of conjugate gradients

# method of a recipe -> what is tried
CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "magnitude": ("magnitude",),
    "wanda": ("wanda",),
    "sparsegpt": ("wanda", "sparsegpt"),
}


@dataclass(frozen=True, slots=True)
class _Task:
    """What all rows of a matrix share."""

    weight: Tensor
    wanted: Tensor
    hessian: Tensor
    known: Statistics
    order: Order | None
    pattern: Pattern
    exchanges: int


def prune(
    weight: Tensor, prepared: Prepared, pattern: Pattern, method: str, options: SolveOptions, workers: Workers
) -> Pruned:
    """The best sparse matrix for weight (f32[out, in]) among what `method` tries."""
    started, names = time.monotonic(), CANDIDATES[method]
    known, wanted, share, order, hessian = prepared.statistics, weight, 0.0, None, prepared.statistics.fitted.hessian
    repairs = "sparsegpt" in names
    if repairs:
        wanted, share, _ = target(weight, prepared, options.shares, workers)
        hessian = damped(hessian, share)
        order = ordered(hessian, pattern)
        names = names if order is not None else tuple(name for name in names if name != "sparsegpt")
    task = _Task(weight, wanted, hessian, known, order, pattern, options.exchanges)

    def made(part: slice) -> list[tuple[Masked, float]]:
        pull = known.held_out.pull(weight, part) if repairs else None
        results = [METHODS[name](task, part) for name in names]
        return [(found, loss(weight[part], found[1], known.held_out, pull)) for found in results]

    here, parts = workers.on(weight.device), parts_of(weight)
    found = here.map(made, parts)
    judge = known.held_out.hessian
    energy = sum(here.map(lambda part: float((weight[part] @ judge * weight[part]).sum()), parts)) or 1.0
    losses = {name: sum(part[number][1] for part in found) / energy for number, name in enumerate(names)}
    best = min(losses, key=lambda name: losses[name])
    kept, value = (torch.cat(pieces) for pieces in zip(*(part[names.index(best)][0] for part in found), strict=True))
    return Pruned(value, kept, best, share, losses[best], losses, time.monotonic() - started)


def _largest(weight: Tensor, scores: Tensor, pattern: Pattern) -> Masked:
    kept = torch.from_numpy(largest_kept(scores.cpu().numpy(), pattern)).to(weight.device)
    return kept, torch.where(kept, weight, 0.0)


def _magnitude(task: _Task, part: slice) -> Masked:
    own = task.weight[part]
    return _largest(own, own.abs(), task.pattern)


def _wanda(task: _Task, part: slice) -> Masked:
    own = task.weight[part]
    return _largest(own, own.abs() * task.known.fitted.hessian.diagonal().clamp_min(0).sqrt(), task.pattern)


def _sparsegpt(task: _Task, part: slice) -> Masked:
    assert task.order is not None, "without an inverse of the Hessian it is no candidate"
    sideways, pattern = task.wanted[part].T.contiguous(), task.pattern
    kept, value = eliminate(sideways, task.order, pattern)
    value = settle(value, sideways, task.hessian, kept, STEPS)
    for _ in range(task.exchanges):
        kept, value = exchange(kept, value, sideways, task.hessian, task.order, pattern)
    value = settle(value, sideways, task.hessian, kept, LAST_STEPS)
    return kept.T.contiguous(), value.T.contiguous()


METHODS: Mapping[str, Callable[[_Task, slice], Masked]] = {
    "magnitude": _magnitude,
    "wanda": _wanda,
    "sparsegpt": _sparsegpt,
}
