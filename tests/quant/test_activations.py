"""Inputs in 8 bits: where static codes are laid, and what a row's own scale keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmx.quant.activations import (
    LEVELS,
    MIDDLE,
    TOP,
    UNIT,
    InputScale,
    Sample,
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
