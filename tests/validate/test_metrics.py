"""The figures of a comparison, against their textbook formulas."""

from __future__ import annotations

import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmx.errors import CheckFailed
from llmx.validate import metrics
from llmx.validate.metrics import Comparison, aligned, kl_divergence, log_softmax, perplexity_ratio


def random_logits(seed: int, rows: int, width: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * scale).astype(np.float32)


def textbook_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    p = np.exp(p_logits.astype(np.float64))
    q = np.exp(q_logits.astype(np.float64))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))


def compared(reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray | None = None) -> metrics.Divergence:
    comparison = Comparison()
    comparison.add(reference, artifact, targets)
    return comparison.summary()


def assert_same(found: metrics.Divergence, expected: metrics.Divergence) -> None:
    np.testing.assert_array_equal(astuple(found), astuple(expected))  # NaN equals NaN here


def test_kl_equals_the_textbook_sum_row_by_row():
    p, q = random_logits(1, 7, 50), random_logits(2, 7, 50)
    expected = [textbook_kl(a, b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(kl_divergence(log_softmax(p), log_softmax(q)), expected, rtol=1e-12)


def test_identical_logits_have_no_divergence_at_all():
    logits = random_logits(3, 9, 40)
    found = compared(logits, logits.copy(), np.arange(9))
    assert found.kl_mean == found.kl_max == found.kl_999 == 0.0
    assert found.same_top1 == 1.0
    assert found.perplexity_ratio == 1.0
    assert found.perplexity_ratio_error == 0.0
    assert found.rms_delta_p == 0.0
    assert found.max_logit_difference == 0.0


def test_the_direction_is_from_the_reference():
    sharp, flat = np.array([[10.0, 0.0]], np.float32), np.array([[0.0, 0.0]], np.float32)
    assert compared(sharp, flat).kl_mean == pytest.approx(np.log(2), rel=1e-2)
    assert compared(flat, sharp).kl_mean > 4


def test_a_constant_added_to_all_logits_changes_the_logits_but_not_the_distribution():
    logits = random_logits(4, 5, 30)
    found = compared(logits, logits + np.float32(2.0))
    assert found.kl_mean < 1e-12
    assert found.max_logit_difference == pytest.approx(2.0, rel=1e-6)


def test_huge_logits_do_not_overflow():
    logits = np.array([[3e38, -3e38, 0.0]], np.float32)
    assert compared(logits, logits).kl_mean == 0.0


def test_an_excluded_token_adds_nothing_and_an_impossible_one_costs_everything():
    allowed = np.array([[0.0, 0.0, -np.inf]], np.float32)
    everything = np.array([[0.0, 0.0, 0.0]], np.float32)
    assert compared(allowed, everything).kl_mean == pytest.approx(np.log(1.5))
    assert compared(everything, allowed).kl_mean == np.inf


def test_one_nan_makes_mean_quantile_and_maximum_infinite():
    logits = random_logits(5, 2000, 4)
    broken = logits.copy()
    broken[7, 2] = np.nan
    found = compared(logits, broken)
    assert found.kl_mean == found.kl_max == np.inf
    assert found.max_logit_difference == np.inf
    assert found.kl_median == 0.0


def test_perplexity_and_its_ratio_follow_their_definitions():
    p, q, targets = random_logits(6, 60, 20), random_logits(7, 60, 20), np.arange(60) % 20
    found = compared(p, q, targets)
    rows = np.arange(60)
    log_p, log_q = log_softmax(p)[rows, targets], log_softmax(q)[rows, targets]
    assert found.perplexity_reference == pytest.approx(np.exp(-log_p.mean()))
    assert found.perplexity_artifact == pytest.approx(np.exp(-log_q.mean()))
    assert found.perplexity_ratio == pytest.approx(found.perplexity_artifact / found.perplexity_reference)
    assert found.rms_delta_p == pytest.approx(np.sqrt(np.mean((np.exp(log_q) - np.exp(log_p)) ** 2)))


def test_the_error_bar_covers_the_spread_of_repeated_samples():
    random = np.random.default_rng(8)
    truth = 0.02
    ratios, errors = [], []
    for _ in range(300):
        log_p = -random.exponential(2.0, 200)
        ratio, error = perplexity_ratio(log_p, log_p - random.normal(truth, 0.3, 200))
        ratios.append(ratio)
        errors.append(error)
    assert np.std(ratios) == pytest.approx(np.mean(errors), rel=0.15)
    assert np.mean(ratios) == pytest.approx(np.exp(truth), rel=0.01)


def test_positions_without_a_target_count_for_the_divergence_only():
    logits = random_logits(9, 3, 10)
    found = compared(logits, logits, np.array([1, -1, 2]))
    assert found.positions == 3
    without = compared(logits, logits)
    assert np.isnan(without.perplexity_ratio) and np.isnan(without.rms_delta_p)


def test_same_top1_is_a_share():
    reference = np.eye(4, dtype=np.float32)
    artifact = reference.copy()
    artifact[0] = [0, 9, 0, 0]
    assert compared(reference, artifact).same_top1 == 0.75


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no position"):
        Comparison().summary()


def test_logits_of_different_positions_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Comparison().add(np.zeros((2, 3), np.float32), np.zeros((3, 3), np.float32))


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 6), elements=st.floats(-80, 80, width=32)),
    hnp.arrays(np.float32, (3, 6), elements=st.floats(-80, 80, width=32)),
)
def test_kl_is_never_negative_and_never_nan(p, q):
    found = kl_divergence(log_softmax(p), log_softmax(q))
    assert (found >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1), st.lists(st.integers(1, 5), min_size=1), st.integers(1, 200))
