"""The structure of a conversion: the artifact's float32 twin on the runtime against transformers float32.

What must agree here is arithmetic on the same numbers, so the limits are those of float32 rounding, five orders of
magnitude below any quantization loss. Causes of a failure: rope scaling dropped or wrong, a wrong epsilon, window, head
count, activation or multiplier, two tensors exchanged, rows that the exporter forgot to permute.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llmx.errors import IntegrityError
from llmx.exporters.artifact import disk_error
from llmx.exporters.gguf_tensors import restore
from llmx.validate import twin
from llmx.validate.case import Case, chunks
from llmx.validate.metrics import Comparison, Divergence
from llmx.validate.oracle import Reference
from llmx.validate.report import Check, at_most, not_run


@dataclass(frozen=True, slots=True)
class Floor:
    """How near float32 arithmetic comes on a runtime: the largest mean KL (nats) and logit difference, and why."""

    kl: float
    logits: float
    origin: str


EXACT = Floor(1e-6, 1e-3, "float32 rounding; measured on llama.cpp: KL 2e-12 to 4e-12, logits 3e-5 to 8e-5")
GELU_TABLE = Floor(1e-5, 2e-2, "ggml looks GELU up in a float16 table; measured: KL 1e-8 to 6e-8, logits 3e-3")
FLOORS = {"silu": EXACT, "gelu": GELU_TABLE, "gelu_tanh": GELU_TABLE}
NAMES = ("conversion.kl", "conversion.logits", "conversion.decode")
PAST_WINDOW = 64  # positions judged past a sliding window


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
    """Yields conversion.kl, .logits, .decode; .gelu_table where the runtime has one; .window for a sliding window."""
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
    sizes = {count: twin.twin_bytes(case.file, count) for count in (None, *range(layers - 1, 0, -1))}
    fitting = next((count for count, size in sizes.items() if size <= budget), layers)
    if fitting == layers:
        return f"even one layer of the float32 twin takes {min(sizes.values())} bytes; its budget is {budget}"
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
    if layers is None and twin.is_its_own_twin(case.file):
        return Twins(case.artifact, case.model.checkpoint.folder, None)
    restored = restore(case.file, case.model, case.entries)
    folder = case.scratch / "twin"
    try:
        folder.mkdir()
        twin.write_gguf_twin(case.file, folder / "twin.gguf", layers)
        twin.write_checkpoint_twin(restored, case.model, folder / "checkpoint", layers)
    except OSError as error:
        raise disk_error(error, folder) from error
    return Twins(folder / "twin.gguf", folder / "checkpoint", layers)


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
            self.case.runtime.open(
                self.twins.artifact, threads=self.case.threads, context=context, exact=True
            ) as session,
            self.reference.gelu_table() if table else contextlib.nullcontext(),
        ):
            for tokens in sequences:
                artifact = session.logits(tokens, judged.start if cached else None)
                found.add_streams(tokens, self.reference.logits(tokens), artifact, judged)
        return found.summary()


def _judge(case: Case, twins: Twins, reference: Reference) -> Iterator[Check]:
    sequences = list(chunks(case.ids, case.leading, case.chunk, -(-case.settings.positions // case.chunk)))
    if not sequences:
        yield from (not_run(name, case.too_short) for name in NAMES)
        return
    trial, whole = _Trial(case, twins, reference), range(len(sequences[0]))
    floor = FLOORS[case.model.architecture.activation]
    found = trial.run(sequences, whole)
    detail = f"{found.positions} positions, KL(transformers f32 ‖ runtime, f32 KV, exact kernels){twins.note}"
    yield at_most("conversion.kl", found.kl_mean, floor.kl, "nats", floor.origin, detail=detail)
    yield at_most("conversion.logits", found.max_logit_difference, floor.logits, "logits", floor.origin, detail=detail)
    if floor is GELU_TABLE:
        found = trial.run(sequences[:1], whole, table=True)
        detail = f"{found.positions} positions against transformers with such a table: the cause; the rest is rounding"
        yield at_most("conversion.gelu_table", found.kl_mean, EXACT.kl, "nats", EXACT.origin, detail=detail)
    found = trial.run(sequences[:1], whole[len(whole) // 2 :], cached=True)
    detail = f"{found.positions} positions fed one at a time through the KV cache{twins.note}"
    yield at_most("conversion.decode", found.kl_mean, floor.kl, "nats", floor.origin, detail=detail)
    yield from _window(trial, floor)


def _window(trial: _Trial, floor: Floor) -> Iterator[Check]:
    """Past the sliding window, where a wrong window shows."""
    case, a = trial.case, trial.case.model.architecture
    window = a.sliding_window
    if window is None or window >= a.context_length or "sliding" not in a.layer_kinds:
        return
    length = min(window + PAST_WINDOW, a.context_length)
    sequence = next(chunks(case.ids, case.leading, length, 1), None)
    if length > case.settings.window_tokens or sequence is None:
        reason = "the text has fewer" if sequence is None else f"at most {case.settings.window_tokens} are run"
        yield not_run("conversion.window", f"it takes {length} tokens; {reason}", required=False)
        return
    found = trial.run([sequence], range(window, length))
    detail = f"{found.positions} positions past the sliding window of {window}{trial.twins.note}"
    yield at_most("conversion.window", found.kl_mean, floor.kl, "nats", floor.origin, detail=detail)
