"""The structure of a conversion: the artifact's float32 twin on the runtime against transformers float32.

What must agree here is arithmetic on the same numbers, so the limits are those of float32 rounding, five orders of
magnitude below any quantization loss. Causes of a failure: rope scaling dropped or wrong, a wrong epsilon, window, head
count, activation or multiplier, two tensors exchanged, rows that the exporter forgot to permute.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError
from llmx.system_errors import disk_error
from llmx.validate import twin
from llmx.validate.case import Case, boundaries
from llmx.validate.checks_floor import ODD_BATCH, Recorded, compared, floor_check, limit_check, resolvable
from llmx.validate.floors import EXACT, Floor
from llmx.validate.gate import Limit
from llmx.validate.kinds import kind_of
from llmx.validate.metrics import Comparison, Divergence
from llmx.validate.oracle import Reference
from llmx.validate.report import Check, at_most, not_applicable, not_run
from llmx.validate.runtimes import Session

NAMES = ("conversion.kl", "conversion.logits", "conversion.decode")
POSITIONS, DECODED, SPREAD = 256, 64, 64  # more do not show more: a wrong number of the metadata moves all of them
WHERE = {"window": "past the sliding window of", "context": "past the original context of"}


@dataclass(frozen=True, slots=True)
class Twins:
    """The two folders' worth of the same float32 weights. layers: None is the whole model."""

    artifact: Path
    reference: Path
    layers: int | None

    @property
    def note(self) -> str:
        return "" if self.layers is None else f"; the first {self.layers} layers, as the whole twin exceeds its budget"


def check_conversion(case: Case) -> Iterator[Check]:
    """Yields conversion.kl, .logits, .decode; .gelu_table where the runtime has one; floor.exact and its limit.

    And .window and .context for what lies past a sliding window and past the original context.
    """
    for check in _checks(case):
        judged = case.limits.judged(check)
        is_kl = judged.unit == "nats" and judged.limit is not None and judged.kind == "conversion"
        yield resolvable(judged, case.noise.exact) if is_kl and judged.passed is not None else judged


