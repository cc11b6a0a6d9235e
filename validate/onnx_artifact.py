"""An ONNX artifact, opened: the weights of its graph, and what stands beside it in its folder.

Of a graph that llmx wrote, `mapped` names every weight as the checkpoint's own canonical tensor; stacked rows are taken
apart, and experts that are stored one by one put together:

    layers.3.q+k+v.weight                         rows of q, then of k, then of v
    layers.3.expert_gate[0]+expert_up[0].weight   rows of the first expert's gate, then of its up
    layers.3.expert_gate_up.weight                rows alternate: gate 0 | up 0 | gate 1 | up 1 | ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmx.exporters.onnx_genai import CONFIG_NAME
from llmx.formats.json_text import read_object
from llmx.formats.onnx_file import OnnxFile
from llmx.formats.onnx_reader import read_onnx
from llmx.models.architecture import Architecture, TensorSpec
from llmx.validate.onnx_weights import FLOATS, Kept, names_in, released, weights_of

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TEMPLATE_BYTES = 1 << 20
ALTERNATING: Mapping[str, tuple[str, ...]] = {
    # a stored tensor's role -> the roles whose rows alternate in it
    "expert_gate_up": ("expert_gate", "expert_up"),
}
FLOAT_BYTES: Mapping[str, int] = dict(FLOATS.values())
PADDED = 4  # rows added at most, so that a line of columns is whole bytes
LONGEST = 256  # weights of a group: fewer are added to fill up a short one


@dataclass(frozen=True, slots=True)
class OnnxArtifact:
    """A graph and its weights by their names. beside: JSON files of its folder that are there, by name."""

    file: OnnxFile
    tensors: Mapping[str, Kept]
    beside: Mapping[str, Mapping[str, Any]]

    @property
    def format(self) -> str:
        return "onnx"

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.file.paths

    @property
    def folder(self) -> Path:
        return self.file.paths[0].parent

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.file.metadata

    @property
    def nbytes(self) -> int:
        """The size of the graph and its data files."""
        return self.file.nbytes

    @property
    def weights(self) -> int:
        """How many weights there are; scales and zero points are none."""
        return sum(prod(kept.shape) for kept in self.tensors.values())

    @property
    def bits_per_weight(self) -> float | None:
        """Of the weights' data, scales and zero points included; None for a graph without any."""
        return 8 * sum(kept.nbytes for kept in self.tensors.values()) / self.weights if self.weights else None

    def release(self, name: str) -> None:
        """Hands the tensor's pages back to the system; reading it again maps them again."""
        released(self.file, self.tensors[name])

    @property
    def template(self) -> str | None:
        """The chat template: in a file of its own, else the tokenizer's."""
        path = self.folder / TEMPLATE
        if path.is_file() and path.stat().st_size <= TEMPLATE_BYTES:
            return path.read_text(encoding="utf-8", errors="replace")
        found = self.beside.get(TOKENIZER_CONFIG, {}).get("chat_template")
        named = {one.get("name"): one.get("template") for one in found} if isinstance(found, list) else {}
        found = named.get("default") if named else found
        return found if isinstance(found, str) else None


def open_onnx(path: Path) -> OnnxArtifact:
    """The artifact of a graph, or of the folder that it lies in.

    Raises: IntegrityError for a broken or hostile graph, or a broken file beside it.
    """
    file = read_onnx(path)
    folder = file.paths[0].parent
    names = [name for name in (CONFIG_NAME, TOKENIZER_CONFIG) if (folder / name).is_file()]
    return OnnxArtifact(file, weights_of(file), {name: read_object(folder / name) for name in names})


