"""How one stored tensor lies beside its source: the figures by which a damaged one is told from a quantized one.

Every figure is a ratio to what is usual, so that types and sizes can be compared. What is usual is measured on the
source itself: it is rounded once more, to the artifact's own type, and the error of that stands beside the artifact's,
for the whole tensor, for every row, every column and every block.

    size      error / error of rounding                                  noise, coarser types, other tensors
    gain      |slope of decoded over source - 1| less rms², which rounding takes,
              / error of rounding                                        a scaled tensor
    bias      |mean error| / root mean square error                      shifted zero points and minimums
    row, column, block     the worst one's error / rounding's there / size           local damage
    tails     fourth over squared second moment of the worst block's errors            flipped bits
    unlike    the cosine with its source of the median row less that of the worst      rows of zeros, other rows
    steps     the largest error in steps of the grid / size              flipped bits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmx.errors import LlmxError
from llmx.exporters.encoding import encoding
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.sparsity import SPARSITY_KEY
from llmx.models.model import Model
from llmx.validate.kinds import Container, kind_of
from llmx.validate.steps import block_weights, decode_with_error
from llmx.validate.type_errors import PRUNED_RMS, USUAL_RMS

FLOAT_BLOCK = 32  # weights looked at together in a type that has no blocks
SHRINKING = 0.15  # the most by which rounding makes a tensor smaller
EXACT = 1e-6  # of a weight: float32 arithmetic on the way, which no type's error is below


@dataclass(frozen=True, slots=True)
class Evidence:
    """The figures of one stored tensor. usual: of rounding to its type, ||rounded - source|| / ||source||.

    usual_variance: the mean square of that error, of one weight.
    rms: ||decoded - source|| / ||source||. similar: the cosine of the two. where: the worst row, column and block.
    zero_rows: rows of zeros whose source is not. not_finite: values that are no numbers.
    """

    entry: Entry
    type_name: str
    rms: float
    usual: float
    usual_variance: float
    similar: float
    slope: float
    not_finite: int
    zero_rows: int
    figures: Mapping[str, float]
    where: Mapping[str, int]


class _Sums:
    """Squares of errors e and of rounding's errors x, of the source w and the decoded v, by row, column and block."""

    def __init__(self, columns: int) -> None:
        self.rows: list[np.ndarray] = []  # f64[5, rows]: ee, xx, ww, vv, vw
        self.columns = np.zeros((3, columns))  # ee, xx, ww
        self.blocks: list[np.ndarray] = []  # f64[4, blocks]: ee, xx, ww, eeee
        self.error, self.count = 0.0, 0

    def add(self, decoded: np.ndarray, source: np.ndarray, rounded: np.ndarray, block: int) -> None:
        """Take in f32[rows, columns] of each."""
        error = decoded - source
        squares = (error * error, (rounded - source) ** 2, source * source)
        products = (*squares, decoded * decoded, decoded * source)
        self.rows.append(np.stack([part.sum(1, dtype=np.float64) for part in products]))
        self.columns += [part.sum(0, dtype=np.float64) for part in squares]
        grouped = [part.reshape(-1, block) for part in squares]
        fourth = np.einsum("nb,nb->n", grouped[0], grouped[0], dtype=np.float64)
        self.blocks.append(np.stack([*(part.sum(1, dtype=np.float64) for part in grouped), fourth]))
        self.error += float(error.sum(dtype=np.float64))
        self.count += error.size


def allowed(file: Container) -> float:
    """How far a solver may have moved a matrix of the file: by as much as the coarsest one loses, because it makes
    fine matrices repair what those before them lost; by as much as pruning takes where the file is sparse."""
    pruned = PRUNED_RMS if SPARSITY_KEY in file.metadata else 0.0
    return max([pruned, *(USUAL_RMS.get(t.type_name, 0.0) for t in file.tensors.values() if len(t.shape) > 1)])


