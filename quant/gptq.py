"""GPTQ on any grid: the scales are frozen first, so any order of columns is legal and none is stored.

With the error E = W* − Ŵ of each row judged by E H Eᵀ, columns are rounded one after another, and what each loses is
made up for by those not yet rounded: with H⁻¹ = Uᵀ U (U upper), w_k ← w_k − (w_j − ŵ_j) U_jk / U_jj.

Source: GPTQ, arXiv 2210.17323, algorithm 1; as Babai's nearest plane: 2507.18553.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmx.quant.columns import BLOCK, gptq_block
from llmx.quant.state import Rows
from llmx.quant.workers import spans

Tensor = torch.Tensor
COLUMNS = 1024  # of a factor that are inverted together


@dataclass(frozen=True, slots=True)
class Factor:
    """order: the columns from the heaviest to the lightest; upper: f32[in, in], U of the damped Hessian so ordered."""

    order: Tensor
    upper: Tensor


def damped(hessian: Tensor, share: float) -> Tensor:
    """The Hessian plus `share` of its mean diagonal on the diagonal. A column that saw nothing gets the mean."""
    diagonal = hessian.diagonal()
    mean = diagonal.double().mean().clamp_min(1e-30).float()
    made = hessian.clone()
    made.diagonal().add_(torch.where(diagonal > 0, mean * share, mean))
    return made


def cholesky(hessian: Tensor) -> Tensor | None:
    """The lower factor f64[n, n] of a float32 matrix; None where it is not positive definite."""
    # By columns, as LAPACK has it: so it is made in its own place, without another copy.
    lower = hessian.mT.to(torch.float64, memory_format=torch.contiguous_format).mT
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return None if int(failed) else lower


def factorize(hessian: Tensor) -> Factor | None:
    """U of a damped Hessian in float64, heaviest columns first; None where it is not positive definite."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    # H = V Vᵀ with V upper is the Cholesky factor of H turned round; U = V⁻¹.
    lower = cholesky(hessian[order.flip(0)][:, order.flip(0)])
    if lower is None:
        return None
    upper = lower.flip(0, 1)
    del lower  # of a wide matrix it takes gigabytes
    return Factor(order, _inverse(upper))


def _inverse(upper: Tensor) -> Tensor:
    """f32 of the inverse of an upper triangular f64[n, n], some columns at a time, down to where each ends."""
    found = torch.zeros(upper.shape, device=upper.device)
    for columns in spans(len(upper), COLUMNS):
        last = columns.stop
        ones = torch.zeros(last, last - columns.start, dtype=upper.dtype, device=upper.device)
        ones[columns.start :].fill_diagonal_(1)
        found[:last, columns] = torch.linalg.solve_triangular(upper[:last, :last], ones, upper=True).float()
    return found


def gptq(target: Tensor, factor: Factor, rows: Rows) -> None:
    """Choose the codes of `rows` for target (f32[columns, rows]) on their frozen scales."""
    order = factor.order
    scale, offset = (part[order] for part in rows.columns())
    w = target[order]
    level = torch.empty_like(w)
    for block in spans(len(w), BLOCK):
        upper = factor.upper[block]
        level[block], error = gptq_block(
            w[block].contiguous(), upper[:, block].contiguous(), scale[block], offset[block], rows.levels
        )
        w[block.stop :].addmm_(upper[:, block.stop :].T, error, alpha=-1)
    rows.level = torch.empty_like(level)
    rows.level[order] = level
