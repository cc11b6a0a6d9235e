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
from llmx.validate.blame import NAME as BLAME_NAME
from llmx.validate.blame import check_blame
from llmx.validate.case import Case, Limits, Settings
from llmx.validate.checks_bytes import check_bytes
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_floor import NAMES as FLOOR_NAMES
from llmx.validate.checks_floor import check_floor
from llmx.validate.checks_quality import NAMES as QUALITY_NAMES
from llmx.validate.checks_quality import check_quality, check_speed
from llmx.validate.checks_tokens import check_template, check_tokens
from llmx.validate.gate import resolved
from llmx.validate.oracle import Tokens
from llmx.validate.report import Check, Report, not_run
from llmx.validate.runtimes import Runtime, find_runtime
from llmx.validate.sample_text import SAMPLE_TEXT
from llmx.validate.stock_types import stock_types

TOKEN_CONTEXT = 64  # tokenizing needs no context to speak of
LOADS = "runtime.loads"
REFUSED = "the runtime refuses the artifact"
TEXT_NAMES = ("tokens.ids", "tokens.bos", "tokens.ends", "tokens.vocabulary", "template.embedded")


@dataclass(frozen=True, slots=True)
class Stage:
    """A group of checks. names: what is recorded as "not run" when the stage cannot run at all.

    required: without it the report has not passed.
    """

    names: tuple[str, ...]
    run: Callable[[Case], Iterator[Check]]
    needs_runtime: bool = True
    required: bool = True

    @property
    def kind(self) -> str:
        return self.names[0].partition(".")[0]


def check_text(case: Case) -> Iterator[Check]:
    """Yields runtime.loads, then what is about text: tokens and template, all in one session."""
    origin = "the runtime's own loader"
    try:
        session = case.runtime.open(case.artifact, threads=case.settings.threads, context=TOKEN_CONTEXT)
    except (CheckFailed, IntegrityError) as error:
        yield Check(LOADS, False, origin=origin, detail=_one_line(error))
        yield from (not_run(name, REFUSED) for name in TEXT_NAMES)
        return
    with session:
        yield Check(LOADS, True, origin=origin, detail=session.build)
        yield from check_tokens(case, session)
        yield from check_template(case, session)


STAGES: tuple[Stage, ...] = (
    Stage(("bytes.tensors", "bytes.error"), check_bytes, needs_runtime=False),
    Stage(TEXT_NAMES, check_text),
    Stage(("conversion.kl", "conversion.logits", "conversion.decode"), check_conversion),
    Stage(FLOOR_NAMES, check_floor),
    Stage(QUALITY_NAMES, check_quality),
    Stage(("speed.decode",), check_speed),
)
BLAME = Stage((BLAME_NAME,), check_blame, needs_runtime=False, required=False)
BLAMED = frozenset({"bytes", "conversion", "quality"})  # kinds of check that a tensor or a number of the metadata fails


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
        _require_text(case)
        checks = tuple(_run(case, progress))
        checks += tuple(case.limits.unused(check.name for check in checks))
    # Two builds of llama.cpp differ by KL 0.03 on some k-quants, so the exact one is recorded.
    build = next((check.detail for check in checks if check.name == LOADS and check.passed), None)
    case.findings.note("stock_types", stock_types(case.model.architecture, case.entries))
    facts = {**_facts(case, build, text is None), "gate": resolved(case.limits, checks)}
    return Report(checks, facts, case.findings.found)


def _require_text(case: Case) -> None:
    """Raises: UsageError when the text gives fewer positions than were asked for; it is never read twice."""
    wanted, each = case.settings.least_positions, len(case.judged)
    have = each * sum(1 for _ in case.sequences(wanted, each))
    if wanted > 1 and have < wanted:
        raise UsageError(
            f"the text has {len(case.ids)} tokens, which gives {have} positions; {wanted} were asked for",
            fix="give a longer --text, or ask for fewer --positions",
        )


def _run(case: Case, progress: Callable[[str], None]) -> Iterator[Check]:
    reason = case.runtime.unavailable()
    missing = None if reason is None else f"{case.runtime.name} is missing: {reason}"
    code = CheckFailed.exit_code if reason is None else RuntimeMissing.exit_code
    failed: set[str] = set()
    for stage in STAGES:
        progress(stage.kind)
        if stage.needs_runtime and missing is not None:
            yield from (not_run(name, missing, code=code) for name in stage.names)
            continue
        for check in _guarded(stage, case):
            if check.name == LOADS and not check.passed:
                missing = REFUSED
            if check.passed is False:
                failed.add(check.kind)
            yield check
    if case.settings.blame or failed & BLAMED:
        progress(BLAME.kind)
        yield from _guarded(BLAME, case)


def _guarded(stage: Stage, case: Case) -> Iterator[Check]:
    """A stage's checks. An artifact that its runtime refuses fails; what lacks memory or a runtime did not run."""
    done: set[str] = set()
    try:
        for check in stage.run(case):
            done.add(check.name)
            yield case.limits.judged(check)
        left = (name for name in stage.names if name not in done)
        yield from (not_run(name, "the stage left it out", required=stage.required) for name in left)
    except (CheckFailed, IntegrityError) as error:
        yield Check(f"{stage.kind}.runs", False, origin="the runtime's own words", detail=_one_line(error))
        yield from (not_run(name, "see above") for name in stage.names if name not in done)
    except (ResourceError, RuntimeMissing) as error:
        reason = _one_line(error)
        left = (name for name in stage.names if name not in done)
        yield from (not_run(name, reason, required=stage.required, code=error.exit_code) for name in left)


def _one_line(error: LlmxError) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


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
