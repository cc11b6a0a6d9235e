"""A classic TensorRT-LLM checkpoint put together again: whole matrices of what its ranks hold.

rank = stage · tp + place. A stage has a run of layers, numbered from 0 in its files; a place has

    attention.qkv           q, k and v of its heads, under each other; keys and values in several places where there
                            are fewer heads of them than places
    mlp.fc, mlp.gate        rows of gate and of up: TensorRT-LLM calls gate fc. One matrix of up above gate in Phi-3 and
                            for every expert; up alone is fc in a model without gates
    dense, proj             columns of o and of down
    vocab_embedding         all rows, or its own; lm_head its own, the last ones filled up with zeros
    everything else         whole, alike in every place

Norm gains have the 1 in them that some models add. What is alike in every place is read from all of them: parts that
differ are told, and not chosen from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from llmx.formats.safetensors import SafetensorsFile
from llmx.formats.trtllm import CACHE_SCALE, INPUT_SCALE, PRE_SCALE, RANKS, SCALES, SUFFIXES
from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.validate.trtllm_arrays import Array, beside, sliced, stacked, stored
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_folder import Folder
from llmx.validate.trtllm_weights import Held, Parts, held

NAMES = SUFFIXES[RANKS]
COMPANIONS = (NAMES[SCALES], NAMES[PRE_SCALE], NAMES[INPUT_SCALE])
FUSED_MLP = frozenset({"phi3"})
FOUR_NORMS: Mapping[Role, str] = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
NORMS: Mapping[Role, str] = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_layernorm",
    "q_norm": "attention.q_layernorm",
    "k_norm": "attention.k_layernorm",
    "router": "mlp.router",
}
QKV: Mapping[Role, int] = {"q": 0, "k": 1, "v": 2}  # role -> its place in attention.qkv
COMPARED_ROWS = 1 << 10  # at a time


def modules(folder: Folder) -> Iterator[tuple[str, Parts]]:
    """(tensor with its rank before its name, its arrays) of everything that is no companion of another tensor."""
    for rank, file in enumerate(folder.files):
        for name in file.tensors:
            if not is_companion(name, file):
                yield f"rank{rank}.{name}", parts_of(name, file)


def is_companion(name: str, file: SafetensorsFile) -> bool:
    module, _, part = name.rpartition(".")
    return (part in COMPANIONS and f"{module}.weight" in file.tensors) or part == CACHE_SCALE


def parts_of(name: str, file: SafetensorsFile) -> Parts:
    """The arrays of a weight and its companions."""
    module, _, part = name.rpartition(".")

    def companion(which: str) -> Array | None:
        found = f"{module}.{NAMES[which]}"
        return stored(file, found) if part == "weight" and found in file.tensors else None

    return Parts(stored(file, name), *(companion(which) for which in (SCALES, PRE_SCALE, INPUT_SCALE)))


def cache_scales(folder: Folder) -> dict[str, float]:
    """rank0.transformer.layers.0.attention.kv_cache_scaling_factor -> its value."""
    found = {}
    for rank, file in enumerate(folder.files):
        for name in file.tensors:
            if name.endswith(f".{CACHE_SCALE}"):
                found[f"rank{rank}.{name}"] = float(stored(file, name).floats()[0, 0])
    return found


def steps(artifact: TrtllmArtifact, layers: int) -> dict[int, float]:
    """Layer -> the scale of its cache, the largest of all places'; layers without one are left out."""
    tp, pp = artifact.folder.parallel
    found = {}
    for layer in range(layers):
        stage, local = _place(layer, layers, pp)
        names = [f"rank{stage * tp + at}.transformer.layers.{local}.attention.{CACHE_SCALE}" for at in range(tp)]
        if all(name in artifact.cache for name in names):
            found[layer] = max(artifact.cache[name] for name in names)
    return found


@dataclass(frozen=True, slots=True)
class Cut:
    """How the ranks' tensors of one name make a canonical one.

    rows: a rank's rows of it, of those that the rank's tensor has; None for all. columns: it is cut along its inputs.
    alike: it is whole in every place.
    """

    module: str
    rows: Callable[[int], tuple[int, int]] | None = None
    columns: bool = False
    alike: bool = False
    every: int = 1  # only every so many places has rows of its own
    experts: int = 0
    half: int | None = None  # of each expert's rows: 0 the first, 1 the second


