"""Making artifacts: `llmx export` from the request to the published file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx import preflight, publishing, rebuilding, resuming
from llmx.memory import peak_rss_bytes, watched
from llmx.preparing import ExportRequest, Prepared, prepare
from llmx.system_errors import disk_error
from llmx.validating import require_runtime, validate

if TYPE_CHECKING:
    from llmx.exporters.solved import Solved
    from llmx.exporters.target import Exporter, WrittenTensor
    from llmx.exporters.workplace import Workplace
    from llmx.validate.report import Report


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export made. `artifact` is the file to load, `manifest` and `report_path` the JSON files beside it.

    ort: the .ort file that was made of the artifact.
    """

    artifact: Path
    nbytes: int
    files: tuple[dict[str, Any], ...]
    seconds: float
    peak_rss_bytes: int
    manifest: Path
    report_path: Path
    plan: dict[str, Any] = field(repr=False)
    validation: Report | None = None
    solved: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    ort: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The object `llmx export --json` prints."""
        return {
            "artifact": str(self.artifact),
            "bytes": self.nbytes,
            "files": list(self.files),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "manifest": str(self.manifest),
            "report": str(self.report_path),
            "type": self.plan["type"],
            "bits_per_weight": self.plan["bits_per_weight"],
            "passed": None if self.validation is None else self.validation.passed,
            "method": self.plan["quantization"]["recipe"]["method"],
            "notes": self.plan["notes"],
            "fall_backs": self.plan["fall_backs"],
            "ort": None if self.ort is None else str(self.ort),
        }


@watched
def export(request: ExportRequest) -> ExportResult:
    """Turn a checkpoint into a proven artifact: plan, check every weight, solve, write, rerun on the runtime, publish.

    Nothing appears under the final name before it has passed; an artifact that fails is left as NAME.failed.
    Raises: CheckFailed when the artifact does not pass, and what the steps raise.
    """
    from llmx.exporters import artifact, publication
    from llmx.exporters.manifest import as_text, manifest_path
    from llmx.exporters.workplace import workplace

    started = time.monotonic()
    request, manifest = rebuilding.as_it_was(request)
    prepared = prepare(request, manifest)
    exporter, model, is_folder = prepared.exporter, prepared.model, prepared.format.is_folder
    targets = exporter.targets(request.output)
    place = _place(prepared, targets)
    if request.validate:
        require_runtime(request.format)
    preflight.require(prepared, place)
    artifact.make_folder(place.parent)
    key = resuming.key_of(prepared)
    with workplace([*targets, manifest_path(targets[0])], place, key, resume=request.resume) as work:
        *partial, kept = work.files
        if request.resume:
            publication.take_back(place, work.files, [*targets, manifest_path(targets[0])])
        source_files = resuming.looked_at(exporter, work.journal)
        if manifest is not None:
            rebuilding.check_source(source_files, manifest)
        written, solved = _written(prepared, work, partial)
        model.checkpoint.check_unchanged()
        seconds, peak = time.monotonic() - started, peak_rss_bytes()
        files = publishing.described(partial, targets)
        told = {**_told(prepared, solved), **publishing.built(partial)}
        facts = _export_facts(prepared, told, files, written, seconds, peak)
        proof = rebuilding.manifest_of(prepared, source_files, files, written)
        if manifest is not None:
            rebuilding.check_rebuilt(proof, manifest)
        kept.write_text(as_text(proof), encoding="utf-8")  # the checks compare digests with it
        report = _judged(prepared, partial[0], facts) if request.validate else None
        kept.write_text(as_text({**proof, "runtime": rebuilding.runtime_of(report)}), encoding="utf-8")
        if report is None or report.passed:
            publication.announce(work.journal, work.files, [*targets, manifest_path(targets[0])])
        derived = exporter.derived(targets[0]) if is_folder else None
        report_path = publishing.publish([*partial, kept], targets, report, facts, derived)
    return ExportResult(
        artifact=targets[0],
        nbytes=sum(file["bytes"] for file in files),
        files=files,
        seconds=seconds,
        peak_rss_bytes=peak,
        manifest=manifest_path(targets[0]),
        report_path=report_path,
        plan=told,
        validation=report,
        solved=tuple(told["solved"]),
        ort=exporter.derive(targets[0]),
    )


def _place(prepared: Prepared, targets: list[Path]) -> Path:
    """Beside which path files are written before they are published. Raises: UsageError for targets in the way."""
    from llmx.exporters import artifact, publication
    from llmx.exporters.manifest import SOURCE_NAMES

    checkpoint = prepared.model.checkpoint
    if prepared.format.is_folder:
        artifact.check_folder(targets)
    read = (*checkpoint.files, *(checkpoint.folder / name for name in SOURCE_NAMES))
    place = targets[0].parent if prepared.format.is_folder else targets[0]
    there = publication.moved(place, targets) if prepared.request.resume else ()
    artifact.check_targets([path for path in targets if path not in there], read, prepared.request.force)
    return place


def _judged(prepared: Prepared, artifact: Path, facts: dict[str, object]) -> Report:
    """What the artifact's runtime says of it."""
    request = prepared.request
    return validate(
        artifact,
        prepared.model,
        text=request.text,
        positions=request.positions,
        limits=request.limits,
        threads=request.threads,
        max_memory=request.max_memory,
        facts=facts,
    )


