"""The report: what counts as passed, the JSON, the table."""

from __future__ import annotations

import json

import pytest

from llmx.validate.report import (
    SCHEMA,
    Check,
    Report,
    as_table,
    at_least,
    at_most,
    not_applicable,
    not_run,
    number,
    reported,
    verdict,
)

GOOD = at_most("quality.kl", 0.004, 0.15, "nats", "the table", detail="512 positions")
BAD = at_most("bytes.finite", 3, 0, "values", "a weight is a number", detail="blk.0.ffn_up.weight: 3 values")


def test_a_report_passes_when_every_required_check_ran_and_held():
    assert Report((GOOD, reported("speed.decode", 12.5, "tokens/s"))).passed


def test_one_failed_check_fails_the_report():
    report = Report((GOOD, BAD))
    assert not report.passed
    assert report.failed == (BAD,)


def test_a_skipped_check_never_reads_as_passed():
    skipped = not_run("quality.kl", "llama.cpp is missing")
    report = Report((GOOD, skipped))
    assert skipped.status == "not run"
    assert not report.passed
    assert report.missing == (skipped,)


def test_a_check_with_nothing_to_look_at_neither_passes_nor_fails():
    nothing = not_applicable("template.embedded", "the checkpoint has no chat template")
    assert nothing.status == "not applicable"
    optional = not_run("template.runtime", "no way to its engine", required=False)
    assert optional.status == "not run"
    assert Report((GOOD, optional)).passed
    assert Report((GOOD, nothing)).passed
    assert not Report((GOOD, BAD, nothing)).passed


def test_a_report_without_any_check_has_not_passed():
    assert not Report(()).passed
    assert verdict(Report(())) == "NOT PASSED: no check ran"


@pytest.mark.parametrize(("judge", "value"), [(at_most, 1.1), (at_least, 0.9), (at_most, float("nan"))])
def test_a_value_past_its_limit_fails_and_so_does_nan(judge, value):
    assert judge("a.b", value, 1.0, "", "here").passed is False


def test_a_value_at_its_limit_passes():
    assert at_most("a.b", 1.0, 1.0, "", "").passed
    assert at_least("a.b", 1.0, 1.0, "", "").passed


def test_the_json_is_versioned_and_says_for_each_check_what_where_and_why():
    found = json.loads(Report((GOOD,), {"artifact": {"name": "a.gguf"}}).to_json())
    assert found["schema"] == SCHEMA == "llmx.report/1"
    assert found["passed"] is True
    assert found["artifact"] == {"name": "a.gguf"}
    assert found["checks"] == [
        {
            "name": "quality.kl",
            "kind": "quality",
            "status": "passed",
            "passed": True,
            "required": True,
            "value": 0.004,
            "limit": 0.15,
            "unit": "nats",
            "origin": "the table",
            "detail": "512 positions",
        }
    ]


@pytest.mark.parametrize(("value", "text"), [(float("inf"), "inf"), (float("nan"), "nan")])
def test_values_that_json_cannot_hold_become_words(value, text):
    found = json.loads(Report((at_most("a.b", value, 1.0, "", ""),)).to_json())
    assert found["checks"][0]["value"] == text
    assert found["passed"] is False


def test_the_same_report_gives_the_same_bytes():
    assert Report((GOOD, BAD)).to_json() == Report((GOOD, BAD)).to_json()


def test_the_table_shows_every_check_and_explains_those_that_did_not_pass():
    report = Report((GOOD, BAD, not_run("speed.decode", "llama.cpp is missing: no wheel")))
    table = as_table(report)
    for words in ("quality.kl", "0.004", "0.15", "nats", "passed", "FAILED", "not run", "no wheel", "ffn_up.weight: 3"):
        assert words in table
    assert table.endswith("NOT PASSED: 1 failed: bytes.finite; 1 not run: speed.decode\n")
    assert "\x1b" not in table
    assert max(len(line) for line in table.splitlines()) <= 120


def test_the_table_has_colours_only_when_asked():
    assert "\x1b[" in as_table(Report((GOOD,)), color=True)


def test_markup_in_a_detail_is_shown_as_it_is():
    report = Report((Check("a.b", False, detail="got [bold]ids[/bold] [1, 2]"),))
    assert "[bold]ids[/bold] [1, 2]" in as_table(report)


def test_numbers_are_short_and_counts_whole():
    assert number(0.000123456) == "0.0001235"
    assert number(1234567) == "1234567"
    assert number(None) == ""
