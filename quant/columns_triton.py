"""The loops over columns as Triton kernels: a program takes a few rows and walks the columns of a block.

A column is brought up to date when its turn comes, from what the columns before it in the block have done:

    w_j = w_j − Σ U_ij error_i            g_j = g_j + Σ H_ij change_i            i < j

so all that a program carries along is a tile of errors or changes, f32[columns, rows], zero where none has been yet.
Loads of the next column are issued before the sums of this one, because its latency is all that a step costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from llmx.quant.columns import BLOCK, Levels

Tensor = torch.Tensor
ROWS, WARPS = 16, 4  # of a program
MOVE_WARPS = {16: 8, 32: 8}  # weights of a sub-block -> warps whose registers hold its tiles
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and taking it away leaves the nearest whole number
TINY = tl.constexpr(1e-30)


@triton.jit
def _nearest(v, low, high, table, middles, count: tl.constexpr):
    """The level nearest to v. middles: f32[width], infinity after the last."""
    if count == 0:
        found = (tl.minimum(tl.maximum(v, low), high) + ROUND) - ROUND
    else:
        found = tl.load(table + tl.sum((v[:, None] > middles[None, :]).to(tl.int32), axis=1))
    return found


@triton.jit
def _wanted(v, scale, offset):
    """v in steps of its scale."""
    return (v - offset) * tl.where(tl.abs(scale) > TINY, 1.0 / scale, 0.0)


@triton.jit(do_not_specialize=["rows", "columns"])
def _gptq(
    w, shares, scale, offset, level, error, rows, columns, low, high, table, middles,
    count: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """shares: f32[columns, columns], U transposed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, BLOCK)
    k = tl.arange(0, width)
    halfway = tl.load(middles + k, mask=k < count, other=float("inf"))
    errors = tl.zeros((BLOCK, ROWS), tl.float32)
    next_w, next_s, next_o = tl.load(w + row, real), tl.load(scale + row, real), tl.load(offset + row, real)
    next_share = tl.load(shares + place, place < columns, 0.0)
    next_own = tl.load(shares)
    for j in range(columns):
        v, s, o, share, own = next_w, next_s, next_o, next_share, next_own
        after = tl.minimum(j + 1, columns - 1)
        at = after * rows + row
        next_w, next_s, next_o = tl.load(w + at, real), tl.load(scale + at, real), tl.load(offset + at, real)
        next_share = tl.load(shares + after * columns + place, place < columns, 0.0)
        next_own = tl.load(shares + after * columns + after)
        v -= tl.sum(share[:, None] * errors, axis=0)
        found = _nearest(_wanted(v, s, o), low, high, table, halfway, count)
        lost = (v - (s * found + o)) / own
        errors = tl.where(place[:, None] == j, lost[None, :], errors)
        tl.store(level + j * rows + row, found, real)
        tl.store(error + j * rows + row, lost, real)


