"""Exact descent from any start, under E H Eᵀ: codes, integer scales, super-scales; every step lowers the loss.

Each step needs only the gradient H (ŵ − w*), which is kept up to date:

    codes    each weight to its best level, the others fixed
    scales   for one sub-block, value = s · level + o: the loss over (s, o) is a quadratic form of five sums
             (lᵀHl, lᵀH1, 1ᵀH1, lᵀg, 1ᵀg), so every legal move of scale and minimum is scored at once
    supers   a block is linear in d and offset: a 2 × 2 system, its solution rounded as it is stored
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from llmx.quant.columns import BLOCK, descend_block, move_block, moved_together
from llmx.quant.state import Rows
from llmx.quant.workers import spans

if TYPE_CHECKING:
    from llmx.formats.ggml_packers import BlockScales

Tensor = torch.Tensor


class Descent:
    """Rows on their way down. target: f32[columns, rows]; hessian: f32[columns, columns], damped."""

    __slots__ = ("gradient", "hessian", "rows", "target", "value")

    def __init__(self, rows: Rows, target: Tensor, hessian: Tensor) -> None:
        self.rows, self.target, self.hessian = rows, target, hessian
        self._start()

    def _start(self) -> None:
        self.value = self.rows.value()
        self.gradient = self.hessian @ (self.value - self.target)

    def sweep_codes(self) -> None:
        """Every code once, block by block."""
        rows = self.rows
        assert rows.level is not None
        scale, offset = rows.columns()
        for block in spans(len(self.value), BLOCK):
            gradient = self.gradient[block]
            change = descend_block(
                self.value[block], gradient, self.hessian[block, block].contiguous(), scale[block], offset[block],
                rows.levels, rows.level[block],
            )  # fmt: skip
            self.gradient.addmm_(self.hessian[:, block], change)

    def move_scales(self) -> None:
        """Every sub-block's scale and minimum to the best of their legal neighbours."""
        rows, size = self.rows, self.rows.grid.size
        assert rows.level is not None
        # A zero point that moves would take the codes of zero with it.
        pinned = rows.kept is not None and rows.scales.mins is not None
        moves = () if pinned else rows.grid.neighbours(rows.scales)
        if not moves:
            return
        (scale, offset), *pairs = rows.subs(rows.scales, *moves)
        steps = torch.stack([s - scale for s, _ in pairs]), torch.stack([o - offset for _, o in pairs])
        chosen = torch.empty(scale.shape, dtype=torch.uint8, device=scale.device)
        for block in spans(len(self.value), moved_together(size, scale.device)):
            subs = slice(block.start // size, block.stop // size)
            chosen[subs], change = self._move(block, *(part[:, subs] for part in steps))
            self.gradient.addmm_(self.hessian[:, block], change)
        picked = rows.upright(chosen)
        for number, move in enumerate(moves):
            rows.scales = rows.grid.merge(rows.scales, move, picked == number + 1)
        self.value = rows.value()

    def _move(self, block: slice, ds: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
        """The best step of every sub-block of a block, as `move_block` returns it. ds, do: f32[moves, subs, rows]."""
        assert self.rows.level is not None
        level = self.rows.level[block]
        if ds.shape[1] > 1:
            return move_block(level, self.gradient[block], self.hessian[block, block], ds, do)
        ds, do = ds[:, 0], do[:, 0]
        best, place = self._gains(block, ds, do).min(0)
        better = best < 0
        ds, do = (torch.where(better, part.gather(0, place[None])[0], 0.0) for part in (ds, do))
        return torch.where(better, place + 1, 0)[None], level * ds + do

    def _gains(self, block: slice, ds: Tensor, do: Tensor) -> Tensor:
        """f32[moves, rows]: what each step of (scale, offset) of a sub-block changes the loss by."""
        assert self.rows.level is not None
        level, gradient, hessian = self.rows.level[block], self.gradient[block], self.hessian[block, block]
        pulled = hessian @ level
        ll, lo, oo = (level * pulled).sum(0), pulled.sum(0), hessian.sum()
        lg, og = (level * gradient).sum(0), gradient.sum(0)
        return ds * ds * ll + 2 * ds * do * lo + do * do * oo + 2 * (ds * lg + do * og)

    def refit_supers(self) -> None:
        """Every block's float super-scales to their least-squares values, in the rows where the loss then is lower."""
        rows, grid = self.rows, self.rows.grid
        first, second = rows.basis()
        d, offset = self._supers()
        new_d, new_offset = d.clone(), offset.clone()
        gradient = self.gradient.clone()
        for number, block in enumerate(spans(len(self.value), grid.weights)):
            a, b = first[block], None if second is None else second[block]
            step_d, step_offset = self._least_squares(block, gradient, a, b)
            new_d[number] += step_d
            new_offset[number] += step_offset
            gradient.addmm_(self.hessian[:, block], a * step_d if b is None else a * step_d + b * step_offset)
        before, kept = rows.scales, (self.value, self.gradient)
        loss = self._loss()
        rows.scales = self._with(new_d, new_offset)
        self._start()
        better = self._loss() < loss  # rounded as stored, so not always
        rows.scales = before
        rows.scales = self._with(torch.where(better, new_d, d), torch.where(better, new_offset, offset))
        self.value = torch.where(better, self.value, kept[0])
        self.gradient = torch.where(better, self.gradient, kept[1])

    def _loss(self) -> Tensor:
        """f32[rows]: the loss."""
        return ((self.value - self.target) * self.gradient).sum(0)

    def _least_squares(self, block: slice, slope: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
        """The step of (d, offset) of least loss, f32[rows] each."""
        hessian, gradient = self.hessian[block, block], slope[block]
        ha = hessian @ a
        aa, ag = (a * ha).sum(0), (a * gradient).sum(0)
        alone = torch.where(aa > 0, -ag / aa, 0.0)
        if b is None:
            return alone, torch.zeros_like(alone)
        ab, bb, bg = (b * ha).sum(0), (b * (hessian @ b)).sum(0), (b * gradient).sum(0)
        determinant = aa * bb - ab * ab
        good = determinant > 1e-6 * aa * bb
        step = torch.where(good, (ab * bg - bb * ag) / determinant, alone)
        return step, torch.where(good, (ab * ag - aa * bg) / determinant, 0.0)

    def _supers(self) -> tuple[Tensor, Tensor]:
        """(d, offset) as stored now, f32[blocks of a row, rows]; offset 0 where the grid has none."""
        d = self.rows.sideways(self.rows.scales.d.astype(np.float32))
        offset = self.rows.scales.offset
        return d, torch.zeros_like(d) if offset is None else self.rows.sideways(offset.astype(np.float32))

    def _with(self, d: Tensor, offset: Tensor) -> BlockScales:
        """The scales with these super-scales, rounded as they are stored."""
        flat = self.rows.upright(d).reshape(-1), self.rows.upright(offset).reshape(-1)
        none = self.rows.scales.offset is None
        return self.rows.grid.with_super(self.rows.scales, flat[0], None if none else flat[1])


def refine(rows: Rows, target: Tensor, hessian: Tensor, sweeps: int) -> None:
    """`sweeps` rounds of code descent, scale moves and super-scale refits, then codes once more."""
    descent = Descent(rows, target, hessian)
    for _ in range(sweeps):
        descent.sweep_codes()
        descent.move_scales()
        descent.refit_supers()
    descent.sweep_codes()
