"""Rows of a matrix while they are solved: their scales, their levels, and what those stand for.

A solver changes codes and scales and never learns the format: everything it needs, the Grid tells. Arrays are
f32[columns, rows], because rows are independent and lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmx.formats.ggml_packers import BlockScales
from llmx.quant.columns import Levels, levels_of

if TYPE_CHECKING:
    from llmx.quant.grid import Grid

Tensor = torch.Tensor


@dataclass(slots=True)
class Rows:
    """Some rows on a grid. level: f32[columns, rows], the level of each code; None until codes are chosen.

    kept: bool[columns, rows], where a weight may differ from zero; None anywhere. Elsewhere scale and offset count as
    zero, so that whatever level a solver puts there is worth nothing, and `codes` has the code of zero.
    """

    grid: Grid
    scales: BlockScales
    count: int
    device: torch.device
    level: Tensor | None = None
    kept: Tensor | None = None
    levels: Levels = field(init=False)

    def __post_init__(self) -> None:
        self.levels = levels_of(self.grid.levels, self.grid.allowed)

    def subs(self, *moves: BlockScales) -> list[tuple[Tensor, Tensor]]:
        """Of each of the scales given, (scale, offset) of every sub-block, f32[subs of a row, rows]."""
        return [self._expanded(scales) for scales in moves] if self.device.type == "cpu" else self._sent(moves)

    def _expanded(self, scales: BlockScales) -> tuple[Tensor, Tensor]:
        scale, offset = self.grid.expand(scales)
        flat = self.sideways(scale)
        return flat, torch.zeros_like(flat) if offset is None else self.sideways(offset)

    def _sent(self, moves: tuple[BlockScales, ...]) -> list[tuple[Tensor, Tensor]]:
        """The same, the integers sent to the GPU as they are stored, each array once, and expanded there."""
        sent: dict[int, Tensor] = {}

        def there(values: np.ndarray[Any, Any], table: Tensor | None = None) -> Tensor:
            if id(values) not in sent:
                if table is None:
                    sent[id(values)] = self.sideways(values.astype(np.float32))
                else:
                    sent[id(values)] = table[self.sideways(values.view(np.uint8)).long()]
            return sent[id(values)]

        def wide(block: Tensor, like: Tensor) -> Tensor:
            return block.repeat_interleave(len(like) // len(block), 0)

        first = moves[0]
        stored = (None if part is None else part.dtype for part in (first.scales, first.mins))
        tables = _meanings(self.grid, first.offset is not None, *stored, self.device)
        pairs = []
        for scales in moves:
            d = there(scales.d)
            factor = None if scales.scales is None else there(scales.scales, tables[0])
            scale = d if factor is None else wide(d, factor) * factor
            offset = torch.zeros_like(scale) if scales.offset is None else wide(there(scales.offset), scale)
            if scales.mins is not None:
                mins = there(scales.mins, tables[1])
                offset = (scale if scales.offset is None else offset) * mins
            pairs.append((scale, offset))
        return pairs

    def columns(self) -> tuple[Tensor, Tensor]:
        """(scale, offset) of every weight, f32[columns, rows]."""
        ((scale, offset),) = self.subs(self.scales)
        wide = scale.repeat_interleave(self.grid.size, 0), offset.repeat_interleave(self.grid.size, 0)
        return (
            wide if self.kept is None else (torch.where(self.kept, wide[0], 0.0), torch.where(self.kept, wide[1], 0.0))
        )

    def value(self) -> Tensor:
        """f32[columns, rows]: what the codes stand for."""
        assert self.level is not None, "codes are chosen first"
        scale, offset = self.columns()
        return scale * self.level + offset

    def codes(self) -> np.ndarray[Any, Any]:
        """u8[blocks, block weights]: the codes as the packer wants them."""
        assert self.level is not None, "codes are chosen first"
        if self.levels.middles.size:
            places = torch.searchsorted(self.levels.on(self.device)[0], self.level)
        else:
            places = self.level - self.levels.low
        codes = (places + self.grid.allowed[0]).to(torch.uint8)
        if self.kept is not None:
            codes = torch.where(self.kept, codes, self._zeros())
        return codes.T.contiguous().cpu().numpy().reshape(-1, self.grid.weights)

    def _zeros(self) -> Tensor:
        """u8: the code that stands for zero, of every weight or of all."""
        zeros = zero_codes(self.grid, self.scales)
        assert zeros is not None, "only a grid with an exact zero is asked for zeros"
        if isinstance(zeros, int):
            return torch.tensor(zeros, dtype=torch.uint8, device=self.device)
        return self.sideways(zeros).repeat_interleave(self.grid.size, 0)

    def set_codes(self, codes: np.ndarray[Any, Any]) -> None:
        level = torch.from_numpy(self.grid.levels.copy()).to(self.device)
        self.level = level[torch.from_numpy(codes).to(self.device).long()].reshape(self.count, -1).T.contiguous()

    def basis(self) -> tuple[Tensor, Tensor | None]:
        """(first, second), f32[columns, rows]: value = d · first + offset · second, d and offset of the block."""
        if self.device.type == "cpu":
            first, second = self.grid.basis(self.scales, self.codes())
            return self.sideways(first), None if second is None else self.sideways(second)
        assert self.level is not None, "codes are chosen first"
        # Codes are many and their way to the CPU is long: what multiplies d and offset follows from the value itself.
        scale, offset = self.columns()
        d = self._of_blocks(self.scales.d)
        if self.scales.offset is None:
            return torch.where(d == 0, 0.0, self.value() / d), None
        minimum = self._of_blocks(self.scales.offset)
        second = torch.where(minimum == 0, float(self.scales.mins is None), offset / minimum)
        return torch.where(d == 0, 0.0, scale * self.level / d), second

    def _of_blocks(self, values: np.ndarray[Any, Any]) -> Tensor:
        """f32[columns, rows] of one number a block."""
        return self.sideways(values.astype(np.float32)).repeat_interleave(self.grid.weights, 0)

    def sideways(self, values: np.ndarray[Any, Any]) -> Tensor:
        """[n, k] of all blocks -> [blocks of a row · k, rows]."""
        upright = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self.device)
        return upright.reshape(self.count, -1).T.contiguous()

    def upright(self, values: Tensor) -> np.ndarray[Any, Any]:
        """[blocks of a row · k, rows] -> [n, k]: the inverse, as the grid lays blocks out."""
        return values.T.contiguous().cpu().numpy().reshape(len(self.scales.d), -1)


def zero_codes(grid: Grid, scales: BlockScales) -> np.ndarray[Any, Any] | int | None:
    """The code whose value is exactly zero: one for all, u8[n, subs] where sub-blocks have zero points, or None."""
    if scales.offset is not None:
        return None
    if scales.mins is not None:
        return scales.mins.astype(np.uint8)
    low, high = grid.allowed
    found = np.flatnonzero(grid.levels[low : high + 1] == 0)
    return int(found[0]) + low if found.size else None


@lru_cache(maxsize=64)
def _meanings(
    grid: Grid, offset: bool, scales: np.dtype | None, mins: np.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """f32[256] of each byte that a sub-block's scale or minimum may be: what it multiplies d or offset by.

    offset: whether the grid has one. scales, mins: how its integers are stored, None where it has none.
    """
    integers, one = np.arange(256, dtype=np.uint8)[:, None], np.ones(256, np.float32)
    known = BlockScales(
        one,
        one if offset else None,
        None if scales is None else integers.view(scales),
        None if mins is None else integers.view(mins),
    )
    first, second = (
        torch.tensor(np.broadcast_to(one[:, None] if part is None else part, (256, 1))[:, 0].tolist(), device=device)
        for part in grid.expand(known)
    )
    return first, second
