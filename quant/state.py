"""Rows of a matrix while they are solved: their scales, their levels, and what those stand for.

A solver changes codes and scales and never learns the format: everything it needs, the Grid tells. Arrays are
f32[columns, rows], because rows are independent and lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmx.quant.columns import Levels, levels_of

if TYPE_CHECKING:
    from llmx.formats.ggml_packers import BlockScales
    from llmx.quant.grid import Grid

Tensor = torch.Tensor


@dataclass(slots=True)
class Rows:
    """Some rows on a grid. level: f32[columns, rows], the level of each code; None until codes are chosen."""

    grid: Grid
    scales: BlockScales
    count: int
    device: torch.device
    level: Tensor | None = None
    levels: Levels = field(init=False)

    def __post_init__(self) -> None:
        self.levels = levels_of(self.grid.levels, self.grid.allowed)

    def copy(self) -> Rows:
        return Rows(self.grid, self.scales, self.count, self.device, None if self.level is None else self.level.clone())

    def subs(self, scales: BlockScales) -> tuple[Tensor, Tensor]:
        """(scale, offset) of every sub-block, f32[subs of a row, rows]."""
        scale, offset = self.grid.expand(scales)
        flat = self.sideways(scale)
        return flat, torch.zeros_like(flat) if offset is None else self.sideways(offset)

    def columns(self) -> tuple[Tensor, Tensor]:
        """(scale, offset) of every weight, f32[columns, rows]."""
        scale, offset = self.subs(self.scales)
        return scale.repeat_interleave(self.grid.size, 0), offset.repeat_interleave(self.grid.size, 0)

    def value(self) -> Tensor:
        """f32[columns, rows]: what the codes stand for."""
        assert self.level is not None, "codes are chosen first"
        scale, offset = self.columns()
        return scale * self.level + offset

    def codes(self) -> np.ndarray[Any, Any]:
        """u8[blocks, block weights]: the codes as the packer wants them."""
        assert self.level is not None, "codes are chosen first"
        level = np.ascontiguousarray(self.level.T.cpu().numpy())
        return self._coded(level)

    def set_codes(self, codes: np.ndarray[Any, Any]) -> None:
        level = torch.from_numpy(self.grid.levels.copy())[torch.from_numpy(codes.astype(np.int64))]
        self.level = level.reshape(self.count, -1).T.contiguous().to(self.device)

    def basis(self) -> tuple[Tensor, Tensor | None]:
        """(first, second), f32[columns, rows]: value = d · first + offset · second, d and offset of the block."""
        first, second = self.grid.basis(self.scales, self.codes())
        return self.sideways(first), None if second is None else self.sideways(second)

    def _coded(self, level: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        lowest = self.grid.allowed[0]
        if not len(self.levels.middles):
            codes = level - np.float32(self.levels.low) + np.float32(lowest)
        else:
            codes = np.searchsorted(self.levels.table, level) + lowest
        return codes.astype(np.uint8).reshape(-1, self.grid.weights)

    def sideways(self, values: np.ndarray[Any, Any]) -> Tensor:
        """[n, k] of all blocks -> [blocks of a row · k, rows]."""
        return torch.from_numpy(np.ascontiguousarray(values.reshape(self.count, -1).T)).to(self.device)

    def upright(self, values: Tensor) -> np.ndarray[Any, Any]:
        """[blocks of a row · k, rows] -> [n, k]: the inverse, as the grid lays blocks out."""
        return np.ascontiguousarray(values.T.cpu().numpy()).reshape(len(self.scales.d), -1)
