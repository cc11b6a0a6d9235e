"""An ONNX artifact, opened: the weights of its graph, and what stands beside it in its folder.

Of a graph that llmx wrote, `mapped` names every weight as the checkpoint's own canonical tensor; stacked rows are taken
apart:

    layers.3.expert_gate_up.weight     rows alternate:      gate 0 | up 0 | gate 1 | up 1 | ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmx.exporters.onnx_genai import CONFIG_NAME
from llmx.formats.json_text import read_object
from llmx.formats.onnx_file import OnnxFile
from llmx.formats.onnx_reader import read_onnx
from llmx.models.architecture import Architecture, TensorSpec
from llmx.validate.onnx_weights import Kept, released, weights_of

TOKENIZER, TOKENIZER_CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TEMPLATE_BYTES = 1 << 20
ALTERNATING: Mapping[str, tuple[str, ...]] = {
    # a stored tensor's role -> the roles whose rows alternate in it
    "expert_gate_up": ("expert_gate", "expert_up"),
}
STACKED: Mapping[str, tuple[str, ...]] = {
    # a stored tensor's role -> the roles whose rows lie under each other in it
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
}


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
    """The same with stacked rows under the names of the checkpoint's own tensors."""
    specs = {spec.name: spec for spec in architecture.tensors}
    tensors: dict[str, Kept] = {}
    for name, kept in artifact.tensors.items():
        tensors |= {name: kept} if name in specs else {one.name: one for one in _apart(kept, specs)}
    return replace(artifact, tensors=tensors)


def _apart(kept: Kept, specs: Mapping[str, TensorSpec]) -> Iterator[Kept]:
    """The canonical tensors in a stored one; itself where it is none of those that are stacked."""
    before, _, rest = kept.name.rpartition("layers.")
    layer, _, role_part = rest.partition(".")
    role, _, part = role_part.partition(".")
    roles = ALTERNATING.get(role) or STACKED.get(role) or ()
    found = [specs.get(f"{before}layers.{layer}.{one}.{part}") for one in roles]
    present = [spec for spec in found if spec is not None]
    if not present or len(present) < len(found) or kept.count * kept.shape[-1] != sum(prod(s.shape) for s in present):
        yield kept
        return
    first, step = 0, len(present) if role in ALTERNATING else 1
    for number, spec in enumerate(present):
        count = prod(spec.shape[:-1])
        start = number if role in ALTERNATING else first
        nbytes = kept.nbytes * prod(spec.shape) // prod(kept.shape)
        yield replace(kept, name=spec.name, shape=spec.shape, nbytes=nbytes, rows=partial(_picked, kept, start, step))
        first += count


def _picked(kept: Kept, first: int, step: int, start: int, stop: int) -> np.ndarray:
    """Rows first + start · step, and so on, of a stored tensor."""
    return kept.rows(first + start * step, first + (stop - 1) * step + 1)[::step]
