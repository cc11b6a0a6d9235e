"""SmoothQuant: the outliers of activations moved into the weights, so that both fit into 8 bits.

    s_j = max|x_j|^α / max|w_j|^(1−α)        x_j: input j over all tokens, w_j: column j over all consumers

The loss is measured on a sample of held-out tokens, inputs and weights rounded as they will be:

    Σ over tokens ‖Ŵ Q(x/s) − W x‖² / ‖W x‖²        Ŵ = Q(W diag(s));  Q(x/s) on a static scale, or on one of each row,
                                                    or x/s as it is

Each part of that was found to matter (KL of a model of 42 M with static scales of all but `down`, 0.00055 unscaled):
noise of a step as wide as the largest input in the place of real rounding, or a range judged on the tokens that it was
measured on, makes α near 1 look best, and 0.00093 is what it gives; tokens that count by their squared errors are few
huge ones, whose errors the next norm divides away (0.00074). As it is here: 0.00053, and by row 0.00042 after 0.00044.

Source: SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmx.models.folded import Floats
from llmx.models.model import Model
from llmx.quant.activations import QUANTIZERS, Rounding, Sample, Samples
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import MatrixInputs
from llmx.quant.protocol import Effort, Grid
from llmx.quant.scale_search import Candidate, Consumer, Grids, Scaling, find_scales, normalized, rounded
from llmx.quant.statistics import Inputs, those
from llmx.quant.transforms import ScalePair
from llmx.quant.workers import Workers

EXTREMES, OTHERS = 16, 256  # rows of a sample: those of the largest magnitudes, and others
TINY = 1e-30  # the least energy of a row's outputs


@dataclass(frozen=True, slots=True)
class SmoothOptions:
    """alphas: the shares of the outliers that are tried; the paper's single 0.5 comes first and wins a tie.

    inputs: canonical name -> how that matrix's inputs are rounded; the others are rounded by row.
    """

    alphas: tuple[float, ...] = (0.5, *(step / 10 for step in range(11) if step != 5))
    effort: Effort = "fast"
    inputs: Mapping[str, Rounding] = field(default_factory=dict)


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
    _met: dict[tuple[int, int], _Met] = field(default_factory=dict)

    def sample(self, inputs: MatrixInputs) -> Samples | None:
        """Some of the inputs."""
        return samples(inputs.batches())

    def candidates(self, pair: ScalePair, consumers: Sequence[Consumer]) -> list[Candidate]:
        """One for each α."""
        self._met.clear()
        largest = [_samples(consumer).fitted.largest for consumer in consumers]
        x = np.max([_largest(pair, columns) for columns in largest], axis=0).astype(np.float64)
        w = np.max([_largest(pair, np.abs(consumer.weight()).max(0)) for consumer in consumers], axis=0)
        alive = (x > 0) & (w > 0)
        x, w = (np.where(alive, part, 1.0) for part in (x, w.astype(np.float64)))
        return [
            Candidate(f"alpha {alpha:.2f}", normalized(x**alpha / w ** (1 - alpha), alive))
            for alpha in self.options.alphas
        ]

    def loss(self, weight: Floats, grid: Grid, consumer: Consumer, columns: Floats | None) -> float:
        """Of some rows with their inputs: see the formula above."""
        value = torch.from_numpy(rounded(weight, grid, columns, None, self.options.effort))
        met = self._inputs(consumer, columns)
        error = met.rounded @ value.T - met.exact @ torch.from_numpy(weight).T
        return consumer.tokens * float(error.square_().sum(dtype=torch.float64))

    def _inputs(self, consumer: Consumer, columns: Floats | None) -> _Met:
        key = id(consumer), id(columns)
        if key not in self._met:  # what is kept there keeps its id
            inputs = _samples(consumer)
            found = QUANTIZERS[self.options.inputs.get(consumer.name, "by row")](
                inputs if columns is None else inputs.divided(columns)
            )
            found = found if columns is None else found * columns
            roots = torch.from_numpy(_shares(consumer.weight(), inputs.judged)).sqrt_()
            exact = torch.from_numpy(inputs.judged.rows) * roots
            self._met[key] = _Met(consumer, columns, exact, torch.from_numpy(found) * roots)
        return self._met[key]


@dataclass(frozen=True, slots=True)
class _Met:
    """The judged inputs of a consumer under some scaling, f32[n, in], each row times the root of its share."""

    consumer: Consumer
    columns: Floats | None
    exact: torch.Tensor
    rounded: torch.Tensor


def _shares(weight: Floats, judged: Sample) -> Floats:
    """f32[n, 1]: what an error counts in each row, so that errors as large as the outputs sum to their mean energy."""
    outputs = torch.from_numpy(judged.rows) @ torch.from_numpy(weight).T
    energy = outputs.square_().sum(1, keepdim=True).double().clamp_min_(TINY).numpy()
    counts = judged.counts / judged.counts.sum(dtype=np.float64)
    return (counts / energy * (counts * energy).sum()).astype(np.float32)


def samples(batches: Sequence[Inputs]) -> Samples:
    """Of the fitted batches, and of those held out; where none is, the same."""
    fitted = sample(those(batches, False) or batches)
    judged = those(batches, True)
    return Samples(fitted, sample(judged) if judged else fitted)


def sample(batches: Sequence[Inputs], others: int = OTHERS) -> Sample:
    """Of float inputs: the rows of the largest magnitudes stand for themselves, others for their neighbours as well.

    others: at most about how many of these there are.
    """
    rows, columns, ends = zip(*(_extent(batch.float_) for batch in batches if len(batch.float_)), strict=True)
    order = torch.cat(rows).argsort(descending=True, stable=True)
    extremes, rest = order[:EXTREMES], order[EXTREMES:].sort().values
    spread = rest[:: max(1, -(-len(rest) // others))]
    counts = np.ones((len(extremes) + len(spread), 1), np.float32)
    counts[len(extremes) :] = len(rest) / max(1, len(spread))
    return Sample(
        _taken(batches, torch.cat([extremes, spread])).cpu().numpy(),
        counts,
        torch.stack(columns).amax(0).cpu().numpy(),
        min(*(low for low, _ in ends), 0.0),
        max(*(high for _, high in ends), 0.0),
    )


def _extent(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """The largest magnitude of every row and of every column; the smallest value and the largest."""
    sizes = inputs.abs()
    return sizes.amax(1), sizes.amax(0), (float(inputs.min()), float(inputs.max()))


def _taken(batches: Sequence[Inputs], rows: torch.Tensor) -> torch.Tensor:
    """f32[rows, in]: these rows of all batches' float inputs, one batch in memory at a time."""
    places, found, first = [], [], 0
    for batch in batches:
        own = torch.where((rows >= first) & (rows < first + len(batch.float_)))[0]
        places.append(own)
        found.append(batch.float_[rows[own] - first])
        first += len(batch.float_)
    return torch.cat(found)[torch.cat(places).argsort()]


def _samples(consumer: Consumer) -> Samples:
    assert consumer.sample is not None, "SmoothQuant asks for inputs"
    return consumer.sample


def _largest(pair: ScalePair, columns: Floats) -> Floats:
    """f32[channels]: the largest over the columns that read a channel."""
    return columns.reshape(-1, pair.repeat, pair.run).max(1).reshape(-1)
