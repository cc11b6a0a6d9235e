"""The audit of the pinned packages: what was not looked up never counts as passed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOUND = {"id": "PYSEC-1", "fix_versions": ["2.0"], "aliases": [], "description": ""}
SOUND = {"name": "a", "version": "1.0", "vulns": []}
BROKEN = {"name": "b", "version": "1.0", "vulns": [FOUND]}
SKIPPED = {"name": "c", "skip_reason": "not found on PyPI"}


def judged(answer: str, said: str = "") -> tuple[int, list[str]]:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.judged(answer, said)


@pytest.mark.parametrize(
    ("packages", "code", "says"),
    [
        ([SOUND], 0, "0 known vulnerabilities in 1 packages"),
        ([SOUND, BROKEN], 4, "b 1.0: PYSEC-1, mended in 2.0"),
        ([SOUND, SKIPPED], 7, "not run for 1 of 2 packages: c"),
        ([BROKEN, SKIPPED], 4, "not run for 1 of 2 packages: c"),
        ([], 7, "not run for 0 of 0"),
    ],
)
def test_packages_that_were_not_looked_up_are_not_passed(packages: list[Any], code: int, says: str) -> None:
    found, lines = judged(json.dumps({"dependencies": packages, "fixes": []}))
    assert found == code and says in "\n".join(lines)


@pytest.mark.parametrize("answer", ["", "[]", "{}", "{"])
def test_without_an_answer_the_audit_was_not_run(answer: str) -> None:
    code, lines = judged(answer, "Traceback\nConnectionError: no route to pypi.org")
    assert code == 7 and lines == ["audit: not run: ConnectionError: no route to pypi.org"]


def test_every_package_of_the_audit_itself_is_pinned() -> None:
    pinned = (ROOT / "constraints.txt").read_text().lower()
    assert "pip_audit==" in pinned and "cyclonedx-bom==" in pinned
