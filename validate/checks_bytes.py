"""The written file, read again: every tensor decoded and compared with the checkpoint.

Two ways, so that no mistake of the exporter can hide in code that it shares with its check:

  bytes.error   back:   the artifact's tensors restored to the checkpoint's layout, against the checkpoint
  bytes.steps   forth:  the checkpoint's rows in the artifact's layout, against the artifact, block by block

Rows that the exporter forgot to permute come back permuted, and the first sees it; what both ways have wrong in the
same manner, the runtime computes otherwise than transformers, and the check of the conversion sees it.

Of weights that a solver moved only the first is asked, with limits of their own; of scaled ones it is asked against the
checkpoint with the artifact's scales folded in (see scales.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.gguf_metadata import SCALED, SOLVED, SOLVER_KEY
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.sparsity import SPARSITY_KEY, prunable
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import decode
from llmx.models.model import Model
from llmx.validate.case import Case
from llmx.validate.checks_metadata import check_numbers
from llmx.validate.checks_sparsity import check_sparsity
from llmx.validate.kinds import Container, kind_of
from llmx.validate.report import Check, at_most, named, not_applicable, not_run
from llmx.validate.restored import restored_model
from llmx.validate.scales import with_scales_of
from llmx.validate.steps import decode_with_error
from llmx.validate.type_errors import MOVED_LIMITS, MOVED_ORIGIN, PRUNED_LIMIT, RMS_LIMITS, RMS_ORIGIN, USUAL_RMS

NAMES = ("bytes.tensors", "bytes.finite", "bytes.steps", "bytes.gain", "bytes.error", "bytes.numbers")
PIECE = 1 << 16  # weights compared at once: they stay in a core's cache
STEP_LIMIT = 4.0
STEP_ORIGIN = (
    "1.6 measured on sound files of every type, 1.9 with importance; a flipped high bit of a 4-bit code makes 8"
)
GAIN_LIMIT = 0.5
GAIN_ORIGIN = "twice what sound files of every type stay below; Q8_0 scales that are 1 % too large make 2"


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a checkpoint tensor lies from what the artifact restores to. rms: ||restored - source|| / ||source||.

    limit: what the tensor's type may have.
    """

    name: str
    stored_as: str
    type_name: str
    rms: float
    limit: float

    @property
    def of_limit(self) -> float:
        """The error in units of the limit; NaN counts as infinite."""
        return float("inf") if np.isnan(self.rms) else self.rms / self.limit

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.stored_as}, {self.type_name}): relative RMS error {self.rms:.3g}, limit {self.limit}"
        )


@dataclass(frozen=True, slots=True)
class GridError:
    """The largest error of one stored tensor in steps of its grid, and how many of its values are no numbers.

    rms: ||decoded - source|| / ||source||, NaN where a value is no number. slope: of decoded over source, 1 for zeros.
    vector: it may hold one value many times, all of which round to the same side.
    """

    name: str
    type_name: str
    steps: float
    not_finite: int
    rms: float
    slope: float
    vector: bool

    @property
    def gain(self) -> float:
        """How far the tensor as a whole is too large or small, in units of the type's usual error.

        Less rms², which rounding to the nearest takes from coarse types; exact types are left to bytes.error.
        """
        usual = USUAL_RMS.get(self.type_name, 0.0)
        if not isfinite(self.slope):
            return inf
        return max(abs(self.slope - 1) - self.rms**2, 0.0) / usual if usual and not self.vector else 0.0

    def __str__(self) -> str:
        return f"{self.name} ({self.type_name}): {self.steps:.3g}"


def check_bytes(case: Case) -> Iterator[Check]:
    """Yields bytes.tensors, .finite, .steps, .gain, .error, .digests, .numbers and what else the format has."""
    kind = kind_of(case.file)
    if (reason := kind.unmapped(case.file, case.model.architecture)) is not None:
        yield from (not_applicable(name, reason) for name in NAMES if name != "bytes.numbers")
        yield kind.digest_check(case.file)
        yield check_numbers(case)
        return
    entries = case.entries
    problems = tensor_problems(case.file, entries)
    detail = named(problems) or f"{len(entries)} tensors, each with the expected shape"
    yield at_most("bytes.tensors", len(problems), 0, "tensors", "the architecture's own tensors", detail=detail)
    solver = case.file.metadata.get(SOLVER_KEY)
    source = compared_with(case) if not problems else case.model
    errors = [grid_error(case.file, source, entry) for entry in entries if _fits(case.file, entry)]
    _note(case, entries, errors)
    broken = [f"{error.name}: {error.not_finite} values" for error in errors if error.not_finite]
    count, detail = sum(error.not_finite for error in errors), named(broken) or "no NaN, no infinity"
    yield at_most("bytes.finite", count, 0, "values", "a weight is a number", detail=detail)
    for name, judged in (("bytes.steps", _steps), ("bytes.gain", _gain)):
        yield judged(errors) if solver is None else not_applicable(name, f"the file's weights were {solver}")
    yield _error(case, source, problems, solver)
    yield from check_sparsity(case)
    yield kind.digest_check(case.file)
    yield check_numbers(case)
    yield from kind.more_checks(case)


