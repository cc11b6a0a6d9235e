"""Rerunning artifacts on their runtimes: `llmx validate`, and what an export asks of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import RuntimeMissing, UsageError
from llmx.memory import parse_limit, peak_rss_bytes, require_validation, watched

if TYPE_CHECKING:
    from llmx.models.model import Model
    from llmx.validate.case import Limits, Settings
    from llmx.validate.report import Check, Report

REPORT_NAME = "report.json"
JUNIT_NAME = "junit.xml"
RUNTIME_OF_FORMAT = {
    "gguf": "llama.cpp",
    "onnx": "onnxruntime",
    "tensorrt": "tensorrt",
    "trtllm": "transformers",  # emulates it: TensorRT-LLM itself takes a GPU
}
EXTRA_OF_FORMAT = {"gguf": "llamacpp", "onnx": "onnx", "tensorrt": "tensorrt"}  # what pip installs the runtime by


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """Raises: UsageError for less than none."""
    if threads < 0:
        raise UsageError("--threads cannot be negative", fix="0 takes every core")


@watched
def validate(
    artifact: Path,
    reference: str | Path | Model | None,
    *,
    against: Path | None = None,
    revision: str | None = None,
    text: Path | None = None,
    positions: int | None = None,
    limits: Limits | None = None,
    output: Path | None = None,
    threads: int = 0,
    max_memory: str | None = None,
    blame: bool = False,
    facts: dict[str, object] | None = None,
) -> Report:
    """Rerun an artifact on its runtime and judge it against the checkpoint; the report says what passed.

    against: another artifact of the same model to judge it against, too; without a reference, what takes the
    checkpoint is not applicable, and a gate that names such a check keeps the report from passing.
    positions: how many next-token distributions to compare; a text with fewer is refused. None: 512, or fewer.
    output: a folder for report.json, report.html and junit.xml. max_memory: bytes to keep within, as "8GB". blame: name
    the tensor at fault, also where none is.
    facts: more about the artifact, for the report.
    Raises: IntegrityError for a broken artifact, UsageError for one that is not there or a text that cannot be read,
    ResourceError where the reference does not fit into max_memory.
    """
    from llmx.exporters import artifact as files
    from llmx.exporters.gguf_model import open_source
    from llmx.progress import stages
    from llmx.validate.junit import junit
    from llmx.validate.suite import validate as run_checks

    check_threads(threads)
    for path in (artifact, *([] if against is None else [against])):
        if not path.exists():
            raise UsageError("there is no such artifact", where=path, fix="give a .gguf file, or an ONNX folder")
    if reference is None and (revision is not None or blame):
        raise UsageError("--revision and --blame are about the checkpoint", fix="give --reference, too")
    limit = parse_limit(max_memory)
    settings = _settings(threads, positions, limit, blame=blame)
    model = open_source(reference, revision) if isinstance(reference, str | Path) else reference
    if model is not None:
        _require_memory(artifact, model, limit)
        model.checkpoint.materialize()
    with stages("validating") as stage:
        report = run_checks(
            artifact,
            model,
            against=against,
            text=None if text is None else read_text(text),
            limits=limits,
            settings=settings,
            progress=stage,
        )
    memory = () if limit is None else (_memory(limit),)
    report = replace(report, checks=(*report.checks, *memory), facts={**report.facts, **(facts or {})})
    if output is not None:
        files.make_folder(output)
        write_report(output / REPORT_NAME, report.to_dict())
        files.write_text(output / JUNIT_NAME, junit(report.to_dict()))
    return report


def _settings(threads: int, positions: int | None, limit: int | None, *, blame: bool) -> Settings:
    """What is run, and what of it has to be smaller under a limit of memory."""
    from llmx.validate.case import Settings

    settings = Settings(threads=threads or available_cores(), blame=blame)
    if positions is not None:
        settings = replace(settings, positions=positions, least_positions=positions)
    if limit is not None:
        twin, scores = min(settings.twin_bytes, limit // 4), min(settings.attention_bytes, limit // 8)
        settings = replace(settings, memory_bytes=limit, twin_bytes=twin, attention_bytes=scores)
    return settings


def _require_memory(artifact: Path, model: Model, limit: int | None) -> None:
    """Raises: ResourceError where the limit is too small for the float32 reference and the artifact."""
    files = [path for path in artifact.iterdir() if path.is_file()] if artifact.is_dir() else [artifact]
    nbytes = sum(path.stat().st_size for path in files)
    parameters = sum(weight.rows * weight.cols for weight in model.weights())
    format_ = "trtllm" if artifact.is_dir() and any(path.suffix == ".safetensors" for path in files) else ""
    require_validation(format_, parameters, nbytes, limit)


def _memory(limit: int) -> Check:
    """What was taken, and whether that is more than was allowed; the artifact is none the worse for it."""
    from llmx.validate.report import reported

    peak = peak_rss_bytes()
    told = f"{'MORE than' if peak > limit else 'within'} the {limit:,} that --max-memory allows"
    return reported("memory.peak", peak, "bytes", told)


def write_report(path: Path, told: Mapping[str, Any]) -> None:
    """Write a report's plain values as JSON to `path`, and the page for people beside it under the ending .html."""
    from llmx.exporters import artifact as files
    from llmx.validate.report import as_json
    from llmx.validate.report_html import page

    files.write_text(path, as_json(told))
    files.write_text(path.with_suffix(".html"), page(told))


def limits(
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_ppl_ratio: float | None = None,
    min_tokens_per_second: float | None = None,
    gate: Path | None = None,
) -> Limits:
    """What an artifact must keep to pass; None takes that of the gate file, or the default of its size class.

    Raises: UsageError for a number that is no limit, and as `read_gate`.
    """
    from llmx.validate.gate import WORDS, Limits, problem_with
    from llmx.validate.gate_file import read_gate

    said = Limits(max_kl, min_top1, max_ppl_ratio, min_tokens_per_second)
    values = {word: getattr(said, word) for word in WORDS}
    problems = [problem_with(word, value) for word, value in values.items() if value is not None]
    if wrong := [problem for problem in problems if problem is not None]:
        raise UsageError("a limit of the command line cannot be kept", problems=wrong)
    return said if gate is None else replace(said, gate=read_gate(gate), gate_name=gate.name)


def exit_code(report: Report) -> int:
    """0 when it passed, 4 when a check failed, 7 for a missing runtime, 5 for memory, 2 for a limit below the floor."""
    return report.exit_code


def missing_runtime(format_: str = "gguf") -> str | None:
    """Why a format's runtime cannot run here, or None."""
    from llmx.validate.runtimes import find_runtime

    return find_runtime(RUNTIME_OF_FORMAT[format_]).unavailable()


def require_runtime(format_: str = "gguf") -> None:
    """Raises: RuntimeMissing where artifacts of the format cannot be rerun."""
    if format_ not in RUNTIME_OF_FORMAT:
        raise RuntimeMissing(f"no runtime is known for {format_} artifacts", fix="export unproven with --no-validate")
    if (reason := missing_runtime(format_)) is not None:
        raise RuntimeMissing(
            f"the runtime {RUNTIME_OF_FORMAT[format_]} cannot run here: {reason}",
            fix=f"pip install 'llmx[{EXTRA_OF_FORMAT[format_]}]', or export unproven with --no-validate",
        )


def read_text(path: Path) -> str:
    """Returns a file's text. Raises: UsageError for one that cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the text cannot be read as UTF-8", where=f"{path}: {error}") from error
