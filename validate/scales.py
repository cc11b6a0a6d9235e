"""The scales that a scaled artifact has in its channels, found again by comparing it with its checkpoint.

AWQ divides a channel where it is made and multiplies it where it is read (see quant/transforms.py):

    norm gain / s   →  columns of q, k, v, gate, up · s      the ratio of the gains is s, to the last bit
    rows of v / s   →  columns of o · s                      s by least squares over a row, or over a column;
    rows of up / s  →  columns of down · s                   the ratio of the biases where there are any

With the scales folded into it, the checkpoint is what the artifact was rounded from, and each tensor can be compared
as in any other file. A fault must not spoil the scale that it is judged by: where the consumers of a norm agree on
another scale than the gain says, theirs is taken; of a row and a column that tell the same scale, the one that is more
like its source. Where all channels are off by one factor, it is in the tensor whose scales are not as the search leaves
them, √(largest · smallest) = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np

from llmx.models.folded import NORM_ROLES, Floats, FoldedModel
from llmx.models.model import Model
from llmx.quant.transforms import Folds, ScalePair, pairs

SMALLEST, LARGEST = 1e-4, 1e4  # a scale beyond these was not searched but comes from a fault
DISAGREEMENT = 0.1  # of the logarithm of a scale, beyond three times what the consumers' own differ by
ALIKE = 0.5  # a cosine above it: of the same channels, however coarsely rounded
FACTOR = 0.025  # of the logarithm: a factor of all channels that is not in the fit's noise
ROWS = 512  # of a matrix compared at once


@dataclass(frozen=True, slots=True)
class Fit:
    """Of every channel: the factor that takes the source to the artifact, and how alike the two are (a cosine)."""

    gain: Floats
    likeness: Floats


def with_scales_of(model: Model, restored: Model) -> FoldedModel:
    """The model with the artifact's scales folded in; those of a file that has none are one, up to its rounding.

    restored: the artifact's weights. Memory: a piece of one matrix.
    """
    found = pairs(model.architecture)
    producers = {pair.producer for pair in found}
    norms = {pair: _norm_scales(model, restored, pair, producers) for pair in found if _is_norm(model, pair)}
    folded = Folds(norms).applied(model)
    matrices = {pair: _matrix_scales(folded, restored, pair) for pair in found if pair not in norms}
    return Folds({**norms, **matrices}).applied(model)


def _is_norm(model: Model, pair: ScalePair) -> bool:
    return model.weight(f"{pair.producer}.weight").spec.role in NORM_ROLES


def _norm_scales(model: Model, restored: Model, pair: ScalePair, producers: Set[str]) -> Floats:
    """f32[channels]: what the gain says, or its consumers where they agree on something else."""
    told = _ratio(model, restored, f"{pair.producer}.weight", model.architecture.norm_offset)
    seen, apart = [], []
    for consumer in pair.consumers:
        matrix, rows = f"{consumer}.weight", None
        if consumer in producers:  # its rows have scales of their own: it cannot tell a factor of all channels
            rows = _usable(_fits(model, restored, matrix, columns=told)[0].gain)
        _, columns = _fits(model, restored, matrix, rows=rows)
        if np.median(columns.likeness) < ALIKE:  # it is another matrix, and tells nothing
            continue
        logarithms = np.log(_usable(columns.gain.reshape(-1, len(told)).mean(0)))
        (seen if rows is None else apart).append(logarithms)
    if len(seen) + len(apart) < 2:
        return told
    common = np.mean(seen, axis=0) if seen else np.log(told)
    seen += [logarithms - np.median(logarithms - common) for logarithms in apart]
    middle = np.median(seen, axis=0)
    # Of the consumers' own factors the smallest: a damaged consumer is off alone, a damaged gain is off beside all.
    factor = min((float(np.median(one - np.log(told))) for one in seen), key=abs)
    if abs(factor) > FACTOR and _off_centre(np.log(told)) > _off_centre(middle):
        told = told * np.float32(np.exp(factor))
    doubted = np.abs(middle - np.log(told)) > DISAGREEMENT + 3 * np.ptp(seen, axis=0)
    return np.where(doubted, np.exp(middle), told).astype(np.float32)


def _matrix_scales(model: Model, restored: Model, pair: ScalePair) -> Floats:
    """f32[channels] or f32[experts, channels]: from the producer's rows or the consumer's columns."""
    made, _ = _fits(model, restored, f"{pair.producer}.weight")
    (consumer,) = pair.consumers
    _, read = _fits(model, restored, f"{consumer}.weight")
    columns = Fit(pair.channels(read.gain), pair.channels(read.likeness))
    with np.errstate(divide="ignore"):
        of_rows = np.log(_usable(1 / made.gain)).reshape(columns.gain.shape)
    of_columns = np.log(_usable(columns.gain))
    for expert, (one, other) in enumerate(zip(of_rows, of_columns, strict=True)):
        factor = float(np.median(one - other))
        if abs(factor) > FACTOR and _off_centre(one) > _off_centre(other):
            of_rows[expert] -= factor
        elif abs(factor) > FACTOR:
            of_columns[expert] += factor
    # Where both are like their sources and still tell two scales, a damage is along a row: so blocks are stored.
    apart = (np.abs(of_rows - of_columns) > DISAGREEMENT) & (columns.likeness > ALIKE)
    likely = made.likeness.reshape(columns.likeness.shape) >= columns.likeness
    found = np.where(likely & ~apart, of_rows, of_columns)
    if model.has(f"{pair.producer}.bias"):  # a float, divided by the same scale: it tells it exactly
        told = np.log(_ratio(model, restored, f"{pair.producer}.bias", 0.0))[None]
        found = np.where(np.abs(told - of_rows) < DISAGREEMENT, told, found)
    return np.exp(found).astype(np.float32).reshape(pair.shape)


def _ratio(model: Model, restored: Model, name: str, offset: float) -> Floats:
    """f32[channels]: source over artifact of a vector, each plus the offset."""
    source, artifact = (part.weight(name).read()[0] + np.float32(offset) for part in (model, restored))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _usable(source / artifact)


def _off_centre(logarithms: np.ndarray) -> float:
    """How far the scales are from √(largest · smallest) = 1."""
    return float(abs(logarithms.max() + logarithms.min()) / 2)


def _fits(
    model: Model, restored: Model, name: str, *, rows: Floats | None = None, columns: Floats | None = None
) -> tuple[Fit, Fit]:
    """The fits of a matrix's rows f32[rows] and of its columns f32[experts, in].

    rows, columns: scales that the source is multiplied by before.
    """
    source, artifact = model.weight(name), restored.weight(name)
    matrix = source.spec.shape[-2]  # rows of one expert, or of all
    of_rows = np.zeros((3, source.rows))
    of_columns = np.zeros((3, source.rows // matrix, source.cols))
    for start, stop in _within_experts(source.rows, matrix):
        a = source.read(start, stop)
        b = np.nan_to_num(artifact.read(start, stop), posinf=0, neginf=0)
        a = a if rows is None else a * rows[start:stop, None]
        a = a if columns is None else a * columns
        for index, product in enumerate((a * b, a * a, b * b)):
            of_rows[index, start:stop] = product.sum(1, dtype=np.float64)
            of_columns[index, start // matrix] += product.sum(0, dtype=np.float64)
    source.release()
    return _fit(*of_rows), _fit(*of_columns)


def _within_experts(rows: int, matrix: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ROWS rows of one expert."""
    for first in range(0, rows, matrix):
        for start in range(first, first + matrix, ROWS):
            yield start, min(start + ROWS, first + matrix)


def _fit(product: np.ndarray, source: np.ndarray, artifact: np.ndarray) -> Fit:
    with np.errstate(divide="ignore", invalid="ignore"):
        gain, likeness = product / source, product / np.sqrt(source * artifact)
    return Fit(gain.astype(np.float32), np.nan_to_num(likeness).astype(np.float32))


def _usable(scales: np.ndarray) -> Floats:
    """The scales as f32; one for those that no search can have chosen, of a channel that is zero or damaged."""
    within = np.isfinite(scales) & (scales >= SMALLEST) & (scales <= LARGEST)
    return np.where(within, scales, 1).astype(np.float32)
