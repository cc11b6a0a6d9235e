"""Looking for the scales of every pair during one walk of the float model, one layer's statistics in memory at a time.

Walk:      each matrix is read and left as it is; its statistics wait until all consumers of its pair have been seen
Candidate: scales for the pair's channels, as the method (AWQ, SmoothQuant) proposes them
Loss:      Σ over consumers of tr(E Ĥ Eᵀ) on held-out tokens, E = Q(W diag(s)) diag(1/s) − W
Choice:    the least loss; no scaling at all is a candidate too, so the loss never rises

Rows of a producer are divided, rows of a matrix are quantized apart: no pair changes what another one finds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llmx.models.architecture import Architecture, Role
from llmx.models.folded import Floats
from llmx.models.model import Model, Weight
from llmx.quant.activations import Samples
from llmx.quant.calibrate import Calibration, walk
from llmx.quant.inputs import MatrixInputs
from llmx.quant.protocol import Effort, Grid
from llmx.quant.statistics import Moments, Statistics
from llmx.quant.transforms import Folds, ScalePair, pairs
from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
Grids = Mapping[str, Grid]  # canonical name -> the grid that the matrix will be quantized on; others stay float
ROWS = 128  # measured together: their arrays stay in a core's cache
SAMPLE, LEAST_ROWS = 512, 32  # rows that candidates are ranked on: of all of a pair's matrices, of each one
FINALISTS = 3  # candidates that are measured on all rows
LIMIT = 2.0**12  # of a scale: far more than any outlier asks for, far less than what a float16 gain cannot hold
UNSEEN: frozenset[Role] = frozenset({"router"})  # consumers that no solver is shown: they stay float


@dataclass(frozen=True, slots=True)
class Consumer:
    """A matrix of a pair, or one expert of a stacked one. name: canonical.

    weight: gives f32[out, in]. squares: f32[in], the sum of squared inputs over the fitted tokens. judged: the moments
    that losses are measured on; tokens: their count, each as much as its error weighs. sample: of the inputs, where the
    method asks for it.
    """

    name: str
    weight: Callable[[], Floats]
    grid: Grid
    squares: Floats
    judged: Moments
    tokens: float
    sample: Samples | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """scales: f32[channels], positive and finite. label: what made them, as the report says it."""

    label: str
    scales: Floats


class Method(Protocol):
    """Which scales are tried, and what they are judged by."""

    def sample(self, inputs: MatrixInputs) -> Samples | None:
        """Some of the inputs, for methods that need them."""
        ...

    def candidates(self, pair: ScalePair, consumers: Sequence[Consumer]) -> list[Candidate]: ...

    def loss(self, weight: Floats, grid: Grid, consumer: Consumer, columns: Floats | None) -> float:
        """The squared error of the outputs of some rows f32[n, in], their columns scaled, summed over judged tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found for a pair, or for one expert of it. before, after: loss as a share of the outputs' energy.

    label: None where no candidate was better than no scaling.
    """

    pair: ScalePair
    expert: int | None
    label: str | None
    before: float
    after: float

    def line(self) -> str:
        """ "layers.3.v -> o: alpha 0.45, 0.0123 -> 0.0101"."""
        where = self.pair.name if self.expert is None else f"{self.pair.name}, expert {self.expert}"
        return f"{where}: {self.label or 'no scaling'}, {self.before:.3g} -> {self.after:.3g}"


@dataclass(frozen=True, slots=True)
class Scaling:
    """folds: the scales that lower the loss. choices: one a pair (one an expert), in the order of the walk."""

    folds: Folds
    choices: tuple[Choice, ...]

    @property
    def left_alone(self) -> int:
        """Choices that kept the model as it is, because no scales were better."""
        return sum(choice.label is None for choice in self.choices)


def find_scales(model: Model, calibration: Calibration, method: Method, grids: Grids, workers: Workers) -> Scaling:
    """Walk the float model once and choose the scales of every pair.

    A store of statistics is not used: those of a walk that quantizes are different ones.
    """
    search = ScaleSearch(model.architecture, method, grids, workers)
    walk(model, replace(calibration, store=None), search, workers)
    return search.found()


Key = tuple[ScalePair, int | None]  # the expert where each has its own scales


class ScaleSearch:
    """A calibrate.Solver that quantizes nothing and chooses scales once all consumers of a pair have been seen."""

    def __init__(self, architecture: Architecture, method: Method, grids: Grids, workers: Workers) -> None:
        self._method, self._grids, self._workers = method, grids, workers
        self._pair_of = {f"{name}.weight": pair for pair in pairs(architecture) for name in pair.consumers}
        self._due: dict[Key, int] = {}
        for spec in architecture.tensors:
            pair = self._pair_of.get(spec.name)
            if pair is not None and spec.role not in UNSEEN:
                for expert in range(spec.shape[0]) if len(spec.shape) == 3 else (None,):
                    key = _key(pair, expert)
                    self._due[key] = self._due.get(key, 0) + 1
        self._waiting: dict[Key, list[Consumer]] = {}
        self._sampled: tuple[str, Samples | None] | None = None  # of the newest inputs, which several matrices share
        self._scales: dict[ScalePair, Floats] = {}
        self._choices: list[Choice] = []

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> Tensor | None:
        """Note the matrix; where it is the last one of its pair, choose the pair's scales. It stays float."""
        pair = self._pair_of.get(weight.spec.name)
        if pair is None:
            return None
        key = _key(pair, expert)
        grid = self._grids.get(weight.spec.name)
        if grid is not None:
            self._waiting.setdefault(key, []).append(self._consumer(weight, expert, inputs, grid))
        self._due[key] -= 1
        if self._due[key] == 0:
            self._choose(key, self._waiting.pop(key, []))
        return None

    def table(self, weight: Weight) -> Tensor | None:
        """Nothing: the embedding stays float."""
        return None

    def found(self) -> Scaling:
        """What has been chosen so far."""
        return Scaling(Folds(dict(self._scales)), tuple(self._choices))

    def _consumer(self, weight: Weight, expert: int | None, inputs: MatrixInputs, grid: Grid) -> Consumer:
        out = weight.spec.shape[-2]
        first = 0 if expert is None else expert * out

        def read() -> Floats:
            rows = weight.read(first, first + out)
            weight.release(first, first + out)
            return rows

        if self._sampled is None or self._sampled[0] != inputs.key:  # statistics let the inputs themselves go
            self._sampled = inputs.key, self._method.sample(inputs)
        known = inputs.statistics()
        squares = known.fitted.hessian.diagonal().cpu().numpy().copy()
        return Consumer(weight.spec.name, read, grid, squares, known.held_out, _tokens(known), self._sampled[1])

    def _choose(self, key: Key, consumers: Sequence[Consumer]) -> None:
        if not consumers:
            return
        pair, expert = key
        candidate, choice = choose(pair, expert, consumers, self._method, self._workers)
        self._choices.append(choice)
        if candidate is not None:
            scales = self._scales.setdefault(pair, np.ones(pair.shape, np.float32))
            scales[... if expert is None else expert] = candidate.scales


