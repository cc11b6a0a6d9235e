"""The record of the reference: the KL estimated, exact where everything is kept, and refused where broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmx.errors import CheckFailed, IntegrityError
from llmx.validate.metrics import Comparison, kl_divergence, log_softmax
from llmx.validate.record import MAGIC, Header, Record, compared, summarized

VOCAB, REAL, POSITIONS = 400, 380, 50


def header(kept: int, drawn: int = 0) -> Header:
    return Header("m", VOCAB, REAL, kept, drawn, 64, 1, 52, 1, 51, 0, 52, 99, "", "")


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    reference = random.normal(0, 3, (POSITIONS, VOCAB)).astype(np.float32)
    artifact = (reference + random.normal(0, 0.3, reference.shape)).astype(np.float32)
    return reference, artifact, random.integers(0, REAL, POSITIONS)


@pytest.mark.parametrize("width", [VOCAB, REAL])
def test_with_every_token_kept_and_no_padding_weight_the_figures_are_those_of_whole_logits(
    logits: tuple[np.ndarray, np.ndarray, np.ndarray], width: int
) -> None:
    reference, artifact, targets = logits
    reference[:, REAL:], artifact[:, REAL:] = -80, -80
    whole, found = Comparison(), Comparison()
    whole.add(reference, artifact[:, :width], targets)
    rows = summarized(reference, targets, header(REAL))
    found.add_figures(*compared(rows, artifact[:, :width], targets, header(REAL)))
    a, b = whole.summary(), found.summary()
    assert b.kl_mean == pytest.approx(a.kl_mean, abs=1e-6)
    assert b.same_top1 == a.same_top1
    assert b.perplexity_ratio == pytest.approx(a.perplexity_ratio, rel=1e-6)


def test_without_drawn_tokens_fewer_kept_ones_give_a_lower_bound_that_grows_with_them(
    logits: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    reference, artifact, targets = logits
    found = []
    for kept in (1, 16, 64, REAL):
        rows = summarized(reference, targets, header(kept))
        found.append(compared(rows, artifact, targets, header(kept))[0].mean())
    assert found == sorted(found) and found[0] < found[-1]


def test_drawn_tokens_make_up_for_what_is_not_kept_of_a_flat_distribution() -> None:
    random = np.random.default_rng(2)
    reference = random.normal(0, 1, (400, VOCAB)).astype(np.float32)
    artifact = (reference + random.normal(0, 0.3, reference.shape)).astype(np.float32)
    reference[:, REAL:], artifact[:, REAL:] = -80, -80
    targets = np.zeros(400, int)
    exact = kl_divergence(log_softmax(reference), log_softmax(artifact)).mean()

    def mean(drawn: int) -> float:
        rows = summarized(reference, targets, header(8, drawn))
        return compared(rows, artifact, targets, header(8, drawn))[0].mean()

    assert mean(0) < 0.2 * exact
    assert mean(64) == pytest.approx(exact, rel=0.01)


def test_where_the_rest_has_no_weight_the_drawn_tokens_add_nothing() -> None:
    reference = np.full((1, VOCAB), -2000, np.float32)
    reference[0, :2] = 1, 2
    artifact = reference.copy()
    artifact[0, 0] = 2
    rows = summarized(reference, np.array([0]), header(8, 16))
    found = compared(rows, artifact, np.array([0]), header(8, 16))[0]
    assert found == pytest.approx(kl_divergence(log_softmax(reference), log_softmax(artifact)), rel=1e-5)


def test_logits_of_another_width_or_no_numbers_are_refused(
    logits: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    reference, artifact, targets = logits
    rows = summarized(reference, targets, header(16))
    with pytest.raises(CheckFailed, match="gives 379 logits"):
        compared(rows, artifact[:, :379], targets, header(16))
    artifact[3, 5] = np.nan
    with pytest.raises(CheckFailed, match="no numbers"):
        compared(rows, artifact, targets, header(16))


@pytest.mark.parametrize("content", [b"", b"something else", MAGIC, MAGIC + b"\xff\xff\xff\xff", MAGIC + b"\2\0\0\0{}"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="no sound reference record"):
        Record(path)
