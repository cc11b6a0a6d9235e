"""What a solver leaves: the rows of every matrix, and a line of the report about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmx.models.model import Model
from llmx.quant.scale_search import Scaling

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor of the report. held_out: loss on held-out tokens as a share of the outputs' energy, 0 unquantized.

    rounding: the same of rounding to the nearest. tokens: that reached it. pooled: too few did, so all were taken.
    """

    name: str
    expert: int | None
    type_name: str
    method: str
    damping: float | None
    held_out: float | None
    rounding: float | None
    tokens: int | None
    pooled: bool
    weights: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        def short(value: float | None) -> float | None:
            return None if value is None else float(f"{value:.4g}")

        return {
            "name": self.name,
            "expert": self.expert,
            "type": self.type_name,
            "method": self.method,
            "damping": self.damping,
            "error_held_out": short(self.held_out),
            "error_of_rounding": short(self.rounding),
            "tokens": self.tokens,
            "pooled": self.pooled,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Solved:
    """rows: canonical name -> u8[rows, row bytes], on disk. model: with the transforms folded in, and sparse matrices
    that are kept as floats in the place of the checkpoint's.

    tokens: that were calibrated on, held-out ones included.
    """

    model: Model
    rows: Mapping[str, Bytes]
    lines: tuple[Line, ...]
    scaling: Scaling | None
    tokens: int

    def notes(self) -> list[str]:
        """What a user should know: fall-backs with the share of weights that they cover."""
        total = sum(line.weights for line in self.lines) or 1
        pooled = [line for line in self.lines if line.pooled]
        notes = []
        if pooled:
            share = sum(line.weights for line in pooled) / total
            notes.append(
                f"{len(pooled)} expert matrices ({share:.1%} of the weights) were reached by too few calibration "
                "tokens and were solved on all tokens of their layer"
            )
        rounded = [line for line in self.lines if line.method == "rtn" and line.held_out is not None]
        if rounded and any(line.method != "rtn" for line in self.lines):
            notes.append(f"{len(rounded)} of {len(self.lines)} matrices were best rounded to the nearest")
        ragged = [line for line in self.lines if line.tokens is not None and line.held_out is None]
        if ragged:
            notes.append(f"{len(ragged)} matrices with a short last group a row were rounded to the nearest")
        if self.scaling is not None and self.scaling.left_alone:
            notes.append(f"{self.scaling.left_alone} of {len(self.scaling.choices)} groups were best left unscaled")
        return notes
