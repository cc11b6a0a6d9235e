"""All checks of an artifact, in order: first what needs only the file, then what needs the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from llmx.errors import CheckFailed, IntegrityError, LlmxError, ResourceError, RuntimeMissing, UsageError
from llmx.formats.gguf import read_gguf_set
from llmx.models.model import Model, open_model
from llmx.validate.case import Case, Limits, Settings
from llmx.validate.checks_bytes import check_bytes
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_quality import check_quality, check_speed
from llmx.validate.checks_tokens import check_template, check_tokens
from llmx.validate.oracle import Tokens
from llmx.validate.report import Check, Report, not_run
from llmx.validate.runtimes import Runtime, Session, find_runtime
from llmx.validate.sample_text import SAMPLE_TEXT

TOKEN_CONTEXT = 64  # tokenizing needs no context to speak of


@dataclass(frozen=True, slots=True)
class Stage:
    """A group of checks. names: what is recorded as "not run" when the stage cannot run at all."""

    names: tuple[str, ...]
    run: Callable[[Case], Iterator[Check]]
    needs_runtime: bool = True


def _with_session(checks: Callable[[Case, Session], Iterator[Check]]) -> Callable[[Case], Iterator[Check]]:
    def run(case: Case) -> Iterator[Check]:
        with case.runtime.open(case.artifact, threads=case.settings.threads, context=TOKEN_CONTEXT) as session:
            yield from checks(case, session)

    return run


STAGES: tuple[Stage, ...] = (
    Stage(("bytes.tensors", "bytes.error"), check_bytes, needs_runtime=False),
    Stage(("tokens.ids", "tokens.bos", "tokens.ends", "tokens.vocabulary"), _with_session(check_tokens)),
    Stage(("template.embedded",), _with_session(check_template)),
    Stage(("conversion.kl", "conversion.logits", "conversion.decode"), check_conversion),
    # The noise floor of the runtime (its spread over threads, batches and cache types) has its place here.
    Stage(("quality.kl", "quality.decode"), check_quality),
    Stage(("speed.decode",), check_speed),
)


def validate(
    artifact: Path,
    reference: Model | Path | str,
    *,
    runtime: Runtime | str = "llama.cpp",
    text: str | None = None,
    limits: Limits | None = None,
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Runs every check of one artifact and returns the report. Nothing is written but temporary files.

    artifact: a GGUF file, or the first of a split set. reference: the checkpoint that it was made from.
    text: what the model reads; None takes the built-in sample. progress: called with each stage's kind before it runs.
    A runtime that is missing leaves "not run" in the report, which then has not passed.
    Raises: IntegrityError when the file is no sound container (cut, hostile); what open_model raises; UsageError when
    the text is empty.
    """
    if text is not None and not text.strip():
        raise UsageError("the evaluation text is empty", fix="give a text of a few thousand words, or none")
    file = read_gguf_set(artifact)
    model = reference if isinstance(reference, Model) else open_model(reference)
    engine = find_runtime(runtime) if isinstance(runtime, str) else runtime
    with tempfile.TemporaryDirectory(prefix="llmx-validate-") as scratch:
        case = Case(
            artifact=artifact,
            file=file,
            model=model,
            tokens=Tokens(model.checkpoint.folder),
            runtime=engine,
            text=SAMPLE_TEXT if text is None else text,
            limits=limits or Limits(),
            settings=settings or Settings(),
            scratch=Path(scratch),
        )
        checks = tuple(_run(case, progress))
        build = _build(case)
    return Report(checks, _facts(case, build, text is None))


def _run(case: Case, progress: Callable[[str], None]) -> Iterator[Check]:
    missing = case.runtime.unavailable()
    for stage in STAGES:
        kind = stage.names[0].partition(".")[0]
        progress(kind)
        if stage.needs_runtime and missing is not None:
            yield from (not_run(name, f"{case.runtime.name} is missing: {missing}") for name in stage.names)
            continue
        yield from _guarded(stage, case)


def _guarded(stage: Stage, case: Case) -> Iterator[Check]:
    """A stage's checks. An artifact that its runtime refuses fails; what lacks memory or a runtime did not run."""
    done: set[str] = set()
    try:
        for check in stage.run(case):
            done.add(check.name)
            yield check
    except (CheckFailed, IntegrityError) as error:
        kind = stage.names[0].partition(".")[0]
        yield Check(f"{kind}.runs", False, origin="the runtime's own words", detail=_one_line(error))
        yield from (not_run(name, "see above") for name in stage.names if name not in done)
    except (ResourceError, RuntimeMissing) as error:
        yield from (not_run(name, _one_line(error)) for name in stage.names if name not in done)


def _one_line(error: LlmxError) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _build(case: Case) -> str | None:
    """The runtime's exact build: two builds of llama.cpp differ by KL 0.03 on some k-quants."""
    if case.runtime.unavailable() is not None:
        return None
    try:
        with case.runtime.open(case.artifact, threads=1, context=TOKEN_CONTEXT) as session:
            return session.build
    except LlmxError:
        return None  # it refuses the artifact, which the checks say already


def _facts(case: Case, build: str | None, built_in: bool) -> dict[str, object]:
    settings, source = case.settings, case.model.checkpoint.source
    return {
        "artifact": {
            "name": case.artifact.name,
            "bytes": sum(path.stat().st_size for path in case.file.paths),
            "bits_per_weight": round(case.bits_per_weight, 4),
        },
        "reference": {"id": source.id, "revision": source.revision, "kind": "transformers, float32, eager attention"},
        "runtime": {"name": case.runtime.name, "build": build},
        "settings": {
            "positions": settings.positions,
            "chunk": case.chunk,
            "threads": settings.threads,
            "text": "built-in sample" if built_in else "given",
            "text_sha256": sha256(case.text.encode()).hexdigest(),
        },
    }