def _written(prepared: Prepared, work: Workplace, partial: list[Path]) -> tuple[list[WrittenTensor], Solved | None]:
    """Solve what is to be solved and write the files: the tensors in them, and what the solver tells."""
    if not prepared.quantization.calibrated:
        return _write(prepared.exporter, work, partial, None), None
    from llmx.exporters.quantization import assignments, calibration_of
    from llmx.exporters.solving import solve_tensors

    planned = assignments(prepared.quantization, prepared.exporter.types_to_solve())
    calibration, store = calibration_of(
        prepared.model, prepared.quantization, planned, work.kept.parent / "shelf" if prepared.shelved else None
    )
    if prepared.quantization.inputs_only:
        exporter = prepared.exporter.calibrated(prepared.exporter.model, calibration, prepared.threads)
        return _write(exporter, work, partial, None), None
    solved = solve_tensors(
        prepared.model,
        planned,
        calibration,
        prepared.quantization.recipe.effort,
        work.kept,
        work.journal,
        prepared.threads,
        prepared.exporter.static_inputs(),
    )
    if store is not None:
        store.finish()
    exporter = prepared.exporter.calibrated(solved.model, calibration, prepared.threads)
    return _write(exporter, work, partial, solved), solved


def _write(exporter: Exporter, work: Workplace, partial: list[Path], solved: Solved | None) -> list[WrittenTensor]:
    try:
        return exporter.write(partial, None if solved is None else solved.rows, work.journal)
    except OSError as error:
        raise disk_error(error, partial[0].parent.parent) from error


def _told(prepared: Prepared, solved: Solved | None) -> dict[str, Any]:
    """The plan, what the solver found of each matrix, and what a user should know of it."""
    told = prepared.described()
    told["solved"] = [] if solved is None else [line.to_json() for line in solved.lines]
    if solved is not None:
        told["quantization"]["calibration"]["tokens"] = solved.tokens
        told["notes"] = [*told["notes"], *solved.notes()]
        if solved.scaling is not None:
            told["scaling"] = [choice.line() for choice in solved.scaling.choices]
    return told


def _export_facts(
    prepared: Prepared,
    told: dict[str, Any],
    files: Sequence[dict[str, Any]],
    written: Sequence[WrittenTensor],
    seconds: float,
    peak: int,
) -> dict[str, object]:
    wanted = {step.name: step.wanted for step in prepared.exporter.plan.steps}
    tensors = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": tensor.type_name,
            "bytes": tensor.nbytes,
            "fell_back_from": wanted.get(tensor.name),
            "sha256": tensor.sha256,
        }
        for tensor in written
    ]
    source = prepared.model.checkpoint.source
    imatrix = prepared.request.imatrix
    return {
        "export": {
            "source": {"id": source.id, "revision": source.revision},
            "method": prepared.quantization.recipe.method,
            "importance": None if imatrix is None else imatrix.name,
            "seconds": round(seconds, 3),
            "peak_rss_bytes": peak,
            **told,
            "bytes": sum(file["bytes"] for file in files),
            "tensors": tensors,
            "files": list(files),
        }
    }