def mapped(artifact: OnnxArtifact, architecture: Architecture) -> OnnxArtifact:
    """The same with stacked rows under the names of the checkpoint's own tensors.

    A tensor whose rows are not all there, or in tensors of two types, stays what it is: it counts as missing.
    """
    specs = {spec.name: spec for spec in architecture.tensors}
    segments: dict[str, list[_Segment]] = {}
    left: dict[str, Kept] = {}
    for kept in artifact.tensors.values():
        found = _segments(kept, specs)
        left |= {} if found else {kept.name: kept}
        for segment in found:
            segments.setdefault(segment.spec.name, []).append(segment)
    made = {}
    for name, parts in segments.items():
        parts.sort(key=lambda part: part.expert or 0)
        if (
            sum(part.values for part in parts) == prod(specs[name].shape)
            and len({p.kept.type_name for p in parts}) == 1
        ):
            made[name] = _joined(specs[name], parts)
        else:
            left |= {part.kept.name: part.kept for part in parts}
    return replace(artifact, tensors={**made, **left})


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows of one canonical tensor in a stored one: count of them, from `first` on, each `step` after the other.

    expert: which they are of; None for all. cut: of a vector, whose values stand beside others', where they do.
    """

    spec: TensorSpec
    expert: int | None
    kept: Kept
    first: int
    step: int
    count: int
    cut: slice | None = None

    @property
    def values(self) -> int:
        return self.count * self.spec.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes * self.values // prod(self.kept.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.cut is not None:
            return self.kept.rows(0, 1)[:, self.cut]
        low, high = self.first + start * self.step, self.first + (stop - 1) * self.step + 1
        return self.kept.rows(low, high)[:: self.step]


def _segments(kept: Kept, specs: Mapping[str, TensorSpec]) -> list[_Segment]:
    """The canonical tensors in a stored one; none where it is not what its name says."""
    names = [(name, None) for name in _alternating(kept.name)] or names_in(kept.name)
    found = [(specs[name], expert) for name, expert in names if name in specs]
    if len(found) < len(names):
        return []
    if len(found) == 1 and found[0][1] is None:
        spec = found[0][0]
        kept = _trimmed(kept, spec)
        return [_Segment(spec, None, kept, 0, 1, prod(spec.shape[:-1]))] if kept.shape == spec.shape else []
    counts = [prod(spec.shape[:-1]) // (1 if expert is None else spec.shape[0]) for spec, expert in found]
    vectors, step = len(kept.shape) == 1, len(found) if _alternating(kept.name) else 1
    widths = [spec.shape[-1] for spec, _ in found]
    whole = sum(widths) == kept.shape[-1] if vectors else 0 <= kept.count - sum(counts) < PADDED
    longer = 1 if vectors or kept.type_name in FLOAT_BYTES else LONGEST
    if not whole or not (vectors or all(0 <= kept.shape[-1] - width < longer for width in widths)):
        return []
    segments, place = [], 0
    size = FLOAT_BYTES.get(kept.type_name, 0)
    for number, ((spec, expert), count) in enumerate(zip(found, counts, strict=True)):
        first = number if step > 1 else place
        cut = slice(place * size, (place + spec.shape[-1]) * size) if vectors else None
        segments.append(_Segment(spec, expert, kept, first, step, count, cut))
        place += spec.shape[-1] if vectors else count
    return segments


def _alternating(name: str) -> list[str]:
    """The names of the tensors whose rows alternate in a stored one; none where it is no such tensor."""
    parts = name.rsplit(".", 2)
    return (
        [".".join([*parts[:-2], role, parts[-1]]) for role in ALTERNATING.get(parts[-2], ())] if len(parts) > 2 else []
    )


def _trimmed(kept: Kept, spec: TensorSpec) -> Kept:
    """Without what fills up its columns to whole bytes, or its rows to whole groups."""
    rows, cols = prod(spec.shape[:-1]), spec.shape[-1]
    padded = kept.type_name not in FLOAT_BYTES and len(kept.shape) == len(spec.shape)
    fits = 0 <= kept.count - rows < PADDED and 0 <= kept.shape[-1] - cols < LONGEST
    return replace(kept, shape=spec.shape) if padded and fits else kept


def _joined(spec: TensorSpec, parts: Sequence[_Segment]) -> Kept:
    """A canonical tensor of its segments, one after another."""

    def rows(start: int, stop: int) -> np.ndarray:
        held, place = [], 0
        for part in parts:
            low, high = max(start - place, 0), min(stop - place, part.count)
            if low < high:
                held.append(part.rows(low, high))
            place += part.count
        return held[0] if len(held) == 1 else np.concatenate(held)

    stored = tuple(dict.fromkeys(name for part in parts for name in part.kept.stored))
    nbytes = sum(part.nbytes for part in parts)
    return Kept(spec.name, parts[0].kept.type_name, spec.shape, rows, stored, nbytes)
