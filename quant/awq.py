"""AWQ: channels with large inputs get larger weights, so that rounding hurts them less; then clipping, group by group.

    s_j = x_j^α / w_j^β      x_j: root mean square of input j, w_j: mean |weight| of column j as a share of its group's
                             largest; β = 0 and β = 1 − α, α in 20 steps; √(max s · min s) = 1

Source: AWQ, arXiv 2306.00978, equations 4 and 5; the variant with weights is AutoAWQ's "duo scaling". Here the loss is
exact, from second moments of held-out tokens, where AWQ samples outputs; and x is a root mean square, which the moments
give, where AWQ has a mean of magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmx.models.architecture import Role
from llmx.models.folded import Floats
from llmx.models.model import Model
from llmx.quant.activations import Samples
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import MatrixInputs
from llmx.quant.protocol import Effort, Grid
from llmx.quant.scale_search import (
    Candidate,
    Consumer,
    Grids,
    Scaling,
    find_scales,
    normalized,
    rounded,
    weighed,
)
from llmx.quant.statistics import Statistics
from llmx.quant.transforms import ScalePair
from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
UNCLIPPED: frozenset[Role] = frozenset({"q", "k"})  # their product's error is no sum over groups, AWQ says
SHRINKS = tuple(1 - step / 40 for step in range(20))  # of a group's largest weight; AWQ has every other one
CLIP_ROWS = 64


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """steps: values of α tried. importance: scales are fitted with mean squared inputs. effort: of every fit tried."""

    steps: int = 20
    importance: bool = True
    effort: Effort = "fast"


def search_awq(model: Model, calibration: Calibration, grids: Grids, options: AwqOptions, workers: Workers) -> Scaling:
    """AWQ's scales of every pair, from one walk of the float model. grids: what each matrix will be quantized on."""
    return find_scales(model, calibration, Awq(options), grids, workers)


@dataclass(frozen=True, slots=True)
class Awq:
    """AWQ as a method of scale_search."""

    options: AwqOptions = AwqOptions()

    def sample(self, inputs: MatrixInputs) -> Samples | None:
        """None: second moments tell all that AWQ asks for."""
        return None

    def candidates(self, pair: ScalePair, consumers: Sequence[Consumer]) -> list[Candidate]:
        """Both variants at every α but 0, where the first is no scaling."""
        x = np.sqrt(sum(pair.channels(consumer.squares.astype(np.float64)) for consumer in consumers))
        w = pair.channels(_shares(consumers))
        alive = (x > 0) & (w > 0)
        x, w = (np.where(alive, part, 1.0) for part in (x, w))
        found = []
        for alpha in np.arange(self.options.steps) / self.options.steps:
            found += [Candidate(f"alpha {alpha:.2f}", normalized(x**alpha, alive))] if alpha else []
            found.append(Candidate(f"alpha {alpha:.2f} with weights", normalized(x**alpha / w ** (1 - alpha), alive)))
        return found

    def loss(self, weight: Floats, grid: Grid, consumer: Consumer, columns: Floats | None) -> float:
        """tr(E Ĥ Eᵀ), E = Q(W diag(s)) diag(1/s) − W."""
        importance = consumer.squares if self.options.importance and consumer.squares.any() else None
        value = rounded(weight, grid, columns, importance, self.options.effort)
        return weighed(value - weight, consumer.judged.hessian)


def _shares(consumers: Sequence[Consumer]) -> np.ndarray:
    """f64[in]: mean over all rows of |weight| as a share of the largest in its group."""
    total, rows = 0.0, 0
    for consumer in consumers:
        size = np.abs(consumer.weight())
        groups = size.reshape(len(size), -1, consumer.grid.size)
        largest = groups.max(-1, keepdims=True)
        shares = np.divide(groups, largest, out=np.zeros_like(groups), where=largest > 0)
        total = total + shares.reshape(size.shape).sum(0, dtype=np.float64)
        rows += len(size)
    return np.asarray(total / rows)


def integer_groups(grid: Grid) -> bool:
    """Whether the levels are whole numbers, evenly spaced, under one float scale a group: what clipping is for."""
    return grid.size == grid.weights and bool((np.diff(grid.levels) == 1).all())


def clip_limits(
    role: Role, weight: Tensor, found: Statistics, grid: Grid, options: AwqOptions, workers: Workers
) -> Tensor | None:
    """f32[out, groups]: the magnitude at which each group of weight (f32[out, in]) is best cut before it is rounded.

    Each group's is chosen on the fitted tokens by tr(e Ĥ_group eᵀ); a row's are kept where they lower its loss on the
    held-out tokens. Infinity cuts nothing. None for roles and grids that are not clipped.
    """
    if role in UNCLIPPED or not integer_groups(grid):
        return None
    diagonal = found.fitted.hessian.diagonal().cpu().numpy()
    importance = diagonal if options.importance and diagonal.any() else None
    rows = weight.cpu().numpy()

    def limits_of(part: slice) -> Floats:
        return _limits(rows[part], found, grid, importance, options.effort)

    parts = workers.map(limits_of, spans(len(rows), CLIP_ROWS))
    return torch.from_numpy(np.concatenate(parts)).to(weight.device)


def _limits(rows: Floats, found: Statistics, grid: Grid, importance: Floats | None, effort: Effort) -> Floats:
    groups = rows.reshape(len(rows), -1, grid.size)
    largest = np.abs(groups).max(-1)
    blocks = _blocks(found.fitted.hessian, grid.size)
    kept, least = np.full(largest.shape, np.inf, np.float32), np.full(largest.shape, np.inf)
    plain = values = rounded(rows, grid, None, importance, effort)
    for shrink in SHRINKS:
        limit = np.float32(shrink) * largest
        cut = np.clip(groups, -limit[..., None], limit[..., None]).reshape(rows.shape)
        value = plain if shrink == 1 else rounded(cut, grid, None, importance, effort)
        error = (value - rows).reshape(groups.shape).swapaxes(0, 1)
        lost = np.einsum("grs,grs->rg", error @ blocks, error)
        better = lost < least
        least[better] = lost[better]
        if shrink < 1:
            kept[better] = limit[better]
            values = np.where(better[..., None], value.reshape(groups.shape), values.reshape(groups.shape))
    kept[_row_losses(values.reshape(rows.shape) - rows, found) >= _row_losses(plain - rows, found)] = np.inf
    return kept


def _blocks(hessian: Tensor, size: int) -> Floats:
    """f32[groups, size, size] on the diagonal."""
    count = len(hessian) // size
    blocks = hessian.reshape(count, size, count, size).diagonal(dim1=0, dim2=2)
    return np.ascontiguousarray(blocks.permute(2, 0, 1).cpu().numpy())


def _row_losses(error: Floats, found: Statistics) -> np.ndarray:
    """f32[n]: e Ĥ eᵀ of each row on the held-out tokens."""
    rows = torch.from_numpy(error).to(found.held_out.hessian.device)
    return (rows @ found.held_out.hessian * rows).sum(1).cpu().numpy()
