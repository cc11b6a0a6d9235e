"""Making artifacts: `llmx export` from the request to the published file, and `llmx plan`."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx import rebuilding
from llmx.errors import CheckFailed, LlmxError, ResourceError, RuntimeMissing, UsageError
from llmx.memory import peak_rss_bytes, require_memory
from llmx.validating import REPORT_NAME, available_cores, check_threads, require_runtime, validate, write_report

if TYPE_CHECKING:
    from llmx.exporters.gguf import GgufExport
    from llmx.exporters.manifest_reader import Manifest
    from llmx.exporters.quantization import Quantization, Wishes
    from llmx.exporters.solving import Solved
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.models.tokenizer import Tokenizer
    from llmx.validate.case import Limits
    from llmx.validate.report import Report

FORMATS = ("gguf",)


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Everything `llmx export` can be told. `output` is a folder, or a file for one-file formats.

    method, effort: None takes the recipe's, or auto and balanced. from_manifest: a manifest that says all that shapes
    the bytes; model may then be empty where the manifest names a hub id.
    """

    model: str
    format: str = "gguf"
    bits: int | None = None
    type_name: str | None = None
    revision: str | None = None
    method: str | None = None
    effort: str | None = None
    recipe: str | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None
    statistics: Path | None = None
    device: str = "auto"
    target_size: str | None = None
    target_bpw: float | None = None
    imatrix: Path | None = None
    tensor_types: Sequence[str] = ()
    split_max_size: str | None = None
    output: Path = Path()
    threads: int = 0
    validate: bool = True
    force: bool = False
    text: Path | None = None
    limits: Limits | None = None
    positions: int | None = None
    from_manifest: Path | None = None


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export made. `artifact` is the file to load, `manifest` and `report_path` the JSON files beside it."""

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
        }


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request thought through: nothing has been written yet."""

    request: ExportRequest
    model: Model
    exporter: GgufExport
    quantization: Quantization
    threads: int

    @property
    def peak_memory_bytes(self) -> int:
        """Estimated: what writing takes, or calibrating where that is more."""
        from llmx.exporters.quantization import calibrated_memory

        writing = self.exporter.plan.peak_memory_bytes
        if not self.quantization.calibrated:
            return writing
        return max(writing, calibrated_memory(self.model, self.quantization.tokens))

    def described(self) -> dict[str, Any]:
        """The plan as plain data, with what was decided of quantizing."""
        told = self.exporter.plan.to_json()
        told["notes"] = [*told["notes"], *self.quantization.notes]
        told["quantization"] = self.quantization.to_json()
        told["peak_memory_bytes"] = self.peak_memory_bytes
        return told


def export(request: ExportRequest) -> ExportResult:
    """Turn a checkpoint into a proven artifact: plan, check every weight, solve, write, rerun on the runtime, publish.

    Nothing appears under the final name before it has passed; an artifact that fails is left as NAME.failed.
    Raises: CheckFailed when the artifact does not pass, and what the steps raise.
    """
    from llmx.exporters import artifact, gguf
    from llmx.exporters.manifest import SourceHashes, as_text, manifest_path

    started = time.monotonic()
    request, manifest = rebuilding.as_it_was(request)
    prepared = _prepare(request, manifest)
    exporter, model = prepared.exporter, prepared.model
    targets = _targets(request.output, exporter)
    artifact.check_targets(targets, model.checkpoint.files, request.force)
    if request.validate:
        require_runtime()
        require_memory(exporter.plan.parameters)
    artifact.make_folder(targets[0].parent)
    artifact.check_room(targets[0].parent, exporter.plan.nbytes * (2 if prepared.quantization.calibrated else 1))
    with SourceHashes(model.checkpoint) as source:
        gguf.check_weights(exporter)
        source_files = source.result()
    if manifest is not None:
        rebuilding.check_source(source_files, manifest)
    with artifact.partial_files([*targets, manifest_path(targets[0])]) as (*partial, kept):
        digests, solved = _written(prepared, partial)
        model.checkpoint.check_unchanged()
        seconds, peak = time.monotonic() - started, peak_rss_bytes()
        files = _described(partial, targets)
        told = _told(prepared, solved)
        facts = _export_facts(prepared, told, files, digests, seconds, peak)
        proof = rebuilding.manifest_of(prepared, source_files, files, digests)
        if manifest is not None:
            rebuilding.check_rebuilt(proof, manifest)
        report = _judged(prepared, partial[0], facts) if request.validate else None
        kept.write_text(as_text({**proof, "runtime": rebuilding.runtime_of(report)}), encoding="utf-8")
        report_path = _publish([*partial, kept], targets, report, facts)
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
    )


