"""SmoothQuant: the outliers of activations moved into the weights, so that both fit into 8 bits.

    s_j = max|x_j|^α / max|w_j|^(1−α)        x_j: input j over all tokens, w_j: column j over all consumers

The loss of a matrix whose inputs are rounded to 8 bits as x/s, on a static scale or on one of each row, is that of the
weights, from second moments, and that of the inputs, from a sample of them:

    tr(E Ĥ Eᵀ) + Σ over tokens ‖W diag(s) (Q(x/s) − x/s)‖²

The inputs are rounded as they will be, clipping included. The noise that a step as wide as the largest input would
make is a poor stand-in: α near 1 looks best then, and does harm (KL 0.0027 instead of 0.0015 without any scaling on a
model of 42 M, static).

Source: SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmx.models.folded import Floats
from llmx.models.model import Model
from llmx.quant.activations import Quantizer, Sample, by_row, static
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import MatrixInputs
from llmx.quant.protocol import Effort, Grid
from llmx.quant.scale_search import Candidate, Consumer, Grids, Scaling, find_scales, normalized, rounded, weighed
from llmx.quant.statistics import Inputs
from llmx.quant.transforms import ScalePair
from llmx.quant.workers import Workers

EXTREMES, OTHERS = 16, 256  # rows of a sample: those of the largest magnitudes, and others


@dataclass(frozen=True, slots=True)
class SmoothOptions:
    """alphas: the shares of the outliers that are tried; the paper's single 0.5 comes first and wins a tie.

    static: canonical names of the matrices whose inputs get a static scale; the others are rounded by row.
    """

    alphas: tuple[float, ...] = (0.5, *(step / 10 for step in range(11) if step != 5))
    effort: Effort = "fast"
    static: Collection[str] = frozenset()


def search_smooth(
    model: Model, calibration: Calibration, grids: Grids, options: SmoothOptions, workers: Workers
) -> Scaling:
    """SmoothQuant's scales of every pair, from one walk of the float model. grids: of the weights, int8 by channel."""
    return find_scales(model, calibration, Smooth(options), grids, workers)


@dataclass(frozen=True, slots=True)
class Smooth:
    """SmoothQuant as a method of scale_search."""

    options: SmoothOptions = SmoothOptions()
    # Of the pair at hand: rows of a matrix are measured a few at a time, and all of them meet the same inputs.
    _errors: dict[tuple[int, int], tuple[Consumer, Floats | None, torch.Tensor]] = field(default_factory=dict)

    def sample(self, inputs: MatrixInputs) -> Sample | None:
        """Some of the inputs."""
        return sample(inputs.batches())

    def candidates(self, pair: ScalePair, consumers: Sequence[Consumer]) -> list[Candidate]:
        """One for each α."""
        self._errors.clear()
        x = np.max([_largest(pair, _sample(consumer).largest) for consumer in consumers], axis=0).astype(np.float64)
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
        outputs = self._error(consumer, columns) @ torch.from_numpy(weight).T
        noise = float(outputs.square_().sum(dtype=torch.float64)) / float(_sample(consumer).counts.sum())
        return weighed(value - weight, consumer.judged.hessian) + consumer.tokens * noise

    def _error(self, consumer: Consumer, columns: Floats | None) -> torch.Tensor:
        """f32[n, in]: what rounding does to the sample, each row times the root of its count."""
        key = id(consumer), id(columns)
        if key not in self._errors:  # what is kept there keeps its id
            quantizer: Quantizer = static if consumer.name in self.options.static else by_row
            inputs = _sample(consumer)
            given = inputs if columns is None else inputs.divided(columns)
            error = (quantizer(given) - given.rows) * np.sqrt(inputs.counts)
            error = error if columns is None else error * columns
            self._errors[key] = consumer, columns, torch.from_numpy(error)
        return self._errors[key][2]


def sample(batches: Sequence[Inputs]) -> Sample:
    """Of float inputs: the rows of the largest magnitudes stand for themselves, others for their neighbours as well."""
    inputs = torch.cat([batch.float_ for batch in batches])
    order = inputs.abs().amax(1).argsort(descending=True, stable=True)
    extremes, rest = order[:EXTREMES], order[EXTREMES:].sort().values
    others = rest[:: max(1, -(-len(rest) // OTHERS))]
    counts = np.ones((len(extremes) + len(others), 1), np.float32)
    counts[len(extremes) :] = len(rest) / max(1, len(others))
    return Sample(
        inputs[torch.cat([extremes, others])].cpu().numpy(),
        counts,
        inputs.abs().amax(0).cpu().numpy(),
        min(float(inputs.min()), 0.0),
        max(float(inputs.max()), 0.0),
    )


def _sample(consumer: Consumer) -> Sample:
    assert consumer.sample is not None, "SmoothQuant asks for inputs"
    return consumer.sample


def _largest(pair: ScalePair, columns: Floats) -> Floats:
    """f32[channels]: the largest over the columns that read a channel."""
    return columns.reshape(-1, pair.repeat, pair.run).max(1).reshape(-1)
