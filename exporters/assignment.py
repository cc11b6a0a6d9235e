"""What a tensor that is quantized gets. Apart from the solver, because plans and roundings need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one canonical tensor gets: an encoding, a method (rtn, gptq, auto), and whether AWQ may scale it."""

    type_name: str
    method: str
    scaled: bool = False