def _checks(case: Case) -> Iterator[Check]:
    kind = kind_of(case.file)
    reason = kind.no_exact_run(case.file)
    if reason is None and not kind.is_its_own_twin(case.file):  # nothing is read from its own twin
        reason = kind.unmapped(case.file, case.model.architecture)
    if reason is not None:
        yield from (not_applicable(name, reason) for name in NAMES)
        return
    plan = _plan(case)
    if isinstance(plan, str):
        yield from (not_run(name, plan) for name in NAMES)
        return
    try:
        twins = make_twins(case, plan.layers)
    except IntegrityError as error:  # tensors are missing or misshapen; the check of the bytes names them
        yield from (not_run(name, error.what) for name in NAMES)
        return
    try:
        with closing(Reference(twins.reference, case.threads)) as reference:
            yield from _judge(case, twins, reference)
    finally:
        shutil.rmtree(case.scratch / "twin", ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Size:
    layers: int | None


def _plan(case: Case) -> _Size | str:
    """Returns how much of the model the twin holds, or why there can be none."""
    budget, layers = case.settings.twin_bytes, case.model.architecture.layers
    sizes = kind_of(case.file).twin_sizes(case.file, layers)
    fitting = next((count for count, size in sizes.items() if size <= budget), layers)
    if fitting == layers:
        part = "even one layer of " if len(sizes) > 1 else ""
        return f"{part}the float32 twin takes {min(sizes.values())} bytes; its budget is {budget}"
    free = shutil.disk_usage(case.scratch).free
    if 2 * sizes[fitting] > free:
        return f"the float32 twins need {2 * sizes[fitting]} bytes of disk for a while; {free} are free"
    if (reason := case.no_memory_for(sizes[fitting])) is not None:
        return reason
    return _Size(fitting)


def make_twins(case: Case, layers: int | None) -> Twins:
    """Writes both twins into the case's scratch folder. An F32 artifact is its own; its reference is the checkpoint.

    Raises: IntegrityError when the artifact does not hold the checkpoint's tensors; ResourceError for a full disk.
    """
    kind = kind_of(case.file)
    if layers is None and kind.is_its_own_twin(case.file):
        return Twins(case.artifact, case.model.checkpoint.folder, None)
    restored = kind.restored(case.file, case.model, case.entries)
    folder = case.scratch / "twin"
    try:
        folder.mkdir()
        artifact = kind.write_twin(case.file, folder, layers)
        twin.write_checkpoint_twin(restored, case.model, folder / "checkpoint", layers)
    except OSError as error:
        raise disk_error(error, folder) from error
    return Twins(artifact, folder / "checkpoint", layers)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Runs sequences on both twins."""

    case: Case
    twins: Twins
    reference: Reference

    def run(
        self, sequences: list[list[int]], judged: range, *, cached: bool = False, table: bool = False
    ) -> Divergence:
        """Compares the judged positions. cached: they are fed one at a time; table: see Reference.gelu_table."""
        found, context = Comparison(), len(sequences[0])
        with (
            self.open(context) as session,
            self.reference.gelu_table() if table else contextlib.nullcontext(),
        ):
            for tokens in sequences:
                artifact = session.logits(tokens, judged.start if cached else None)
                found.add_streams(tokens, self.reference.logits(tokens), artifact, judged)
        return found.summary()

    def open(self, context: int, **options: Any) -> Session:
        """Returns a session of the artifact's twin with exact kernels."""
        usual = {"threads": self.case.threads, "context": context, "exact": True}
        return self.case.runtime.open(self.twins.artifact, **{**usual, **options})

    def spread(self, tokens: list[int]) -> float:
        """Returns the mean KL, nats, between the twin run as usual and run with other threads and odd batches."""
        options = {"threads": 2 if self.case.threads == 1 else 1, "batch": ODD_BATCH}
        with self.open(len(tokens)) as session, self.open(len(tokens), **options) as other:
            first = Recorded(self.case.scratch / "exact.f32", session.logits(tokens))
            try:
                return compared(tokens, first, other.logits(tokens), range(len(tokens))).summary().kl_mean
            finally:
                first.remove()


def _judge(case: Case, twins: Twins, reference: Reference) -> Iterator[Check]:
    sequences = list(case.sequences(min(POSITIONS, case.settings.positions), case.chunk))
    if not sequences:
        yield from (not_run(name, case.too_short) for name in NAMES)
        return
    trial, whole = _Trial(case, twins, reference), range(len(sequences[0]))
    floor = kind_of(case.file).floor(case.file, case.model.architecture)
    yield from _spread(trial, sequences[0][:SPREAD], floor)
    found = trial.run(sequences, whole)
    detail = f"{found.positions} positions, KL(transformers f32 ‖ runtime, f32 KV, exact kernels){twins.note}"
    yield at_most("conversion.kl", found.kl_mean, floor.kl, "nats", floor.origin, detail=detail)
    yield at_most("conversion.logits", found.max_logit_difference, floor.logits, "logits", floor.origin, detail=detail)
    if floor.gelu_table:
        found = trial.run(sequences[:1], whole, table=True)
        detail = f"{found.positions} positions against transformers with such a table: the cause; the rest is rounding"
        yield at_most("conversion.gelu_table", found.kl_mean, EXACT.kl, "nats", EXACT.origin, detail=detail)
    found = trial.run(sequences[:1], whole[max(1, len(whole) - DECODED) :], cached=True)
    detail = f"{found.positions} positions fed one at a time through the KV cache{twins.note}"
    yield at_most("conversion.decode", found.kl_mean, floor.kl, "nats", floor.origin, detail=detail)
    for name, boundary in boundaries(case.model.architecture).items():
        yield _past(trial, floor, name, boundary)


def _spread(trial: _Trial, tokens: list[int], floor: Floor) -> Iterator[Check]:
    """Yields floor.exact, and whether the limit on the conversion's KL lies above it."""
    case, kl = trial.case, trial.spread(tokens)
    detail = f"mean KL(runtime ‖ runtime) of the float32 twin, {len(tokens)} positions, other threads and batches"
    yield floor_check("floor.exact", kl, detail)
    case.noise.exact = kl
    limit = case.limits.asked("conversion.kl") or Limit(floor.kl, floor.origin)
    if math.isfinite(kl):
        yield limit_check("floor.exact_limit", kl, limit, "floor.exact")


def _past(trial: _Trial, floor: Floor, name: str, boundary: int) -> Check:
    """Past a boundary, where a window that is one too long, or a scaling that is missing, shows."""
    sequence = trial.case.past(boundary)
    if isinstance(sequence, str):
        return not_run(f"conversion.{name}", sequence, required=False)
    found = trial.run([sequence], range(boundary, len(sequence)))
    detail = f"{found.positions} positions {WHERE[name]} {boundary}{trial.twins.note}"
    return at_most(f"conversion.{name}", found.kl_mean, floor.kl, "nats", floor.origin, detail=detail)