def test_neither_the_cut_into_blocks_nor_the_working_memory_changes_a_figure(left, right, budget):
    total = min(sum(left), sum(right))
    p, q, targets = random_logits(10, total, 8), random_logits(11, total, 8), np.arange(total) % 8

    def cut(logits: np.ndarray, sizes: list[int]):
        start = 0
        for size in sizes:
            if start < total:
                yield logits[start : start + size]
            start += size

    whole = compared(p, q, targets)
    before, metrics.WORKING_BYTES = metrics.WORKING_BYTES, budget
    try:
        pieces = Comparison()
        for start, a, b in aligned(cut(p, left), cut(q, right)):
            pieces.add(a, b, targets[start : start + len(a)])
    finally:
        metrics.WORKING_BYTES = before
    assert_same(pieces.summary(), whole)


def test_a_stream_that_ends_early_is_refused():
    block = np.zeros((3, 2), np.float32)
    with pytest.raises(CheckFailed, match="3 positions only"):
        list(aligned([block], [block, block]))


def test_streams_are_judged_where_asked_with_the_following_token_as_target():
    tokens = [3, 1, 2, 0, 1]
    p, q = random_logits(12, 5, 4), random_logits(13, 5, 4)
    streamed = Comparison()
    streamed.add_streams(tokens, [p[:2], p[2:]], [q[:4], q[4:]], range(1, 4))
    assert_same(streamed.summary(), compared(p[1:4], q[1:4], np.array([2, 0, 1])))


def test_the_last_position_has_no_target():
    p = random_logits(14, 2, 4)
    streamed = Comparison()
    streamed.add_streams([0, 1], [p], [p], range(2))
    assert_same(streamed.summary(), compared(p, p, np.array([1, -1])))


def test_a_narrower_vocabulary_is_compared_on_the_common_part():
    p = random_logits(15, 3, 6)
    streamed = Comparison()
    streamed.add_streams([0, 5, 1], [p], [p[:, :4]], range(3))
    assert streamed.summary().kl_max == 0.0


def test_two_streams_that_both_end_early_are_refused_because_fewer_would_read_as_all():
    block = np.zeros((3, 4), np.float32)
    with pytest.raises(CheckFailed, match="2 of 4 positions"):
        Comparison().add_streams([0, 1, 2, 3, 0], [block], [block], range(1, 5))


def test_a_padding_row_that_the_reference_does_not_have_costs_what_it_takes():
    p = random_logits(16, 3, 4)
    padded = np.concatenate([p, np.full((3, 1), -np.inf, np.float32)], axis=1)
    assert compared(p, padded).kl_max < 1e-12
    padded[:, 4] = p.max(axis=1) + 5
    found = compared(p, padded)
    assert found.kl_mean > 1
    assert found.same_top1 == 0.0


def test_the_quantiles_are_exact_and_end_with_the_maximum():
    logits = random_logits(17, 1000, 5)
    comparison = Comparison()
    comparison.add(logits, random_logits(18, 1000, 5))
    kl = np.sort(kl_divergence(log_softmax(logits), log_softmax(random_logits(18, 1000, 5))))
    found = comparison.quantiles()
    assert list(found) == ["0.5", "0.9", "0.99", "0.999", "1"]
    assert found["1"] == kl[-1] == comparison.summary().kl_max
    assert found["0.9"] == kl[900] and found["0.5"] == kl[500]


@pytest.mark.parametrize("positions", [1, 7, 512, 513, 5000])
def test_the_curve_has_at_most_512_points_and_its_mean_is_the_mean(positions):
    comparison = Comparison()
    comparison.add(random_logits(19, positions, 5), random_logits(20, positions, 5))
    curve = comparison.curve()
    assert len(curve) == min(positions, 512)
    starts = [int(point["position"]) for point in curve]
    assert starts[0] == 0 and starts == sorted(set(starts))
    widths = np.diff([*starts, positions])
    assert np.average([point["kl"] for point in curve], weights=widths) == pytest.approx(comparison.summary().kl_mean)


def test_what_is_kept_is_a_few_bytes_a_position_however_wide_the_logits_are():
    """Ten times as many positions: the peak grows by their rows alone, not by logits (4 kB a position here)."""
    logits, other = random_logits(21, 200, 1000), random_logits(22, 200, 1000)

    def peak(blocks: int) -> int:
        tracemalloc.start()
        comparison = Comparison()
        for _ in range(blocks):
            comparison.add(logits, other)
        assert comparison.positions == 200 * blocks
        assert comparison.nbytes <= 50 * comparison.positions
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    small, large = peak(4), peak(40)
    assert large - small < 80 * 200 * 36
