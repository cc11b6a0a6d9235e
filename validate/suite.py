"""All checks of an artifact, in order: first what needs only the file, then what needs the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmx.errors import CheckFailed, IntegrityError, ResourceError, RuntimeMissing, UsageError
from llmx.models.model import Model, open_model
from llmx.validate.blame import NAME as BLAME_NAME
from llmx.validate.blame import check_blame
from llmx.validate.case import Case, Limits, Settings, Subject
from llmx.validate.checks_against import (
    ALIKE_NAMES,
    Pair,
    check_against,
    check_alike,
    check_pair_floor,
    check_pair_speed,
)
from llmx.validate.checks_against import NAMES as AGAINST_NAMES
from llmx.validate.checks_bytes import check_bytes
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_floor import NAMES as FLOOR_NAMES
from llmx.validate.checks_floor import check_floor
from llmx.validate.checks_quality import NAMES as QUALITY_NAMES
from llmx.validate.checks_quality import check_quality, check_speed
from llmx.validate.checks_tokens import check_template, check_tokens
from llmx.validate.gate import resolved
from llmx.validate.kinds import ArtifactKind, Container, find_kind, kind_of
from llmx.validate.oracle import Tokens
from llmx.validate.report import Check, Report, not_applicable, not_run
from llmx.validate.runtimes import Runtime, find_runtime
from llmx.validate.sample_text import SAMPLE_TEXT

TOKEN_CONTEXT = 64  # tokenizing needs no context to speak of
LOADS = "runtime.loads"
REFUSED = "the runtime refuses the artifact"
TEXT_NAMES = ("tokens.ids", "tokens.bos", "tokens.ends", "tokens.vocabulary", "template.embedded")


@dataclass(frozen=True, slots=True)
class Stage:
    """A group of checks. names: what is recorded as "not run" when the stage cannot run at all.

    run: takes a Case; of a stage of PAIR_STAGES or PAIR_ONLY, a Pair.
    required: without it the report has not passed.
    """

    names: tuple[str, ...]
    run: Callable[[Any], Iterator[Check]]
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
        yield Check(LOADS, False, origin=origin, detail=error.one_line)
        yield from (not_run(name, REFUSED) for name in TEXT_NAMES)
        return
    with session:
        yield Check(LOADS, True, origin=origin, detail=session.build)
        if (reason := kind_of(case.file).no_text(case.file)) is not None:
            yield from (not_applicable(name, reason) for name in TEXT_NAMES)
            return
        yield from check_tokens(case, session)
        yield from check_template(case, session)


def _loads(pair: Pair) -> Iterator[Check]:
    with pair.open(pair.artifact, TOKEN_CONTEXT) as session:
        yield Check(LOADS, True, origin="the runtime's own loader", detail=session.build)


STAGES: tuple[Stage, ...] = (
    Stage(("bytes.tensors", "bytes.error"), check_bytes, needs_runtime=False),
    Stage(TEXT_NAMES, check_text),
    Stage(("conversion.kl", "conversion.logits", "conversion.decode"), check_conversion),
    Stage(FLOOR_NAMES, check_floor),
    Stage(QUALITY_NAMES, check_quality),
    Stage(("speed.decode",), check_speed),
)
PAIR_STAGES: tuple[Stage, ...] = (Stage(ALIKE_NAMES, check_alike), Stage(AGAINST_NAMES, check_against))
PAIR_ONLY: tuple[Stage, ...] = (
    # what is run of a pair without a checkpoint; the floor stands before the checks that it limits
    Stage((LOADS,), _loads),
    Stage(ALIKE_NAMES, check_alike),
    Stage(FLOOR_NAMES, check_pair_floor),
    Stage(AGAINST_NAMES, check_against),
    Stage(("speed.decode",), check_pair_speed),
)
NO_CHECKPOINT = "it takes the checkpoint, and no reference was given"
BLAME = Stage((BLAME_NAME,), check_blame, needs_runtime=False, required=False)
BLAMED = frozenset({"bytes", "conversion", "quality"})  # kinds of check that a tensor or a number of the metadata fails


def validate(
    artifact: Path,
    reference: Model | Path | str | None,
    *,
    against: Path | None = None,
    runtime: Runtime | str | None = None,
    text: str | None = None,
    limits: Limits | None = None,
    settings: Settings | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Runs every check of one artifact and returns the report. Nothing is written but temporary files.

    artifact: a GGUF file, the first of a split set, an ONNX graph or its folder. reference: the checkpoint that it was
    made from; None leaves out what takes it, and `against` then stands in its place. against: another artifact, to be
    judged against.
    runtime: None takes that of the artifact's format.
    text: what the model reads; None takes the built-in sample. progress: called with each stage's kind before it runs.
    A runtime that is missing leaves "not run" in the report, which then has not passed.
    Raises: IntegrityError when a file is no sound container (cut, hostile); what open_model raises; UsageError when
    the text is empty or there is nothing to judge against.
    """
    if text is not None and not text.strip():
        raise UsageError("the evaluation text is empty", fix="give a text of a few thousand words, or none")
    if reference is None and against is None:
        raise UsageError("there is nothing to judge the artifact against", fix="give a reference or another artifact")
    kind = find_kind(artifact)
    common = {
        "artifact": kind.located(artifact),
        "file": kind.open(artifact),
        "runtime": _runtime(kind, runtime),
        "text": SAMPLE_TEXT if text is None else text,
        "limits": limits or Limits(),
        "settings": settings or Settings(),
    }
    with tempfile.TemporaryDirectory(prefix="llmx-validate-") as folder:
        common["scratch"] = Path(folder)
        case = None if reference is None else _case(common, reference)
        if case is not None:
            common |= {"findings": case.findings, "noise": case.noise}
        pair = None
        if against is not None:
            pair = _pair(common, against, runtime, alone=case is None)
        return _report(case, pair, text is None, progress)


