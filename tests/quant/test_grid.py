"""The encoders: error, determinism, and what they do with weights that are no ordinary weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_decode import LEVELS, decode
from llmx.formats.ggml_packers import pack, unpack
from llmx.quant.grid import ENCODABLE, GRIDS, encode, overflow

ROWS, COLS = 24, 512
FINE_SCALES = [name for name in GRIDS if name != "MXFP4"]  # its scales are powers of two: see test_grids.py


def weights(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """Gaussian with rows of different sizes and a heavy tail, as trained matrices are."""
    random = np.random.default_rng(seed)
    return (random.standard_t(6, (rows, COLS)) * random.uniform(0.01, 0.1, (rows, 1))).astype(np.float32)


def importance(seed: int = 1) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, 1.5, COLS)).astype(np.float32)


def naive(type_name: str, weight: np.ndarray) -> np.ndarray:
    """The weights as plain rounding gives them: every sub-block on its own exact float range, no search."""
    levels, size = LEVELS[type_name], GRIDS[type_name].size
    blocks = weight.reshape(-1, size)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    if levels[0] == 0:
        low = np.minimum(low, 0)
        scale = (np.maximum(high, 0) - low) / levels[-1]
    else:
        scale, low = np.abs(blocks).max(1, keepdims=True) / levels[-1], 0
    target = (blocks - low) / np.where(scale > 0, scale, 1)
    near = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, target)]
    return (near * scale + low).reshape(weight.shape)


def error(weight: np.ndarray, again: np.ndarray, columns: np.ndarray | float = 1.0) -> float:
    return float((columns * (weight.astype(np.float64) - again) ** 2).sum())


@pytest.mark.parametrize("type_name", FINE_SCALES)
def test_the_error_is_below_that_of_plain_rounding_on_unquantized_scales(type_name: str) -> None:
    weight = weights()
    assert error(weight, decode(type_name, encode(type_name, weight))) < 0.98 * error(weight, naive(type_name, weight))


@pytest.mark.parametrize("type_name", GRIDS)
def test_importance_lowers_the_error_it_weighs(type_name: str) -> None:
    weight, columns = weights(), importance()
    plain = error(weight, decode(type_name, encode(type_name, weight)), columns)
    assert error(weight, decode(type_name, encode(type_name, weight, columns)), columns) < plain


@pytest.mark.parametrize("type_name", GRIDS)
def test_the_scale_of_importance_does_not_matter(type_name: str) -> None:
    weight, columns = weights(rows=4), importance()
    assert np.array_equal(encode(type_name, weight, columns), encode(type_name, weight, columns * np.float32(2.0**30)))


@pytest.mark.parametrize("type_name", ENCODABLE)
def test_the_bytes_do_not_depend_on_how_rows_are_cut_or_on_threads(type_name: str) -> None:
    weight, columns = weights(rows=37), importance()
    whole = encode(type_name, weight, columns)
    pieces = np.empty_like(whole)
    cuts = [slice(0, 1), slice(1, 6), slice(6, 23), slice(23, 37)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cut: encode(type_name, weight[cut], columns, pieces[cut]), cuts))
    assert np.array_equal(whole, pieces)


@pytest.mark.parametrize("type_name", ENCODABLE)
def test_a_tensor_of_many_chunks_is_the_same_as_its_rows(type_name: str) -> None:
    weight = weights(rows=300)
    whole = encode(type_name, weight)
    assert np.array_equal(whole[255:], encode(type_name, weight[255:]))


@pytest.mark.parametrize("type_name", GRIDS)
def test_zero_rows_are_zero_again(type_name: str) -> None:
    weight = weights(rows=3)
    weight[1] = 0
    assert not decode(type_name, encode(type_name, weight))[1].any()


@pytest.mark.parametrize("value", [0.3, -0.3, 0.05, -57.0])
@pytest.mark.parametrize("type_name", FINE_SCALES)
def test_constant_rows_come_back_within_the_precision_of_float16(type_name: str, value: float) -> None:
    again = decode(type_name, encode(type_name, np.full((2, COLS), value, np.float32)))
    assert np.abs(again - value).max() <= abs(value) * 2e-3


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-12, 1e-8, 1e-6, 1e3])
@pytest.mark.parametrize("type_name", ENCODABLE)
def test_tiny_and_large_weights_never_become_nan_and_err_by_a_few_steps_of_float16_at_most(
    type_name: str, scale: float
) -> None:
    weight = (weights(rows=4) * scale).astype(np.float32)
    again = decode(type_name, encode(type_name, weight, importance()))
    assert np.isfinite(again).all()
    assert np.abs(again - weight).max() <= max(np.abs(weight).max(), 16 * 2**-24)


@pytest.mark.parametrize("type_name", GRIDS)
def test_an_outlier_that_fits_is_stored_and_one_that_does_not_is_refused(type_name: str) -> None:
    weight = weights(rows=2)
    weight[1, 7] = np.float32(GRIDS[type_name].limit())
    again = decode(type_name, encode(type_name, weight))
    assert np.isfinite(again).all()
    assert again[1, 7] == pytest.approx(weight[1, 7], rel=0.15)
    weight[1, 7] *= 1.01
    assert "largest" in (overflow(type_name, weight) or "")
    with pytest.raises(IntegrityError, match="largest"):
        encode(type_name, weight)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_nan_and_infinity_are_refused_by_name(value: float, word: str) -> None:
    weight = weights(rows=2)
    weight[0, 3] = value
    for type_name in ENCODABLE:
        with pytest.raises(IntegrityError, match=word):
            encode(type_name, weight)


def test_a_sub_block_that_no_input_reaches_is_still_rounded_sensibly() -> None:
    weight, columns = weights(), importance()
    columns[:64] = 0
    for type_name in GRIDS:
        again = decode(type_name, encode(type_name, weight, columns))
        assert error(weight[:, :64], again[:, :64]) < 0.2 * float((weight[:, :64] ** 2).sum())


@pytest.mark.parametrize("broken", [np.zeros(COLS), np.full(COLS, np.nan), -np.ones(COLS), np.ones(COLS - 1)])
def test_a_broken_importance_is_refused(broken: np.ndarray) -> None:
    with pytest.raises(IntegrityError, match="importance"):
        encode("Q4_K", weights(), broken.astype(np.float32))


def test_a_row_of_no_whole_blocks_a_foreign_type_and_a_wrong_target_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="blocks of 256"):
        encode("Q4_K", np.zeros((1, 128), np.float32))
    with pytest.raises(UnsupportedError, match="Q4_K"):
        encode("IQ1_S", np.zeros((1, 256), np.float32))
    with pytest.raises(UsageError, match="out"):
        encode("Q4_K", np.zeros((1, 256), np.float32), out=np.zeros((1, 100), np.uint8))


@pytest.mark.parametrize("type_name", GRIDS)
def test_a_solver_can_freeze_the_scales_choose_codes_and_pack(type_name: str) -> None:
    grid, weight = GRIDS[type_name], weights()
    scales = grid.fit(weight)
    codes = grid.round(weight, scales)
    blocks = pack(type_name, scales, codes)
    assert np.array_equal(blocks.reshape(ROWS, -1), encode(type_name, weight))
    stored, same = unpack(type_name, blocks)
    assert np.array_equal(grid.decode(stored, same).reshape(weight.shape), decode(type_name, encode(type_name, weight)))


@pytest.mark.parametrize("type_name", GRIDS)
def test_rounding_finds_the_nearest_level_of_every_weight(type_name: str) -> None:
    grid, weight = GRIDS[type_name], weights(rows=4)
    scales = grid.fit(weight)
    scale, offset = grid.expand(scales)
    allowed = LEVELS[type_name] if type_name != "Q8_0" else LEVELS[type_name][1:]  # -128 is left out: see GRIDS
    values = scale[..., None] * allowed + (0 if offset is None else offset[..., None])
    wanted = np.abs(weight.reshape(*scale.shape, -1, 1) - values[:, :, None]).min(-1)
    got = np.abs(weight.reshape(-1) - grid.decode(scales, grid.round(weight, scales)).reshape(-1))
    assert got == pytest.approx(wanted.reshape(-1), abs=1e-6)


def test_read_only_weights_are_taken_and_left_alone() -> None:
    weight = weights(rows=2)
    weight.flags.writeable = False
    copy = weight.copy()
    encode("Q4_K", weight)
    assert np.array_equal(weight, copy)


def test_the_bytes_are_those_of_the_block_table() -> None:
    for type_name in ENCODABLE:
        assert encode(type_name, weights(rows=2)).shape == (2, row_bytes(type_name, COLS))
        assert type_name in BLOCKS
