"""How far two sets of logits lie apart, in llama.cpp's own vocabulary (its `perplexity --kl-divergence`).

Everything is in natural units (nats) and computed in float64 from float32 logits. Direction: KL(reference ‖ artifact).
Logits arrive in blocks of positions and are reduced at once; what stays is four numbers a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WORKING_BYTES = 32 << 20  # the float64 copies of one slice of logits stay under this


@dataclass(frozen=True, slots=True)
class Divergence:
    """The summary of a comparison over `positions` next-token distributions; figures without a target are NaN."""

    positions: int
    kl_mean: float
    kl_median: float
    kl_999: float  # 99.9 % quantile
    kl_max: float
    same_top1: float  # share of positions whose most likely token is the same
    perplexity_reference: float
    perplexity_artifact: float
    perplexity_ratio: float  # artifact / reference
    perplexity_ratio_error: float  # one standard error
    rms_delta_p: float  # of the probability given to the true next token
    max_logit_difference: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns f64[t, V]: the logarithm of the softmax of each row, shifted by the row's maximum first."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Returns f64[t]: sum p (log p - log q) of each row, nats, never below zero; NaN stays NaN.

    log_p, log_q: f64[t, V]. A token that p excludes (log p = -inf) adds nothing.
    """
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = p * (log_p - log_q)
    terms[p == 0.0] = 0.0
    return np.maximum(terms.sum(axis=-1), 0.0)


class Comparison:
    """Gathers per-position figures from blocks of logits."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._same: list[np.ndarray] = []
        self._log_p: list[np.ndarray] = []  # of the true next token, by the reference; NaN where there is none
        self._log_q: list[np.ndarray] = []
        self._largest = 0.0

    @property
    def positions(self) -> int:
        return sum(len(part) for part in self._kl)

    def add(self, reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Compares f32[t, V] with f32[t, V]; targets: i64[t], the token that really follows, -1 where none does."""
        if reference.shape != artifact.shape:
            raise ValueError(f"logits of shape {reference.shape} against {artifact.shape}")
        if targets is None:
            targets = np.full(len(reference), -1)
        rows = max(1, WORKING_BYTES // (8 * reference.shape[1] * 4))
        for start in range(0, len(reference), rows):
            part = slice(start, start + rows)
            self._add_slice(reference[part], artifact[part], np.asarray(targets[part]))

    def add_streams(
        self, tokens: Sequence[int], reference: Iterable[np.ndarray], artifact: Iterable[np.ndarray], judged: range
    ) -> None:
        """Compares two streams of f32[t, V] blocks over the `judged` positions of tokens, each against what follows it.

        Where one vocabulary is wider (padding rows left out), the common part is compared.
        """
        following = np.array([*tokens[1:], -1])
        for start, expected, found in aligned(reference, artifact):
            first, last = max(judged.start - start, 0), min(judged.stop - start, len(expected))
            if first >= last:
                continue
            width = min(expected.shape[1], found.shape[1])
            targets = following[start + first : start + last]
            self.add(expected[first:last, :width], found[first:last, :width], np.where(targets < width, targets, -1))

    def _add_slice(self, reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray) -> None:
        log_p, log_q = log_softmax(reference), log_softmax(artifact)
        self._kl.append(kl_divergence(log_p, log_q))
        self._same.append(reference.argmax(axis=-1) == artifact.argmax(axis=-1))
        rows = np.arange(len(targets))
        for log_probability, store in ((log_p, self._log_p), (log_q, self._log_q)):
            store.append(np.where(targets >= 0, log_probability[rows, targets], np.nan))
        difference = float(np.abs(reference.astype(np.float64) - artifact).max(initial=0.0))
        self._largest = max(self._largest, np.inf if np.isnan(difference) else difference)

    def summary(self) -> Divergence:
        """Returns the figures of all positions so far. Raises ValueError when there are none."""
        if self.positions == 0:
            raise ValueError("no position was compared")
        kl = np.concatenate(self._kl)
        # A NaN divergence means broken logits: it counts as infinite, so that no mean or quantile can hide it.
        kl = np.where(np.isnan(kl), np.inf, kl)
        log_p, log_q = np.concatenate(self._log_p), np.concatenate(self._log_q)
        known = ~np.isnan(log_p)
        ratio, error = perplexity_ratio(log_p[known], log_q[known])
        return Divergence(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_median=float(np.quantile(kl, 0.5, method="higher")),
            kl_999=float(np.quantile(kl, 0.999, method="higher")),
            kl_max=float(kl.max()),
            same_top1=float(np.concatenate(self._same).mean()),
            perplexity_reference=_perplexity(log_p[known]),
            perplexity_artifact=_perplexity(log_q[known]),
            perplexity_ratio=ratio,
            perplexity_ratio_error=error,
            rms_delta_p=_rms(np.exp(log_q[known]) - np.exp(log_p[known])),
            max_logit_difference=self._largest,
        )


def perplexity_ratio(log_p: np.ndarray, log_q: np.ndarray) -> tuple[float, float]:
    """Returns (PPL(q) / PPL(p), its standard error) from the log-probabilities f64[n] of the true tokens.

    The two perplexities are strongly correlated, so the error is that of the paired differences (delta method).
    """
    if len(log_p) == 0:
        return float("nan"), float("nan")
    difference = log_p - log_q
    ratio = float(np.exp(difference.mean()))
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else float("nan")
    return ratio, ratio * error


def _perplexity(log_probability: np.ndarray) -> float:
    return float(np.exp(-log_probability.mean())) if len(log_probability) else float("nan")


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else float("nan")


def aligned(
    reference: Iterable[np.ndarray], artifact: Iterable[np.ndarray]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (first position, f32[t, V], f32[t, V]) from two streams of blocks whose sizes need not agree.

    Raises: ValueError when one stream ends before the other.
    """
    left, right = iter(reference), iter(artifact)
    start = 0
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        count = min(len(a), len(b))
        yield start, a[:count], b[:count]
        start += count
        a = a[count:] if count < len(a) else next(left, None)
        b = b[count:] if count < len(b) else next(right, None)
    if a is not None or b is not None:
        raise ValueError(f"one side gave logits for {start} positions only")
