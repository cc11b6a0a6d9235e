"""What llmx does, each job read top to bottom: export, validate, plan, inspect, doctor."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import CheckFailed, RuntimeMissing, UnsupportedError, UsageError

if TYPE_CHECKING:
    from llmx.exporters.gguf import GgufExport
    from llmx.models.model import Model
    from llmx.validate.report import Report
    from llmx.validate.case import Limits

FORMATS = ("gguf",)
METHODS = ("auto", "rtn", "awq", "gptq")
REPORT_NAME = "report.json"


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
        _require_runtime("llamacpp")
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
        report = _validated(request, partial[0], targets[0], model, facts) if request.validate else None
        report_path = _report_path(targets[0])
        content = _unproven(facts) if report is None else report.to_json()
        if report is not None and not report.passed:
            failed = [target.with_name(target.name + artifact.FAILED) for target in targets]
            artifact.publish(partial, failed)
            artifact.write_text(report_path, content)
            raise _failure(report, failed[0], report_path)
        artifact.publish(partial, targets)
        artifact.write_text(report_path, content)
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


def _require_runtime(name: str) -> None:
    from llmx.validate.runtimes import RUNTIMES

    if (reason := RUNTIMES[name].unavailable()) is not None:
        raise RuntimeMissing(
            f"the runtime {name} cannot run here: {reason}",
            fix="pip install 'llmx[llamacpp]', or export unproven with --no-validate",
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
            "source": {"id": exporter.model.checkpoint.source.id, "revision": exporter.model.checkpoint.source.revision},
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


def _failure(report: Report, artifact: Path, report_path: Path | None) -> CheckFailed:
    problems = [f"{check.name}: {check.value} against {check.limit}: {check.detail}" for check in report.failed]
    problems += [f"{check.name}: not run: {check.detail}" for check in report.missing]
    where = artifact if report_path is None else f"{artifact}, report {report_path}"
    return CheckFailed("the artifact did not pass", problems=problems, where=where)
