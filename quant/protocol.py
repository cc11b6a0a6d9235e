"""What a solver needs of a format: the Grid protocol, and how hard a grid may look for its scales."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from llmx.formats.ggml_packers import BlockScales

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Effort = Literal["fast", "balanced", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "balanced", "best")
_IMPORTANCE_FLOOR = 1e-6  # of the mean: a column that saw nothing still has a scale to be rounded with
_NO_IMPORTANCE = np.empty(0, np.float32)


class Grid(Protocol):
    """What a solver needs of a format. weight: f32[rows, cols], rows of whole blocks; n blocks in all.

    Scales are made by `fit` and changed by `neighbours`, `merge` and `with_super` alone, so that they stay legal.
    """

    @property
    def name(self) -> str:
        """The grid's name, as `llmx.quant.grid.grid` takes it."""
        ...

    @property
    def levels(self) -> Floats:
        """f32[codes], read-only: what each code stands for before it is scaled; ascending over the allowed codes."""
        ...

    @property
    def allowed(self) -> tuple[int, int]:
        """(lowest, highest) code that may be stored."""
        ...

    @property
    def size(self) -> int:
        """Weights of a sub-block, which share a scale."""
        ...

    @property
    def weights(self) -> int:
        """Weights of a block, which share the float super-scales; block weights // size = subs."""
        ...

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        """This grid with what the whole tensor shares fixed from it; itself where a tensor shares nothing.

        To be called once with the whole tensor, before its rows are fitted in parts. importance: as in `fit`.
        """
        ...

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        """The scales of least weighted error, as they will be stored. importance: f32[cols], mean squared inputs."""
        ...

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        """(scale, offset) of every sub-block, f32[n, subs]; value = scale · level + offset."""
        ...

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        """u8[n, block weights]: the code of the level nearest to each weight."""
        ...

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        """f32[n, block weights]: what scales and codes stand for."""
        ...

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        """The legal small moves of the sub-blocks' scales and minima: in each, every sub-block has moved alike.

        Empty where a tensor has one scale.
        """
        ...

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        """scales, with the sub-blocks where mask (bool[n, subs]) holds taken from other."""
        ...

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        """scales with the float super-scales d and offset (f32[n]) in place of its own, rounded as they are stored."""
        ...

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        """(first, second), f32[n, block weights]: the weights are d · first + offset · second; None without offset."""
        ...

    def limit(self) -> float:
        """The largest |weight| that the stored scales can reach."""
        ...


def flat(weight: Floats) -> Floats:
    """f32[rows · cols], contiguous and writable: a kernel would be compiled once more for read-only arrays."""
    return np.require(weight, np.float32, ["C", "W"]).reshape(-1)


def relative(importance: Floats | None) -> Floats:
    """The importance scaled to a mean of 1; empty for None."""
    if importance is None:
        return _NO_IMPORTANCE
    mean = np.mean(importance, dtype=np.float64)
    return np.maximum(importance / mean, _IMPORTANCE_FLOOR).astype(np.float32)
