"""What is done alike with every artifact whose tensors have the checkpoint's canonical names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llmx.errors import IntegrityError, LlmxError
from llmx.exporters.gguf_tensors import Entry, assembled
from llmx.exporters.manifest import manifest_path
from llmx.exporters.manifest_reader import HashedTensor, read_manifest
from llmx.models.architecture import TensorSpec
from llmx.models.model import Model
from llmx.validate.kinds import Stored
from llmx.validate.report import Check, at_most, named, not_applicable

Decoded = Callable[[str, int, int], np.ndarray]


def restored(
    tensors: Mapping[str, Stored], model: Model, entries: Sequence[Entry], decoded: Decoded
) -> dict[str, Callable[[], np.ndarray]]:
    """Checkpoint tensor -> a function that decodes it, in the checkpoint's layout. decoded: f32 rows of one tensor.

    Raises: IntegrityError when a tensor is missing or has another shape.
    """
    problems = []
    for entry in entries:
        kept = tensors.get(entry.name)
        if kept is None:
            problems.append(f"{entry.name} is missing")
        elif kept.shape != entry.shape:
            problems.append(f"{entry.name} has shape {kept.shape}, expected {entry.shape}")
    if problems:
        raise IntegrityError("the artifact does not hold this checkpoint's tensors", problems=problems)
    by_name = {entry.name: entry for entry in entries}

    def canonical(spec: TensorSpec, expert: int | None) -> np.ndarray:
        entry = by_name[spec.name]
        rows = entry.rows_per_expert if expert is not None else entry.rows
        start = rows * (expert or 0)
        values = decoded(spec.name, start, start + rows)
        if entry.pieces[0].transform == "gain":
            values = values - np.float32(model.architecture.norm_offset)
        return values.reshape(spec.shape if expert is None else spec.shape[1:])

    return assembled(model, canonical)


def changed(artifact: Path, holds: Callable[[HashedTensor], bool]) -> list[str] | str:
    """The tensors whose bytes are not those of the manifest beside the artifact, or why that cannot be told.

    holds: whether the artifact has a tensor of the manifest, with those bytes.
    """
    path = manifest_path(artifact)
    if not path.is_file():
        return f"there is no {path.name} beside it that says what its weights hash to"
    try:
        told = read_manifest(path).tensors
    except LlmxError as error:
        return f"{path.name} cannot be read: {error.what}"
    return sorted({tensor.name for tensor in told if not holds(tensor)})


def digest_check(found: list[str] | str) -> Check:
    """bytes.digests of what `changed` found."""
    if isinstance(found, str):
        return not_applicable("bytes.digests", found)
    origin = "the manifest beside it: the SHA-256 of each tensor's bytes"
    return at_most("bytes.digests", len(found), 0, "tensors", origin, detail=named(found) or "every tensor")
