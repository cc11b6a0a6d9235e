"""Importance matrices of our own: the mean squares of every matrix's inputs, under the names that llama.cpp uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from llmx.exporters.gguf_tensors import Entry
from llmx.models.model import Model, Weight
from llmx.progress import Progress, track
from llmx.quant.calibrate import Calibration, walk
from llmx.quant.inputs import MatrixInputs
from llmx.quant.workers import Workers, workers


@dataclass(slots=True)
class _Squares:
    """A Solver that solves nothing and collects sums of squares."""

    progress: Progress
    sums: dict[str, dict[int, tuple[np.ndarray, int]]] = field(default_factory=dict)

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        squares, tokens = inputs.squares()  # of an expert's own tokens, however few
        self.sums.setdefault(weight.spec.name, {})[expert or 0] = (squares.cpu().numpy(), tokens)
        self.progress.advance(weight.spec.shape[-2] * weight.spec.shape[-1])
        return None

    def table(self, weight: Weight) -> torch.Tensor | None:
        return None


def mean_squares(model: Model, calibration: Calibration, pool: Workers) -> dict[str, np.ndarray]:
    """Canonical name -> f32[experts, cols] or f32[cols], from one pass of the float model.

    What nothing reached, and the embedding (which no matrix multiplies at the bottom), weighs the same everywhere.
    """
    with track(0, "measuring", enabled=False) as progress:
        seen = _Squares(progress)
        walk(model, calibration, seen, pool)
    found = {}
    for name, experts in seen.sums.items():
        rows = [squares / max(tokens, 1) for _, (squares, tokens) in sorted(experts.items())]
        rows = [row if row.any() else np.ones_like(row) for row in rows]
        found[name] = np.stack(rows) if len(model.weight(name).spec.shape) == 3 else rows[0]
    return found


def measure_importance(
    model: Model, entries: Sequence[Entry], calibration: Calibration, threads: int
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """(sums f32[experts, cols], counts i64[experts]) by GGUF name, from one pass of the float model."""
    matrices = [entry for entry in entries if entry.quantizable]
    total = sum(piece.spec.shape[-1] * model.weight(piece.spec.name).rows for e in matrices for piece in e.pieces)
    with workers(threads) as pool, track(total, "measuring") as progress:
        seen = _Squares(progress)
        walk(model, calibration, seen, pool)
    sums, counts = {}, {}
    for entry in matrices:
        found = next((seen.sums[piece.spec.name] for piece in entry.pieces if piece.spec.name in seen.sums), None)
        if found is None or entry.role == "embedding":
            continue  # llama.cpp's own files say nothing of an embedding, tied or not
        sums[entry.name] = np.stack([found[expert][0] for expert in sorted(found)])
        counts[entry.name] = np.array([found[expert][1] for expert in sorted(found)], np.int64)
    return sums, counts
