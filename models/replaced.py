"""A model some of whose weights are read from elsewhere: computed from the stored ones, or solved before.

Nothing is computed before a row is read, and a tensor that is not replaced is the stored one, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from llmx.models.checkpoint import Checkpoint
from llmx.models.model import Model, Weight

Rows = Callable[[int, int], npt.NDArray[np.float32]]  # (start, stop) -> f32[stop - start, cols]


class ReplacedWeight(Weight):
    """A weight with other values. It reads, and passes on raw, float32, whatever the checkpoint stores."""

    __slots__ = ("_rows", "_stored_weight")

    def __init__(self, weight: Weight, checkpoint: Checkpoint, rows: Rows) -> None:
        super().__init__(weight.spec, checkpoint)
        self.dtype = "F32"
        self._stored_weight = weight
        self._rows = rows

    @property
    def nbytes(self) -> int:
        """Bytes as the checkpoint stores the weight that is replaced."""
        return self._stored_weight.nbytes

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """f32[stop - start, cols], a fresh array of these rows."""
        stop = self.rows if stop is None else stop
        assert 0 <= start <= stop <= self.rows
        values = np.array(self._rows(start, stop), np.float32)
        assert values.shape == (stop - start, self.cols), "a weight is replaced by one of its shape"
        return values

    def read_raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The same as `read`."""
        return self.read(start, stop)

    def views(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """One piece: the bits u32[stop - start, cols] of these rows."""
        yield 0, self.read(start, stop).view(np.uint32)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Hand the pages of the stored rows back to the system."""
        self._stored_weight.release(start, stop)


class ReplacedModel(Model):
    """A model with other values in some weights. rows: canonical tensor name -> what reads its rows."""

    __slots__ = ()

    def __init__(self, model: Model, rows: Mapping[str, Rows]) -> None:
        super().__init__(model.architecture, model.checkpoint)
        unknown = [name for name in rows if not model.has(name)]
        assert not unknown, f"the model has no {unknown}"
        self._weights = {
            weight.spec.name: ReplacedWeight(weight, self.checkpoint, rows[weight.spec.name])
            if weight.spec.name in rows
            else weight
            for weight in model.weights()
        }
