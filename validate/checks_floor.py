"""The noise floor: how far the runtime lies from itself on this artifact when only the way of running it changes.

What is below it cannot be told from chance, so a limit on a KL that lies below it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import CheckFailed, UsageError
from llmx.validate.case import Case, Subject
from llmx.validate.gate import ASKED, KL_CHECKS, Limit
from llmx.validate.metrics import Comparison
from llmx.validate.report import Check, not_applicable, not_run, reported

ODD_BATCH = 31  # no multiple of what any kernel takes at once, so that the remainders of kernels are run, too
POSITIONS, DECODED = 128, 32  # of one sequence, and the last of it that are fed one at a time
NAMES = ("floor.threads", "floor.batch", "floor.cache", "floor.decode")
LIMIT = "floor.limit"


@dataclass(frozen=True, slots=True)
class Way:
    """Another way of running the same artifact. options: those of Runtime.open that are not as in the first run."""

    name: str
    options: Mapping[str, Any]
    what: str


def ways(threads: int) -> tuple[Way, ...]:
    """Returns what is varied, one thing at a time, against a run with so many threads."""
    other = 2 if threads == 1 else 1
    return (
        Way("floor.threads", {"threads": other}, f"{threads} against {other} threads"),
        Way("floor.batch", {"batch": ODD_BATCH}, f"usual batches against {ODD_BATCH} positions at once"),
        Way("floor.cache", {"exact": True}, "usual key-value cache and attention against float32 and plain attention"),
    )


def check_floor(case: Case) -> Iterator[Check]:
    """Yields floor.threads, .batch, .cache, .decode and, of those, whether the limits on the KL lie above: .limit."""
    tokens = next(case.sequences(1, 1), None)
    if tokens is None:
        yield from (not_run(name, case.too_short) for name in NAMES)
        return
    yield from floor_of(case, tokens, [case.kl_limit(name) for name in KL_CHECKS])


def floor_of(subject: Subject, tokens: list[int], limits: Sequence[Limit]) -> Iterator[Check]:
    """Yields what check_floor does, on the first of these tokens. limits: those on a KL that must lie above."""
    found: dict[str, float] = {}
    for way in ways(subject.threads):
        if not _varies(subject, way):
            yield not_applicable(way.name, f"{subject.runtime.name} has one way only as to {_named(way)}")
    for name, comparison, what in _runs(subject, tokens[:POSITIONS]):
        found[name] = comparison.summary().kl_mean
        detail = f"mean KL(runtime ‖ runtime), {comparison.positions} positions, {what}"
        yield subject.limits.judged(floor_check(name, found[name], detail))
    subject.noise.usual = max(found.values())
    if math.isfinite(subject.noise.usual):
        yield _limit(limits, found)


def _runs(case: Subject, tokens: list[int]) -> Iterator[tuple[str, Comparison, str]]:
    """Yields (check, comparison with the first run, what differs). The first run's logits lie on disk meanwhile."""
    usual: dict[str, Any] = {"threads": case.threads, "context": len(tokens)}
    every, last = range(len(tokens)), range(max(1, len(tokens) - DECODED), len(tokens))
    with case.runtime.open(case.artifact, **usual) as session:
        first = Recorded(case.scratch / "floor.f32", session.logits(tokens))
        try:
            decoded = compared(tokens, first, session.logits(tokens, last.start), last)
            for way in (way for way in ways(case.threads) if _varies(case, way)):
                with case.runtime.open(case.artifact, **{**usual, **way.options}) as other:
                    yield way.name, compared(tokens, first, other.logits(tokens), every), way.what
            yield "floor.decode", decoded, "a whole prompt against one position at a time"
        finally:
            first.remove()


def _varies(case: Subject, way: Way) -> bool:
    """Whether the runtime runs otherwise so; see `Runtime`."""
    return not way.options.keys() <= getattr(case.runtime, "fixed", frozenset())


def _named(way: Way) -> str:
    return " and ".join(way.options)


def compared(tokens: list[int], first: Recorded, second: Iterator[np.ndarray], judged: range) -> Comparison:
    """Returns the comparison of a second run with a recorded first one."""
    found = Comparison()
    found.add_streams(tokens, first.blocks(), second, judged)
    return found


class Recorded:
    """A stream of f32[t, V] blocks kept in a file, so that it can be read again and again in little memory."""

    def __init__(self, path: Path, blocks: Iterator[np.ndarray]) -> None:
        self._path = path
        self._shapes: list[tuple[int, int]] = []
        with path.open("wb") as out:
            for block in blocks:
                self._shapes.append((block.shape[0], block.shape[1]))
                out.write(np.ascontiguousarray(block, np.float32).data)
        if not self._shapes:
            raise CheckFailed("the runtime gives no logits")

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the blocks as they came."""
        with self._path.open("rb") as stream:
            for rows, width in self._shapes:
                yield np.fromfile(stream, np.float32, rows * width).reshape(rows, width)

    def remove(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)


def floor_check(name: str, kl: float, detail: str) -> Check:
    """Returns a floor, mean KL in nats, without a limit; one that is no number fails: the logits are broken."""
    if math.isfinite(kl):
        return reported(name, kl, "nats", detail)
    return Check(name, False, kl, None, "nats", "logits are numbers", f"the runtime gives NaN or infinity; {detail}")


def _limit(limits: Sequence[Limit], found: Mapping[str, float]) -> Check:
    """Whether the smallest limit on a KL is at or above the largest of the floors."""
    least = min(limits, key=lambda limit: limit.value)
    name = max(found, key=lambda each: found[each])
    return limit_check(LIMIT, found[name], least, name)


def limit_check(name: str, floor: float, limit: Limit, measured: str) -> Check:
    """Returns the check that a limit is not below the floor; a user's own that is, is a wrong use of the command."""
    held = floor <= limit.value
    refused = (
        f"refused: a limit of {limit.value:.3g} ({limit.origin}) lies below the noise floor of {floor:.3g} nats "
        f"({measured}): the runtime differs from itself by more; ask for at least {floor:.2g}"
    )
    detail = f"the smallest limit on a KL ({limit.origin}) against the largest floor ({measured})" if held else refused
    check = Check(name, held, floor, limit.value, "nats", "a limit must lie above what is chance", detail)
    return replace(check, code=UsageError.exit_code if limit.asked else CheckFailed.exit_code)


def resolvable(check: Check, floor: float | None) -> Check:
    """Returns the check, undecided where its limit is below the floor and its value is no further off than that.

    A value that is above its limit and above the floor has failed, whatever the floor is.
    """
    assert isinstance(check.limit, int | float) and isinstance(check.value, int | float)
    if floor is None or not check.limit < floor < math.inf or not check.value <= floor:
        return check
    reason = f"its limit of {check.limit:.3g} is refused: the noise floor is {floor:.3g} nats"
    code = UsageError.exit_code if check.origin.startswith(ASKED) else CheckFailed.exit_code
    return replace(check, passed=None, detail=f"{reason}; {check.detail}", code=code)