def _runtime(kind: ArtifactKind, asked: Runtime | str | None) -> Runtime:
    named = kind.runtime if asked is None else asked
    return find_runtime(named) if isinstance(named, str) else named


def _pair(common: dict[str, Any], against: Path, asked: Runtime | str | None, *, alone: bool) -> Pair:
    """The artifact and the other one, which may be of another format and then has a runtime of its own."""
    kind, file = find_kind(against), common["file"]
    own = _runtime(kind, asked) if kind.name != file.format else None
    return Pair(**common, other=kind.located(against), other_file=kind.open(against), alone=alone, other_runtime=own)


def _case(common: dict[str, Any], reference: Model | Path | str) -> Case:
    model = reference if isinstance(reference, Model) else open_model(reference)
    file = kind_of(common["file"]).mapped(common["file"], model.architecture)
    case = Case(**{**common, "file": file}, model=model, tokens=Tokens(model.checkpoint.folder))
    _require_text(case)
    return case


def _report(case: Case | None, pair: Pair | None, built_in: bool, progress: Callable[[str], None]) -> Report:
    """Runs the stages of what there is; at least one of both."""
    subject = case or pair
    assert subject is not None
    checks: tuple[Check, ...] = ()
    if case is None:
        checks += tuple(_without_checkpoint(subject.limits))
        steps: list[tuple[Stage, Any]] = [(stage, pair) for stage in PAIR_ONLY]
    else:
        steps = [(stage, case) for stage in STAGES] + [(stage, pair) for stage in PAIR_STAGES if pair is not None]
    checks += tuple(_run(steps, subject, progress))
    if case is not None:
        failed = {check.kind for check in checks if check.passed is False}
        if case.settings.blame or failed & BLAMED:
            progress(BLAME.kind)
            checks += tuple(_guarded(BLAME, case))
        case.findings.note("stock_types", kind_of(case.file).stock_types(case))
    checks += tuple(subject.limits.unused(check.name for check in checks))
    # Two builds of llama.cpp differ by KL 0.03 on some k-quants, so the exact one is recorded.
    build = next((check.detail for check in checks if check.name == LOADS and check.passed), None)
    facts = {**_facts(subject, case, pair, build, built_in), "gate": resolved(subject.limits, checks)}
    return Report(checks, facts, subject.findings.found)


