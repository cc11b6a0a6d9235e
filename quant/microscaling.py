"""Grids of small floats: MXFP4, NVFP4 and FP8.

    MXFP4       32 weights in E2M1 share a power of two                 OCP Microscaling Formats v1.0
    NVFP4       16 weights in E2M1 share an E4M3 scale, the tensor a float32      NVIDIA; in GGUF four groups a block
    FP8 E4M3    a row, or the tensor, shares a float32                  OCP 8-bit Floating Point v1.0

E2M1 levels are doubled and their scales halved, as ggml has it (llmx.formats.microfloats). All scales are positive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmx.formats.ggml_decode import expand
from llmx.formats.ggml_packers import BlockScales
from llmx.formats.microfloats import E2M1_DOUBLED, E4M3, E8M0_HALVED, UE4M3
from llmx.quant import moves, symmetric
from llmx.quant.groups import SEARCH_LIMIT
from llmx.quant.lanes import workspace
from llmx.quant.nonlinear import E2M1
from llmx.quant.nonlinear import E4M3 as E4M3_LEVELS
from llmx.quant.protocol import Codes, Effort, Floats, Grid, flat, relative
from llmx.quant.rounding import round_e2m1, round_e4m3
from llmx.quant.searches import FP8_SEARCHES, STEP_SEARCHES
from llmx.quant.stepped import fit_steps, squared_error
from llmx.quant.stores import STORES, replaced

_TOP = E2M1_DOUBLED.max()
_POWERS = E8M0_HALVED[:255].copy()  # the last byte is NaN outside ggml
_E4M3_HALVED: Floats = UE4M3 / np.float32(2)
_SPREAD = 3.0


def _nearest(steps: Floats, values: Floats) -> NDArray[np.intp]:
    """The number of the step nearest to each value."""
    return np.searchsorted((steps[1:] + steps[:-1]) / 2, values)


def _fit_steps(grid: Grid, weight: Floats, importance: Floats | None, steps: Floats, tries: tuple[int, ...]) -> Codes:
    values = flat(weight)
    number = np.empty(values.size // grid.size, np.uint8)
    work, tried = workspace(grid.size), np.array(tries, np.int64)
    fit_steps(values, relative(importance), work, E2M1, _TOP, _SPREAD, steps, tried, number)
    return number


def _round_e2m1(grid: Grid, weight: Floats, scales: BlockScales) -> Codes:
    values = flat(weight).reshape(-1, grid.size)
    codes = np.empty(values.shape, np.uint8)
    round_e2m1(values, np.ascontiguousarray(grid.expand(scales)[0]).reshape(-1), codes)
    return codes.reshape(len(scales.d), -1)


@dataclass(frozen=True, slots=True)
class MxGrid:
    """MXFP4. BlockScales: d f32[n], the halved scale, a power of two."""

    name: str
    size: int = 32

    @property
    def levels(self) -> Floats:
        return E2M1_DOUBLED

    @property
    def allowed(self) -> tuple[int, int]:
        return 0, len(E2M1_DOUBLED) - 2

    @property
    def weights(self) -> int:
        return self.size

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        return self

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        tries = STEP_SEARCHES["e8m0"][effort]
        return BlockScales(_POWERS[_fit_steps(self, weight, importance, _POWERS, tries)])

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return scales.d.astype(np.float32, copy=False)[:, None], None

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        return _round_e2m1(self, weight, scales)

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return self.levels[codes] * self.expand(scales)[0]

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        return tuple(
            replace(scales, d=np.clip(scales.d * np.float32(by), _POWERS[0], _POWERS[-1])) for by in (0.5, 2.0)
        )

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        return replace(scales, d=_POWERS[_nearest(_POWERS, replaced(d, scales.d))])

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        return self.levels[codes], None

    def limit(self) -> float:
        return SEARCH_LIMIT


@dataclass(frozen=True, slots=True)
class NvGrid:
    """NVFP4. BlockScales: d f32[n], the tensor's scale, n times; scales i8[n, subs], the bytes of the E4M3 scales.

    d is the tensor's, so a new super-scale of a block goes into its E4M3 scales, as near as they come. tensor: the
    tensor's scale once it is known (see bound); 0 takes it from the weights that are fitted.
    """

    name: str
    weights: int = 16
    tensor: float = 0.0
    size: int = 16

    @property
    def levels(self) -> Floats:
        return E2M1_DOUBLED

    @property
    def allowed(self) -> tuple[int, int]:
        return 0, len(E2M1_DOUBLED) - 2

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        """With the tensor's scale such that the group of the largest weight gets a scale of 256: below E4M3's 448, so
        that its largest weight, too, can be put on the level 4."""
        largest = np.abs(weight).max(initial=0)
        return replace(self, tensor=float(largest / (_TOP * np.float32(128)) or 1.0))

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        if not self.tensor:
            return self.bound(weight).fit(weight, importance, effort)
        tensor = np.float32(self.tensor)
        number = _fit_steps(self, weight, importance, _E4M3_HALVED * tensor, STEP_SEARCHES["e4m3"][effort])
        scales = number.view(np.int8).reshape(-1, self.weights // self.size)
        return BlockScales(np.full(len(scales), tensor), None, scales)

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return expand("NVFP4", scales)

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        return _round_e2m1(self, weight, scales)

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return self.levels[codes] * np.repeat(self.expand(scales)[0], self.size, axis=1)

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        return moves.move_integers(scales, (0, len(UE4M3) - 1))

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        assert scales.scales is not None
        wanted = UE4M3[scales.scales] * (replaced(d, scales.d, 0.0) / scales.d)[:, None]
        return replace(scales, scales=_nearest(UE4M3, wanted.astype(np.float32)).astype(np.int8))

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        assert scales.scales is not None
        return self.levels[codes] * np.repeat(_E4M3_HALVED[scales.scales], self.size, axis=1), None

    def limit(self) -> float:
        return SEARCH_LIMIT


@dataclass(frozen=True, slots=True)
class Fp8Grid:
    """FP8 E4M3 with a float32 scale: one a row (size: its weights), or one for the tensor.

    BlockScales: d f32[n]; all equal where the tensor shares it, and then no solver can move it. tensor: as NvGrid's.
    """

    name: str
    size: int
    shared: bool = False
    tensor: float = 0.0

    @property
    def levels(self) -> Floats:
        return E4M3

    @property
    def allowed(self) -> tuple[int, int]:
        return 0, len(E4M3) - 2

    @property
    def weights(self) -> int:
        return self.size

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        """With the tensor's scale, where one is shared and none is given: of those tried, that of least error."""
        if not self.shared or self.tensor:
            return self
        values, columns, work = flat(weight), relative(importance), workspace(self.size)
        tried = np.abs(weight).max(initial=0) / np.array(FP8_SEARCHES["balanced"].starts, np.float32)
        errors = [squared_error(values, columns, E4M3_LEVELS, scale, work) for scale in tried]
        return replace(self, tensor=float(tried[np.argmin(errors)]) or 1.0)

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        if self.shared and not self.tensor:
            return self.bound(weight, importance).fit(weight, importance, effort)
        values, search = flat(weight), FP8_SEARCHES[effort]
        d = np.full(values.size // self.size, self.tensor, np.float32)
        if not self.shared:
            work, starts = workspace(self.size), np.array(search.starts, np.float32)
            symmetric.fit_blocks(
                values, relative(importance), work, E4M3_LEVELS, 0, 0, _SPREAD, starts, search.lloyd, d
            )  # fmt: skip
        return BlockScales(np.abs(d))  # levels have both signs, so a scale needs none

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return scales.d.astype(np.float32, copy=False)[:, None], None

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        values = flat(weight).reshape(-1, self.size)
        codes = np.empty(values.shape, np.uint8)
        round_e4m3(values, scales.d.astype(np.float32, copy=False), codes)
        return codes

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return self.levels[codes] * self.expand(scales)[0]

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        if self.shared:
            return ()
        return tuple(replace(scales, d=scales.d * np.float32(factor)) for factor in moves.FACTORS)

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return scales if self.shared else moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        return scales if self.shared else replace(scales, d=STORES["float32"].rounded(replaced(d, scales.d, 0.0)))

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        return self.levels[codes], None

    def limit(self) -> float:
        return SEARCH_LIMIT
