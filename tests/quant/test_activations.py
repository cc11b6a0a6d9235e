"""Inputs in 8 bits: where static codes are laid, and what a row's own scale keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from llmx.quant.activations import (
    LEVELS,
    MIDDLE,
    QUANTIZERS,
    TOP,
    UNIT,
    InputScale,
    Kind,
    Sample,
    Samples,
    affine,
    best_scale,
    rounded,
    rounded_by_row,
)
from llmx.quant.protocol import Floats

RANDOM = np.random.default_rng(8)


def given(rows: Floats) -> Sample:
    counts = np.ones((len(rows), 1), np.float32)
    return Sample(rows, counts, np.abs(rows).max(0), min(float(rows.min()), 0.0), max(float(rows.max()), 0.0))


def normal(rows: int = 64, cols: int = 32) -> Floats:
    return RANDOM.standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize("ends", [(-3.0, 1.0), (0.0, 5.0), (-2.0, 0.0), (0.0, 0.0)])
def test_codes_reach_from_end_to_end_and_zero_is_one_of_them(ends: tuple[float, float]) -> None:
    scale = affine(*ends)
    assert scale.scale > 0 and 0 <= scale.zero_point <= TOP
    values = np.array([*ends, 0], np.float32)
    assert np.abs(rounded(values, scale) - values).max() <= scale.scale
    assert rounded(values, scale)[2] == 0


def test_what_lies_outside_is_clipped() -> None:
    assert rounded(np.array([-9, 9], np.float32), affine(-1, 1)) == pytest.approx([-1, 1], abs=0.01)


def test_a_single_far_value_is_clipped_unless_it_stands_for_many() -> None:
    rows = normal(4096)
    rows[0, 0] = 15

    def high(scale: InputScale) -> float:
        return (TOP - scale.zero_point) * scale.scale

    assert 4 < high(best_scale(given(rows))) < 12
    weighed = given(rows)
    weighed.counts[0] = 1e4
    assert high(best_scale(weighed)) > 14.5


def test_the_best_scale_loses_no_more_than_the_whole_range() -> None:
    for rows in (normal(), np.abs(normal()), normal() ** 5, np.zeros((4, 3), np.float32)):
        found, whole = best_scale(given(rows)), affine(min(rows.min(), 0), max(rows.max(), 0))
        losses = [np.square(rounded(rows, scale) - rows, dtype=np.float64).sum() for scale in (found, whole)]
        assert losses[0] <= losses[1] * (1 + 1e-5)  # the ends themselves are rounded to float32


def test_rows_are_rounded_each_on_a_scale_of_its_own_and_zeros_stay() -> None:
    rows = normal()
    rows[3], rows[5] = 0, rows[5] * 1e4
    found = rounded_by_row(rows)
    assert not found[3].any()
    assert (np.abs(found - rows).max(1) <= np.abs(rows).max(1) / LEVELS * 0.501).all()
    assert np.array_equal(found[:3], rounded_by_row(rows[:3]))


def test_a_row_divided_by_its_magnitude_fits_the_unit_scale() -> None:
    rows = normal()
    largest = np.abs(rows).max(1, keepdims=True)
    assert np.allclose(rounded(rows / largest, UNIT) * largest, rounded_by_row(rows), atol=1e-6)
    assert UNIT.zero_point == MIDDLE


def test_divided_columns_keep_the_ends_of_their_rows() -> None:
    some = replace(given(normal()), low=-99.0)
    half = some.divided(np.full(32, 2, np.float32))
    assert np.array_equal(half.rows, some.rows / 2) and np.array_equal(half.largest, some.largest / 2)
    assert half.low == half.rows.min() and half.high == half.rows.max()


# ── zero in the middle ───────────────────────────────────────────────────────────────────────────────────────────────

MIDDLES: tuple[Kind, ...] = ("int8", "fp8")


def error(rows: Floats, scale: InputScale) -> float:
    return float(np.square(rounded(rows, scale) - rows, dtype=np.float64).sum())


@for_all(st.integers(0, 2**32 - 1), st.integers(-12, 12))
@settings(max_examples=60, deadline=None)
def test_fp8_is_what_torch_rounds_to(seed: int, power: int) -> None:
    random = np.random.default_rng(seed)
    values = (random.standard_normal(400) * np.exp(random.normal(0, 3, 400))).astype(np.float32)
    values[:4] = 0, 1e30, -1e30, 2.0**-10
    scale = InputScale(2.0**power, 0, "fp8")
    theirs = (torch.from_numpy(values) / scale.scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale.scale
    assert np.array_equal(rounded(values, scale), theirs.numpy())


def test_int8_is_what_quantizelinear_rounds_to() -> None:
    values = np.array([0.4, 0.6, -0.6, 126.7, 300, -300, 2.5, 3.5], np.float32)
    assert rounded(values, InputScale(1.0, 0, "int8")).tolist() == [0, 1, -1, 127, 127, -128, 2, 4]


@pytest.mark.parametrize("kind", MIDDLES)
def test_zero_is_in_the_middle_and_the_farther_end_counts(kind: Kind) -> None:
    rows = normal(256)
    for part in (rows, -np.abs(rows), np.abs(rows)):
        found = best_scale(given(part), kind)
        assert found.zero_point == 0 and found.kind == kind and found.scale > 0
        reach = found.scale * (127 if kind == "int8" else 448)
        assert reach <= np.abs(part).max() * 1.001
        assert not rounded(np.zeros(3, np.float32), found).any()
    assert best_scale(given(np.zeros((4, 3), np.float32)), kind).scale == 1.0


@pytest.mark.parametrize("kind", MIDDLES)
def test_the_best_scale_in_the_middle_loses_no_more_than_the_whole_range(kind: Kind) -> None:
    top = 127 if kind == "int8" else 448
    for rows in (normal(), np.abs(normal()), normal() ** 5):
        whole = InputScale(float(np.abs(rows).max()) / top, 0, kind)
        assert error(rows, best_scale(given(rows), kind)) <= error(rows, whole) * (1 + 1e-5)


def test_a_single_far_value_is_clipped_by_whole_numbers_and_kept_by_floats() -> None:
    rows = normal(4096)
    rows[0, 0] = 60
    assert 127 * best_scale(given(rows), "int8").scale < 45
    assert 448 * best_scale(given(rows), "fp8").scale > 50


def test_codes_from_zero_use_the_range_of_one_sided_inputs_better() -> None:
    rows = np.abs(normal(512))
    assert error(rows, best_scale(given(rows))) < 0.3 * error(rows, best_scale(given(rows), "int8"))


def test_every_way_of_rounding_is_chosen_on_the_fitted_rows_and_judged_on_the_others() -> None:
    some = Samples(given(normal(256)), given(normal(64)))
    for kind in ("uint8", "int8", "fp8"):
        wanted = rounded(some.judged.rows, best_scale(some.fitted, kind))
        assert np.array_equal(QUANTIZERS[kind](some), wanted)
    assert np.array_equal(QUANTIZERS["float"](some), some.judged.rows)
    assert np.array_equal(QUANTIZERS["by row"](some), rounded_by_row(some.judged.rows))
