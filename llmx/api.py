"""What llmx does, each job read top to bottom: export, validate, plan, inspect, doctor."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import CheckFailed, ResourceError, RuntimeMissing, UnsupportedError, UsageError

if TYPE_CHECKING:
    from llmx.exporters.gguf import GgufExport
    from llmx.models.model import Model
    from llmx.validate.case import Limits
    from llmx.validate.report import Report

FORMATS = ("gguf",)
METHODS = ("auto", "rtn", "awq", "gptq")
REPORT_NAME = "report.json"
RUNTIME_OF_FORMAT = {"gguf": "llama.cpp"}
LIBRARIES = ("xllamacpp", "llama-cpp-python", "torch", "transformers", "tokenizers", "numba", "numpy", "gguf")


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Everything `llmx export` can be told. `output` is a folder, or a file for one-file formats."""

    model: str
    format: str = "gguf"
    bits: int | None = None
    type_name: str | None = None
    revision: str | None = None
    method: str = "auto"
    calibration: Path | None = None
    imatrix: Path | None = None
    tensor_types: Sequence[str] = ()
    split_max_size: str | None = None
    output: Path = Path()
    threads: int = 0
    validate: bool = True
    force: bool = False
    text: Path | None = None
    limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What an export made. `artifact` is the file to load; `report` the JSON beside it, None without validation."""

    artifact: Path
    nbytes: int
    files: tuple[dict[str, Any], ...]
    seconds: float
    peak_rss_bytes: int
    report_path: Path
    plan: dict[str, Any] = field(repr=False)
    validation: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """The object `llmx export --json` prints."""
        return {
            "artifact": str(self.artifact),
            "bytes": self.nbytes,
            "files": list(self.files),
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "report": str(self.report_path),
            "type": self.plan["type"],
            "bits_per_weight": self.plan["bits_per_weight"],
            "passed": None if self.validation is None else self.validation.passed,
            "notes": self.plan["notes"],
            "fall_backs": self.plan["fall_backs"],
        }


def export(request: ExportRequest) -> ExportResult:
    """Turn a checkpoint into a proven artifact: plan, check every weight, write, rerun on the runtime, publish.

    Nothing appears under the final name before it has passed; an artifact that fails is left as NAME.failed.
    Raises: CheckFailed when the artifact does not pass, and what the steps raise.
    """
    from llmx.exporters import artifact, gguf

    started = time.monotonic()
    model, exporter = _prepare(request)
    targets = _targets(request.output, exporter)
    artifact.check_targets(targets, model.checkpoint.files, request.force)
    if request.validate:
        _require_runtime()
        _require_memory(exporter)
    artifact.make_folder(targets[0].parent)
    artifact.check_room(targets[0].parent, exporter.plan.nbytes)
    gguf.check_weights(exporter)
    with artifact.partial_files(targets) as partial:
        digests = _write(exporter, partial)
        model.checkpoint.check_unchanged()
        seconds, peak = time.monotonic() - started, _peak_rss_bytes()
        files = tuple(
            artifact.ArtifactFile(target, path.stat().st_size, artifact.file_sha256(path)).to_json()
            for path, target in zip(partial, targets, strict=True)
        )
        facts = _export_facts(request, exporter, files, digests, seconds, peak)
        report = None
        if request.validate:
            report = validate(
                partial[0], model, text=request.text, limits=request.limits, threads=request.threads, facts=facts
            )
        report_path = _publish(partial, targets, report, facts)
    return ExportResult(
        artifact=targets[0],
        nbytes=sum(file["bytes"] for file in files),
        files=files,
        seconds=seconds,
        peak_rss_bytes=peak,
        report_path=report_path,
        plan=exporter.plan.to_json(),
        validation=report,
    )


def _publish(partial: list[Path], targets: list[Path], report: Report | None, facts: dict[str, object]) -> Path:
    """Move the files to their final names, write the report beside them and return its path.

    Raises: CheckFailed when the report did not pass; the files then have the names of failed ones.
    """
    from llmx.exporters import artifact

    passed = report is None or report.passed
    names = targets if passed else [target.with_name(target.name + artifact.FAILED) for target in targets]
    report_path = _report_path(targets[0])
    artifact.publish(partial, names)
    artifact.write_text(report_path, _unproven(facts) if report is None else report.to_json())
    if report is not None and not passed:
        raise _failure(report, names[0], report_path)
    return report_path


def plan(request: ExportRequest) -> GgufExport:
    """What `export` would do: every tensor's type, the exact sizes, the fall-backs. Reads no weight."""
    return _prepare(request)[1]


