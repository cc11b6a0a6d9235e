"""The loops over columns that GPTQ and exact descent are made of: numba on the CPU, Triton on a GPU.

Rows are independent, so they lie side by side in SIMD lanes: every array is f32[columns, rows]. The loops work on a
block of columns; what a block does to the columns outside it is one matrix product, the caller's. On a GPU without
Triton torch's own operations serve, a hundred times more slowly.
"""

from __future__ import annotations

import subprocess
import warnings
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from llmx.quant.compiled import compiled
from llmx.quant.lanes import f32

Tensor = torch.Tensor
TINY = f32(1e-30)
BLOCK = 128  # columns solved before the others hear of it


class Levels(NamedTuple):
    """A grid's levels for the kernels: low … high in steps of one, or a table where `middles` is not empty."""

    low: float
    high: float
    table: np.ndarray[Any, Any]  # f32[k], ascending
    middles: np.ndarray[Any, Any]  # f32[k - 1], half-way between neighbours

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """table and middles on a GPU, sent there once."""
        return _sent(self.table.tobytes(), self.middles.tobytes(), device)


def levels_of(levels: np.ndarray[Any, Any], allowed: tuple[int, int]) -> Levels:
    """The kernels' view of a grid's levels, from the lowest allowed code to the highest."""
    table = np.ascontiguousarray(levels[allowed[0] : allowed[1] + 1], np.float32)
    even = bool((np.diff(table) == 1).all())
    middles = np.empty(0, np.float32) if even else (table[1:] + table[:-1]) / np.float32(2)
    return Levels(float(table[0]), float(table[-1]), table, middles)


