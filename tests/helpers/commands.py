"""What a command of llmx left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """Exit code and what was printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def told(self) -> Any:
        """The one JSON object of stdout."""
        return json.loads(self.stdout)