def compared_with(case: Case) -> Model:
    """Returns what the artifact was rounded from: the checkpoint, with the scales of a scaled file folded in.

    Raises: IntegrityError when the artifact does not hold the checkpoint's tensors.
    """
    if case.file.metadata.get(SOLVER_KEY) != SCALED:
        return case.model
    return with_scales_of(case.model, restored_model(case.file, case.model, case.entries))


def _note(case: Case, entries: Sequence[Entry], errors: Sequence[GridError]) -> None:
    """Leaves a row for every stored tensor that was compared."""
    by_name = {entry.name: entry for entry in entries}
    for error in errors:
        row = {
            "name": error.name,
            "type": error.type_name,
            "bytes": case.file.tensors[error.name].nbytes,
            "layer": by_name[error.name].layer,
            "role": by_name[error.name].role or "rope",
            "rms": error.rms if isfinite(error.rms) else str(error.rms),
            "expected": USUAL_RMS.get(error.type_name),
        }
        case.findings.add("tensors", row)


def _steps(errors: Sequence[GridError]) -> Check:
    if not errors:
        return not_run("bytes.steps", "no tensor can be compared")
    largest = max(errors, key=lambda error: error.steps)
    far = [str(error) for error in errors if error.steps > STEP_LIMIT]
    detail = named(far) or f"worst: {largest}"
    return at_most("bytes.steps", largest.steps, STEP_LIMIT, "steps of the grid", STEP_ORIGIN, detail=detail)


def _gain(errors: Sequence[GridError]) -> Check:
    """Scales that are all a little too large: each weight stays within a few steps of its source, and all lean."""
    if not errors:
        return not_run("bytes.gain", "no tensor can be compared")
    largest = max(errors, key=lambda error: error.gain)
    over = [error for error in errors if error.gain > GAIN_LIMIT]
    told = [f"{e.name} ({e.type_name}): {e.slope:.4g} times its source" for e in over]
    detail = named(told) or f"worst: {largest.name} ({largest.type_name}), {largest.slope:.5g} times its source"
    return at_most("bytes.gain", largest.gain, GAIN_LIMIT, "of the type's usual error", GAIN_ORIGIN, detail=detail)


def _error(case: Case, source: Model, problems: Sequence[str], solver: object) -> Check:
    try:
        distances = list(distances_of(case) if solver != SCALED else scaled_distances(case, source))
    except IntegrityError as error:
        return not_run("bytes.error", f"{error.what}: {named(problems)}")
    worst = max(distances, key=lambda distance: distance.of_limit)
    over = [str(distance) for distance in distances if distance.of_limit > 1]
    detail = named(over) or f"worst: {worst}"
    origin = MOVED_ORIGIN if solver in (SOLVED, SCALED) else RMS_ORIGIN
    return at_most("bytes.error", worst.of_limit, 1.0, "of the type's limit", origin, detail=detail)


def distances_of(case: Case) -> Iterator[Distance]:
    """Yields the distance of every checkpoint tensor; one tensor is in memory at a time.

    Raises: IntegrityError when the artifact does not hold the checkpoint's tensors.
    """
    limits = MOVED_LIMITS if case.file.metadata.get(SOLVER_KEY) == SOLVED else RMS_LIMITS
    least = PRUNED_LIMIT if SPARSITY_KEY in case.file.metadata else 0.0
    entries = case.entries
    holders = {name: entry for entry in entries for piece in entry.pieces for name in piece.spec.source.names}
    for name, restored in kind_of(case.file).restored(case.file, case.model, entries).items():
        entry = holders[name]
        values = restored().reshape(-1)
        if entry.role in ("embedding", "head"):  # rows of padding may be left out
            values = values[: entry.rows * entry.columns]
        type_name = case.file.tensors[entry.name].type_name
        gain = any(piece.transform == "gain" for piece in entry.pieces)
        rms = _relative_rms(case, name, values, case.model.architecture.norm_offset if gain else 0.0)
        limit = max(limits[type_name], least if any(prunable(piece.spec) for piece in entry.pieces) else 0.0)
        yield Distance(name, entry.name, type_name, rms, limit)
        case.file.release(entry.name)


