"""Grids of whole numbers in groups: INT2, INT3, INT4, INT8 as ONNX Runtime, TensorRT, AWQ and GPTQ kernels take them.

A group of `size` neighbours in a row, or the whole row, shares one scale, stored as a float, and possibly a zero point:

    sym   value = d · code, codes −2ᵇ⁻¹ … 2ᵇ⁻¹ − 1, d of either sign, so that the largest weight may lie on −2ᵇ⁻¹
    pos   the same with d > 0, for runtimes that ask for it (TensorRT)
    zp    value = d · (code − zero), codes and zero 0 … 2ᵇ − 1, d > 0

Codes here count from 0 in all three; `levels` are what they stand for. In 8 bits without a zero point −128 is left out:
runtimes multiply by the sign of a code, and 8 bits do not hold +128.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmx.formats.ggml_packers import BlockScales
from llmx.quant import integer, moves
from llmx.quant.lanes import workspace
from llmx.quant.protocol import Codes, Effort, Floats, Grid, flat, relative
from llmx.quant.rounding import round_linear, round_shifted
from llmx.quant.searches import GROUP_SEARCHES
from llmx.quant.stores import STORES, replaced

KINDS: tuple[str, ...] = ("sym", "pos", "zp")
BITS: tuple[int, ...] = (2, 3, 4, 8)
GROUPS: tuple[int, ...] = (16, 32, 64, 128, 256)
_FACTORS = (1.0, *moves.FACTORS)
SEARCH_LIMIT = 2.0**48  # of a weight, whatever the scale may hold: float32 sums its square over a row


def _levels(low: int, count: int) -> Floats:
    levels = np.arange(low, low + count, dtype=np.float32)
    levels.flags.writeable = False
    return levels


_LEVELS = {
    (bits, zero): _levels(0 if zero else -(1 << bits >> 1), 1 << bits) for bits in BITS for zero in (False, True)
}


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """One such grid. name: see integer_grid. kind: of KINDS. store: how d is stored, of STORES.

    BlockScales: d f32[n], values that the store holds; mins u8[n, 1], the zero points, where there are any.
    """

    name: str
    bits: int
    size: int  # weights of a group
    kind: str = "sym"
    store: str = "float16"

    @property
    def zero_point(self) -> bool:
        """Whether groups have zero points."""
        return self.kind == "zp"

    @property
    def levels(self) -> Floats:
        return _LEVELS[self.bits, self.zero_point]

    @property
    def allowed(self) -> tuple[int, int]:
        return int(self.bits == 8 and not self.zero_point), (1 << self.bits) - 1

    @property
    def weights(self) -> int:
        return self.size

    def bound(self, weight: Floats, importance: Floats | None = None) -> Grid:
        return self

    def fit(self, weight: Floats, importance: Floats | None = None, effort: Effort = "balanced") -> BlockScales:
        values, columns = self._whole_fours(flat(weight), relative(importance))
        search = GROUP_SEARCHES[self.bits, self.kind][effort]
        # How much a weight near zero counts beside a large one: as ggml's grids of as many levels.
        spread = 10.0 if self.zero_point or self.bits == 8 else 3.0
        starts = np.array(search.starts, np.float32).reshape(len(search.starts), -1)
        low, high = (int(self.levels[code]) for code in self.allowed)
        work = workspace(self.size + -self.size % 4)
        n = values.size // len(work.x)
        d, zero = np.empty(n, np.float32), np.empty(n if self.zero_point else 0, np.uint8)
        integer.fit_groups(
            values, columns, work, low, high, self.zero_point, self.kind != "sym", self.bits == 8, spread, starts,
            search.lloyd, search.loops, d, zero,
        )  # fmt: skip
        return BlockScales(STORES[self.store].rounded(d), None, None, zero[:, None] if self.zero_point else None)

    def _whole_fours(self, values: Floats, columns: Floats) -> tuple[Floats, Floats]:
        """Groups that the kernels cannot take four by four, filled up with zeros that count nothing."""
        missing = -self.size % 4
        if not missing:
            return values, columns
        ones = columns if columns.size else np.ones(self.size, np.float32)
        return tuple(
            np.ascontiguousarray(np.pad(part.reshape(-1, self.size), ((0, 0), (0, missing)))).reshape(-1)
            for part in (values, ones)
        )  # type: ignore[return-value]

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        scale = scales.d.astype(np.float32, copy=False)[:, None]
        return scale, None if scales.mins is None else -scale * scales.mins

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        values, d = flat(weight).reshape(-1, self.size), scales.d.astype(np.float32, copy=False)
        codes = np.empty(values.shape, np.uint8)
        if scales.mins is None:
            low, high = (self.levels[code] for code in self.allowed)
            round_linear(values, d, low, high, -self.levels[0], codes)
        else:
            round_shifted(values, d, np.ascontiguousarray(scales.mins.reshape(-1)), self.allowed[1], codes)
        return codes

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return self.basis(scales, codes)[0] * scales.d.astype(np.float32, copy=False)[:, None]

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        d = {factor: STORES[self.store].rounded(scales.d * np.float32(factor)) for factor in _FACTORS}
        if scales.mins is None:
            return tuple(replace(scales, d=d[factor]) for factor in moves.FACTORS)
        zero = {by: moves.moved(scales.mins, by, self.allowed) for by in (0, -1, 1)}
        pairs = [(factor, by) for by in zero for factor in d if (factor, by) != (1.0, 0)]
        return tuple(replace(scales, d=d[factor], mins=zero[by]) for factor, by in pairs)

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        low = -np.inf if self.kind == "sym" else 0.0
        return replace(scales, d=STORES[self.store].rounded(replaced(d, scales.d, low)))

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        levels = self.levels[codes]
        return levels if scales.mins is None else levels - scales.mins.astype(np.float32), None

    def limit(self) -> float:
        reach = (1 << self.bits >> 1) - 1  # of the side with the fewer levels, or about the middle
        return min(STORES[self.store].largest * reach, SEARCH_LIMIT)


def integer_grid(
    bits: int, group: int, kind: str = "sym", store: str = "float16", channel: bool = False
) -> IntegerGrid:
    """The grid named int{bits}-g{group}-{kind}, or int{bits}-channel-{kind} where the group is a whole row.

    A store other than float16 is part of the name: int4-g32-zp-bfloat16.
    """
    where = "channel" if channel else f"g{group}"
    suffix = "" if store == "float16" else f"-{store}"
    return IntegerGrid(f"int{bits}-{where}-{kind}{suffix}", bits, group, kind, store)