def mapped(artifact: TrtllmArtifact, architecture: Architecture) -> TrtllmArtifact:
    """The artifact with canonical tensors. What makes none stays under its rank's name and counts as left over."""
    made: dict[str, Held] = {}
    used: set[str] = set()
    cuts = _cuts(artifact, architecture)
    for spec in architecture.tensors:
        cut = cuts[spec.role]
        if spec.part == "bias" and cut.columns:  # every place adds the whole one
            cut = Cut(cut.module, alike=True)
        names = _names(artifact, architecture.layers, spec, cut.module)
        found = [artifact.opened[name] for name in names if name in artifact.opened]
        if len(found) == len(names) and (one := _canonical(spec, found, cut)) is not None:
            made[spec.name] = one
            used |= set(names)
    if architecture.tied:
        used |= _tied(artifact, made)
    left = {name: tensor for name, tensor in artifact.opened.items() if name not in used}
    return replace(artifact, tensors={**made, **left})


def _tied(artifact: TrtllmArtifact, made: Mapping[str, Held]) -> set[str]:
    """The parts of a head that repeats the embedding; none where one of its values differs."""
    names = [name for name in artifact.opened if name.endswith(".lm_head.weight")]
    embedding = made.get("embedding.weight")
    if not names or embedding is None:
        return set()
    head = stacked([artifact.opened[name].parts.weight for name in names])
    count = embedding.count
    same = head.shape[-1] == embedding.shape[-1] and head.count >= count
    for start in range(0, count if same else 0, COMPARED_ROWS):
        stop = min(start + COMPARED_ROWS, count)
        same = same and np.array_equal(head.floats(start, stop), embedding.parts.weight.floats(start, stop))
    return set(names) if same else set()


def _names(artifact: TrtllmArtifact, layers: int, spec: TensorSpec, module: str) -> list[str]:
    """The tensors of all places that hold parts of a canonical one."""
    tp, pp = artifact.folder.parallel
    if spec.layer is None:
        stage = 0 if spec.role in ("embedding", "position_embedding") else pp - 1
        prefix = ""
    else:
        stage, local = _place(spec.layer, layers, pp)
        prefix = f"transformer.layers.{local}."
    return [f"rank{stage * tp + place}.{prefix}{module}.{spec.part}" for place in range(tp)]


def _place(layer: int, layers: int, pp: int) -> tuple[int, int]:
    """The stage of a layer and its number there: the first stages have one more where stages do not divide layers."""
    each, more = divmod(layers, pp)
    first = more * (each + 1)
    if layer < first:
        return divmod(layer, each + 1)
    stage, local = divmod(layer - first, each)
    return more + stage, local


def _cuts(artifact: TrtllmArtifact, a: Architecture) -> Mapping[Role, Cut]:
    """Role -> where the ranks keep its matrix, and how it is cut."""
    tp, config = artifact.folder.parallel[0], artifact.folder.config
    whole_table = tp == 1 or config.get("use_parallel_embedding") is not True
    norms: dict[Role, str] = {
        **NORMS,
        **(FOUR_NORMS if any(spec.role == "ffn_post_norm" for spec in a.tensors) else {}),
    }
    gates = Cut("mlp.fc", half=1), Cut("mlp.fc", half=0)
    gate, up = gates if a.family in FUSED_MLP else (Cut("mlp.fc"), Cut("mlp.gate" if a.gated else "mlp.fc"))
    cuts: dict[Role, Cut] = {role: Cut(name, alike=True) for role, name in norms.items()}
    return {
        **cuts,
        **{role: _of_heads(a, role, tp) for role in QKV},
        "embedding": Cut("transformer.vocab_embedding", alike=whole_table),
        "position_embedding": Cut("transformer.position_embedding", alike=True),
        "final_norm": Cut("transformer.ln_f", alike=True),
        "head": Cut("lm_head"),
        "o": Cut("attention.dense", columns=True),
        "gate": gate,
        "up": up,
        "down": Cut("mlp.proj", columns=True),
        "expert_up": Cut("mlp.fc", experts=a.experts, half=0),
        "expert_gate": Cut("mlp.fc", experts=a.experts, half=1),
        "expert_down": Cut("mlp.proj", columns=True, experts=a.experts),
    }


def _of_heads(a: Architecture, role: Role, tp: int) -> Cut:
    """Rows of q, k or v in a rank's qkv."""
    size, many = a.head_dim, tp > a.kv_heads
    own_q, own_kv = a.heads // tp * size, (1 if many else a.kv_heads // tp) * size
    starts = (0, own_q, own_q + own_kv)
    start, count = starts[QKV[role]], own_q if role == "q" else own_kv
    return Cut(
        "attention.qkv",
        rows=lambda _: (start, start + count),
        every=tp // a.kv_heads if many and role != "q" else 1,
    )