@triton.jit(do_not_specialize=["rows", "columns"])
def _descend(
    value, gradient, hessian, scale, offset, level, change, rows, columns, low, high, table, middles,
    count: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    place = tl.arange(0, BLOCK)
    k = tl.arange(0, width)
    halfway = tl.load(middles + k, mask=k < count, other=float("inf"))
    changes = tl.zeros((BLOCK, ROWS), tl.float32)
    next_v, next_g, next_l = tl.load(value + row, real), tl.load(gradient + row, real), tl.load(level + row, real)
    next_s, next_o = tl.load(scale + row, real), tl.load(offset + row, real)
    next_share = tl.load(hessian + place, place < columns, 0.0)
    next_own = tl.load(hessian)
    for j in range(columns):
        v, g, old, s, o, share, own = next_v, next_g, next_l, next_s, next_o, next_share, next_own
        after = tl.minimum(j + 1, columns - 1)
        at = after * rows + row
        next_v, next_g, next_l = tl.load(value + at, real), tl.load(gradient + at, real), tl.load(level + at, real)
        next_s, next_o = tl.load(scale + at, real), tl.load(offset + at, real)
        next_share = tl.load(hessian + after * columns + place, place < columns, 0.0)
        next_own = tl.load(hessian + after * columns + after)
        g += tl.sum(share[:, None] * changes, axis=0)
        found = _nearest(_wanted(v - g / own, s, o), low, high, table, halfway, count)
        step = tl.where(found == old, 0.0, s * found + o - v)
        changes = tl.where(place[:, None] == j, step[None, :], changes)
        tl.store(value + j * rows + row, v + step, real)
        tl.store(level + j * rows + row, found, real)
        tl.store(change + j * rows + row, step, real)


@triton.jit(do_not_specialize=["rows", "columns", "next_move", "moves"])
def _move(
    level, gradient, hessian, scales, offsets, chosen, change, rows, columns, next_move, moves,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """change is zero at the start. next_move: from one move's steps to those of the next."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    inside = tl.arange(0, SIZE)
    place = tl.arange(0, BLOCK)
    tile = real[None, :] & (place < columns)[:, None]
    for sub in range(columns // SIZE):
        at = sub * SIZE + inside
        own = at[:, None] * rows + row[None, :]
        levels = tl.load(level + own, real[None, :], 0.0)
        slope = tl.load(gradient + own, real[None, :], 0.0)
        before = tl.load(change + place[:, None] * rows + row[None, :], tile, 0.0)
        across = tl.load(hessian + at[:, None] * columns + place[None, :], (place < columns)[None, :], 0.0)
        slope += tl.dot(across, before, input_precision="ieee")
        block = tl.load(hessian + at[:, None] * columns + at[None, :])
        pulled = tl.dot(block, levels, input_precision="ieee")
        ll, lo, oo = tl.sum(levels * pulled, axis=0), tl.sum(pulled, axis=0), tl.sum(tl.sum(block, axis=1), axis=0)
        lg, og = tl.sum(levels * slope, axis=0), tl.sum(slope, axis=0)
        best, picked = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32)
        best_s, best_o = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        for move in range(moves):
            ds = tl.load(scales + move * next_move + sub * rows + row, real, 0.0)
            do = tl.load(offsets + move * next_move + sub * rows + row, real, 0.0)
            gain = ds * ds * ll + 2 * ds * do * lo + do * do * oo + 2 * (ds * lg + do * og)
            better = gain < best
            best, picked = tl.where(better, gain, best), tl.where(better, move + 1, picked)
            best_s, best_o = tl.where(better, ds, best_s), tl.where(better, do, best_o)
        tl.store(chosen + sub * rows + row, picked, real)
        tl.store(change + own, levels * best_s[None, :] + best_o[None, :], real[None, :])
        tl.debug_barrier()  # the next sub-block reads it


def gptq(
    w: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Levels, level: Tensor, error: Tensor
) -> None:
    """Fills level and error, f32[columns, rows]; the arguments are those of `llmx.quant.columns.gptq_block`."""
    _walk(_gptq, (w, factor.T.contiguous(), scale, offset, level, error), levels)


def descend(
    value: Tensor, gradient: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, levels: Levels, level: Tensor,
    change: Tensor,
) -> None:  # fmt: skip
    """Fills change and brings value and level up to date; as `llmx.quant.columns.descend_block`."""
    _walk(_descend, (value, gradient, hessian, scale, offset, level, change), levels)


def move(
    level: Tensor, gradient: Tensor, hessian: Tensor, ds: Tensor, do: Tensor, chosen: Tensor, change: Tensor
) -> None:
    """Fills chosen and change, zero before; as `llmx.quant.columns.move_block`."""
    columns, rows = level.shape
    size = columns // len(chosen)
    arrays = (level, gradient, hessian)
    assert all(array.is_contiguous() for array in arrays)
    assert ds.stride() == do.stride()
    assert ds.stride()[1:] == (rows, 1)
    kernel: Any = _move
    kernel[(triton.cdiv(rows, ROWS),)](
        *arrays, ds, do, chosen, change, rows, columns, ds.stride(0), len(ds),
        SIZE=size, BLOCK=BLOCK, ROWS=ROWS, num_warps=MOVE_WARPS[size],
    )  # fmt: skip


def can_move(size: int) -> bool:
    """Whether `move` takes sub-blocks of that many weights."""
    return size in MOVE_WARPS


def attempt() -> None:
    """Run a kernel on two columns. Raises: RuntimeError, OSError, CalledProcessError where none can be compiled."""
    ones = torch.ones(2, 2, device="cuda")
    none = np.empty(0, np.float32)
    _walk(_gptq, (ones, ones, ones, ones, ones.clone(), ones.clone()), Levels(0.0, 1.0, none, none))


def _walk(kernel: Any, arrays: tuple[Tensor, ...], levels: Levels) -> None:
    assert all(array.is_contiguous() for array in arrays)
    columns, rows = arrays[0].shape
    assert columns <= BLOCK
    count = levels.middles.size
    table, middles = levels.on(arrays[0].device) if count else arrays[:2]  # not looked at without middles
    kernel[(triton.cdiv(rows, ROWS),)](
        *arrays, rows, columns, levels.low, levels.high, table, middles,
        count=count, width=triton.next_power_of_2(max(count, 1)), BLOCK=BLOCK, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
