"""What a tensor that is quantized gets. Apart from the solver, because plans and roundings need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one canonical tensor gets: an encoding and a method (rtn, gptq, auto; of a sparse one sparsegpt, wanda,
    magnitude).

    scaled, smoothed: whether AWQ, or SmoothQuant, may scale its channels. sparsity: the name of its pattern of zeros,
    None where it is dense.
    """

    type_name: str
    method: str
    scaled: bool = False
    smoothed: bool = False
    sparsity: str | None = None