def _canonical(spec: TensorSpec, found: Sequence[Held], cut: Cut) -> Held | None:
    """The whole tensor, or None where the parts do not make it."""
    if cut.alike and not _alike(found):
        return None
    try:
        parts = [_part(one, cut, place) for place, one in enumerate(found)]
    except IndexError:
        return None
    kept = parts[:1] if cut.alike else parts[:: cut.every]
    if cut.every > 1 and not all(_same(parts[at], parts[at - at % cut.every]) for at in range(len(parts))):
        return None
    if cut.columns and not all(_same_rows(part, kept[0]) for part in kept):
        return None
    whole = _joined(kept, cut)
    if spec.role in ("head", "embedding") and spec.part == "weight":  # what fills up the last place's rows
        whole = replace(whole, weight=sliced(whole.weight, 0, min(whole.weight.count, spec.shape[0])))
    made = held(spec.name, whole)
    if prod(made.shape) != prod(spec.shape) or made.shape[-1] != spec.shape[-1]:
        return None
    return replace(made, shape=spec.shape)


def _alike(found: Sequence[Held]) -> bool:
    return all(_same(one.parts, found[0].parts) for one in found[1:])


def _same(one: Parts, other: Parts) -> bool:
    """Whether two parts hold the same bytes."""
    pairs = ((one.weight, other.weight), (one.scale, other.scale))
    for a, b in pairs:
        if (a is None) != (b is None):
            return False
        if a is None or b is None:
            continue
        if a.shape != b.shape or not np.array_equal(a.read(0, a.count), b.read(0, b.count)):
            return False
    return True


def _same_rows(one: Parts, other: Parts) -> bool:
    """Whether the scales are alike, unless they are of groups along the inputs: every place has its own of those."""
    a, b = one.scale, other.scale
    if a is None or b is None:
        return a is b
    return _columns(a, one.weight) or np.array_equal(a.floats(), b.floats())


def _part(one: Held, cut: Cut, place: int) -> Parts:
    """A place's own rows. Raises: IndexError where its tensor has not so many."""
    parts = one.parts
    if cut.rows is None and cut.half is None:
        return parts
    per_byte = 2 if one.type_name.startswith("int4") else 1
    vector = len(parts.weight.shape) == 1
    rows = parts.weight.shape[-1] if vector else parts.weight.count * per_byte
    ranges = _ranges(cut, rows, place)
    if any(stop > rows or start % per_byte or stop % per_byte for start, stop in ranges):
        raise IndexError
    weight = stacked([sliced(parts.weight, start // per_byte, stop // per_byte) for start, stop in ranges])
    scale = parts.scale
    if scale is not None and _by_rows(scale, rows):
        scale = _of_rows(scale, rows)
        scale = stacked([sliced(scale, start, stop) for start, stop in ranges])
    return replace(parts, weight=weight, scale=scale)


def _ranges(cut: Cut, rows: int, place: int) -> list[tuple[int, int]]:
    if cut.rows is not None:
        return [cut.rows(place)]
    assert cut.half is not None
    matrices = cut.experts or 1
    each = rows // matrices
    return [(at * each + cut.half * each // 2, at * each + (cut.half + 1) * each // 2) for at in range(matrices)]


def _by_rows(scale: Array, rows: int) -> bool:
    """Whether every row has scales of its own."""
    return scale.count == rows or prod(scale.shape) == rows


def _of_rows(scale: Array, rows: int) -> Array:
    """One line a row: of scales [experts, rows] that lie side by side, too."""
    if scale.count == rows:
        return scale
    values = scale.floats().reshape(rows, 1)
    return Array("F32", (rows, 1), lambda start, stop: values[start:stop], scale.places)


def _joined(parts: Sequence[Parts], cut: Cut) -> Parts:
    """All places' rows under each other, or columns side by side; of experts, each expert's."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if cut.columns:
        weight = beside([part.weight for part in parts])
        scale = first.scale
        if scale is not None and _columns(scale, first.weight):
            scale = beside([part.scale for part in parts if part.scale is not None])
        inputs = [part.inputs for part in parts if part.inputs is not None]
        return replace(first, weight=weight, scale=scale, inputs=beside(inputs) if inputs else None)
    if cut.experts:
        return _expert_rows(parts, cut.experts)
    scales = [part.scale for part in parts if part.scale is not None]
    scale = stacked(scales) if scales and prod(scales[0].shape) > 1 else first.scale
    return replace(first, weight=stacked([part.weight for part in parts]), scale=scale)


def _columns(scale: Array, weight: Array) -> bool:
    """Whether scales are of groups along the inputs, and not one a row."""
    return len(scale.shape) > 1 and scale.count >= weight.count


def _expert_rows(parts: Sequence[Parts], experts: int) -> Parts:
    """Every expert's rows of all places, expert by expert."""

    def dealt(arrays: Sequence[Array]) -> Array:
        each = arrays[0].count // experts
        pieces = [sliced(one, at * each, (at + 1) * each) for at in range(experts) for one in arrays]
        return stacked(pieces)

    first = parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    scale = dealt(scales) if scales and scales[0].count >= first.weight.count else first.scale
    return replace(first, weight=dealt([part.weight for part in parts]), scale=scale)
