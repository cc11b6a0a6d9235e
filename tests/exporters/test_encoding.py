"""One protocol over both kinds of kept rows: rounding, packing and decoding agree, whatever the format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.exporters.encoding import CHUNK, ENCODINGS, GROUP_ENCODINGS, SOLVABLE, encoding, fitting
from llmx.formats import ggml_decode, ggml_packers
from llmx.quant import grid as grids

NAMES = (
    "int2-g16-zp", "int2-g32-sym-float32", "int4-g32-zp-float32", "int4-g128-sym", "int4-g64-pos-bfloat16",
    "int8-g32-sym-float32", "int8-g256-zp", "int8-channel-sym-float32", "int4-channel-zp",
)  # fmt: skip
BLOCK_NAMES = ("Q4_0", "Q4_K", "IQ4_XS", "Q8_0", "MXFP4")


def some_weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, cols)).astype(np.float32)


def some_importance(cols: int) -> np.ndarray:
    return np.random.default_rng(1).gamma(1.0, size=cols).astype(np.float32)


@pytest.mark.parametrize("name", [*NAMES, *BLOCK_NAMES])
def test_encoding_is_fitting_rounding_and_packing(name: str) -> None:
    weight, importance, kept = some_weights(6, 512), some_importance(512), encoding(name)
    grid = kept.grid(512)
    scales = grid.fit(weight, importance)
    codes = grid.round(weight, scales)
    data = kept.encode(weight, importance)
    assert data.shape == (6, kept.row_bytes(512)) and kept.bits(512) == 8 * data.shape[1] / 512
    assert np.array_equal(kept.pack(scales, codes.reshape(6, 512)), data)
    assert np.array_equal(kept.decode(data, 512), grid.decode(scales, codes).reshape(6, 512))


@pytest.mark.parametrize("name", ["int4-g32-zp-float32", "Q4_K"])
def test_rows_are_packed_where_they_are_wanted(name: str) -> None:
    weight, kept = some_weights(5, 256), encoding(name)
    scales = kept.grid(256).fit(weight)
    codes = kept.grid(256).round(weight, scales).reshape(5, 256)
    wide = np.zeros((5, kept.row_bytes(256) + 3), np.uint8)
    assert kept.pack(scales, codes, wide[:, 1:-2]) is not None
    assert np.array_equal(wide[:, 1:-2], kept.pack(scales, codes)) and not wide[:, [0, -1, -2]].any()


@given(st.sampled_from(NAMES), st.integers(1, 300), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_of_any_length_come_back_within_a_step(name: str, cols: int, rows: int, important: bool) -> None:
    kept, weight = encoding(name), some_weights(rows, cols, cols)
    data = kept.encode(weight, some_importance(cols) if important else None)
    found = kept.decode(data, cols)
    assert found.shape == weight.shape and found.dtype == np.float32
    layout = GROUP_ENCODINGS[name].layout
    # The range of a group, zero in it, cut in 2^bits - 1 steps; the search may give up a step at the end.
    step = (max(weight.max(), 0) - min(weight.min(), 0)) / ((1 << layout.bits) - 1) * 2
    assert np.abs(found - weight).max() <= 2.5 * step


@pytest.mark.parametrize("name", ["int4-g32-zp-float32", "int8-channel-sym-float32", "Q4_K"])
def test_any_cut_of_rows_makes_the_same_bytes(name: str) -> None:
    cols, importance, kept = 1024, some_importance(1024), encoding(name)
    rows = 2 * CHUNK // cols + 3
    weight = some_weights(rows, cols)
    whole = kept.encode(weight, importance)
    pieces = [kept.encode(weight[start : start + 7], importance) for start in range(0, rows, 7)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(np.concatenate([kept.decode(piece, cols) for piece in pieces]), kept.decode(whole, cols))


def test_a_block_encoding_writes_what_gguf_files_hold() -> None:
    weight = some_weights(3, 512)
    for name in BLOCK_NAMES:
        kept, grid = encoding(name), grids.GRIDS[name]
        scales = grid.fit(weight)
        codes = grid.round(weight, scales)
        packed = ggml_packers.pack(name, scales, codes).reshape(3, -1)
        assert np.array_equal(kept.pack(scales, codes.reshape(3, -1)), packed)
        assert np.array_equal(kept.decode(packed, 512), ggml_decode.decode(name, packed))


def test_every_group_encoding_has_the_name_of_its_grid() -> None:
    assert len(GROUP_ENCODINGS) == 3 * 6 * 3 * 3 and GROUP_ENCODINGS.keys() < ENCODINGS.keys()
    for name, kept in GROUP_ENCODINGS.items():
        grid = kept.grid(512)
        assert grid.name == name == kept.name and len(grid.levels) == 1 << kept.layout.bits
        assert name in SOLVABLE and kept.solvable(512)


def test_bits_count_scales_and_zero_points() -> None:
    told = {"int4-g32-sym-float32": 5.0, "int4-g32-zp-float32": 5.125, "int4-g128-sym": 4.125, "int8-channel-sym": 8.0}
    assert {name: round(encoding(name).bits(4096), 2) for name in told} == {n: round(b, 2) for n, b in told.items()}
    assert encoding("F16").bits(100) == 16


def test_short_groups_are_kept_and_not_solved() -> None:
    kept = encoding("int4-g32-sym")
    assert kept.solvable(64) and not kept.solvable(50) and not encoding("F16").solvable(64)
    assert not encoding("Q4_K").solvable(64)
    with pytest.raises(UnsupportedError, match="whole number of int4-g32-sym"):
        kept.grid(50)


def test_a_short_group_is_filled_up_with_what_stands_for_zero() -> None:
    kept = GROUP_ENCODINGS["int4-g32-zp-float32"]
    weight = some_weights(2, 40) + np.float32(0.05)
    data = kept.encode(weight)
    full = kept.decode(np.ascontiguousarray(data), 40)
    # The same bytes read as a row of 64 weights: the 24 that nobody gave are zero.
    padded = kept.decode(data, 64)
    assert np.array_equal(padded[:, :40], full) and not padded[:, 40:].any()


@pytest.mark.parametrize("name", ["int4-g32-zp-float32", "Q4_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_weights_that_cannot_be_kept_are_refused(name: str, value: float) -> None:
    weight = some_weights(2, 64)
    weight[1, 3] = value
    with pytest.raises(IntegrityError, match=r"holds NaN|holds infinity|NaN or infinity|largest that"):
        encoding(name).encode(weight)


def test_an_importance_of_another_length_is_refused() -> None:
    with pytest.raises(IntegrityError, match="64 columns"):
        encoding("int4-g32-sym").encode(some_weights(2, 64), np.ones(32, np.float32))


def test_rows_of_other_bytes_are_refused() -> None:
    for name in ("int4-g32-sym", "Q4_0"):
        with pytest.raises(IntegrityError, match=r"not 64|bytes, not"):
            encoding(name).decode(np.zeros((2, encoding(name).row_bytes(96)), np.uint8), 64)


@pytest.mark.parametrize("name", ["int3-g32-sym", "int4-g48-sym", "fp8-tensor", "int4"])
def test_an_unknown_encoding_names_the_choices(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name) as told:
        encoding(name)
    assert told.value.fix is not None and "Q4_K" in told.value.fix and "int{2|4|8}" in told.value.fix


@pytest.mark.parametrize(
    ("name", "cols", "kept"),
    [
        ("int4-g32-zp-float32", 64, "int4-g32-zp-float32"),
        ("int4-g32-zp-float32", 48, "int4-g16-zp-float32"),
        ("int4-g256-sym", 192, "int4-g64-sym"),
        ("int4-g32-zp-float32", 50, "int4-g32-zp-float32"),
        ("int8-channel-sym", 50, "int8-channel-sym"),
    ],
)
def test_a_group_that_does_not_divide_its_rows_becomes_the_largest_that_does(name: str, cols: int, kept: str) -> None:
    assert fitting(name, cols) == kept


def test_only_groups_are_made_to_fit() -> None:
    with pytest.raises(UsageError, match="Q4_K"):
        fitting("Q4_K", 64)