def scaled_distances(case: Case, source: Model) -> Iterator[Distance]:
    """The same of every canonical tensor. source: the checkpoint with the artifact's scales folded in.

    Raises: IntegrityError when the artifact does not hold the checkpoint's tensors.
    """
    entries = case.entries
    artifact = restored_model(case.file, case.model, entries)
    least = PRUNED_LIMIT if SPARSITY_KEY in case.file.metadata else 0.0
    for entry in entries:
        for piece in entry.pieces:
            expected, stored = source.weight(piece.spec.name), artifact.weight(piece.spec.name)
            offset = np.float32(source.architecture.norm_offset if piece.transform == "gain" else 0.0)
            rows = min(expected.rows, entry.rows)  # rows of padding may be left out
            squares = total = 0.0
            step = max(1, PIECE // expected.cols)
            for start in range(0, rows, step):
                values = expected.read(start, min(start + step, rows))
                with np.errstate(invalid="ignore", over="ignore"):
                    squares += float(np.square(stored.read(start, start + len(values)) - values).sum(dtype=np.float64))
                total += float(np.square(values + offset).sum(dtype=np.float64))
            expected.release()
            type_name, names = case.file.tensors[entry.name].type_name, piece.spec.source.names
            name = names[0] if len(names) == 1 else piece.spec.name
            rms = float(np.sqrt(squares / total if total else squares))
            limit = max(MOVED_LIMITS[type_name], least if prunable(piece.spec) else 0.0)
            yield Distance(name, entry.name, type_name, rms, limit)


def _relative_rms(case: Case, name: str, values: np.ndarray, offset: float) -> float:
    """||values - source|| / ||source + offset||, read piece by piece; against a source of zeros, ||values||.

    offset: what a norm's gain is stored with: so it is rounded, near one, however small the gain of the checkpoint is.
    """
    checkpoint, squares, total = case.model.checkpoint, 0.0, 0.0
    dtype = checkpoint.tensors[name].dtype
    size = BLOCKS[dtype].bytes
    for start in range(0, len(values), PIECE):
        stop = min(start + PIECE, len(values))
        source = decode(dtype, checkpoint.bytes(name, start * size, stop * size).reshape(1, -1))[0]
        with np.errstate(invalid="ignore", over="ignore"):
            difference = values[start:stop] - source
            squares += float(difference @ difference)
            total += float(np.square(source + np.float32(offset)).sum(dtype=np.float64))
    checkpoint.release(name)
    return float(np.sqrt(squares / total if total else squares))


def tensor_problems(file: Container, entries: Sequence[Entry]) -> list[str]:
    """Returns every tensor that is missing, has another shape, or that no one asked for."""
    names = {entry.name for entry in entries}
    problems = [f"{entry.name} is missing" for entry in entries if entry.name not in file.tensors]
    problems += [
        f"{entry.name} has shape {list(file.tensors[entry.name].shape)}, expected {list(entry.shape)}"
        for entry in entries
        if entry.name in file.tensors and not _fits(file, entry)
    ]
    return problems + [f"{name} is not a tensor of this model" for name in file.tensors if name not in names]


def _fits(file: Container, entry: Entry) -> bool:
    stored = file.tensors.get(entry.name)
    return stored is not None and tuple(stored.shape) == tuple(entry.shape)


def grid_error(file: Container, model: Model, entry: Entry) -> GridError:
    """Returns the largest error of one stored tensor; memory follows a piece of rows, not the tensor."""
    kind, type_name = kind_of(file), file.tensors[entry.name].type_name
    not_finite, steps, squares, total, product = 0, 0.0, 0.0, 0.0, 0.0
    for start, data in kind.rows(file, entry.name):
        source = kind.source_rows(model, entry, start, start + len(data)).astype(np.float32, copy=False)
        values, largest = decode_with_error(type_name, data, source)
        not_finite += values.size - int(np.isfinite(values).sum())
        steps = max(steps, largest)
        with np.errstate(invalid="ignore", over="ignore"):
            squares += float(np.square(values - source).sum(dtype=np.float64))
            product += float((values * source).sum(dtype=np.float64))
        total += float(np.square(source).sum(dtype=np.float64))
    for piece in entry.pieces:
        model.weight(piece.spec.name).release()
    rms = float(np.sqrt(squares / total if total else squares))
    slope = product / total if total else 1.0
    return GridError(entry.name, type_name, steps, not_finite, rms, slope, len(entry.shape) == 1)