def _prepare(request: ExportRequest) -> tuple[Model, GgufExport]:
    """The opened model and its plan."""
    from llmx.exporters import gguf, gguf_types
    from llmx.formats.gguf import parse_size
    from llmx.formats.imatrix import read_imatrix
    from llmx.models.model import open_model
    from llmx.models.tokenizer import open_tokenizer

    _check_request(request)
    chosen = (
        gguf_types.file_type(request.type_name)
        if request.type_name is not None
        else gguf_types.file_type_of_bits(request.bits or 4)
    )
    options = gguf.GgufOptions(
        file_type=chosen,
        overrides=gguf_types.parse_overrides(request.tensor_types),
        importance=None if request.imatrix is None else read_imatrix(request.imatrix),
        split_max_bytes=None if request.split_max_size is None else parse_size(request.split_max_size),
        threads=request.threads or available_cores(),
    )
    model = open_model(request.model, request.revision)
    return model, gguf.prepare(model, open_tokenizer(model.checkpoint.folder), options)


def _check_request(request: ExportRequest) -> None:
    if request.format not in FORMATS:
        raise UsageError(f"there is no format {request.format!r}", fix=f"choose one of {', '.join(FORMATS)}")
    if request.method not in METHODS:
        raise UsageError(f"there is no method {request.method!r}", fix=f"choose one of {', '.join(METHODS)}")
    if request.method in ("awq", "gptq"):
        raise UnsupportedError(
            f"--method {request.method} is not available for {request.format} yet",
            fix="use --method rtn, with --imatrix for importance weights",
        )
    if request.calibration is not None:
        raise UnsupportedError(
            "--calibration needs a method that calibrates; none is available yet",
            fix="give importance weights with --imatrix",
        )
    if request.bits is not None and request.type_name is not None:
        raise UsageError("--bits and --type both choose the type", fix="give one of them")
    if request.threads < 0:
        raise UsageError("--threads cannot be negative", fix="0 takes every core")


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _targets(output: Path, exporter: GgufExport) -> list[Path]:
    """The final paths: in the folder `output`, or the file `output` itself."""
    from llmx.formats.gguf import shard_name

    names = [file.name for file in exporter.plan.files]
    if output.suffix != ".gguf":
        return [output / name for name in names]
    if len(names) == 1:
        return [output]
    return [output.with_name(shard_name(output.stem, number, len(names))) for number in range(len(names))]


def _write(exporter: GgufExport, partial: list[Path]) -> tuple[str, ...]:
    from llmx.exporters import artifact, gguf

    try:
        return gguf.write(exporter, partial)
    except OSError as error:
        raise artifact.disk_error(error, partial[0].parent.parent) from error


def validate(
    artifact: Path,
    reference: str | Path | Model,
    *,
    revision: str | None = None,
    text: Path | None = None,
    limits: Limits | None = None,
    output: Path | None = None,
    threads: int = 0,
    facts: dict[str, object] | None = None,
) -> Report:
    """Rerun an artifact on its runtime and judge it against the checkpoint; the report says what passed.

    output: a folder for report.json. facts: more about the artifact, for the report.
    Raises: IntegrityError for a broken artifact, UsageError for one that is not there or a text that cannot be read.
    """
    from llmx.exporters import artifact as files
    from llmx.models.model import Model, open_model
    from llmx.progress import stages
    from llmx.validate.case import Settings
    from llmx.validate.suite import validate as run_checks

    if not artifact.is_file():
        raise UsageError("there is no such artifact", where=artifact, fix="give a .gguf file")
    with stages("validating") as stage:
        report = run_checks(
            artifact,
            reference if isinstance(reference, Model) else open_model(reference, revision),
            runtime=RUNTIME_OF_FORMAT["gguf"],
            text=None if text is None else _read_text(text),
            limits=limits,
            settings=Settings(threads=threads or available_cores()),
            progress=stage,
        )
    report = replace(report, facts={**report.facts, **(facts or {})})
    if output is not None:
        files.make_folder(output)
        files.write_text(output / REPORT_NAME, report.to_json())
    return report


def limits(
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    min_tokens_per_second: float | None = None,
) -> Limits:
    """What an artifact must keep to pass; None takes the default of its size class."""
    from llmx.validate.case import Limits

    return Limits(max_kl, min_top1, max_ppl_ratio, min_tokens_per_second)


