"""The written file, read again: every tensor decoded and compared with the checkpoint.

Two ways, so that no mistake of the exporter can hide in code that it shares with its check:

  bytes.error   back:   the artifact's tensors restored to the checkpoint's layout, against the checkpoint
  bytes.steps   forth:  the checkpoint's rows in the artifact's layout, against the artifact, block by block

Rows that the exporter forgot to permute come back permuted, and the first sees it; what both ways have wrong in the
same manner, the runtime computes otherwise than transformers, and the check of the conversion sees it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.gguf_metadata import DIGESTS_KEY, SCALED, SOLVED, SOLVER_KEY, WRITTEN_TYPE_KEY, short_digest
from llmx.exporters.gguf_tensors import Entry, read_rows, restore
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import decode
from llmx.formats.gguf import GgufFile
from llmx.models.model import Model
from llmx.validate.case import Case
from llmx.validate.report import Check, at_most, not_applicable, not_run
from llmx.validate.steps import decode_with_error
from llmx.validate.twin import stored_rows

HASH_BYTES = 1 << 20
PIECE = 1 << 16  # weights compared at once: they stay in a core's cache
RMS_LIMITS: Mapping[str, float] = {
    # type -> largest ||decoded - source|| / ||source|| of a tensor
    "F32": 1e-6,
    "F16": 5e-4,
    "BF16": 4e-3,
    "Q8_0": 0.012,
    "Q6_K": 0.03,
    "Q5_K": 0.06,
    "Q5_0": 0.08,
    "Q5_1": 0.07,
    "Q4_K": 0.12,
    "Q4_0": 0.16,
    "Q4_1": 0.13,
    "IQ4_NL": 0.12,
    "IQ4_XS": 0.12,
    "Q3_K": 0.26,
    "Q2_K": 0.50,
}
RMS_ORIGIN = "1.5 to 2.5 times the largest error measured on the ten test checkpoints, by type"
MOVED_LIMIT = 1.0
MOVED_ORIGIN = (
    "a tensor in another's place, or with its rows in another order, is √2 away; the most that was measured on solved "
    "files of the ten test checkpoints is 0.63 (Q2_K)"
)
STEP_LIMIT = 4.0
STEP_ORIGIN = (
    "1.6 measured on sound files of every type, 1.9 with importance; a flipped high bit of a 4-bit code makes 8"
)
SHOWN = 8  # offenders named


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a checkpoint tensor lies from what the artifact restores to. rms: ||restored - source|| / ||source||."""

    name: str
    stored_as: str
    type_name: str
    rms: float

    @property
    def of_limit(self) -> float:
        """The error in units of the type's limit; NaN counts as infinite."""
        return float("inf") if np.isnan(self.rms) else self.rms / RMS_LIMITS[self.type_name]

    def __str__(self) -> str:
        limit = RMS_LIMITS[self.type_name]
        return f"{self.name} ({self.stored_as}, {self.type_name}): relative RMS error {self.rms:.3g}, limit {limit}"


@dataclass(frozen=True, slots=True)
class GridError:
    """The largest error of one stored tensor in steps of its grid, and how many of its values are no numbers."""

    name: str
    type_name: str
    steps: float
    not_finite: int

    def __str__(self) -> str:
        return f"{self.name} ({self.type_name}): {self.steps:.3g}"


def check_bytes(case: Case) -> Iterator[Check]:
    """Yields bytes.tensors, .finite, .steps, .error and .digests."""
    entries = case.entries
    problems = tensor_problems(case.file, entries)
    detail = named(problems) or f"{len(entries)} tensors, each with the expected shape"
    yield at_most("bytes.tensors", len(problems), 0, "tensors", "the architecture's own tensors", detail=detail)
    errors = [grid_error(case.file, case.model, entry) for entry in entries if _fits(case.file, entry)]
    broken = [f"{error.name}: {error.not_finite} values" for error in errors if error.not_finite]
    count, detail = sum(error.not_finite for error in errors), named(broken) or "no NaN, no infinity"
    yield at_most("bytes.finite", count, 0, "values", "a weight is a number", detail=detail)
    solver = case.file.metadata.get(SOLVER_KEY)
    yield _steps(errors) if solver is None else not_applicable("bytes.steps", f"the file's weights were {solver}")
    yield _error(case, problems, solver)
    yield _digests(case.file)


def _steps(errors: Sequence[GridError]) -> Check:
    if not errors:
        return not_run("bytes.steps", "no tensor can be compared")
    largest = max(errors, key=lambda error: error.steps)
    far = [str(error) for error in errors if error.steps > STEP_LIMIT]
    detail = named(far) or f"worst: {largest}"
    return at_most("bytes.steps", largest.steps, STEP_LIMIT, "steps of the grid", STEP_ORIGIN, detail=detail)


