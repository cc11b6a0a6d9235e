"""Where an artifact goes wrong: the first layer, the tensor, or the number of the metadata that differs.

    weights     every stored tensor beside its source              evidence.py, suspicion.py
    outputs     what its error makes of its outputs on a text      streams.py
    stream      the relative error of the residual stream, layer by layer
    metadata    where every tensor is sound                        hyperparameters.py

Nothing here needs a runtime, or the digests that our own files carry: files of other tools are told apart as well.
Where there are digests, a tensor that was changed after the export is named by them, however little it was changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmx.exporters.gguf_metadata import SCALED, SOLVER_KEY
from llmx.exporters.gguf_tensors import Entry
from llmx.models.model import Model
from llmx.validate.case import Case
from llmx.validate.evidence import Evidence, allowed, gather
from llmx.validate.kinds import kind_of
from llmx.validate.report import Check, not_applicable, reported
from llmx.validate.restored import restored_model
from llmx.validate.scales import with_scales_of
from llmx.validate.streams import OutputError, Streams, compare
from llmx.validate.suspicion import Suspect, identify, suspects

NAME = "blame.tensor"
TOKENS = 256  # run through the decoder
NAMED = 8  # suspects of the report
IDENTIFIED = 3  # suspects whose contents are looked for elsewhere
TOGETHER = 0.5  # of the highest score: tensors this suspicious are of one fault, and the first of them is named


@dataclass(frozen=True, slots=True)
class Blame:
    """What is wrong, in one sentence. tensor: None where no tensor stands out; layer: None outside the layers.

    embedding, layers: the relative error of the residual stream after each; empty where the tensors make no model.
    """

    tensor: str | None
    layer: int | None
    reason: str
    suspects: tuple[Suspect, ...]
    layers: tuple[float, ...]
    embedding: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Returns the table "blame" of the report's details; what is infinite is written as text.

        Layer -1 is the embedding.
        """
        stream = (self.embedding, *self.layers) if self.layers else ()
        return {
            "layer": self.layer,
            "tensor": self.tensor,
            "reason": self.reason,
            "suspects": [
                {"tensor": one.tensor, "score": _plain(one.score), "reason": one.reason}
                for one in self.suspects[:NAMED]
            ],
            "layers": [{"layer": index, "error": _plain(error)} for index, error in enumerate(stream, -1)],
        }


def _plain(value: float) -> float | str:
    return float(f"{value:.6g}") if np.isfinite(value) else str(value)


def check_blame(case: Case) -> Iterator[Check]:
    """Yields blame.tensor, which names what is wrong and judges nothing; notes "blame" for the report."""
    if (reason := kind_of(case.file).unmapped(case.file, case.model.architecture)) is not None:
        yield not_applicable(NAME, reason)
        return
    found = find_blame(case)
    case.findings.note("blame", found.to_json())
    yield reported(NAME, found.tensor or "none", "", found.reason)


def find_blame(case: Case) -> Blame:
    """Returns the tensor, or the number of the metadata, that makes the artifact another function than its source.

    Memory: one layer of both models in float32.
    """
    whole = case.entries
    there = [entry for entry in whole if _fits(case, entry)]
    model, streams = case.model, None
    if len(there) == len(whole):
        restored = restored_model(case.file, case.model, whole)
        if case.file.metadata.get(SOLVER_KEY) == SCALED:
            model = with_scales_of(case.model, restored)
        streams = _streams(case, model, restored)
    solved = SOLVER_KEY in case.file.metadata
    moved = allowed(case.file) if solved else 0.0
    evidence = [gather(case.file, model, entry, moved) for entry in there]
    outputs = {} if streams is None else dict(_outputs(model, evidence, streams))
    found = suspects(evidence, outputs, solved)
    found = _changed(_identified(case, model, evidence, found), _told_by_digests(case))
    layers, embedding = ((), 0.0) if streams is None else (streams.layers, streams.embedding)
    return replace(_verdict(case, found, layers, [e.name for e in whole if e not in there]), embedding=embedding)


