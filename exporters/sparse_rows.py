"""Sparse matrices between the solver and the exporter: pruned before they are rounded, or kept as floats.

A matrix on a grid is rounded with its zeros held, and its rows go to the exporter like those of any other. One that the
artifact keeps as floats goes to it as a weight of the model: so every exporter can write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from llmx.exporters.assignment import Assignment
from llmx.exporters.encoding import SOLVABLE, Encoding
from llmx.models.model import Model
from llmx.models.replaced import ReplacedModel
from llmx.quant.pruning import prune
from llmx.quant.solve import Prepared, Solution, SolveOptions
from llmx.quant.sparse import Pruned
from llmx.quant.sparsity import find_pattern
from llmx.quant.workers import Workers, spans

Bytes = npt.NDArray[np.uint8]
ENCODED_ROWS = 256  # by one worker


def pruned(
    values: torch.Tensor, prepared: Prepared, assigned: Assignment, options: SolveOptions, workers: Workers
) -> Pruned | None:
    """The matrix (f32[out, in]) with its zeros; None where it is to be dense."""
    if assigned.sparsity is None:
        return None
    return prune(values, prepared, find_pattern(assigned.sparsity), assigned.method, options, workers)


def told(solution: Solution, before: Pruned | None) -> Solution:
    """The solution with what was done before its rounding, for the report."""
    if before is None:
        return solution
    method, seconds = f"{before.method}+{solution.method}", before.seconds + solution.seconds
    return replace(solution, method=method, seconds=seconds)


def encode(found: Pruned, kept: Encoding, rows: Bytes, workers: Workers) -> None:
    """Fills the rows on disk with a matrix that no grid takes."""
    values = found.value.cpu().numpy()

    def encoded(part: slice) -> None:
        rows[part] = kept.encode(values[part])

    workers.map(encoded, spans(len(rows), ENCODED_ROWS))


def handed_over(
    model: Model, assignments: Mapping[str, Assignment], rows: Mapping[str, Bytes]
) -> tuple[Model, dict[str, Bytes]]:
    """The model that reads what was solved as floats, and the rows of the others."""
    floats = {name: held for name, held in rows.items() if assignments[name].type_name not in SOLVABLE}
    if not floats:
        return model, dict(rows)
    readers = {name: partial(_read, held) for name, held in floats.items()}
    return ReplacedModel(model, readers), {name: held for name, held in rows.items() if name not in floats}


def _read(rows: Bytes, start: int, stop: int) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(rows[start:stop]).view("<f4")
