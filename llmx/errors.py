"""The error tree. Every error a user can cause is one of these; each carries the process's exit code.

LlmxError ............... 1  a bug of ours, or of a library below us
├── UsageError .......... 2  the command line or an option is wrong; a target exists
├── UnsupportedError .... 3  an architecture, tokenizer, config key, type or file that llmx does not know
├── CheckFailed ......... 4  an artifact was made or read, and a check on it failed
├── ResourceError ....... 5  not enough disk or memory
├── IntegrityError ...... 6  a file is broken, inconsistent or hostile
└── RuntimeMissing ...... 7  the runtime that a check needs is not installed here
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class LlmxError(Exception):
    """What went wrong, where, and what to do.

    what: one sentence. where: a file, tensor or key. fix: what the user can do.
    problems: every single offence when there is more than one, all listed at once.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, where: object | None = None, fix: str | None = None, problems: Sequence[str] = ()
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        self.problems = tuple(problems)
        super().__init__(self._text())

    def to_json(self) -> dict[str, object]:
        """The error as plain data, for `--json`."""
        return {
            "what": self.what,
            "where": self.where,
            "fix": self.fix,
            "problems": list(self.problems),
            "exit_code": self.exit_code,
        }

    @property
    def one_line(self) -> str:
        """The whole text on one line, for a cell or a check's detail."""
        return "; ".join(line.strip() for line in str(self).splitlines() if line.strip())

    def _text(self) -> str:
        lines = [self.what]
        # A stranger's name must not look like a line of ours.
        lines += ["  - " + problem.replace("\n", "\\n") for problem in self.problems]
        if self.where is not None:
            lines.append("  where: " + self.where.replace("\n", "\\n"))
        if self.fix is not None:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(LlmxError):
    exit_code = 2


class UnsupportedError(LlmxError):
    exit_code = 3


class CheckFailed(LlmxError):
    exit_code = 4


class ResourceError(LlmxError):
    exit_code = 5


class IntegrityError(LlmxError):
    exit_code = 6


class RuntimeMissing(LlmxError):
    exit_code = 7