def _told_by_digests(case: Case) -> list[str]:
    """The tensors that were changed after the file was written; none where it does not say."""
    changed = kind_of(case.file).changed(case.file)
    return [] if isinstance(changed, str) else changed


def _fits(case: Case, entry: Entry) -> bool:
    stored = case.file.tensors.get(entry.name)
    return stored is not None and tuple(stored.shape) == tuple(entry.shape)


def _streams(case: Case, model: Model, restored: Model) -> Streams | None:
    tokens = [*case.leading, *case.ids][: min(TOKENS, model.architecture.context_length)]
    return compare(model, restored, tokens) if tokens else None


def _outputs(model: Model, evidence: Sequence[Evidence], streams: Streams) -> Iterator[tuple[str, float]]:
    """Stored tensor -> how far its outputs are off, over what its inputs and rounding to its type explain."""
    for e in evidence:
        found = [streams.outputs[p.spec.name] for p in e.entry.pieces if p.spec.name in streams.outputs]
        if found:
            whole = OutputError(*(sum(getattr(part, key) for part in found) for key in ("lost", "handed", "unit")))
            yield e.entry.name, whole.over_expected(e.usual_variance)


def _identified(case: Case, model: Model, evidence: Sequence[Evidence], found: list[Suspect]) -> list[Suspect]:
    """The suspects, the first ones with what they hold instead, where that can be told."""
    by_name: Mapping[str, Evidence] = {e.entry.name: e for e in evidence}
    every = [e.entry for e in evidence]
    told = [
        replace(one, reason=held)
        if one.score > 1 and (held := identify(case.file, model, by_name[one.tensor], every))
        else one
        for one in found[:IDENTIFIED]
    ]
    return [*told, *found[IDENTIFIED:]]


def _changed(found: list[Suspect], names: Sequence[str]) -> list[Suspect]:
    """The suspects, those first whose bytes are not those that the file was written with: nothing is surer."""

    def told(one: Suspect) -> Suspect:
        more = f"; {one.reason}" if one.score > 1 else ""
        return replace(one, score=float("inf"), reason=f"its bytes were changed after the file was written{more}")

    first = [told(one) for one in found if one.tensor in names]
    return [*first, *(one for one in found if one.tensor not in names)]


def _verdict(case: Case, found: list[Suspect], layers: tuple[float, ...], absent: Sequence[str]) -> Blame:
    def blame(tensor: str | None, layer: int | None, reason: str) -> Blame:
        return Blame(tensor, layer, reason, tuple(found), layers)

    if absent:
        return blame(absent[0], None, f"{absent[0]} is missing or has another shape")
    order = {entry.name: number for number, entry in enumerate(case.entries)}
    together = [one for one in found if one.score > 1 and one.score >= TOGETHER * found[0].score]
    if together:
        first = min(together, key=lambda one: order[one.tensor])
        more = len(together) - 1
        others = f"; {more} more tensor{'s' if more > 1 else ''} like it" if more else ""
        return blame(first.tensor, first.layer, f"{first.tensor}: {first.reason}{others}{_rise(layers, first.layer)}")
    numbers = kind_of(case.file).differences(case.file, case.model)
    if numbers and not isinstance(numbers, str):
        return blame(None, None, f"every tensor is sound; in the metadata {'; '.join(numbers)}")
    return blame(None, None, f"no tensor and no number of the metadata stands out{_largest_rise(layers)}")


def _rise(layers: tuple[float, ...], layer: int | None) -> str:
    """What the layer adds to the error of the residual stream, in words."""
    if layer is None or not layers:
        return ""
    before = layers[layer - 1] if layer else 0.0
    return f"; after layer {layer} the residual stream is off by {layers[layer]:.3g}, before it by {before:.3g}"


def _largest_rise(layers: tuple[float, ...]) -> str:
    if not layers:
        return ""
    layer = int(np.argmax(np.diff([0.0, *layers])))
    return f"; most is lost in layer {layer}{_rise(layers, layer)}"