def exit_code(report: Report) -> int:
    """0 when it passed, 7 when its runtime is missing, 4 otherwise."""
    if report.passed:
        return 0
    if report.failed:
        return CheckFailed.exit_code
    return RuntimeMissing.exit_code if _missing_runtime() is not None else CheckFailed.exit_code


def inspect(path: Path) -> dict[str, Any]:
    """What a GGUF file, or a split set of which `path` is a part, holds: metadata, tensors, sizes.

    Raises: UsageError when there is no such file, IntegrityError when it is broken or hostile.
    """
    from llmx.formats.gguf import read_gguf_set

    if not path.is_file():
        raise UsageError("there is no such file", where=path)
    file = read_gguf_set(path)
    tensors = list(file.tensors.values())
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return {
        "format": "gguf",
        "version": file.version,
        "files": [str(shard) for shard in file.paths],
        "bytes": sum(shard.stat().st_size for shard in file.paths),
        "parameters": parameters,
        "bits_per_weight": round(8 * sum(t.nbytes for t in tensors) / parameters, 4) if parameters else None,
        "metadata": {key: {"type": file.types[key], "value": value} for key, value in file.metadata.items()},
        "tensors": [{"name": t.name, "shape": list(t.shape), "type": t.type_name, "bytes": t.nbytes} for t in tensors],
    }


def doctor() -> dict[str, Any]:
    """Which runtimes and libraries are here, and why a runtime is not."""
    import platform
    from importlib import metadata

    import psutil

    from llmx.validate.runtimes import find_runtime, runtime_names

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    reasons = {name: find_runtime(name).unavailable() for name in runtime_names()}
    return {
        "llmx": version("llmx"),
        "python": platform.python_version(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "runtimes": [{"name": name, "available": reason is None, "reason": reason} for name, reason in reasons.items()],
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read as UTF-8", where=f"{path}: {error}") from error


def _missing_runtime() -> str | None:
    """Why the GGUF runtime cannot run here, or None."""
    from llmx.validate.runtimes import find_runtime

    return find_runtime(RUNTIME_OF_FORMAT["gguf"]).unavailable()


def _require_runtime() -> None:
    if (reason := _missing_runtime()) is not None:
        raise RuntimeMissing(
            f"the runtime {RUNTIME_OF_FORMAT['gguf']} cannot run here: {reason}",
            fix="pip install 'llmx[llamacpp]', or export unproven with --no-validate",
        )


def _require_memory(exporter: GgufExport) -> None:
    """The proof runs transformers in float32: refuse before the export what cannot be proven after it."""
    import psutil

    needed, available = 4 * exporter.plan.parameters, psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"validation holds a float32 reference: {needed / 1e9:,.1f} GB, and {available / 1e9:,.1f} GB are free",
            fix="export with --no-validate, and run `llmx validate` on a larger machine",
        )


def _peak_rss_bytes() -> int:
    """The largest resident set this process ever had."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _export_facts(
    request: ExportRequest,
    exporter: GgufExport,
    files: Sequence[dict[str, Any]],
    digests: Sequence[str],
    seconds: float,
    peak: int,
) -> dict[str, object]:
    described = exporter.plan.to_json()
    for tensor, digest in zip(described["tensors"], digests, strict=True):
        tensor["sha256"] = digest
    return {
        "export": {
            "source": {
                "id": exporter.model.checkpoint.source.id,
                "revision": exporter.model.checkpoint.source.revision,
            },
            "method": "rtn",
            "importance": None if request.imatrix is None else request.imatrix.name,
            "seconds": round(seconds, 3),
            "peak_rss_bytes": peak,
            **described,
            "files": list(files),
        }
    }


def _unproven(facts: dict[str, object]) -> str:
    """report.json of an export that was not validated: passed is null, never true."""
    from llmx.validate.report import SCHEMA

    return json.dumps({"schema": SCHEMA, "passed": None, **facts, "checks": []}, indent=2) + "\n"


def _report_path(artifact: Path) -> Path:
    """report.json beside the artifact; ARTIFACT.report.json where the folder's report tells of another artifact."""
    path = artifact.with_name(REPORT_NAME)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["export"]["files"][0]["name"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return path
    return path if told == artifact.name else artifact.with_name(f"{artifact.name}.{REPORT_NAME}")


def _failure(report: Report, artifact: Path, report_path: Path) -> CheckFailed:
    problems = [f"{check.name}: {check.value} against {check.limit}: {check.detail}" for check in report.failed]
    problems += [f"{check.name}: not run: {check.detail}" for check in report.missing]
    where = f"{artifact}, report {report_path}"
    return CheckFailed("the artifact did not pass", problems=problems, where=where)
