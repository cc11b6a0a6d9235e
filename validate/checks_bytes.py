"""The written file, read again: every tensor decoded and compared with the checkpoint, piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmx.exporters.gguf_metadata import DIGESTS_KEY
from llmx.exporters.gguf_tensors import Entry, read_rows
from llmx.formats.gguf import GgufFile
from llmx.models.model import Model
from llmx.validate.case import Case
from llmx.validate.report import Check, at_most, not_applicable, not_run
from llmx.validate.steps import decode_with_error
from llmx.validate.twin import stored_rows

HASH_BYTES = 1 << 20
RMS_LIMITS: Mapping[str, float] = {
    # type -> largest ||decoded - source|| / ||source|| of a tensor
    "F32": 1e-6,
    "F16": 5e-4,
    "BF16": 4e-3,
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q5_0": 0.07,
    "Q5_1": 0.07,
    "Q4_K": 0.12,
    "Q4_0": 0.14,
    "Q4_1": 0.13,
    "IQ4_NL": 0.12,
    "IQ4_XS": 0.12,
    "Q3_K": 0.26,
    "Q2_K": 0.50,
}
RMS_ORIGIN = "largest seen on the test checkpoints for the tensor's type, times about 1.5"
STEP_LIMIT = 5.0
STEP_ORIGIN = "rounding gives 0.5, deliberate clipping up to 3 on the test checkpoints; a flipped high bit 8"
SHOWN = 8  # offenders named


@dataclass(frozen=True, slots=True)
class TensorError:
    """One tensor's distance from its source. rms: relative; steps: the largest single error in the grid's steps."""

    name: str
    type_name: str
    rms: float
    steps: float
    not_finite: int

    @property
    def rms_of_limit(self) -> float:
        """The error in units of the type's limit."""
        return self.rms / RMS_LIMITS[self.type_name]


def check_bytes(case: Case) -> Iterator[Check]:
    """Yields bytes.tensors, .finite, .error, .steps and .digests."""
    entries = case.entries
    problems = tensor_problems(case.file, entries)
    detail = _named(problems) if problems else f"{len(entries)} tensors, each with the expected shape"
    yield at_most("bytes.tensors", len(problems), 0, "tensors", "the architecture's own tensors", detail=detail)
    comparable = [entry for entry in entries if _fits(case.file, entry)]
    errors = [tensor_error(case.file, case.model, entry) for entry in comparable]
    if errors:
        yield from _judged(errors)
    else:
        yield from (not_run(f"bytes.{what}", "no tensor can be compared") for what in ("finite", "error", "steps"))
    yield _digests(case.file)


def _judged(errors: Sequence[TensorError]) -> Iterator[Check]:
    broken = [f"{error.name}: {error.not_finite} values" for error in errors if error.not_finite]
    count = sum(error.not_finite for error in errors)
    yield at_most(
        "bytes.finite", count, 0, "values", "a weight is a number", detail=_named(broken) or "no NaN, no infinity"
    )
    worst = max(errors, key=lambda error: _nan_is_worst(error.rms_of_limit))
    over = [_rms_words(error) for error in errors if not error.rms_of_limit <= 1]
    detail = _named(over) or f"worst: {_rms_words(worst)}"
    yield at_most("bytes.error", worst.rms_of_limit, 1.0, "of the type's limit", RMS_ORIGIN, detail=detail)
    largest = max(errors, key=lambda error: error.steps)
    far = [f"{error.name} ({error.type_name}): {error.steps:.3g}" for error in errors if error.steps > STEP_LIMIT]
    detail = _named(far) or f"worst: {largest.name} ({largest.type_name})"
    yield at_most("bytes.steps", largest.steps, STEP_LIMIT, "steps of the grid", STEP_ORIGIN, detail=detail)


def tensor_problems(file: GgufFile, entries: Sequence[Entry]) -> list[str]:
    """Returns every tensor that is missing, has another shape, or that no one asked for."""
    names = {entry.name for entry in entries}
    problems = [f"{entry.name} is missing" for entry in entries if entry.name not in file.tensors]
    problems += [
        f"{entry.name} has shape {list(file.tensors[entry.name].shape)}, expected {list(entry.shape)}"
        for entry in entries
        if entry.name in file.tensors and not _fits(file, entry)
    ]
    return problems + [f"{name} is not a tensor of this model" for name in file.tensors if name not in names]


def _fits(file: GgufFile, entry: Entry) -> bool:
    stored = file.tensors.get(entry.name)
    return stored is not None and tuple(stored.shape) == tuple(entry.shape)


def tensor_error(file: GgufFile, model: Model, entry: Entry) -> TensorError:
    """Returns the distance of one stored tensor from its source; memory follows a piece of rows, not the tensor."""
    type_name = file.tensors[entry.name].type_name
    squares = total = 0.0
    not_finite, steps = 0, 0.0
    for start, data in stored_rows(file, entry.name):
        source = read_rows(model, entry, start, start + len(data)).astype(np.float32, copy=False)
        values, largest = decode_with_error(type_name, data, source)
        not_finite += values.size - int(np.isfinite(values).sum())
        with np.errstate(invalid="ignore", over="ignore"):
            difference = (values - source).ravel().astype(np.float64)
            squares += float(difference @ difference)
            total += float(source.ravel().astype(np.float64) @ source.ravel())
        steps = max(steps, largest)
    for piece in entry.pieces:
        model.weight(piece.spec.name).release()
    rms = float(np.sqrt(squares / total)) if total else float(np.sqrt(squares))
    return TensorError(entry.name, type_name, rms, steps, not_finite)


def _digests(file: GgufFile) -> Check:
    """Our own files say what each tensor's bytes hash to: one flipped bit anywhere shows."""
    stored = file.metadata.get(DIGESTS_KEY)
    if not isinstance(stored, list):
        return not_applicable("bytes.digests", f"the file does not carry {DIGESTS_KEY}")
    origin = "written with the file: the first 8 bytes of each tensor's SHA-256"
    if len(stored) != len(file.tensors):
        detail = f"{len(stored)} digests for {len(file.tensors)} tensors"
        return Check("bytes.digests", False, len(stored), len(file.tensors), "digests", origin, detail)
    changed = [name for name, digest in zip(file.tensors, stored, strict=True) if tensor_digest(file, name) != digest]
    detail = _named(changed) or f"{len(stored)} tensors"
    return at_most("bytes.digests", len(changed), 0, "tensors", origin, detail=detail)


def tensor_digest(file: GgufFile, name: str) -> int:
    """Returns the first 8 bytes, little-endian, of the SHA-256 of a tensor's stored bytes."""
    digest = hashlib.sha256()
    data = file.bytes(name)
    for start in range(0, len(data), HASH_BYTES):
        digest.update(data[start : start + HASH_BYTES].data)
    file.release(name)
    return int.from_bytes(digest.digest()[:8], "little")


def _rms_words(error: TensorError) -> str:
    limit = RMS_LIMITS[error.type_name]
    return f"{error.name} ({error.type_name}): relative RMS error {error.rms:.3g}, limit {limit}"


def _nan_is_worst(value: float) -> float:
    return float("inf") if np.isnan(value) else value


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
