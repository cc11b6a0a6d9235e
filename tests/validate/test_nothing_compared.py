"""No way leads to "passed" without a position that was compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_double import Double, DoubleSession

from llmx import api
from llmx.errors import CheckFailed, RuntimeMissing, UsageError
from llmx.formats.gguf import read_gguf
from llmx.validate import suite
from llmx.validate.case import SHORTEST_CHUNK, Case, Settings
from llmx.validate.checks_bytes import check_bytes
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_floor import check_floor
from llmx.validate.checks_quality import check_quality, check_speed
from llmx.validate.report import Report
from llmx.validate.sample_text import SAMPLE_TEXT
from llmx.validate.suite import validate

LOGITS = (check_conversion, check_floor, check_quality)


def everything(case: Case) -> Report:
    """The report of every check that compares logits, as the suite guards them."""
    stages = [stage for stage in suite.STAGES if stage.run in LOGITS]
    assert len(stages) == len(LOGITS)
    return Report(tuple(check for stage in stages for check in suite._guarded(stage, case)))


@pytest.fixture
def doubled(artifacts, case_of) -> Callable[..., Case]:
    """doubled(**changes): a case on a runtime that agrees with the reference in every bit."""

    def made(runtime: Callable[[Path], Any] = Double, **changes: object) -> Case:
        artifact, reference = artifacts("tiny-qwen3", "F32")
        return case_of(artifact, reference, runtime(reference), **changes)

    return made


def test_where_everything_agrees_and_enough_is_compared_it_passes(doubled) -> None:
    report = everything(doubled())
    assert report.passed, report.checks
    assert next(check for check in report.checks if check.name == "quality.positions").value == 128 - 128 % 31 + 31


@pytest.mark.parametrize("text", ["Hi", "!"])
def test_a_text_shorter_than_a_chunk_can_be(text, doubled) -> None:
    report = everything(doubled(text=text))
    assert {check.status for check in report.checks} == {"not run"}
    assert not report.passed and report.exit_code == 4
    assert all(str(SHORTEST_CHUNK) in check.detail for check in report.checks)


@pytest.mark.parametrize("chunk", [0, 1, 2, SHORTEST_CHUNK - 1])
def test_a_chunk_shorter_than_it_can_be(chunk, doubled) -> None:
    report = everything(doubled(settings=Settings(positions=16, chunk=chunk)))
    assert {check.status for check in report.checks} == {"not run"}
    assert not report.passed


def test_the_shortest_chunk_that_there_can_be_is_compared(doubled) -> None:
    report = everything(doubled(settings=Settings(positions=1, chunk=SHORTEST_CHUNK)))
    assert report.passed, report.checks
    values = {check.name: check.value for check in report.checks}
    assert values["quality.positions"] == SHORTEST_CHUNK - 1 - SHORTEST_CHUNK // 2


class Silent(Double):
    """Gives no logits at all."""

    def open(self, artifact: Path, **options: Any) -> DoubleSession:
        session = super().open(artifact, **options)
        session.logits = lambda tokens, decode_from=None: iter(())  # type: ignore[method-assign]
        return session


class Forgetful(Double):
    """Gives the first four positions only."""

    def open(self, artifact: Path, **options: Any) -> DoubleSession:
        session = super().open(artifact, **options)
        whole = session.logits

        def some(tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
            yield next(whole(tokens, decode_from))[:4]

        session.logits = some  # type: ignore[method-assign]
        return session


def not_a_number(folder: Path) -> Double:
    return Double(folder, lambda logits, options: np.full_like(logits, np.nan))


@pytest.mark.parametrize("runtime", [Silent, Forgetful, not_a_number])
def test_a_runtime_that_gives_nothing_too_little_or_nan_fails(runtime, doubled) -> None:
    report = everything(doubled(runtime))
    assert not report.passed and report.exit_code == 4
    for kind in ("conversion", "floor", "quality"):
        mine = [check for check in report.checks if check.kind == kind]
        assert any(check.passed is False for check in mine), kind
    assert not any(check.passed for check in report.checks if check.name in ("quality.kl", "conversion.kl"))


@pytest.mark.parametrize(("module", "kinds"), [("checks_quality", {"quality"}), ("checks_conversion", {"conversion"})])
def test_a_stage_that_yields_nothing_does_not_read_as_passed(module, kinds, doubled, monkeypatch) -> None:
    case = doubled()
    stage = next(stage for stage in suite.STAGES if stage.kind in kinds)
    empty = suite.Stage(stage.names, lambda case: iter(()))
    found = list(suite._guarded(empty, case))
    assert {check.name for check in found} == set(stage.names)
    assert all(check.passed is None and check.required for check in found), module


def test_too_little_memory_for_the_reference_exits_5(doubled, monkeypatch) -> None:
    monkeypatch.setattr(Case, "no_memory_for", lambda self, weights: "no memory")
    checks = list(check_quality(doubled()))
    assert {check.status for check in checks} == {"not run"}
    assert Report(tuple(checks)).exit_code == 5


class Absent:
    name = "llama.cpp"

    def unavailable(self) -> str | None:
        return "no package has it"

    def open(self, artifact: Path, **options: Any) -> Any:
        raise AssertionError("must not be opened")


def test_a_missing_runtime_exits_7_with_not_run(artifacts) -> None:
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    report = validate(artifact, reference, runtime=Absent())
    assert report.exit_code == RuntimeMissing.exit_code == api.exit_code(report) == 7
    names = {check.name: check.status for check in report.checks}
    assert all(names[name] == "not run" for name in ("tokens.ids", "conversion.kl", "floor.batch", "quality.kl"))
    assert "quality.positions" not in names


def test_a_broken_file_without_a_runtime_is_broken_first(artifacts, rewrite, tmp_path) -> None:
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    file = read_gguf(artifact)
    one, two = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={one: file.bytes(two), two: file.bytes(one)})
    assert validate(bad, reference, runtime=Absent()).exit_code == CheckFailed.exit_code


def test_a_text_that_gives_fewer_positions_than_were_asked_for_is_refused_and_never_read_twice(artifacts) -> None:
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    with pytest.raises(UsageError, match="10000 were asked for"):
        api.validate(artifact, reference, positions=10_000)


def test_fewer_positions_than_usual_are_told(doubled) -> None:
    case = doubled(text=SAMPLE_TEXT[:120])
    found = next(check for check in check_quality(case) if check.name == "quality.positions")
    assert found.passed and isinstance(found.value, int) and 0 < found.value < 128
    assert "too short for more" in found.detail


def test_a_context_without_room_for_an_answer_has_no_speed(doubled, monkeypatch) -> None:
    case = doubled()
    monkeypatch.setattr("llmx.validate.checks_quality.SPEED_PREFILL", 1)
    monkeypatch.setattr("llmx.validate.checks_quality.SPEED_DECODE", 0)
    assert [check.status for check in check_speed(case)] == ["not run"]


def test_the_bytes_alone_never_pass(artifacts, case_of) -> None:
    """What the suite leaves out is recorded: a report of the bytes alone exists only without the suite."""
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    report = validate(artifact, reference, runtime=Absent())
    done = {check.name for check in check_bytes(case_of(artifact, reference))}
    assert done < {check.name for check in report.checks}
    assert not report.passed
