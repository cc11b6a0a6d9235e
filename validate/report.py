"""What a validation found: the records, the versioned JSON and the table for a terminal.

A check is a number with a limit, a unit and the origin of the limit. Its status is one of four words:

  passed           it ran and held
  FAILED           it ran and did not hold
  not run          it could not run; `detail` says why; never counts as passed; a required one fails the report
  not applicable   there is nothing to check: a model without a chat template
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from llmx.errors import CheckFailed

SCHEMA = "llmx.report/1"  # raise the number when a key changes its meaning or goes away
EXIT_CODES = (4, 7, 5, 2)  # of a report that has not passed: a check, the runtime, memory or disk, a refused limit
SHOWN = 8  # offenders of a check that are named
SCHEMA_FILE = "schemas/report-1.json"  # every key, with its meaning and unit


@dataclass(frozen=True, slots=True)
class Check:
    """One figure of an artifact. passed: None means that the check did not run.

    name: "kind.what". limit: the value must not pass it; None for a figure that is only reported.
    origin: where the limit comes from. detail: a short explanation; it names the offenders.
    required: the whole report cannot pass while this check has not run. applicable: there is something to check.
    code: what the process exits with where this check keeps the report from passing.
    """

    name: str
    passed: bool | None
    value: float | int | str | None = None
    limit: float | int | str | None = None
    unit: str = ""
    origin: str = ""
    detail: str = ""
    required: bool = True
    applicable: bool = True
    code: int = CheckFailed.exit_code

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def status(self) -> str:
        if self.passed is None:
            return "not run" if self.applicable else "not applicable"
        return "passed" if self.passed else "FAILED"


def not_run(name: str, reason: str, *, required: bool = True, code: int = CheckFailed.exit_code) -> Check:
    """Returns a check that could not run; the report cannot pass when it was required."""
    return Check(name, None, detail=reason, required=required, code=code)


def not_applicable(name: str, reason: str) -> Check:
    """Returns a check that has nothing to look at; it counts neither as passed nor as failed."""
    return Check(name, None, detail=reason, required=False, applicable=False)


def at_most(name: str, value: float, limit: float, unit: str, origin: str, *, detail: str = "") -> Check:
    """Returns a check that value <= limit; NaN fails."""
    return Check(name, bool(value <= limit), value, limit, unit, origin, detail)


def at_least(name: str, value: float, limit: float, unit: str, origin: str, *, detail: str = "") -> Check:
    """Returns a check that value >= limit; NaN fails."""
    return Check(name, bool(value >= limit), value, limit, unit, origin, detail)


def reported(name: str, value: float | int | str | None, unit: str, detail: str = "") -> Check:
    """Returns a figure without a limit."""
    return Check(name, True, value, None, unit, "reported only", detail)


def named(names: Sequence[str]) -> str:
    """Returns the first names of a list and how many more there are; "" for none."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one artifact, with what was compared and how (`facts`: artifact, reference, runtime, settings).

    details: the curves and tables that the checks left, by name.
    """

    checks: tuple[Check, ...]
    facts: Mapping[str, object] = field(default_factory=dict)
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def missing(self) -> tuple[Check, ...]:
        """Required checks that did not run."""
        return tuple(check for check in self.checks if check.passed is None and check.required)

    @property
    def passed(self) -> bool:
        """True when something ran, nothing failed and no required check was left out."""
        return any(check.passed for check in self.checks) and not self.failed and not self.missing

    @property
    def exit_code(self) -> int:
        """0 when it passed; otherwise what kept it from passing, the first of EXIT_CODES that there is.

        What failed goes before what could not run: an artifact that is broken is broken without a runtime, too.
        """
        if self.passed:
            return 0
        codes = {check.code for check in self.failed or self.missing}
        return next((code for code in EXIT_CODES if code in codes), CheckFailed.exit_code)

    def to_dict(self) -> dict[str, object]:
        """Returns the report as plain JSON values, in schema `SCHEMA`; NaN and infinity as strings."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            **plain(self.facts),
            "checks": [_check_to_dict(check) for check in self.checks],
            "details": plain(self.details),
        }

    def to_json(self) -> str:
        """Returns report.json's text: no time, no machine name."""
        return as_json(self.to_dict())


def as_json(told: Mapping[str, Any]) -> str:
    """Returns the text of a report's plain values as report.json holds it, with escapes for what UTF-8 cannot write.

    Raises: ValueError for NaN and infinity.
    """
    text = json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes \\udxxx, as JSON writes it


def unproven(facts: Mapping[str, object]) -> dict[str, Any]:
    """Returns the plain values of the report of an artifact that nobody validated: passed is null, never true."""
    return {"schema": SCHEMA, "passed": None, **plain(facts), "checks": []}


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) that every report keeps to."""
    return json.loads(resources.files("llmx.validate").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))


def _check_to_dict(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "kind": check.kind,
        "status": check.status.lower(),
        "passed": check.passed,
        "required": check.required,
        "value": plain(check.value),
        "limit": plain(check.limit),
        "unit": check.unit,
        "origin": check.origin,
        "detail": check.detail,
    }


def plain(value: Any) -> Any:
    """The same value with lists for tuples, and with words for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | int | str | None) -> str:
    """Returns a value in at most four significant digits; counts in full."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


STYLES = {"passed": "green", "FAILED": "bold red", "not run": "yellow", "not applicable": "dim"}


def as_table(report: Report, width: int = 120, color: bool = False) -> str:
    """Returns the checks as a table, with the details of everything that did not pass below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("result", no_wrap=True)
    for check in report.checks:
        status = Text(check.status, style=STYLES[check.status])
        table.add_row(check.name, number(check.value), number(check.limit), check.unit, status)
    console = Console(file=io.StringIO(), width=width, force_terminal=color, no_color=not color, highlight=False)
    console.print(table)
    for check in report.checks:
        if (check.passed is not True or check.kind == "blame") and check.detail:
            console.print(Text(f"{check.name}: {check.detail}", style=STYLES[check.status]))
    console.print(Text(verdict(report), style=STYLES["passed" if report.passed else "FAILED"]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def verdict(report: Report) -> str:
    """Returns one line: passed; or how many checks failed and how many were not run."""
    if report.passed:
        return "passed"
    words = []
    if report.failed:
        words.append(f"{len(report.failed)} failed: " + ", ".join(check.name for check in report.failed))
    if report.missing:
        words.append(f"{len(report.missing)} not run: " + ", ".join(check.name for check in report.missing))
    return "NOT PASSED: " + ("; ".join(words) or "no check ran")
