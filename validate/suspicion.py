"""From a tensor's figures to how suspicious it is, and to a sentence that says what is wrong with it.

A score is a figure over the largest that sound tensors have; above one nothing sound was measured. The largest figure
of a tensor gives its score and its sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmx.exporters.gguf_tensors import Entry
from llmx.models.model import Model
from llmx.validate.evidence import Evidence
from llmx.validate.kinds import Container, kind_of

SOUND: Mapping[str, float] = {
    # figure -> what sound tensors of rounded files stay below
    "size": 1.6,
    "gain": 0.25,
    "bias": 0.15,
    "row": 1.6,
    "column": 2.0,
    "block": 1.9,
    "tails": 14.0,
    "unlike": 0.12,
    "steps": 3.0,
    "output": 1.3,
    "size beside": 1.4,
}
SOUND_SOLVED: Mapping[str, float] = {
    # the same of files whose weights a solver moved; errors over what the file's coarsest type makes
    **SOUND,
    "size": 2.4,
    "row": 2.0,
    "column": 3.0,
    "block": 2.6,
    "tails": 15.0,
    "steps": 3.5,
    "output": 1.2,
    "size beside": 2.0,
}
# Few tokens reach an expert, and what they leave open the solver is free to move.
SOUND_SOLVED_EXPERTS: Mapping[str, float] = {**SOUND_SOLVED, "row": 7.0, "block": 7.0, "steps": 8.0}
ALIKE = 0.5  # a cosine from which on two tensors are the same one
SAMPLE = 64  # rows compared to find out what a tensor holds


@dataclass(frozen=True, slots=True)
class Suspect:
    """A stored tensor and what speaks against it; above a score of one no sound tensor was measured."""

    tensor: str
    layer: int | None
    score: float
    reason: str


def suspects(evidence: Sequence[Evidence], outputs: Mapping[str, float], solved: bool) -> list[Suspect]:
    """Returns every tensor with its score and reason, the most suspicious first.

    outputs: stored tensor -> how far its outputs are off, over what its inputs and rounding explain.
    solved: weights were moved to make up for what earlier layers lost.
    """
    figures = {e.entry.name: dict(e.figures) for e in evidence}
    for name, value in outputs.items():
        figures[name]["output"] = value
    for e in evidence:
        own = figures[e.entry.name]
        if (middle := _middle_of_peers(e, evidence)) is not None:
            own["size beside"] = own["size"] / max(middle, 1.0)
    judged = [_judged(e, figures[e.entry.name], _limits(e, solved)) for e in evidence]
    return sorted(judged, key=lambda suspect: suspect.score, reverse=True)


def _limits(e: Evidence, solved: bool) -> Mapping[str, float]:
    if not solved:
        return SOUND
    return SOUND_SOLVED_EXPERTS if (e.entry.role or "").startswith("expert") else SOUND_SOLVED


def _middle_of_peers(e: Evidence, evidence: Iterable[Evidence]) -> float | None:
    """The median size of the error of the same matrix in other layers, in the same type; None where they are few."""
    sizes = [
        other.figures["size"]
        for other in evidence
        if other is not e and other.entry.role == e.entry.role and other.type_name == e.type_name
        if len(other.entry.shape) > 1
    ]
    return float(np.median(sizes)) if len(sizes) > 1 else None


def _judged(e: Evidence, figures: Mapping[str, float], limits: Mapping[str, float]) -> Suspect:
    if e.not_finite:
        return Suspect(e.entry.name, e.entry.layer, float("inf"), f"{e.not_finite} of its values are NaN or infinite")
    scores = {name: value / limits[name] for name, value in figures.items()}
    worst = max(scores, key=lambda name: scores[name])
    told = "unlike" if e.zero_rows else worst
    return Suspect(e.entry.name, e.entry.layer, scores[worst], REASONS[told](e, figures[told]))


def _unlike(e: Evidence, value: float) -> str:
    if e.zero_rows:
        return f"{e.zero_rows} of its rows are zero and their source is not"
    return f"row {e.where['unlike']} is unlike its source, its cosine {value:.2f} less than other rows'"


def _local(what: str) -> Callable[[Evidence, float], str]:
    return lambda e, value: f"{what} {e.where[what]} is {value:.3g} times as far from its source as the rest of it is"


REASONS: Mapping[str, Callable[[Evidence, float], str]] = {
    "size": lambda e, _: f"its error is {e.rms:.3g}, where {e.type_name} makes {e.usual:.3g} of it",
    "gain": lambda e, _: f"its weights are {e.slope:.4g} times those of its source",
    "bias": lambda e, value: f"its errors lean to one side: their mean is {value:.2f} of their root mean square",
    "row": _local("row"),
    "column": _local("column"),
    "block": _local("block"),
    "tails": lambda *_: "some of its weights lie much farther from their source than their neighbours",
    "unlike": _unlike,
    "steps": lambda e, value: f"one of its weights lies {value * max(e.figures['size'], 1):.3g} steps from its source",
    "output": lambda _, value: f"what it computes on the text is {value:.3g} times as far off as its inputs explain",
    "size beside": lambda e, value: f"its error, {e.rms:.3g}, is {value:.3g} times that of the same matrix elsewhere",
}


def identify(file: Container, model: Model, e: Evidence, entries: Sequence[Entry]) -> str | None:
    """Returns what a tensor that is not like its source holds instead, or None where that cannot be told.

    Looked at are some rows of it: another tensor's, the same rows in another order, transposed, of opposite sign.
    """
    kind, entry = kind_of(file), e.entry
    if e.similar > 1 - ALIKE / 2 or len(entry.shape) == 1 or not e.figures["size"] > 0:
        return None
    rows = np.linspace(0, entry.rows - 1, min(SAMPLE, entry.rows)).astype(np.int64)
    held = np.nan_to_num(np.concatenate([kind.decoded(file, entry.name, row, row + 1) for row in rows]))

    def source(of: Entry) -> np.ndarray:
        return np.concatenate([kind.source_rows(model, of, row, row + 1) for row in rows])

    if _cosine(held, source(entry)) < -ALIKE:
        return "it holds its source with the opposite sign"
    alike = {
        other.name: _cosine(held, source(other))
        for other in entries
        if other is not entry and other.shape == entry.shape and other.pieces
    }
    if alike and (name := max(alike, key=lambda name: alike[name])) and alike[name] > ALIKE:
        return f"it holds {name} (cosine {alike[name]:.2f})"
    whole = kind.source_rows(model, entry, 0, entry.rows)
    if entry.rows == entry.columns and _cosine(held, whole.T[rows]) > ALIKE:
        return "it holds its source transposed"
    if _moved_rows(held, whole, rows) > 0.5:
        return "it holds its source with the rows in another order"
    return None


def _moved_rows(held: np.ndarray, whole: np.ndarray, rows: np.ndarray) -> float:
    """The share of these rows that are another row of the source."""
    norms = np.linalg.norm(held, axis=1)[:, None] * np.linalg.norm(whole, axis=1)
    cosines = np.divide(held @ whole.T, norms, out=np.zeros_like(norms), where=norms > 0)
    nearest = cosines.argmax(1)
    return float(((nearest != rows) & (cosines.max(1) > ALIKE)).mean())


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum() / size) if size else 0.0
