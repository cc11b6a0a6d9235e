"""Every llmx command that the documentation shows is one that the real command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from llmx.cli import commands

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / "docs" / "examples" / "release-gate.yml"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = re.compile(r"\$\{\{.*?\}\}")  # GitHub's own expressions


def steps() -> list[dict[str, Any]]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]["gate"]["steps"]


def command_lines() -> list[tuple[str, str]]:
    found = [("release-gate.yml", line.strip()) for step in steps() for line in step.get("run", "").splitlines()]
    for path in DOCUMENTS:
        for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            found += [(path.name, line) for line in block.replace("\\\n", " ").splitlines()]
    return [(name, line) for name, line in found if line.startswith("llmx ")]


def parse(line: str) -> click.Context:
    """The line as the command would get it; nothing is run. Raises: click.ClickException where it is refused."""
    words = shlex.split(PLACES.sub("x", line), comments=True)[1:]
    command = commands.commands[words[0]]
    return command.make_context(words[0], words[1:])


@pytest.mark.parametrize(("document", "line"), command_lines(), ids=lambda value: value[:60])
def test_every_documented_command_line_parses(document: str, line: str) -> None:
    parse(line)


def test_the_parser_refuses_an_option_that_there_is_not() -> None:
    with pytest.raises(click.NoSuchOption):
        parse("llmx verify a.gguf --no-such-option")


def test_documents_and_workflow_show_commands() -> None:
    assert {"README.md", "release-gate.md", "release-gate.yml"} <= {name for name, _ in command_lines()}


def test_the_workflow_exports_validates_by_a_gate_and_keeps_the_report_of_a_failure() -> None:
    lines = [line for name, line in command_lines() if name == WORKFLOW.name]
    assert [line.split()[1] for line in lines] == ["doctor", "export", "validate", "sign", "verify"]
    assert parse(lines[2]).params["gate"] == Path("gate.yaml")
    kept = next(step for step in steps() if step.get("with", {}).get("name") == "report")
    assert "always()" in kept["if"]
    assert {"report/report.html", "report/junit.xml"} <= set(kept["with"]["path"].split())
    # Nothing swallows an exit code.
    assert not any("continue-on-error" in step for step in steps())
    assert "||" not in "".join(step.get("run", "") for step in steps())


def test_the_gate_file_of_the_recipe_is_read(tmp_path: Path) -> None:
    from llmx.validate.gate_file import read_gate

    text = (ROOT / "docs" / "release-gate.md").read_text()
    block = re.search(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    (tmp_path / "gate.yaml").write_text(block[1])
    assert read_gate(tmp_path / "gate.yaml").keys() == {"max_kl", "min_top1", "max_ppl_ratio"}
