"""docs/faults.md, read: which checks and exit code it names for every fault."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
OTHER_FORMATS = ("ONNX folders", "TensorRT-LLM checkpoints", "TensorRT engines")
Row = tuple[frozenset[str], int]


class Fault(Protocol):
    """A row of a table of faults."""

    @property
    def name(self) -> str: ...
    @property
    def caught_by(self) -> frozenset[str]: ...
    @property
    def exit_code(self) -> int: ...


def documented(section: str | None = None) -> dict[str, Row]:
    """Fault -> (checks, exit code) of a section of the page; None: of all that are about GGUF files."""
    found: dict[str, Row] = {}
    here = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        here = line.removeprefix("## ") if line.startswith("## ") else here
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        wanted = here == section if section is not None else here not in OTHER_FORMATS
        if wanted and len(cells) == 3 and cells[2].isdigit():
            assert cells[0] not in found, f"{cells[0]} stands there twice"
            found[cells[0]] = frozenset(re.findall(r"`([^`]+)`", cells[1])), int(cells[2])
    return found


def of_table(faults: Iterable[Fault]) -> dict[str, Row]:
    """The same of a table."""
    return {fault.name: (fault.caught_by, fault.exit_code) for fault in faults}