def _without_checkpoint(limits: Limits) -> Iterator[Check]:
    """What cannot be looked at; where the user's gate names such a check, the report cannot pass without it."""
    done = {name for stage in PAIR_ONLY for name in stage.names}
    names = [name for stage in STAGES for name in stage.names if name not in done]
    kinds = {name.partition(".")[0] for name in names}
    names += [name for name in limits.gate if name.partition(".")[0] in kinds and name not in names]
    for name in names:
        if name in limits.gate:
            yield not_run(name, f"{limits.gate_name} limits it; {NO_CHECKPOINT}", code=UsageError.exit_code)
        else:
            yield not_applicable(name, NO_CHECKPOINT)


def _require_text(case: Case) -> None:
    """Raises: UsageError when the text gives fewer positions than were asked for; it is never read twice."""
    wanted, each = case.settings.least_positions, len(case.judged)
    have = each * sum(1 for _ in case.sequences(wanted, each))
    if wanted > 1 and have < wanted:
        raise UsageError(
            f"the text has {len(case.ids)} tokens, which gives {have} positions; {wanted} were asked for",
            fix="give a longer --text, or ask for fewer --positions",
        )


def _run(steps: list[tuple[Stage, Any]], subject: Subject, progress: Callable[[str], None]) -> Iterator[Check]:
    reason = subject.runtime.unavailable()
    missing = None if reason is None else f"{subject.runtime.name} is missing: {reason}"
    code = CheckFailed.exit_code if reason is None else RuntimeMissing.exit_code
    for stage, given in steps:
        progress(stage.kind)
        if stage.needs_runtime and missing is not None:
            yield from (not_run(name, missing, code=code) for name in stage.names)
            continue
        for check in _guarded(stage, given):
            if check.name == LOADS and not check.passed:
                missing = REFUSED
            yield check


def _guarded(stage: Stage, given: Any) -> Iterator[Check]:
    """A stage's checks. An artifact that its runtime refuses fails; what lacks memory or a runtime did not run."""
    done: set[str] = set()
    try:
        for check in stage.run(given):
            done.add(check.name)
            yield given.limits.judged(check)
        left = (name for name in stage.names if name not in done)
        yield from (not_run(name, "the stage left it out", required=stage.required) for name in left)
    except (CheckFailed, IntegrityError) as error:
        yield Check(f"{stage.kind}.runs", False, origin="the runtime's own words", detail=error.one_line)
        yield from (not_run(name, "see above") for name in stage.names if name not in done)
    except (ResourceError, RuntimeMissing) as error:
        reason = error.one_line
        left = (name for name in stage.names if name not in done)
        yield from (not_run(name, reason, required=stage.required, code=error.exit_code) for name in left)


def _facts(
    subject: Case | Pair, case: Case | None, pair: Pair | None, build: str | None, built_in: bool
) -> dict[str, object]:
    settings = subject.settings
    found = {
        "artifact": _file(subject.artifact, subject.file),
        "reference": _reference(case, pair),
        "runtime": {"name": subject.runtime.name, "build": build},
        "settings": {
            "positions": settings.positions,
            "chunk": subject.chunk,
            "threads": settings.threads,
            "text": "built-in sample" if built_in else "given",
            "text_sha256": sha256(subject.text.encode()).hexdigest(),
        },
    }
    return found if pair is None else {**found, "against": _file(pair.other, pair.other_file)}


def _reference(case: Case | None, pair: Pair | None) -> dict[str, object]:
    if case is not None:
        source = case.model.checkpoint.source
        return {"id": source.id, "revision": source.revision, "kind": "transformers, float32, eager attention"}
    assert pair is not None
    return {"id": pair.other.name, "revision": None, "kind": f"another artifact, on {pair.runtime.name}"}


def _file(path: Path, file: Container) -> dict[str, object]:
    assert file.bits_per_weight is not None, "a file that is judged holds tensors"
    return {"name": path.name, "bytes": file.nbytes, "bits_per_weight": round(file.bits_per_weight, 4)}
