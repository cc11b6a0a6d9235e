"""What an export will do, before a weight is read: every tensor's type, every file's exact size, every fall-back."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from llmx.models.architecture import Role


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the artifact. `wanted` is the type it would have had if its row length allowed it.

    beside: the step whose weights these are the scales or zero points of: no weights of their own.
    """

    name: str
    role: Role | None  # None: made by the exporter (a rope table), not by the checkpoint
    layer: int | None
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    wanted: str | None = None
    beside: str | None = None

    @property
    def parameters(self) -> int:
        return 0 if self.beside is not None else math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of the artifact: its name in the target folder and its size, estimated where it is not exact."""

    name: str
    nbytes: int
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole export. `notes` are the things the artifact will do otherwise than the checkpoint."""

    format: str
    type_name: str
    steps: tuple[Step, ...]
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...]
    peak_memory_bytes: int  # estimated

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def parameters(self) -> int:
        return sum(step.parameters for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        """Tensor bytes only: what the types cost, without the tokenizer and the metadata."""
        return 8 * sum(step.nbytes for step in self.steps) / self.parameters

    @property
    def fall_backs(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.wanted is not None)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: every tensor, the sizes, which of them are estimates, the fall-backs."""
        return {
            "format": self.format,
            "type": self.type_name,
            "bytes": self.nbytes,
            "files": [
                {"name": file.name, "bytes": file.nbytes, **({} if file.exact else {"estimated": True})}
                for file in self.files
            ],
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "peak_memory_bytes": self.peak_memory_bytes,
            "types": dict(Counter(step.type_name for step in self.steps if step.beside is None)),
            "notes": list(self.notes),
            "fall_backs": [f"{s.name}: {s.wanted} -> {s.type_name}" for s in self.fall_backs],
            "tensors": [
                {
                    "name": step.name,
                    "shape": list(step.shape),
                    "type": step.type_name,
                    "bytes": step.nbytes,
                    "fell_back_from": step.wanted,
                }
                for step in self.steps
            ],
        }
