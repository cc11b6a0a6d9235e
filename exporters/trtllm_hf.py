"""The layout of Hugging Face's names: which tensors a checkpoint for TensorRT-LLM on PyTorch and for Edge-LLM has.

Modules are called as transformers calls them, whatever spelling the source has; experts are one module each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from llmx.exporters.trtllm_tensors import Contents, Matrix, Options, Stored, constant, parts, vector, whole
from llmx.exporters.trtllm_types import is_matrix
from llmx.formats.trtllm import HF, KEY_SCALE, VALUE_SCALE
from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.models.families import FAMILIES
from llmx.models.family import TensorRule

HEAD_MODULE = "lm_head"
CACHE_SCALES: Mapping[Role, str] = {"k": f"k_proj.{KEY_SCALE}", "v": f"v_proj.{VALUE_SCALE}"}
# A weight, and which expert of it; None for all of it.
Member = tuple[TensorSpec, int | None]


def rules(family: str) -> Mapping[Role, TensorRule]:
    """Role -> where transformers keeps it, in the usual spelling."""
    known = FAMILIES[family]
    chosen = (*known.tensors, *(rule for spellings in known.alternatives for rule in spellings[0]))
    return {rule.role: rule for rule in chosen}


def hf_contents(architecture: Architecture, options: Options) -> Contents:
    """The tensors in order, all of file 0, and the modules whose matrices stay floats."""
    found, excluded = rules(architecture.family), [HEAD_MODULE]
    members: dict[str, list[Member]] = {}
    for name, member in _named(architecture, found):
        members.setdefault(name, []).append(member)
    tensors: list[Stored] = []
    for name, group in members.items():
        spec, expert = group[0]
        encoding = options.types.get(spec.name)
        transposed = found[spec.role].transpose and encoding is None
        matrix = Matrix(
            name.rpartition(".")[0], whole([one for one, _ in group], expert), encoding, transposed=transposed
        )
        if len(spec.shape) == 1:
            tensors.append(vector(matrix, 0, name, options.floats))
            continue
        tensors += parts(matrix, 0, HF, options, options.inputs.get(spec.name))
        tensors += _cache_scales(group, matrix.module, options.cache)
        if encoding is None and (is_matrix(spec) or spec.role == "router"):
            excluded.append(matrix.module)
    return Contents(tuple(tensors), tuple(excluded))


def _named(architecture: Architecture, found: Mapping[Role, TensorRule]) -> Iterator[tuple[str, Member]]:
    """Every weight and the name of the tensor that it is in, or is."""
    prefix = FAMILIES[architecture.family].prefixes[0]
    for spec in architecture.tensors:
        source = found[spec.role].source.removesuffix("weight") + spec.part
        experts = range(spec.shape[0]) if "{expert}" in source else (None,)
        for expert in experts:
            yield source.format(prefix=prefix, layer=spec.layer, expert=expert), (spec, expert)


def _cache_scales(group: list[Member], module: str, cache: Mapping[str, float]) -> Iterator[Stored]:
    """Of cached keys and values: called as if keys and values had modules of their own, where they have not, too."""
    for spec, _ in group:
        scale = cache.get(f"layers.{spec.layer}.{spec.role}")
        if scale is not None and spec.role in CACHE_SCALES:
            name = f"{module.rpartition('.')[0]}.{CACHE_SCALES[spec.role]}"
            yield constant(0, name, "F32", np.array(scale, "<f4"))
