"""A model whose weights are read with scales folded in: s moves from one tensor to the next, the function stays.

    linear   y = W x            W' = diag(1 / r) W diag(s),  b' = b / r     its inputs came divided by s, its outputs
    norm     y = n(x) (g + o)   g' = (g + o) / r - o,        b' = b / r     go out divided by r

Nothing is computed before a row is read, and a tensor that no fold names is the stored one, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmx.models.architecture import Role
from llmx.models.checkpoint import Checkpoint
from llmx.models.model import Model, Weight

Floats = npt.NDArray[np.float32]

NORM_ROLES: frozenset[Role] = frozenset(
    {"attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm", "q_norm", "k_norm", "final_norm"}
)


@dataclass(frozen=True, slots=True)
class Fold:
    """Scales of one canonical tensor; None for ones. All are positive and finite.

    columns: f32[in], or f32[experts, in]; the weights are multiplied by the scale of their input.
    rows: f32[out], or f32[experts, out]; the weights are divided by the scale of their output. A vector has rows alone.
    """

    columns: Floats | None = None
    rows: Floats | None = None

    def then(self, other: Fold) -> Fold:
        """Both folds at once; scales that all experts share meet scales of each."""
        return Fold(_product(self.columns, other.columns), _product(self.rows, other.rows))


def _product(a: Floats | None, b: Floats | None) -> Floats | None:
    return a if b is None else b if a is None else a * b


class FoldedWeight(Weight):
    """A weight with a fold in it. It reads, and passes on raw, float32: the scaled values are stored nowhere."""

    __slots__ = ("_columns", "_matrix", "_offset", "_rows", "_unfolded", "_vector")

    def __init__(self, weight: Weight, checkpoint: Checkpoint, fold: Fold, offset: float) -> None:
        """offset: what is added to a stored norm gain before it is used; 0 for anything else."""
        super().__init__(weight.spec, checkpoint)
        self.dtype = "F32"
        self._unfolded = weight
        self._offset = np.float32(offset)
        self._vector = len(weight.spec.shape) == 1
        assert not self._vector or fold.columns is None, "a vector has no columns"
        *experts, out, _ = (*weight.spec.shape, 1) if self._vector else weight.spec.shape
        self._matrix = out  # rows of one expert, or of all
        self._columns = _spread(fold.columns, math.prod(experts), self.cols)
        self._rows = _spread(fold.rows, math.prod(experts), out)

    @property
    def nbytes(self) -> int:
        """Bytes as the checkpoint stores it, unfolded."""
        return self._unfolded.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """f32[stop - start, cols], a fresh array of these rows, folds applied."""
        stop = self.rows if stop is None else stop
        result = self._unfolded.read(start, stop)
        if self._columns is not None:
            shared = len(self._columns) == 1
            result *= self._columns if shared else self._columns[np.arange(start, stop) // self._matrix]
        if self._rows is not None:
            result += self._offset
            result /= self._rows if self._vector else self._rows.reshape(-1, 1)[start:stop]
            result -= self._offset
        return result

    def read_raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The same as `read`."""
        return self.read(start, stop)

    def views(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """One piece: the bits u32[stop - start, cols] of these rows, computed."""
        yield 0, self.read(start, stop).view(np.uint32)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Hand the pages of the stored rows back to the system."""
        self._unfolded.release(start, stop)


def _spread(scales: Floats | None, experts: int, size: int) -> Floats | None:
    """f32[experts, size]."""
    if scales is None:
        return None
    assert np.isfinite(scales).all() and (scales > 0).all(), "a scale is positive and finite"
    return np.broadcast_to(np.asarray(scales, np.float32), (experts, size))


class FoldedModel(Model):
    """A model with folds in its weights. folds: canonical tensor name -> its fold. Folds of folded models add up."""

    __slots__ = ()

    def __init__(self, model: Model, folds: Mapping[str, Fold]) -> None:
        super().__init__(model.architecture, model.checkpoint)
        unknown = [name for name in folds if not model.has(name)]
        assert not unknown, f"the model has no {unknown}"
        self._weights = {weight.spec.name: self._folded(weight, folds) for weight in model.weights()}

    def _folded(self, weight: Weight, folds: Mapping[str, Fold]) -> Weight:
        spec = weight.spec
        if spec.name not in folds:
            return weight
        gain = spec.role in NORM_ROLES and spec.part == "weight"
        offset = self.architecture.norm_offset if gain else 0.0
        return FoldedWeight(weight, self.checkpoint, folds[spec.name], offset)