def _described(partial: Sequence[Path], targets: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Name, bytes and sha256 of every file, under the name that it will have."""
    from llmx.exporters.artifact import ArtifactFile, file_sha256

    pairs = zip(partial, targets, strict=True)
    return tuple(ArtifactFile(target, path.stat().st_size, file_sha256(path)).to_json() for path, target in pairs)


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
        facts=facts,
    )


def _written(prepared: Prepared, partial: list[Path]) -> tuple[tuple[str, ...], Solved | None]:
    """Solve what is to be solved and write the files: the tensors' digests, and what the solver tells."""
    if not prepared.quantization.calibrated:
        return _write(prepared.exporter, partial, None), None
    from llmx.exporters.gguf import canonical_types
    from llmx.exporters.quantization import assignments, calibration_of
    from llmx.exporters.solving import solve_tensors

    planned = assignments(prepared.quantization, canonical_types(prepared.exporter))
    calibration, store = calibration_of(prepared.model, prepared.quantization, planned)
    with tempfile.TemporaryDirectory(prefix="solved-", dir=partial[0].parent) as folder:
        effort = prepared.quantization.recipe.effort
        solved = solve_tensors(prepared.model, planned, calibration, effort, Path(folder), prepared.threads)
        if store is not None:
            store.finish()
        return _write(replace(prepared.exporter, model=solved.model), partial, solved), solved


def _publish(partial: list[Path], targets: list[Path], report: Report | None, facts: dict[str, object]) -> Path:
    """Move the files to their final names, write the report and its page beside them, return the report's path.

    partial: those of targets, and last the manifest, which only an artifact that passed gets.
    Raises: CheckFailed, or what the report's exit code stands for, when it did not pass; the files then have the names
    of failed ones.
    """
    from llmx.exporters import artifact
    from llmx.exporters.manifest import manifest_path
    from llmx.validate.report import unproven

    passed = report is None or report.passed
    names = targets if passed else [target.with_name(target.name + artifact.FAILED) for target in targets]
    report_path = _report_path(targets[0])
    artifact.publish(partial[: None if passed else -1], [*names, *[manifest_path(targets[0])] * passed])
    write_report(report_path, unproven(facts) if report is None else report.to_dict())
    if report is not None and not passed:
        raise _failure(report, names[0], report_path)
    return report_path


def plan(request: ExportRequest) -> Prepared:
    """What `export` would do: every tensor's type, the exact sizes, the fall-backs. Only a budget reads weights."""
    return _prepare(*rebuilding.as_it_was(request))


def _prepare(request: ExportRequest, manifest: Manifest | None) -> Prepared:
    """The opened model, its plan, and how it will be quantized: as asked, or as it was when the manifest was made."""
    from llmx.exporters import gguf, gguf_types, quantization
    from llmx.formats.gguf import parse_size
    from llmx.formats.imatrix import read_imatrix
    from llmx.models.model import open_model
    from llmx.models.tokenizer import open_tokenizer

    _check_request(request)
    threads = request.threads or available_cores()
    wishes = _wishes(request, manifest)
    recipe = (
        quantization.chosen_recipe(wishes, _named_type(request)) if manifest is None else rebuilding.recipe_of(manifest)
    )
    chosen = quantization.file_type_of(recipe)
    overrides = gguf_types.parse_overrides(request.tensor_types)
    importance = None if request.imatrix is None else read_imatrix(request.imatrix)
    split = None if request.split_max_size is None else parse_size(request.split_max_size)
    model = open_model(request.model, request.revision)
    if manifest is not None:
        rebuilding.call_it_as_before(model, manifest)
    decided = quantization.quantization(model, wishes, recipe, chosen.base, threads)
    types = {name: got.type.upper() for name, got in decided.resolved.items() if got.type is not None}
    options = gguf.GgufOptions(
        file_type=chosen,
        overrides=overrides,
        types=types,
        importance=importance,
        solver=decided.solver,
        split_max_bytes=split,
        threads=threads,
        effort=recipe.effort,
    )
    tokenizer = open_tokenizer(model.checkpoint.folder)
    exporter = gguf.prepare(model, tokenizer, options)
    if request.target_size is not None or request.target_bpw is not None:
        exporter = _within_budget(request, exporter, tokenizer, decided.text, threads)
    if decided.calibrated and not quantization.assignments(decided, gguf.canonical_types(exporter)):
        raise UsageError(
            f"a {chosen.name} file holds no quantized tensor: there is nothing to calibrate",
            fix="leave out --method and --calibration, or choose a smaller type",
        )
    return Prepared(request, model, exporter, decided, threads)


def _named_type(request: ExportRequest) -> str | None:
    """The mix that --type or --bits names, as it is spelt."""
    from llmx.exporters.gguf_types import file_type, file_type_of_bits

    if request.type_name is not None:
        return file_type(request.type_name).name
    return None if request.bits is None else file_type_of_bits(request.bits).name


def _wishes(request: ExportRequest, manifest: Manifest | None) -> Wishes:
    from llmx.exporters.quantization import Wishes

    return Wishes(
        recipe=request.recipe,
        method=request.method,
        effort=request.effort,
        calibration=request.calibration,
        tokens=request.calibration_tokens,
        statistics=request.statistics,
        device=request.device,
        importance=request.imatrix is not None,
        calibrate=None if manifest is None else manifest.told["calibration"] is not None,
    )


def _within_budget(
    request: ExportRequest, exporter: GgufExport, tokenizer: Tokenizer, text: CalibrationText | None, threads: int
) -> GgufExport:
    """The export planned anew within --target-size or --target-bpw."""
    from llmx.exporters.budget import Budget, within_budget
    from llmx.formats.gguf import parse_size
    from llmx.models.calibration_text import read_calibration

    size = None if request.target_size is None else parse_size(request.target_size)
    text = text or (None if request.calibration is None else read_calibration(request.calibration))
    return within_budget(exporter.model, tokenizer, exporter, Budget(size, request.target_bpw), text, threads)


def _check_request(request: ExportRequest) -> None:
    if request.format not in FORMATS:
        raise UsageError(f"there is no format {request.format!r}", fix=f"choose one of {', '.join(FORMATS)}")
    if request.bits is not None and request.type_name is not None:
        raise UsageError("--bits and --type both choose the type", fix="give one of them")
    if request.target_size is not None and request.target_bpw is not None:
        raise UsageError("--target-size and --target-bpw both set the size", fix="give one of them")
    if request.target_bpw is not None and not 0 < request.target_bpw < math.inf:
        raise UsageError(f"--target-bpw {request.target_bpw} is no number of bits", fix="for example 4.2")
    check_threads(request.threads)


def _targets(output: Path, exporter: GgufExport) -> list[Path]:
    """The final paths: in the folder `output`, or the file `output` itself."""
    from llmx.formats.gguf import shard_name

    names = [file.name for file in exporter.plan.files]
    if output.suffix != ".gguf":
        return [output / name for name in names]
    if len(names) == 1:
        return [output]
    return [output.with_name(shard_name(output.stem, number, len(names))) for number in range(len(names))]


def _write(exporter: GgufExport, partial: list[Path], solved: Solved | None) -> tuple[str, ...]:
    from llmx.exporters import artifact, gguf

    try:
        return gguf.write(exporter, partial, None if solved is None else solved.rows)
    except OSError as error:
        raise artifact.disk_error(error, partial[0].parent.parent) from error


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
    digests: Sequence[str],
    seconds: float,
    peak: int,
) -> dict[str, object]:
    tensors = [{**t, "sha256": digest} for t, digest in zip(told["tensors"], digests, strict=True)]
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
            "tensors": tensors,
            "files": list(files),
        }
    }


def _report_path(artifact: Path) -> Path:
    """report.json beside the artifact; ARTIFACT.report.json where the folder's report tells of another artifact."""
    path = artifact.with_name(REPORT_NAME)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["export"]["files"][0]["name"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return path
    return path if told == artifact.name else artifact.with_name(f"{artifact.name}.{REPORT_NAME}")


def _failure(report: Report, artifact: Path, report_path: Path) -> LlmxError:
    problems = [f"{check.name}: {check.value} against {check.limit}: {check.detail}" for check in report.failed]
    problems += [f"{check.name}: not run: {check.detail}" for check in report.missing]
    where = f"{artifact}, report {report_path}"
    kinds = (UsageError, ResourceError, RuntimeMissing, CheckFailed)
    kind = next(kind for kind in kinds if kind.exit_code == report.exit_code)
    return kind("the artifact did not pass", problems=problems, where=where)
