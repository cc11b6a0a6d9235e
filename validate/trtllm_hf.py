"""The layout of Hugging Face's names, read: which tensors belong together, and which of the checkpoint's they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

from llmx.formats.safetensors import SafetensorsFile
from llmx.formats.trtllm import HF, INPUT_SCALE, KEY_SCALE, PRE_SCALE, SCALES, SUFFIXES, VALUE_SCALE
from llmx.models.architecture import Architecture, TensorSpec
from llmx.models.families import FAMILIES
from llmx.validate.trtllm_arrays import Array, sliced, stacked, stored, turned
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_folder import Folder
from llmx.validate.trtllm_weights import Held, Parts, held

NAMES = SUFFIXES[HF]
CACHE = (KEY_SCALE, VALUE_SCALE)  # of k_proj and v_proj
COMPANIONS = (NAMES[SCALES], NAMES[PRE_SCALE], NAMES[INPUT_SCALE], *CACHE)


def modules(folder: Folder) -> Iterator[tuple[str, Parts]]:
    """(tensor, its arrays) of everything that is no companion of another tensor."""
    places = {name: file for file in folder.files for name in file.tensors}
    for name in places:
        if not _is_companion(name, places):
            yield name, parts_of(name, places)


def cache_scales(folder: Folder) -> dict[str, float]:
    """model.layers.0.self_attn.k_proj.k_scale -> its value."""
    places = {name: file for file in folder.files for name in file.tensors}
    found = {name: file for name, file in places.items() if name.rpartition(".")[2] in CACHE}
    return {name: float(stored(file, name).floats()[0, 0]) for name, file in found.items()}


def _is_companion(name: str, places: Mapping[str, SafetensorsFile]) -> bool:
    module, _, part = name.rpartition(".")
    return part in COMPANIONS and f"{module}.weight" in places


def parts_of(name: str, places: Mapping[str, SafetensorsFile]) -> Parts:
    """The arrays of a weight and its companions."""
    module, dot, part = name.rpartition(".")

    def companion(suffix: str) -> Array | None:
        found = f"{module}.{suffix}"
        return stored(places[found], found) if found in places and dot and part == "weight" else None

    return Parts(stored(places[name], name), *(companion(NAMES[which]) for which in (SCALES, PRE_SCALE, INPUT_SCALE)))


def mapped(artifact: TrtllmArtifact, architecture: Architecture) -> TrtllmArtifact:
    """The same with the checkpoint's own tensors under their canonical names.

    What is no tensor of the checkpoint, or lacks some of its rows, stays what it is: it counts as left over, and the
    tensor as missing.
    """
    made, used = {}, set()
    for spec in architecture.tensors:
        for names, rows in _candidates(spec, architecture.family):
            found = [artifact.tensors[name] for name in names if name in artifact.tensors]
            if len(found) == len(names) and (one := _canonical(spec, found, rows)) is not None:
                made[spec.name] = one
                used |= set(names)
                break
    left = {name: tensor for name, tensor in artifact.tensors.items() if name not in used}
    return replace(artifact, tensors={**made, **left})


def _candidates(spec: TensorSpec, family: str) -> Iterator[tuple[tuple[str, ...], tuple[int, int] | None]]:
    """(stored names, rows of them) that may hold a canonical tensor: the checkpoint's own, then transformers' usual."""
    yield spec.source.names, spec.source.rows
    known = FAMILIES[family]
    for rule in (*known.tensors, *(rule for spellings in known.alternatives for rule in spellings[0])):
        if rule.role == spec.role:
            experts = range(spec.shape[0]) if "{expert}" in rule.source else (None,)
            stem = rule.source.removesuffix("weight") + spec.part if spec.part == "bias" else rule.source
            names = [stem.format(prefix=known.prefixes[0], layer=spec.layer, expert=expert) for expert in experts]
            yield tuple(names), None if rule.after is None else spec.source.rows


def _canonical(spec: TensorSpec, found: list[Held], rows: tuple[int, int] | None) -> Held | None:
    """A canonical tensor of the stored ones that hold it, or None where their shapes do not make it."""
    parts, columns = [one.parts for one in found], spec.shape[-1]
    floats = parts[0].scale is None
    if len({(one.type_name, one.parts.scale is None) for one in found}) > 1:
        return None
    whole = together(parts)
    if rows is not None:
        whole = _cut(whole, rows, found[0])
    if spec.source.transpose and floats and len(spec.shape) > 1:
        whole = replace(whole, weight=turned(stacked([part.weight for part in parts])))
        whole = whole if rows is None else replace(whole, weight=sliced(whole.weight, *rows))
    made = held(spec.name, whole)
    if prod(made.shape) != prod(spec.shape) or made.shape[-1] != columns:
        return None
    return replace(made, shape=spec.shape)


def together(parts: list[Parts]) -> Parts:
    """Matrices under each other, with their scales; inputs and steps side by side in a list of their own."""

    def joined(which: str) -> Array | None:
        found = [getattr(part, which) for part in parts]
        kept = [one for one in found if one is not None]
        return stacked(kept) if len(kept) == len(found) else None

    weight = joined("weight")
    assert weight is not None
    return Parts(weight, joined("scale"), joined("inputs"), joined("step"))


def _cut(whole: Parts, rows: tuple[int, int], tensor: Held) -> Parts:
    """The rows of a fused matrix, or of every expert's, that are one tensor's; packed rows are two a byte."""
    weight, scale = whole.weight, whole.scale
    if len(tensor.shape) > 2:
        each = weight.shape[-2]
        starts = range(0, weight.count, each)
        return replace(whole, weight=stacked([sliced(weight, at + rows[0], at + rows[1]) for at in starts]))
    per_byte = 2 if tensor.type_name.startswith("int4") else 1
    if scale is not None and (scale.count > 1 or scale.shape[-1] > 1):
        scale = sliced(scale, *rows)
    return replace(whole, weight=sliced(weight, rows[0] // per_byte, rows[1] // per_byte), scale=scale)
