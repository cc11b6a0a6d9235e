"""Limits: which of several counts, what a gate file may say, and the exit code of what they decide."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from llmx import api
from llmx.errors import UsageError
from llmx.validate.gate import DEFAULTS, LIMITED, WORDS, Limits, resolved
from llmx.validate.gate_file import GATE_BYTES, read_gate
from llmx.validate.report import Check, Report, at_most, not_applicable, not_run, reported


def gate(folder: Path, text: str) -> Path:
    path = folder / "gate.yaml"
    path.write_text(text)
    return path


def test_a_gate_takes_words_and_names_of_checks_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    found = read_gate(gate(tmp_path, "max-kl: 0.05\nmin_top1: 1\nconversion.kl: 1e-6\nquality.kl_999: 2.5e-1\n"))
    assert found == {"max_kl": 0.05, "min_top1": 1.0, "conversion.kl": 1e-6, "quality.kl_999": 0.25}


def test_every_mistake_of_a_gate_is_told_at_once_with_the_choices(tmp_path: Path) -> None:
    text = "max_kll: 0.05\nquality.kl: much\nmin_top1: 1.5\nspeed.decode: -1\nconversion.kl: true\nspeed.load: .nan\n"
    with pytest.raises(UsageError) as caught:
        read_gate(gate(tmp_path, text))
    assert len(caught.value.problems) == 6
    assert "did you mean max_kl?" in caught.value.problems[0]
    assert all(name in str(caught.value.fix) for name in (*WORDS, *LIMITED))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "says nothing"),
        ("- max_kl\n", "says nothing"),
        ("max_kl: 1\nmax_kl: 2\n", "repeated"),
        ("max_kl: 1\nmax-kl: 2\n", "said twice"),
        ("max_kl: [1\n", "not plain YAML"),
        ("a: " + "x" * GATE_BYTES, "KiB"),
    ],
)
def test_what_is_no_gate_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        read_gate(gate(tmp_path, text))


def test_a_gate_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_gate(tmp_path / "none.yaml")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_number_of_the_command_line_that_is_no_limit_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="command line"):
        api.limits(max_kl=value)
    with pytest.raises(UsageError, match="share"):
        api.limits(min_top1=1.01)


def test_the_command_line_goes_before_the_gate_and_a_checks_name_before_a_word(tmp_path: Path) -> None:
    path = gate(tmp_path, "max_kl: 0.3\nquality.decode: 0.4\nmin_top1: 0.5\n")
    both = api.limits(max_kl=0.1, gate=path)
    assert [both.asked(name).value for name in ("quality.kl", "quality.decode")] == [0.1, 0.1]  # type: ignore[union-attr]
    only = api.limits(gate=path)
    assert [only.asked(name).value for name in ("quality.kl", "quality.decode")] == [0.3, 0.4]  # type: ignore[union-attr]
    limit = only.asked("quality.same_top1")
    assert limit is not None and limit.origin == "asked for in gate.yaml" and limit.asked
    assert only.asked("conversion.kl") is None


@pytest.mark.parametrize(
    ("name", "value", "limit", "passed"),
    [
        ("quality.same_top1", 0.9, 0.95, False),
        ("quality.same_top1", 0.95, 0.95, True),
        ("speed.first_token", 2.0, 1.0, False),
        ("conversion.kl", 1e-7, 1e-6, True),
        ("quality.ppl_ratio", math.nan, 1e9, False),
    ],
)
def test_a_limit_of_the_gate_judges_any_check_in_its_direction(
    name: str, value: float, limit: float, passed: bool
) -> None:
    judged = Limits(gate={name: limit}, gate_name="g").judged(reported(name, value, "unit"))
    assert judged.passed is passed
    assert (judged.limit, judged.origin) == (limit, "asked for in g")
    assert Limits(gate={name: limit}, gate_name="g").judged(judged) == judged


def test_the_error_bar_of_the_perplexity_ratio_helps_nothing_over_its_limit() -> None:
    check = reported("quality.ppl_ratio", 1.0201, "ratio", "± 0.5")
    assert Limits(max_ppl_ratio=1.02).judged(check).passed is False
    assert Limits(max_ppl_ratio=1.0201).judged(check).passed is True


def test_a_check_that_could_not_run_becomes_required_by_a_limit() -> None:
    limits = Limits(gate={"quality.window": 0.1}, gate_name="g")
    assert limits.judged(not_run("quality.window", "too long", required=False)).required
    assert not limits.judged(not_applicable("quality.window", "no window")).required


def test_a_limit_that_nothing_was_judged_by_is_not_forgotten() -> None:
    limits = Limits(gate={"quality.window": 0.1, "quality.kl": 0.1, "max_kl": 1}, gate_name="g")
    (left,) = limits.unused(["quality.kl"])
    assert (left.name, left.status) == ("quality.window", "not applicable")


def test_the_resolved_gate_tells_each_limit_and_its_origin() -> None:
    limits = Limits(max_kl=0.2, gate={"speed.load": 3.0}, gate_name="g")
    checks = [
        at_most("quality.kl", 0.1, 0.2, "nats", "asked for"),
        at_most("conversion.kl", 0.0, 1e-6, "nats", "float32 rounding"),
        not_run("speed.load", "no runtime"),
        at_most("tokens.ids", 0, 0, "texts", "the tokenizer"),
    ]
    assert resolved(limits, checks) == {
        "quality.kl": {"limit": 0.2, "origin": "asked for"},
        "conversion.kl": {"limit": 1e-6, "origin": "float32 rounding"},
        "speed.load": {"limit": 3.0, "origin": "asked for in g"},
    }


def test_coarser_types_may_lose_more() -> None:
    order = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    bounds = [DEFAULTS["gguf"][name] for name in order]
    for fine, coarse in itertools.pairwise(bounds):
        assert fine.kl < coarse.kl and fine.top1 >= coarse.top1 and fine.ppl_ratio <= coarse.ppl_ratio


GOOD = Check("bytes.tensors", True)


@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ((GOOD,), 0),
        ((), 4),
        ((not_applicable("template.embedded", "none"),), 4),
        ((not_run("conversion.window", "short", required=False),), 4),
        ((GOOD, Check("quality.kl", False)), 4),
        ((GOOD, not_run("quality.kl", "short")), 4),
        ((GOOD, not_run("quality.kl", "missing", code=7)), 7),
        ((GOOD, not_run("quality.kl", "memory", code=5)), 5),
        ((GOOD, not_run("quality.kl", "memory", code=5), not_run("tokens.ids", "missing", code=7)), 7),
        ((Check("bytes.error", False), not_run("quality.kl", "missing", code=7)), 4),
        ((GOOD, Check("floor.limit", False, code=2), not_run("quality.kl", "refused", code=2)), 2),
        ((GOOD, Check("floor.limit", False, code=2), Check("quality.kl", False)), 4),
    ],
)
def test_the_exit_code_says_what_kept_the_report_from_passing(checks: tuple[Check, ...], code: int) -> None:
    report = Report(checks)
    assert report.exit_code == code
    assert report.passed == (code == 0)
