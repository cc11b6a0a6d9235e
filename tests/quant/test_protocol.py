"""What a solver that knows no format relies on: levels, legal moves, mixes of two scales, new super-scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.formats.ggml_packers import BlockScales, pack, unpack
from llmx.quant.grid import GRIDS
from llmx.quant.protocol import Codes, Floats, Grid

COLS = 512
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=12, deadline=None)


def problem(grid: Grid, seed: int) -> tuple[np.random.Generator, Floats, BlockScales, Codes]:
    """(random numbers, weights of several sizes, their scales, their codes)."""
    random = np.random.default_rng(seed)
    size = 10.0 ** random.uniform(-6, 2, (4, 1))
    weight = (random.standard_t(4, (4, COLS)) * size).astype(np.float32)
    scales = grid.fit(weight)
    return random, weight, scales, grid.round(weight, scales)


def random_codes(grid: Grid, random: np.random.Generator, n: int) -> Codes:
    low, high = grid.allowed
    return random.integers(low, high, (n, grid.weights), dtype=np.uint8, endpoint=True)


def assert_legal(grid: Grid, scales: BlockScales) -> None:
    """The scales come back from the file as they are, and stand for finite numbers."""
    codes = np.full((len(scales.d), grid.weights), grid.allowed[1], np.uint8)
    again, _ = unpack(grid.name, pack(grid.name, scales, codes))
    for field in ("d", "offset", "scales", "mins"):
        wanted, got = getattr(scales, field), getattr(again, field)
        assert (wanted is None) == (got is None)
        assert wanted is None or (wanted.dtype == got.dtype and np.array_equal(wanted, got)), field
    assert np.isfinite(grid.decode(scales, codes)).all()


@every_grid
def test_levels_ascend_are_read_only_and_every_code_used_is_allowed(grid: Grid) -> None:
    assert (np.diff(grid.levels) > 0).all()
    assert not grid.levels.flags.writeable
    low, high = grid.allowed
    assert 0 <= low < high < len(grid.levels)
    codes = problem(grid, 0)[3]
    assert codes.min() >= low
    assert codes.max() <= high
    assert grid.weights % grid.size == 0


@every_grid
@few
@seeds
def test_decoding_is_scale_times_level_plus_offset(grid: Grid, seed: int) -> None:
    random, _, scales, _ = problem(grid, seed)
    codes = random_codes(grid, random, len(scales.d))
    scale, offset = grid.expand(scales)
    assert scale.shape == (len(codes), grid.weights // grid.size)
    levels = grid.levels[codes].reshape(*scale.shape, -1)
    wanted = scale[..., None] * levels + (0 if offset is None else offset[..., None])
    assert np.array_equal(grid.decode(scales, codes), wanted.reshape(codes.shape))


@every_grid
@few
@seeds
def test_neighbours_are_legal_differ_and_move_every_sub_block_that_can(grid: Grid, seed: int) -> None:
    _, _, scales, codes = problem(grid, seed)
    moves = grid.neighbours(scales)
    assert moves
    for move in moves:
        assert_legal(grid, move)
        assert not np.array_equal(grid.decode(move, codes), grid.decode(scales, codes))
    # Every sub-block has somewhere to go, unless its scale is too small to have a neighbour.
    own = grid.expand(scales)
    moved = np.zeros(own[0].shape, bool)
    for move in moves:
        for mine, theirs in zip(own, grid.expand(move), strict=True):
            moved |= mine is not None and theirs is not None and mine != theirs
    assert moved[np.abs(own[0]) > 2.0**-10].all()


@every_grid
@few
@seeds
def test_a_merge_has_each_sub_block_from_one_of_the_two(grid: Grid, seed: int) -> None:
    random, _, scales, codes = problem(grid, seed)
    for other in grid.neighbours(scales):
        mask = random.random((len(codes), grid.weights // grid.size)) < 0.5
        mixed = grid.merge(scales, other, mask)
        assert_legal(grid, mixed)
        wanted = np.where(np.repeat(mask, grid.size, axis=1), grid.decode(other, codes), grid.decode(scales, codes))
        assert np.array_equal(grid.decode(mixed, codes), wanted)


@every_grid
@few
@seeds
def test_weights_are_linear_in_the_super_scales(grid: Grid, seed: int) -> None:
    random, _, scales, _ = problem(grid, seed)
    codes = random_codes(grid, random, len(scales.d))
    first, second = grid.basis(scales, codes)
    assert (second is None) == (scales.offset is None)
    d = (scales.d.astype(np.float32) * random.uniform(0.9, 1.1, len(codes))).astype(np.float32)
    offset = None if scales.offset is None else scales.offset.astype(np.float32) * np.float32(0.9)
    for again in (scales, grid.with_super(scales, d, offset)):
        assert_legal(grid, again)
        value = first * again.d.astype(np.float32)[:, None]
        if second is not None and again.offset is not None:
            value = value + second * again.offset.astype(np.float32)[:, None]
        got = grid.decode(again, codes)
        assert np.allclose(value, got, rtol=1e-5, atol=1e-6 * np.abs(got).max(initial=0))


@every_grid
@few
@seeds
def test_least_squares_super_scales_do_not_raise_the_error_of_fixed_codes(grid: Grid, seed: int) -> None:
    _, weight, scales, codes = problem(grid, seed)
    target = weight.reshape(codes.shape)
    first, second = grid.basis(scales, codes)
    bent = grid.with_super(scales, scales.d.astype(np.float32) * np.float32(1.05), None)
    rest = target - (0 if second is None else second * bent.offset.astype(np.float32)[:, None])
    square = (first * first).sum(1)
    best = (first * rest).sum(1) / np.where(square > 0, square, 1)
    fixed = grid.with_super(bent, best, None)
    before = ((grid.decode(bent, codes) - target) ** 2).sum(1)
    after = ((grid.decode(fixed, codes) - target) ** 2).sum(1)
    assert (after <= before * 1.0001 + 1e-12).all()


@every_grid
def test_super_scales_are_kept_finite_and_of_the_sign_that_the_type_allows(grid: Grid) -> None:
    scales = problem(grid, 0)[2]
    n = len(scales.d)
    wild = np.resize(np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, -1.0, 1e-30], np.float32), n)
    again = grid.with_super(scales, wild, None if scales.offset is None else wild[::-1].copy())
    assert np.isfinite(again.d).all()
    assert again.offset is None or np.isfinite(again.offset).all()
    if again.mins is not None and again.offset is not None:
        assert (again.d >= 0).all()
        assert (again.offset >= 0).all()
