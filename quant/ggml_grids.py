"""The grids of ggml's block types that have a float16 scale: with a minimum, and without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmx.formats.ggml_blocks import BLOCKS, SUPER_BLOCK
from llmx.formats.ggml_decode import LEVELS, decode_codes, expand
from llmx.formats.ggml_packers import BlockScales
from llmx.quant import affine, integer, kquant, moves, symmetric
from llmx.quant.lanes import workspace
from llmx.quant.nonlinear import LINEAR, UNEVEN
from llmx.quant.protocol import Codes, Effort, Floats, Grid, flat, relative
from llmx.quant.rounding import round_affine, round_linear, round_uneven
from llmx.quant.searches import SEARCHES, Search
from llmx.quant.stores import HALF_MAX, to_half

FINE = 64  # levels from which on the error is summed itself (llmx.quant.integer)


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """value = scale · code − minimum, codes 0 … top; in super-blocks with integer scales up to `integers`, if any.

    spread, without and with an importance matrix: how much a weight near zero counts beside a large one:
    w = importance · (spread + (x/σ)²). The values are those of least KL on a trained model; between 1 and 10 the
    difference is mostly chance.
    """

    name: str
    size: int  # weights of a sub-block
    top: int
    spread: tuple[float, float]
    integers: int = 0

    @property
    def levels(self) -> Floats:
        return LEVELS[self.name]

    @property
    def weights(self) -> int:
        return BLOCKS[self.name].weights

    @property
    def allowed(self) -> tuple[int, int]:
        return 0, self.top

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        return self

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        values, columns, search = flat(weight), relative(importance), SEARCHES[self.name][effort]
        spread = self.spread[importance is not None]
        work, starts = workspace(self.size), np.array(search.starts, np.float32)
        n = values.size // self.weights
        d, offset = np.empty(n, np.float32), np.empty(n, np.float32)
        if not self.integers:
            affine.fit_blocks(values, columns, work, self.top, spread, starts, search.lloyd, d, offset)
            return BlockScales(to_half(d), to_half(offset))
        scales = np.empty((n, SUPER_BLOCK // self.size), np.int8)
        mins = np.empty_like(scales)
        kquant.fit_super(
            values, columns, work, self.top, self.integers, spread, starts, search.lloyd, search.loops,
            d, offset, scales, mins,
        )  # fmt: skip
        return BlockScales(to_half(d), to_half(offset), scales, mins)

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return expand(self.name, scales)

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        scale, offset = self.expand(scales)
        assert offset is not None
        values = flat(weight).reshape(-1, self.size)
        codes = np.empty(values.shape, np.uint8)
        round_affine(values, scale.reshape(-1), offset.reshape(-1), self.top, codes)
        return codes.reshape(len(scales.d), -1)

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return decode_codes(self.name, scales, codes)

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        return moves.move_pairs(scales, self.integers) if self.integers else moves.move_floats(scales)

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        return moves.with_super(scales, d, offset)

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        return moves.basis(scales, self.levels[codes])

    def limit(self) -> float:
        return HALF_MAX * max(self.integers, 1)


@dataclass(frozen=True, slots=True)
class SymmetricGrid:
    """value = scale · level; levels low … high, or IQ4's uneven ones where both are 0; scales in `integers`.

    spread: as AffineGrid's.
    """

    name: str
    size: int  # weights of a sub-block
    low: int
    high: int
    spread: tuple[float, float]
    integers: tuple[int, int] | None = None

    @property
    def levels(self) -> Floats:
        return LEVELS[self.name]

    @property
    def weights(self) -> int:
        return BLOCKS[self.name].weights

    @property
    def allowed(self) -> tuple[int, int]:
        if self.kind == UNEVEN:
            return 0, len(self.levels) - 1
        return self.low - int(self.levels[0]), self.high - int(self.levels[0])

    @property
    def kind(self) -> int:
        """The kind of levels, for the kernels."""
        return UNEVEN if self.low == self.high else LINEAR

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        return self

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        values, columns, search = flat(weight), relative(importance), SEARCHES[self.name][effort]
        spread = self.spread[importance is not None]
        work, starts = workspace(self.size), np.array(search.starts, np.float32)
        d = np.empty(values.size // self.weights, np.float32)
        if self.integers is None:
            self._fit_blocks(values, columns, spread, search, d)
            return BlockScales(to_half(d))
        scales = np.empty((d.size, SUPER_BLOCK // self.size), np.int8)
        symmetric.fit_super(
            values, columns, work, self.kind, self.low, self.high, self.integers, spread, starts, search.lloyd,
            search.loops, d, scales,
        )  # fmt: skip
        return BlockScales(to_half(d), None, scales)

    def _fit_blocks(self, values: Floats, columns: Floats, spread: float, search: Search, d: Floats) -> None:
        """Fill d of a type without integer scales, not rounded yet."""
        work, starts = workspace(self.size), np.array(search.starts, np.float32)
        if self.high < FINE:
            symmetric.fit_blocks(
                values, columns, work, self.kind, self.low, self.high, spread, starts, search.lloyd, d
            )  # fmt: skip
            return
        integer.fit_groups(
            values, columns, work, self.low, self.high, False, False, True, spread, starts[:, None], search.lloyd, 0,
            d, np.empty(0, np.uint8),
        )  # fmt: skip

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return expand(self.name, scales)

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        scale = self.expand(scales)[0].reshape(-1)
        values = flat(weight).reshape(-1, self.size)
        codes = np.empty(values.shape, np.uint8)
        if self.kind == UNEVEN:
            round_uneven(values, scale, codes)
        else:
            round_linear(values, scale, self.low, self.high, -LEVELS[self.name][0], codes)
        return codes.reshape(len(scales.d), -1)

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return decode_codes(self.name, scales, codes)

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        return moves.move_integers(scales, self.integers) if self.integers else moves.move_floats(scales)

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        return moves.with_super(scales, d, offset)

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        return moves.basis(scales, self.levels[codes])

    def limit(self) -> float:
        # The side with the fewer levels decides: the largest weight may have either sign.
        reach = min(-self.low, self.high) or int(LEVELS[self.name][-1])
        return HALF_MAX * reach * (min(-self.integers[0], self.integers[1]) if self.integers else 1)


GGML_GRIDS: tuple[Grid, ...] = (
    AffineGrid("Q2_K", 16, 3, (3, 1), integers=15),
    AffineGrid("Q4_K", 32, 15, (10, 10), integers=63),
    AffineGrid("Q5_K", 32, 31, (3, 3), integers=63),
    AffineGrid("Q4_1", 32, 15, (10, 10)),
    AffineGrid("Q5_1", 32, 31, (3, 3)),
    SymmetricGrid("Q3_K", 16, -4, 3, (1, 3), (-32, 31)),
    SymmetricGrid("Q6_K", 16, -32, 31, (0.3, 0.3), (-128, 127)),
    SymmetricGrid("Q4_0", 32, -8, 7, (3, 0.3)),
    SymmetricGrid("Q5_0", 32, -16, 15, (3, 0.3)),
    # -128 is left out: runtimes multiply by the sign of a code, and 8 bits do not hold +128.
    SymmetricGrid("Q8_0", 32, -127, 127, (10, 10)),
    SymmetricGrid("IQ4_NL", 32, 0, 0, (1, 3)),
    SymmetricGrid("IQ4_XS", 32, 0, 0, (1, 3), (-32, 31)),
)
"""The grids over a float16 scale that llmx can write as ggml blocks."""