@lru_cache(maxsize=256)
def _sent(table: bytes, middles: bytes, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = (torch.tensor(np.frombuffer(part, np.float32), device=device) for part in (table, middles))
    return first, second


@compiled
def _nearest(v, low, high, table, middles):
    if middles.size == 0:
        return min(max(np.rint(v), low), high)
    place = 0
    for k in range(middles.size):
        place += 1 if v > middles[k] else 0
    return table[place]


@compiled
def _nearest_row(v, inverse, offset, low, high, table, middles, out):
    """out = the level nearest to (v - offset) · inverse, lane by lane."""
    if middles.size == 0:
        for r in range(v.size):
            out[r] = min(max(np.rint((v[r] - offset[r]) * inverse[r]), low), high)
    else:
        for r in range(v.size):
            out[r] = _nearest((v[r] - offset[r]) * inverse[r], low, high, table, middles)


@compiled
def _gptq(w, factor, scale, offset, low, high, table, middles, level, error):
    """Round column by column; error[j] = (w_j − ŵ_j) / U_jj, spread over the later columns of the block."""
    columns, rows = w.shape
    inverse = np.empty(rows, f32)
    for j in range(columns):
        for r in range(rows):
            inverse[r] = f32(1) / scale[j, r] if abs(scale[j, r]) > TINY else f32(0)
        _nearest_row(w[j], inverse, offset[j], low, high, table, middles, level[j])
        over = f32(1) / factor[j, j]
        for r in range(rows):
            error[j, r] = (w[j, r] - (scale[j, r] * level[j, r] + offset[j, r])) * over
        for k in range(j + 1, columns):
            share = factor[j, k]
            for r in range(rows):
                w[k, r] -= share * error[j, r]


@compiled
def _descend(value, gradient, hessian, scale, offset, low, high, table, middles, level, change):
    """Move each column to its best level, the others fixed; gradient = H (ŵ − w*) of the block, kept up to date."""
    columns, rows = value.shape
    inverse, wanted, found = np.empty(rows, f32), np.empty(rows, f32), np.empty(rows, f32)
    for j in range(columns):
        over = f32(1) / hessian[j, j]
        for r in range(rows):
            inverse[r] = f32(1) / scale[j, r] if abs(scale[j, r]) > TINY else f32(0)
            wanted[r] = value[j, r] - gradient[j, r] * over
        _nearest_row(wanted, inverse, offset[j], low, high, table, middles, found)
        moved = False
        for r in range(rows):
            new = scale[j, r] * found[r] + offset[j, r]
            step = new - value[j, r] if found[r] != level[j, r] else f32(0)
            change[j, r] = step
            moved |= step != f32(0)
            value[j, r] += step
            level[j, r] = found[r]
        if moved:
            for k in range(columns):
                share = hessian[j, k]
                for r in range(rows):
                    gradient[k, r] += share * change[j, r]


def gptq_block(w: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """(level, error), f32[columns, rows], of one block of columns; w is used up.

    factor: f32[columns, columns], the block of the upper factor U, H⁻¹ = Uᵀ U.
    """
    level, error = torch.empty_like(w), torch.empty_like(w)
    if w.device.type == "cpu":
        _gptq(*_arrays(w, factor, scale, offset), *_kernel(levels), level.numpy(), error.numpy())
    elif kernels := triton_kernels():
        kernels.gptq(w, factor, scale, offset, levels, level, error)
    else:
        for j in range(len(w)):
            level[j] = _nearest_of(levels, w[j], scale[j], offset[j])
            error[j] = (w[j] - (scale[j] * level[j] + offset[j])) / factor[j, j]
            w[j + 1 :].addr_(factor[j, j + 1 :], error[j], alpha=-1)
    return level, error


def descend_block(
    value: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, levels: Levels, level: Tensor
) -> Tensor:
    """One sweep of code descent over a block; value and level are brought up to date, the change returned."""
    change = torch.zeros_like(value)
    if value.device.type == "cpu":
        # The kernel keeps its own copy of the gradient: the caller's product brings all of it up to date.
        arrays = _arrays(value, gradient.clone(), hessian, scale, offset)
        _descend(*arrays, *_kernel(levels), level.numpy(), change.numpy())
    elif kernels := triton_kernels():
        kernels.descend(value, gradient, hessian, scale, offset, levels, level, change)
    else:
        gradient = gradient.clone()
        for j in range(len(value)):
            found = _nearest_of(levels, value[j] - gradient[j] / hessian[j, j], scale[j], offset[j])
            step = torch.where(found == level[j], 0.0, scale[j] * found + offset[j] - value[j])
            change[j], level[j] = step, found
            value[j] += step
            gradient.addr_(hessian[j], step)
    return change


def moved_together(size: int, device: torch.device) -> int:
    """Columns whose sub-blocks of that size `move_block` takes at once; `size` where it serves none."""
    if device.type == "cpu" or (kernels := triton_kernels()) is None:
        return size
    return BLOCK if kernels.can_move(size) else size


def move_block(level: Tensor, gradient: Tensor, hessian: Tensor, ds: Tensor, do: Tensor) -> tuple[Tensor, Tensor]:
    """Of every sub-block, one after another, the step of (scale, offset) that lowers the loss most; needs Triton.

    ds, do: f32[steps, subs, rows]. Returns the number of the step from 1, 0 for none, u8[subs, rows]; and the change
    of the values, f32[columns, rows].
    """
    chosen = torch.empty(ds.shape[1:], dtype=torch.uint8, device=level.device)
    change = torch.zeros_like(level)
    kernels = triton_kernels()
    assert kernels is not None, "see moved_together"
    kernels.move(level, gradient, hessian.contiguous(), ds, do, chosen, change)
    return chosen, change


@cache
def triton_kernels() -> ModuleType | None:
    """The loops for a CUDA GPU, tried once on two columns; None, with a warning, where Triton cannot compile them."""
    try:
        from llmx.quant import columns_triton

        columns_triton.attempt()
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        warnings.warn(
            f"Triton cannot be used ({problem}): the GPU solves as well without it, and many times more slowly; "
            "Triton comes with torch for CUDA and needs a C compiler and Python's headers",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return columns_triton


def _arrays(*tensors: Tensor) -> list[np.ndarray[Any, Any]]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.numpy() for tensor in tensors]


def _kernel(levels: Levels) -> tuple[Any, ...]:
    return f32(levels.low), f32(levels.high), levels.table, levels.middles


def _nearest_of(levels: Levels, v: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """_nearest_row in torch."""
    wanted = (v - offset) * torch.where(scale.abs() > float(TINY), 1 / scale, 0.0)
    if not levels.middles.size:
        return wanted.round().clamp(levels.low, levels.high)
    table, middles = levels.on(v.device)
    return table[torch.bucketize(wanted, middles)]
