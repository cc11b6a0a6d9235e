"""SmoothQuant: the outliers of activations moved into the weights, so that both fit into 8 bits.

    s_j = max|x_j|^α / max|w_j|^(1−α)        x_j: input j over all tokens, w_j: column j over all consumers

The loss of a matrix whose inputs x/s are stored with one static step Δ = max_j(max|x_j| / s_j) / 127 is, from second
moments and ranges alone, the rounding of the weights and that of the inputs, taken as noise of variance Δ²/12:

    tr(E Ĥ Eᵀ) + Σ_j min(tokens · Δ²/12, Ĥ_jj / s_j²) · Σ_i (W_ij s_j)²

No input loses more than all of itself, hence the minimum. Source: SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llmx.models.folded import Floats
from llmx.models.model import Model
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import MatrixInputs
from llmx.quant.protocol import Effort, Grid
from llmx.quant.scale_search import Candidate, Consumer, Grids, Scaling, find_scales, normalized, rounded, weighed
from llmx.quant.statistics import Inputs
from llmx.quant.transforms import ScalePair
from llmx.quant.workers import Workers

LEVELS = 127  # of an int8 activation, on either side of 0


@dataclass(frozen=True, slots=True)
class SmoothOptions:
    """alphas: the shares of the outliers that are tried; the paper's single 0.5 comes first and wins a tie."""

    alphas: tuple[float, ...] = (0.5, *(step / 20 for step in range(21) if step != 10))
    effort: Effort = "fast"


def search_smooth(
    model: Model, calibration: Calibration, grids: Grids, options: SmoothOptions, workers: Workers
) -> Scaling:
    """SmoothQuant's scales of every pair, from one walk of the float model. grids: of the weights, int8 by channel."""
    return find_scales(model, calibration, Smooth(options), grids, workers)


@dataclass(frozen=True, slots=True)
class Smooth:
    """SmoothQuant as a method of scale_search."""

    options: SmoothOptions = SmoothOptions()

    def ranges(self, inputs: MatrixInputs) -> Floats | None:
        """f32[in]: the largest |input| of every column over all tokens."""
        return column_ranges(inputs._gather())

    def candidates(self, pair: ScalePair, consumers: Sequence[Consumer]) -> list[Candidate]:
        """One for each α."""
        x = np.max([_largest(pair, _ranges(consumer)) for consumer in consumers], axis=0).astype(np.float64)
        w = np.max([_largest(pair, np.abs(consumer.weight()).max(0)) for consumer in consumers], axis=0)
        alive = (x > 0) & (w > 0)
        x, w = (np.where(alive, part, 1.0) for part in (x, w.astype(np.float64)))
        return [
            Candidate(f"alpha {alpha:.2f}", normalized(x**alpha / w ** (1 - alpha), alive))
            for alpha in self.options.alphas
        ]

    def loss(self, weight: Floats, grid: Grid, consumer: Consumer, columns: Floats | None) -> float:
        """Of some rows with their inputs: see the formula above."""
        value = rounded(weight, grid, columns, None, self.options.effort)
        scales = np.ones(weight.shape[1], np.float32) if columns is None else columns
        step = (_ranges(consumer) / scales).max() / LEVELS
        energy = consumer.judged.hessian.diagonal().cpu().numpy() / (scales * scales)
        noise = np.minimum(consumer.tokens * step * step / 12, energy)
        outputs = np.square(weight * scales, dtype=np.float64).sum(0)
        return weighed(value - weight, consumer.judged.hessian) + float(noise @ outputs)


def column_ranges(batches: Sequence[Inputs]) -> Floats:
    """f32[in]: the largest magnitude of every column of the float inputs."""
    return torch.stack([batch.float_.abs().amax(0) for batch in batches if len(batch.float_)]).amax(0).cpu().numpy()


def _ranges(consumer: Consumer) -> Floats:
    assert consumer.largest is not None, "SmoothQuant asks for ranges"
    return consumer.largest


def _largest(pair: ScalePair, columns: Floats) -> Floats:
    """f32[channels]: the largest over the columns that read a channel."""
    return columns.reshape(-1, pair.repeat, pair.run).max(1).reshape(-1)
