"""What the checks see beside their figures: the curves and tables of the report's pictures. Judged by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Findings:
    """Plain JSON values under a name each, gathered while the checks run; the report carries them as `details`.

    A name stands for one table or curve ("tensors", "kl_by_position", "blame"); whoever fills it documents its keys in
    the report's JSON Schema.
    """

    found: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        """Keep a whole value; a second one of the same name replaces it."""
        self.found[name] = value

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a row to the table of that name."""
        self.found.setdefault(name, []).append(dict(row))
