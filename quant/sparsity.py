"""Patterns of zeros: how many weights of a row may be left, and which are by magnitude alone. Needs no torch.

    2:4    of every four neighbouring weights of a row two are zero      | a 0 0 b | 0 c d 0 | …
    50%    that share of a matrix is zero, anywhere in it

Sparse tensor cores want the first; the second is for research.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmx.errors import UsageError
from llmx.models.architecture import Role
from llmx.quant.protocol import Floats

NONE = "none"
PRUNED_ROLES: frozenset[Role] = frozenset(
    {"q", "k", "v", "o", "gate", "up", "down", "expert_gate", "expert_up", "expert_down"}
)
"""What is made sparse. Embedding and head are looked up or read out whole, and a router chooses among few."""
CHOICES = "2:4, a share such as 50%, or none"

_SHARE = re.compile(r"(\d{1,2}(?:\.\d{1,3})?)%")


@dataclass(frozen=True, slots=True)
class Pattern:
    """group: neighbouring weights of a row that are pruned together, 0 for the whole matrix. zeros: share of zeros."""

    name: str
    group: int
    zeros: float

    @property
    def kept(self) -> int:
        """How many weights of a group may differ from zero."""
        assert self.group, "a share of the whole has no groups"
        return self.group - round(self.group * self.zeros)

    def problem(self, cols: int) -> str | None:
        """Why rows of so many weights cannot be pruned so, or None."""
        if self.group and cols % self.group:
            return f"rows of {cols} weights are no whole number of groups of {self.group}"
        return None

    def pruned(self, count: int) -> int:
        """How many of so many weights that share no group are zero: the share, rounded up."""
        return math.ceil(round(count * self.zeros, 6))


def find_pattern(name: str) -> Pattern:
    """The pattern of that name. Raises: UsageError with the choices."""
    told = name.strip()
    if told == "2:4":
        return Pattern(told, 4, 0.5)
    found = _SHARE.fullmatch(told)
    if found is None or not 0 < float(found[1]) < 100:
        raise UsageError(f"there is no sparsity {name!r}", fix=f"choose {CHOICES}")
    return Pattern(f"{float(found[1]):g}%", 0, float(found[1]) / 100)


def largest_kept(scores: Floats, pattern: Pattern) -> NDArray[np.bool_]:
    """bool[rows, cols]: where weights are kept, those of the highest score (f32[rows, cols]) of each group, or of each
    row where the pattern has no groups; of equal ones the first."""
    rows, cols = scores.shape
    size = pattern.group or cols
    grouped = scores.reshape(rows, -1, size)
    count = pattern.kept if pattern.group else cols - pattern.pruned(cols)
    order = np.argsort(-grouped, axis=2, kind="stable")
    kept = np.zeros(grouped.shape, np.bool_)
    np.put_along_axis(kept, order[:, :, :count], True, axis=2)
    return kept.reshape(rows, cols)


def by_magnitude(weight: Floats, pattern: Pattern) -> Floats:
    """f32[rows, cols]: the weights with all but the largest magnitudes set to zero."""
    return np.where(largest_kept(np.abs(weight), pattern), weight, np.float32(0))


def crowded(values: Floats, pattern: Pattern) -> int:
    """Groups of values (f32[rows, cols]) with more weights that are not zero than the pattern allows; without groups,
    how many such weights there are in all."""
    if not pattern.group:
        return int(np.count_nonzero(values))
    rows, cols = values.shape
    filled = np.count_nonzero(values.reshape(rows, cols // pattern.group, pattern.group), axis=2)
    return int(np.count_nonzero(filled > pattern.kept))