def _error(case: Case, problems: Sequence[str], solver: object) -> Check:
    if solver == SCALED:
        return not_applicable("bytes.error", "channels were scaled: the check of the conversion compares functions")
    try:
        distances = list(distances_of(case))
    except IntegrityError as error:
        return not_run("bytes.error", f"{error.what}: {named(problems)}")
    if solver == SOLVED:
        return _moved(distances)
    worst = max(distances, key=lambda distance: distance.of_limit)
    over = [str(distance) for distance in distances if distance.of_limit > 1]
    detail = named(over) or f"worst: {worst}"
    return at_most("bytes.error", worst.of_limit, 1.0, "of the type's limit", RMS_ORIGIN, detail=detail)


def _moved(distances: Sequence[Distance]) -> Check:
    """Of weights that were moved on purpose: near enough to be this tensor, in this order."""
    worst = max(distances, key=lambda distance: float("inf") if np.isnan(distance.rms) else distance.rms)
    far = [f"{d.name} ({d.stored_as}): {d.rms:.3g}" for d in distances if not d.rms <= MOVED_LIMIT]
    detail = named(far) or f"worst: {worst.name}"
    return at_most("bytes.error", worst.rms, MOVED_LIMIT, "of the tensor", MOVED_ORIGIN, detail=detail)


def distances_of(case: Case) -> Iterator[Distance]:
    """Yields the distance of every checkpoint tensor; one tensor is in memory at a time.

    Raises: IntegrityError when the artifact does not hold the checkpoint's tensors.
    """
    entries = case.entries
    holders = {name: entry for entry in entries for piece in entry.pieces for name in piece.spec.source.names}
    for name, restored in restore(case.file, case.model, entries).items():
        entry = holders[name]
        values = restored().reshape(-1)
        if entry.role in ("embedding", "head"):  # rows of padding may be left out
            values = values[: entry.rows * entry.columns]
        yield Distance(name, entry.name, case.file.tensors[entry.name].type_name, _relative_rms(case, name, values))
        case.file.release(entry.name)


def _relative_rms(case: Case, name: str, values: np.ndarray) -> float:
    """||values - source|| / ||source||, read piece by piece; against a source of zeros, ||values||."""
    checkpoint, squares, total = case.model.checkpoint, 0.0, 0.0
    dtype = checkpoint.tensors[name].dtype
    size = BLOCKS[dtype].bytes
    for start in range(0, len(values), PIECE):
        stop = min(start + PIECE, len(values))
        source = decode(dtype, checkpoint.bytes(name, start * size, stop * size).reshape(1, -1))[0]
        with np.errstate(invalid="ignore", over="ignore"):
            difference = values[start:stop] - source
            squares += float(difference @ difference)
            total += float(source @ source)
    checkpoint.release(name)
    return float(np.sqrt(squares / total if total else squares))


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


def grid_error(file: GgufFile, model: Model, entry: Entry) -> GridError:
    """Returns the largest error of one stored tensor; memory follows a piece of rows, not the tensor."""
    type_name = file.tensors[entry.name].type_name
    not_finite, steps = 0, 0.0
    for start, data in stored_rows(file, entry.name):
        source = read_rows(model, entry, start, start + len(data)).astype(np.float32, copy=False)
        values, largest = decode_with_error(type_name, data, source)
        not_finite += values.size - int(np.isfinite(values).sum())
        steps = max(steps, largest)
    for piece in entry.pieces:
        model.weight(piece.spec.name).release()
    return GridError(entry.name, type_name, steps, not_finite)


def _digests(file: GgufFile) -> Check:
    """Our own files say what each tensor's bytes hash to: one flipped bit anywhere shows."""
    stored = file.metadata.get(DIGESTS_KEY)
    if not isinstance(stored, list):
        return not_applicable("bytes.digests", f"the file does not carry {DIGESTS_KEY}")
    if file.metadata.get(WRITTEN_TYPE_KEY) != file.metadata.get("general.file_type"):
        return not_applicable(
            "bytes.digests", "another program quantized this file again; the digests are of its source"
        )
    origin = "written with the file: the first 8 bytes of each tensor's SHA-256"
    if len(stored) != len(file.tensors):
        detail = f"{len(stored)} digests for {len(file.tensors)} tensors"
        return Check("bytes.digests", False, len(stored), len(file.tensors), "digests", origin, detail)
    changed = [name for name, digest in zip(file.tensors, stored, strict=True) if tensor_digest(file, name) != digest]
    detail = named(changed) or f"{len(stored)} tensors"
    return at_most("bytes.digests", len(changed), 0, "tensors", origin, detail=detail)


def tensor_digest(file: GgufFile, name: str) -> int:
    """Returns the first 8 bytes, little-endian, of the SHA-256 of a tensor's stored bytes."""
    digest = hashlib.sha256()
    data = file.bytes(name)
    for start in range(0, len(data), HASH_BYTES):
        digest.update(data[start : start + HASH_BYTES].data)
    file.release(name)
    return short_digest(digest.digest())


def named(names: Sequence[str]) -> str:
    """Returns the first names of a list and how many more there are; "" for none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
