"""The report as JUnit XML, which every CI system reads: one test case a check.

  passed                    a test case with its figures as output
  failed                    <failure>
  not run, and required     <error>: the artifact is not proven, so no pipeline may show green
  not run, not required     <skipped> with the reason
  not applicable            <skipped> with the reason

Neither time nor machine is written: the same report gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from llmx.validate.charts import printable
from llmx.validate.report import number

Outcome = tuple[str, str]  # element, type
OUTCOMES: Mapping[tuple[str, bool], Outcome] = {
    # (status, required) -> what stands in the test case; a passed one has nothing
    ("failed", True): ("failure", "failed"),
    ("failed", False): ("failure", "failed"),
    ("not run", True): ("error", "not run"),
    ("not run", False): ("skipped", "not run"),
    ("not applicable", False): ("skipped", "not applicable"),
}
COUNTED = {"failures": "failure", "errors": "error", "skipped": "skipped"}  # attribute of a suite -> element
NOTHING_RAN = "no check ran: the artifact is not validated"


def junit(told: Mapping[str, Any]) -> str:
    """Returns the XML text of a report as `Report.to_dict` gives it: one suite, named after the artifact.

    A report without any check holds one <error>, so that it cannot read as a pass.
    """
    name = _artifact(told)
    root = ElementTree.Element("testsuites", {"name": "llmx"})
    suite = ElementTree.SubElement(root, "testsuite", {"name": printable(name)})
    _properties(suite, told)
    for check in told["checks"]:
        _case(suite, check)
    if not told["checks"]:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "llmx.report", "name": "report.ran"})
        ElementTree.SubElement(case, "error", {"type": "not run", "message": NOTHING_RAN}).text = NOTHING_RAN
    counts = {"tests": len(suite.findall("testcase"))}
    counts |= {attribute: len(suite.findall(f"testcase/{element}")) for attribute, element in COUNTED.items()}
    suite.attrib.update({attribute: str(count) for attribute, count in counts.items()})
    root.attrib.update({attribute: str(counts[attribute]) for attribute in ("tests", "failures", "errors")})
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _artifact(told: Mapping[str, Any]) -> str:
    if "artifact" in told:
        return str(told["artifact"]["name"])
    return str(told["export"]["files"][0]["name"]) if "export" in told else "artifact"


def _properties(suite: ElementTree.Element, told: Mapping[str, Any]) -> None:
    """What was compared, with what: artifact, reference, other artifact, runtime and settings."""
    element = ElementTree.SubElement(suite, "properties")
    for group in ("artifact", "reference", "against", "runtime", "settings"):
        for key, value in told.get(group, {}).items():
            if value is not None:
                about = {"name": f"{group}.{key}", "value": printable(str(value))}
                ElementTree.SubElement(element, "property", about)


def _case(suite: ElementTree.Element, check: Mapping[str, Any]) -> None:
    place = {"classname": f"llmx.{printable(check['kind'])}", "name": printable(check["name"])}
    case = ElementTree.SubElement(suite, "testcase", place)
    figures = "\n".join(_figures(check))
    if check["status"] == "passed":
        if figures:
            ElementTree.SubElement(case, "system-out").text = figures
        return
    element, kind = OUTCOMES[check["status"], check["required"]]
    message = printable(_message(check))
    ElementTree.SubElement(case, element, {"type": kind, "message": message}).text = figures or message


def _message(check: Mapping[str, Any]) -> str:
    """One line: the reason, or the value against its limit."""
    if check["status"] != "failed":
        return f"{check['status']}: {check['detail']}"
    return " ".join(f"{number(check['value'])} against {number(check['limit'])} {check['unit']}".split())


def _figures(check: Mapping[str, Any]) -> Sequence[str]:
    """Value, limit, unit, origin and detail, a line each; what there is."""
    unit = f" {check['unit']}" if check["unit"] else ""
    lines = {
        "value": "" if check["value"] is None else f"{number(check['value'])}{unit}",
        "limit": "" if check["limit"] is None else f"{number(check['limit'])}{unit}",
        "origin of the limit": check["origin"],
        "detail": check["detail"],
    }
    return [printable(f"{name}: {value}") for name, value in lines.items() if value]
