"""JUnit XML: what passed, what failed, and that nothing unproven reads as a pass."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from sample_reports import FACTS, failed, sound

from llmx.validate.junit import NOTHING_RAN, junit
from llmx.validate.report import Check, Report, not_applicable, not_run, reported, unproven

# The structure that readers of JUnit XML share (Jenkins, GitLab, GitHub, surefire):
# element -> (required attributes, other attributes, children).
STRUCTURE = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"skipped", "time", "timestamp", "hostname", "id", "package"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name", "classname"}, {"time"}, {"skipped", "error", "failure", "system-out", "system-err"}),
    "skipped": (set(), {"message", "type"}, set()),
    "error": (set(), {"message", "type"}, set()),
    "failure": (set(), {"message", "type"}, set()),
    "system-out": (set(), set(), set()),
}
HOSTILE = 'blk.0<script>alert("1")</script>]]>&\x00\x1b[31m\ud800'


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.encode())


def outcome(check: Check) -> list[str]:
    """The elements that a check leaves in its test case."""
    (case,) = parsed(junit(Report((check,)).to_dict())).iter("testcase")
    return [child.tag for child in case]


@pytest.mark.parametrize("told", [sound(), failed(), failed(HOSTILE), unproven({}), Report(()).to_dict()])
def test_every_report_has_the_structure_that_readers_share(told: dict) -> None:
    root = parsed(junit(told))
    assert root.tag == "testsuites"
    for element in root.iter():
        required, other, children = STRUCTURE[element.tag]
        assert required <= element.attrib.keys() <= required | other, element.tag
        assert {child.tag for child in element} <= children, element.tag


def test_there_is_one_test_case_a_check_and_the_counts_are_true() -> None:
    told = failed()
    root = parsed(junit(told))
    (suite,) = root
    cases = list(suite.iter("testcase"))
    assert [case.attrib["name"] for case in cases] == [check["name"] for check in told["checks"]]
    assert {case.attrib["classname"] for case in cases} == {f"llmx.{check['kind']}" for check in told["checks"]}
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": 5, "failures": 2, "errors": 1, "skipped": 0}
    assert (root.attrib["tests"], root.attrib["failures"], root.attrib["errors"]) == ("5", "2", "1")


@pytest.mark.parametrize(
    ("check", "elements"),
    [
        (reported("speed.decode", 12.5, "tokens/s"), ["system-out"]),
        (Check("runtime.loads", True), []),
        (Check("bytes.error", False, 2.0, 1.0), ["failure"]),
        (Check("bytes.error", False, 2.0, 1.0, required=False), ["failure"]),
        (not_run("quality.kl", "llama.cpp is missing"), ["error"]),
        (not_run("template.runtime", "no way in", required=False), ["skipped"]),
        (not_applicable("template.embedded", "no template"), ["skipped"]),
    ],
)
def test_each_status_has_its_element(check: Check, elements: list[str]) -> None:
    assert outcome(check) == elements


@pytest.mark.parametrize("told", [unproven(FACTS), Report(()).to_dict()])
def test_a_report_without_a_check_is_an_error(told: dict) -> None:
    root = parsed(junit(told))
    assert root.attrib["errors"] == root.attrib["tests"] == "1"
    assert [error.attrib["message"] for error in root.iter("error")] == [NOTHING_RAN]


def test_a_failure_says_value_limit_origin_and_offender() -> None:
    check = Check("quality.kl", False, 0.4, 0.15, "nats", "each type's limit", "blk.3.ffn_down.weight")
    (failure,) = parsed(junit(Report((check,)).to_dict())).iter("failure")
    assert failure.attrib["message"] == "0.4 against 0.15 nats"
    for words in ("value: 0.4 nats", "limit: 0.15 nats", "each type's limit", "blk.3.ffn_down.weight"):
        assert words in (failure.text or "")


def test_a_reason_stands_beside_what_was_skipped() -> None:
    (skipped,) = parsed(junit(Report((not_run("a.b", "no wheel", required=False),)).to_dict())).iter("skipped")
    assert skipped.attrib == {"type": "not run", "message": "not run: no wheel"}


def test_what_was_compared_stands_in_the_properties() -> None:
    found = {p.attrib["name"]: p.attrib["value"] for p in parsed(junit(sound())).iter("property")}
    assert found["runtime.build"] == FACTS["runtime"]["build"]
    assert found["settings.text_sha256"] == "ab" * 32
    assert found["reference.revision"] == "0123abc"


def test_the_same_report_gives_the_same_xml_and_hostile_names_stay_text() -> None:
    text = junit(failed(HOSTILE))
    assert text == junit(failed(HOSTILE))
    assert "<script" not in text and "\x00" not in text and "\x1b" not in text
    assert any("<script>" in (failure.text or "") for failure in parsed(text).iter("failure"))
