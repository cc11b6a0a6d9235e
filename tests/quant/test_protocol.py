"""What a solver that knows no format relies on, on every grid: levels, legal moves, mixes of two, new super-scales."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.formats.ggml_packers import LAYOUTS, BlockScales, pack, unpack
from llmx.quant.grid import GRIDS, grid
from llmx.quant.protocol import Codes, Floats, Grid

COLS = 512
NAMES = (
    *GRIDS,
    *("NVFP4", "nvfp4", "mxfp4", "fp8-channel-float32", "fp8-tensor-float32"),
    *(
        "int4-g128-sym",
        "int4-g32-zp",
        "int4-g64-pos",
        "int8-channel-sym",
        "int8-g128-zp",
        "int2-g16-zp",
        "int3-g32-sym",
    ),
    *("int4-g256-zp-bfloat16", "int8-channel-zp-float32"),
)
every_grid = pytest.mark.parametrize("kind", [grid(name, COLS) for name in NAMES], ids=NAMES)
seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=8, deadline=None)


def problem(kind: Grid, seed: int) -> tuple[np.random.Generator, Floats, BlockScales, Codes]:
    """(random numbers, weights of several sizes, their scales, their codes)."""
    random = np.random.default_rng(seed)
    size = 10.0 ** random.uniform(-6, 2, (4, 1))
    size[0] = 1  # not all so small that a float16 holds no scale for them
    weight = (random.standard_t(4, (4, COLS)) * size).astype(np.float32)
    scales = kind.fit(weight)
    return random, weight, scales, kind.round(weight, scales)


def random_codes(kind: Grid, random: np.random.Generator, n: int) -> Codes:
    low, high = kind.allowed
    return random.integers(low, high, (n, kind.weights), dtype=np.uint8, endpoint=True)


def assert_same(one: BlockScales, other: BlockScales) -> None:
    for field in ("d", "offset", "scales", "mins"):
        wanted, got = getattr(one, field), getattr(other, field)
        assert (wanted is None) == (got is None), field
        assert wanted is None or (wanted.dtype == got.dtype and np.array_equal(wanted, got)), field


def assert_legal(kind: Grid, scales: BlockScales) -> None:
    """The scales come back from where they are stored as they are, and stand for finite numbers."""
    codes = np.full((len(scales.d), kind.weights), kind.allowed[1], np.uint8)
    if kind.name in LAYOUTS:
        again, _ = unpack(kind.name, pack(kind.name, scales, codes))
        assert_same(scales, replace(again, d=scales.d) if LAYOUTS[kind.name].d is None else again)
    else:
        assert_same(scales, kind.with_super(scales, scales.d.astype(np.float32)))
    assert np.isfinite(kind.decode(scales, codes)).all()


@every_grid
def test_levels_ascend_are_read_only_and_every_code_used_is_allowed(kind: Grid) -> None:
    low, high = kind.allowed
    assert 0 <= low < high < len(kind.levels)
    assert (np.diff(kind.levels[low : high + 1]) > 0).all()
    assert not kind.levels.flags.writeable
    codes = problem(kind, 0)[3]
    assert codes.min() >= low
    assert codes.max() <= high
    assert kind.weights % kind.size == 0
    assert COLS % kind.weights == 0


@every_grid
@few
@seeds
def test_decoding_is_scale_times_level_plus_offset(kind: Grid, seed: int) -> None:
    random, _, scales, _ = problem(kind, seed)
    codes = random_codes(kind, random, len(scales.d))
    scale, offset = kind.expand(scales)
    assert scale.shape == (len(codes), kind.weights // kind.size)
    assert scale.dtype == np.float32
    levels = kind.levels[codes].reshape(*scale.shape, -1)
    wanted = (scale[..., None] * levels + (0 if offset is None else offset[..., None])).reshape(codes.shape)
    got = kind.decode(scales, codes)
    # Runtimes subtract a zero point before they multiply: a float32 scale then rounds once, not twice.
    assert np.allclose(got, wanted, rtol=0, atol=0 if "float32" not in kind.name else 1e-6 * np.abs(wanted).max())


@every_grid
@few
@seeds
def test_rounding_what_was_decoded_changes_nothing(kind: Grid, seed: int) -> None:
    random, _, scales, _ = problem(kind, seed)
    value = kind.decode(scales, random_codes(kind, random, len(scales.d)))
    assert np.array_equal(kind.decode(scales, kind.round(value, scales)), value)


@every_grid
@few
@seeds
def test_neighbours_are_legal_differ_and_move_every_sub_block_that_can(kind: Grid, seed: int) -> None:
    _, _, scales, codes = problem(kind, seed)
    moves = kind.neighbours(scales)
    assert bool(moves) == (kind.name != "fp8-tensor-float32")
    for move in moves:
        assert_legal(kind, move)
        assert not np.array_equal(kind.decode(move, codes), kind.decode(scales, codes))
    # Every sub-block has somewhere to go, unless its scale is too small to have a neighbour.
    own = kind.expand(scales)
    moved = np.zeros(own[0].shape, bool)
    for move in moves:
        for mine, theirs in zip(own, kind.expand(move), strict=True):
            moved |= mine is not None and theirs is not None and mine != theirs
    assert not moves or moved[np.abs(own[0]) > 2.0**-10].all()


@every_grid
@few
@seeds
def test_a_merge_has_each_sub_block_from_one_of_the_two(kind: Grid, seed: int) -> None:
    random, _, scales, codes = problem(kind, seed)
    for other in kind.neighbours(scales):
        mask = random.random((len(codes), kind.weights // kind.size)) < 0.5
        mixed = kind.merge(scales, other, mask)
        assert_legal(kind, mixed)
        wanted = np.where(np.repeat(mask, kind.size, axis=1), kind.decode(other, codes), kind.decode(scales, codes))
        assert np.array_equal(kind.decode(mixed, codes), wanted)


@every_grid
@few
@seeds
def test_weights_are_linear_in_the_super_scales(kind: Grid, seed: int) -> None:
    random, _, scales, _ = problem(kind, seed)
    codes = random_codes(kind, random, len(scales.d))
    d = (scales.d.astype(np.float32) * random.uniform(0.9, 1.1, len(codes))).astype(np.float32)
    offset = None if scales.offset is None else scales.offset.astype(np.float32) * np.float32(0.9)
    for again in (scales, kind.with_super(scales, d, offset)):
        assert_legal(kind, again)
        first, second = kind.basis(again, codes)
        assert (second is None) == (scales.offset is None)
        value = first * again.d.astype(np.float32)[:, None]
        if second is not None and again.offset is not None:
            value = value + second * again.offset.astype(np.float32)[:, None]
        got = kind.decode(again, codes)
        assert np.allclose(value, got, rtol=1e-5, atol=1e-6 * np.abs(got).max(initial=0))


@every_grid
@few
@seeds
def test_the_super_scales_stored_are_those_given_as_near_as_they_come(kind: Grid, seed: int) -> None:
    if kind.name == "fp8-tensor-float32":
        return  # one block alone cannot have a new scale
    random, _, scales, codes = problem(kind, seed)
    d = (scales.d.astype(np.float32) * random.uniform(0.7, 1, len(codes))).astype(np.float32)
    again = kind.with_super(scales, d)
    wanted = kind.expand(scales)[0] * (d / np.where(scales.d == 0, 1, scales.d).astype(np.float32))[:, None]
    # Half a step: of a power of two, of E4M3 (or its subnormals), of float16 (or its subnormals under integer scales).
    relative, absolute = {
        "MXFP4": (0.34, 0.0),
        "mxfp4": (0.34, 0.0),
        "NVFP4": (2.0**-4, float(scales.d.max()) * 2.0**-11),
        "nvfp4": (2.0**-4, float(scales.d.max()) * 2.0**-11),
    }.get(kind.name, (2.0**-8 if "bfloat16" in kind.name else 2.0**-10, 2.0**-17))
    assert np.allclose(kind.expand(again)[0], wanted, rtol=relative, atol=absolute)
    assert_same(kind.with_super(scales, scales.d.astype(np.float32)), scales)


@every_grid
@few
@seeds
def test_least_squares_super_scales_do_not_raise_the_error_of_fixed_codes(kind: Grid, seed: int) -> None:
    if kind.name == "NVFP4":
        return  # four E4M3 scales, rounded each by itself
    _, weight, scales, codes = problem(kind, seed)
    target = weight.reshape(codes.shape)
    bent = kind.with_super(scales, scales.d.astype(np.float32) * np.float32(1.05), None)
    first, second = kind.basis(bent, codes)
    rest = target - (0 if second is None else second * bent.offset.astype(np.float32)[:, None])
    square = (first * first).sum(1)
    best = (first * rest).sum(1) / np.where(square > 0, square, 1)
    fixed = kind.with_super(bent, best, None)
    before = ((kind.decode(bent, codes) - target) ** 2).sum(1)
    after = ((kind.decode(fixed, codes) - target) ** 2).sum(1)
    assert (after <= before * 1.0001 + 1e-12).all()


@every_grid
def test_super_scales_are_kept_finite_and_of_the_sign_that_the_type_allows(kind: Grid) -> None:
    scales = problem(kind, 0)[2]
    n = len(scales.d)
    wild = np.resize(np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, -1.0, 1e-30], np.float32), n)
    again = kind.with_super(scales, wild, None if scales.offset is None else wild[::-1].copy())
    assert np.isfinite(again.d).all()
    assert again.offset is None or np.isfinite(again.offset).all()
    if again.mins is not None or "fp" in kind.name.lower() or "pos" in kind.name:
        assert (again.d >= 0).all()
    if again.mins is not None and again.offset is not None:
        assert (again.offset >= 0).all()
