"""How far two sets of logits lie apart, in llama.cpp's own vocabulary (its `perplexity --kl-divergence`).

Everything is in natural units (nats) and computed in float64 from float32 logits. Direction: KL(reference ‖ artifact).
Logits arrive in blocks of positions and are reduced at once; what stays is one packed row of numbers a position, so
that means and quantiles are exact and a million positions take 25 MB.

    row | kl f64 | log p(next) f64 | log q(next) f64 | same most likely token u8 |      25 bytes
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llmx.errors import CheckFailed

WORKING_BYTES = 32 << 20  # the float64 copies of one slice of logits stay under this
ROW = np.dtype([("kl", "f8"), ("log_p", "f8"), ("log_q", "f8"), ("same", "?")])
FIRST_ROWS = 256
CURVE_POINTS = 512  # of a curve over the positions
QUANTILES = ("0.5", "0.9", "0.99", "0.999", "1")  # 1 is the maximum


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
    """Gathers one row of figures a position from blocks of logits; no logits are kept."""

    def __init__(self) -> None:
        self._rows = np.empty(FIRST_ROWS, ROW)
        self._count = 0
        self._largest = 0.0

    @property
    def positions(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """What is kept, in bytes: 25 to 50 a position, as the room doubles when it is full."""
        return self._rows.nbytes

    def add(self, reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray | None = None) -> None:
        """Compares f32[t, V] with f32[t, W]; targets: i64[t], the token that really follows, -1 where none does.

        The first min(V, W) tokens are compared. What the reference has beyond them are padding rows that the artifact
        left out, as if they did not exist. What the artifact has beyond them it can generate: their probability is
        lost, and a padding row that wins is another most likely token.
        """
        if len(reference) != len(artifact):
            raise ValueError(f"logits of shape {reference.shape} against {artifact.shape}")
        if targets is None:
            targets = np.full(len(reference), -1)
        rows = max(1, WORKING_BYTES // (8 * max(reference.shape[1], artifact.shape[1]) * 4))
        for start in range(0, len(reference), rows):
            part = slice(start, start + rows)
            self._add_slice(reference[part], artifact[part], np.asarray(targets[part]))

    def add_streams(
        self, tokens: Sequence[int], reference: Iterable[np.ndarray], artifact: Iterable[np.ndarray], judged: range
    ) -> None:
        """Compares two streams of f32[t, V] blocks over the `judged` positions of tokens, each against what follows it.

        Raises: CheckFailed where the streams do not cover the judged positions: fewer would read as all of them.
        """
        following = np.array([*tokens[1:], -1])
        before = self._count
        for start, expected, found in aligned(reference, artifact):
            first, last = max(judged.start - start, 0), min(judged.stop - start, len(expected))
            if first < last:
                self.add(expected[first:last], found[first:last], following[start + first : start + last])
        if self._count - before != len(judged):
            raise CheckFailed(f"logits came for {self._count - before} of {len(judged)} positions that are judged")

    def add_figures(self, kl: np.ndarray, log_p: np.ndarray, log_q: np.ndarray, same: np.ndarray) -> None:
        """Takes f64[t] KL, f64[t] log p(next), f64[t] log q(next) and bool[t] that were computed elsewhere."""
        rows = self._room(len(kl))
        rows["kl"], rows["log_p"], rows["log_q"], rows["same"] = kl, log_p, log_q, same

    def _add_slice(self, reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray) -> None:
        width = min(reference.shape[1], artifact.shape[1])
        common = reference[:, :width]
        log_p, log_q = log_softmax(common), log_softmax(artifact)[:, :width]
        targets = np.where(targets < width, targets, -1)
        number, known = np.arange(len(targets)), targets >= 0
        rows = self._room(len(targets))
        rows["kl"] = kl_divergence(log_p, log_q)
        rows["same"] = common.argmax(axis=-1) == artifact.argmax(axis=-1)
        rows["log_p"] = np.where(known, log_p[number, targets], np.nan)
        rows["log_q"] = np.where(known, log_q[number, targets], np.nan)
        difference = float(np.abs(common.astype(np.float64) - artifact[:, :width]).max(initial=0.0))
        self._largest = max(self._largest, np.inf if np.isnan(difference) else difference)

    def _room(self, count: int) -> np.ndarray:
        """The next `count` rows, to be filled."""
        have, self._count = self._count, self._count + count
        if self._count > len(self._rows):
            grown = np.empty(max(self._count, 2 * len(self._rows)), ROW)
            grown[:have] = self._rows[:have]
            self._rows = grown
        return self._rows[have : self._count]

    def _kl(self) -> np.ndarray:
        """f64[positions]. A NaN divergence means broken logits: it counts as infinite, so that no mean hides it."""
        if self._count == 0:
            raise ValueError("no position was compared")
        kl = self._rows["kl"][: self._count]
        return np.where(np.isnan(kl), np.inf, kl)

    def summary(self) -> Divergence:
        """Returns the figures of all positions so far. Raises ValueError when there are none."""
        kl, rows = self._kl(), self._rows[: self._count]
        known = ~np.isnan(rows["log_p"])
        log_p, log_q = rows["log_p"][known], rows["log_q"][known]
        ratio, error = perplexity_ratio(log_p, log_q)
        return Divergence(
            positions=len(kl),
            kl_mean=float(kl.mean()),
            kl_median=float(np.quantile(kl, 0.5, method="higher")),
            kl_999=float(np.quantile(kl, 0.999, method="higher")),
            kl_max=float(kl.max()),
            same_top1=float(rows["same"].mean()),
            perplexity_reference=_perplexity(log_p),
            perplexity_artifact=_perplexity(log_q),
            perplexity_ratio=ratio,
            perplexity_ratio_error=error,
            rms_delta_p=_rms(np.exp(log_q) - np.exp(log_p)),
            max_logit_difference=self._largest,
        )

    def quantiles(self) -> dict[str, float]:
        """Returns share of the positions -> KL, nats, that they do not exceed; exact. Raises ValueError for none."""
        kl = self._kl()
        return {share: float(np.quantile(kl, float(share), method="higher")) for share in QUANTILES}

    def curve(self) -> list[dict[str, float | int]]:
        """Returns at most CURVE_POINTS of {"position", "kl"}: the mean KL, nats, from that judged position to the next.

        Raises: ValueError when nothing was compared.
        """
        kl = self._kl()
        edges = np.linspace(0, len(kl), min(CURVE_POINTS, len(kl)) + 1).astype(int)
        return [
            {"position": int(first), "kl": float(kl[first:last].mean())} for first, last in itertools.pairwise(edges)
        ]


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

    Raises: CheckFailed when one stream ends before the other.
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
        raise CheckFailed(f"one side gave logits for {start} positions only")