def _tokens(known: Statistics) -> float:
    """The held-out tokens; where errors are weighted (a router's shares), times the mean weight of all."""
    sets = (known.fitted,) if known.held_out is known.fitted else (known.fitted, known.held_out)
    weighted = sum(float(part.hessian.diagonal().sum(dtype=torch.float64)) for part in sets)
    return known.held_out.tokens * weighted / (float(known.squares.sum(dtype=torch.float64)) or 1.0)


def _key(pair: ScalePair, expert: int | None) -> Key:
    return pair, expert if len(pair.shape) > 1 else None


def choose(
    pair: ScalePair, expert: int | None, consumers: Sequence[Consumer], method: Method, workers: Workers
) -> tuple[Candidate | None, Choice]:
    """The candidate of least loss, None where none is better than no scaling; and the line of the report.

    All candidates are ranked on a sample of the rows; the first few are measured on all.
    """
    candidates = method.candidates(pair, consumers)
    columns = [None, *(pair.columns(candidate.scales) for candidate in candidates)]
    ranked, _ = _losses(consumers, columns, method, workers, max(LEAST_ROWS, SAMPLE // len(consumers)))
    finalists = [0, *(np.argsort(ranked[1:], kind="stable")[:FINALISTS] + 1)]
    losses, energy = _losses(consumers, [columns[n] for n in finalists], method, workers, None)
    best = int(np.nanargmin(losses))
    candidate = candidates[finalists[best] - 1] if best else None
    before, after = (float(losses[n]) / (energy or 1.0) for n in (0, best))
    return candidate, Choice(pair, expert, candidate.label if candidate else None, before, after)


def _losses(
    consumers: Sequence[Consumer],
    columns: Sequence[Floats | None],
    method: Method,
    workers: Workers,
    sample: int | None,
) -> tuple[np.ndarray, float]:
    """(f64[columns], energy): the loss under each scaling and tr(W Ĥ Wᵀ), over all or about `sample` rows of each."""
    total, energy = np.zeros(len(columns)), 0.0
    for consumer in consumers:
        weight = consumer.weight()
        grids = [consumer.grid.bound(weight if scales is None else weight * scales) for scales in columns]
        rows = weight if sample is None else weight[:: -(-len(weight) // sample)]

        def measured(part: slice, rows: Floats = rows, consumer: Consumer = consumer, grids: list[Grid] = grids):
            some = rows[part]
            found = [method.loss(some, grid, consumer, scales) for grid, scales in zip(grids, columns, strict=True)]
            return np.array(found), weighed(some, consumer.judged.hessian)

        for losses, outputs in workers.map(measured, spans(len(rows), ROWS)):
            total += losses
            energy += outputs
    return total, energy


def weighed(error: Floats, hessian: Tensor) -> float:
    """tr(E H Eᵀ) of f32[n, in]."""
    rows = torch.from_numpy(error).to(hessian.device)
    return float((rows @ hessian * rows).sum(dtype=torch.float64))


def rounded(weight: Floats, grid: Grid, columns: Floats | None, importance: Floats | None, effort: Effort) -> Floats:
    """f32[n, in]: what the grid makes of the rows with scaled columns, the scales divided out again.

    importance: f32[in], the mean squares of the inputs as they are, or None.
    """
    scaled = weight if columns is None else weight * columns
    if importance is not None and columns is not None:
        importance = np.divide(importance, columns * columns, dtype=np.float32)
    scales = grid.fit(scaled, importance, effort)
    value = grid.decode(scales, grid.round(scaled, scales)).reshape(weight.shape)
    return value if columns is None else value / columns


def normalized(scales: NDArray[np.floating], alive: NDArray[np.bool_]) -> Floats:
    """f32[channels]: scales with √(largest · smallest) = 1, within LIMIT; 1 for channels that are not alive."""
    if not alive.any():
        return np.ones(scales.shape, np.float32)
    middle = np.sqrt(scales[alive].max() * scales[alive].min())
    return np.where(alive, np.clip(scales / middle, 1 / LIMIT, LIMIT), 1.0).astype(np.float32)