def gather(file: Container, model: Model, entry: Entry, moved: float = 0.0) -> Evidence:
    """Returns the evidence of one stored tensor; memory follows a piece of its rows.

    model: the source, with the artifact's scales folded in where it has any. moved: relative error that matrices may
    have whatever their type.
    """
    kind, type_name = kind_of(file), file.tensors[entry.name].type_name
    block = block_weights(type_name, entry.columns) or (FLOAT_BLOCK if entry.columns % FLOAT_BLOCK == 0 else 1)
    sums, not_finite, steps = _Sums(entry.columns), 0, 0.0
    for start, data in kind.rows(file, entry.name):
        source = kind.source_rows(model, entry, start, start + len(data)).astype(np.float32, copy=False)
        decoded, largest = decode_with_error(type_name, data, source)
        finite = np.isfinite(decoded)
        not_finite += decoded.size - int(finite.sum())
        steps = max(steps, largest)
        sums.add(np.where(finite, decoded, 0), source, _rounded(type_name, source), block)
    for piece in entry.pieces:
        model.weight(piece.spec.name).release()
    return _judged(entry, type_name, sums, steps, not_finite, moved if len(entry.shape) > 1 else 0.0)


def _rounded(type_name: str, source: np.ndarray) -> np.ndarray:
    """The source after rounding to the type; itself where it cannot be (a checkpoint with values out of range)."""
    try:
        kept = encoding(type_name)
        return kept.decode(kept.encode(source, effort="fast"), source.shape[1])
    except LlmxError:
        return source


def _judged(entry: Entry, type_name: str, sums: _Sums, steps: float, not_finite: int, moved: float) -> Evidence:
    rows, blocks = np.concatenate(sums.rows, axis=1), np.concatenate(sums.blocks, axis=1)
    ee, xx, ww, vv, vw = rows.sum(1)
    floor = EXACT**2
    # A checkpoint that was quantized once already lies on a grid, and rounding it again costs next to nothing.
    least = max(floor, (USUAL_RMS.get(type_name, 0.0) / 3) ** 2)
    usual = max(xx / ww, least) if ww else least
    share = max(usual, moved**2)
    size, in_steps = (np.sqrt(ee / (of * ww)) if ww else np.sqrt(ee) for of in (share, usual))
    slope = vw / ww if ww else 1.0
    parts = {"row": rows[:3], "column": sums.columns, "block": blocks[:3]}
    ratios = {name: _ratios(part[0], part[1], part[2], share) for name, part in parts.items()}
    where = {name: int(ratio.argmax()) for name, ratio in ratios.items()}
    alive = rows[2] > 0
    cosines = np.ones(len(alive))
    np.divide(rows[4], np.sqrt(rows[2] * rows[3]), out=cosines, where=alive & (rows[3] > 0))
    zero = alive & (rows[3] == 0)
    cosines[zero] = 0.0
    where["unlike"] = int(cosines.argmin())
    figures = {
        "size": float(size),
        "gain": float(max(abs(slope - 1) - min(ee / ww, SHRINKING), 0) / np.sqrt(share)) if ww else 0.0,
        "bias": float(abs(sums.error) / np.sqrt(ee * sums.count)) if ee > share * ww * 0.25 else 0.0,
        **{name: float(ratio.max() / max(size, 1.0)) for name, ratio in ratios.items()},
        "tails": _tails(blocks[0], blocks[3], sums.count) if block_weights(type_name, entry.columns) else 0.0,
        "unlike": float(np.median(cosines) - cosines.min()),
        "steps": float(steps / max(in_steps, 1.0)),
    }
    return Evidence(
        entry=entry,
        type_name=type_name,
        rms=float(np.sqrt(ee / ww)) if ww else float(np.sqrt(ee)),
        usual=float(np.sqrt(usual)),
        usual_variance=float(usual * ww / sums.count),
        similar=float(vw / np.sqrt(vv * ww)) if vv and ww else float(vv == ww),
        slope=float(slope),
        not_finite=not_finite,
        zero_rows=int(zero.sum()),
        figures=figures,
        where=where,
    )


def _ratios(error: np.ndarray, usual: np.ndarray, energy: np.ndarray, share: float) -> np.ndarray:
    """The error of every row, column or block over what is usual, half here and half in the whole tensor.

    Only half here: a few are met nearly exactly, by chance.
    """
    expected = 0.5 * np.maximum(usual, EXACT**2 * energy) + 0.5 * share * energy
    return np.sqrt(np.divide(error, expected, out=np.zeros_like(error), where=expected > 0))


def _tails(squares: np.ndarray, fourths: np.ndarray, count: int) -> float:
    """The largest kurtosis of a block's errors; blocks that are met nearly exactly are no reason for one."""
    block = count / len(squares)
    expected = squares + 0.25 * squares.mean()
    return float(np.divide(fourths * block, expected**2, out=np.zeros_like(fourths), where=expected > 0).max())
