"""What a TensorRT-LLM folder says of itself, beside what its tensors say: its configurations, scales and numbers.

Its loaders believe the configuration: a group size that is not the tensors' own makes wrong numbers or a refusal, and
a scale that is missing is taken for one.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmx.formats.onnx_groups import GroupLayout
from llmx.formats.trtllm import CACHE_SCALE, HF, RANKS
from llmx.models.model import Model
from llmx.validate.folder_text import TOKENIZERS, has_tokenizer
from llmx.validate.report import Check, at_most, named
from llmx.validate.trtllm_arrays import Array
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_folder import INLINE, METHOD, QUANTIZATION
from llmx.validate.trtllm_rank_config import config_differences
from llmx.validate.trtllm_weights import NAMES, Held

STORED: Mapping[str | None, str] = {
    # algorithm -> how the types begin that its matrices are kept as; "" for floats
    None: "",
    "NO_QUANT": "",
    "W4A16": "int4",
    "W4A16_AWQ": "int4",
    "W4A16_GPTQ": "int4",
    "W8A16": "int8-channel",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-channel",
    **{f"W8A8_SQ_PER_{rest}": "int8-channel" for rest in ("CHANNEL", "CHANNEL_PER_TENSOR_PLUGIN")},
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": "int8-channel",
}
GROUPED = "int4"
STATIC = ("FP8", "W8A8_SQ_PER_CHANNEL")  # algorithms whose inputs have a scale each
LARGEST_CACHE = ("FP8", "INT8")
LAYER = re.compile(r"\.(\d+)\.")
NOT_NUMBERS = frozenset(
    # what an export says of itself, or takes from the library that wrote it
    {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", INLINE, "use_cache"}
)
FLOAT_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def more_checks(artifact: TrtllmArtifact) -> Iterator[Check]:
    """Yields bytes.scales and bytes.config."""
    scales = list(_scales(artifact))
    origin = "a scale is a number above zero"
    yield at_most("bytes.scales", len(scales), 0, "scales", origin, detail=named(scales) or "every scale and factor")
    problems = [*_quantization(artifact), *_inline(artifact), *_cache(artifact)]
    origin = "TensorRT-LLM loads what the configuration says"
    detail = named(problems) or f"{artifact.folder.quantization.algorithm or 'floats'}, as the tensors have it"
    yield at_most("bytes.config", len(problems), 0, "contradictions", origin, detail=detail)


def files_check(artifact: TrtllmArtifact, checkpoint: Path) -> Check:
    """Returns bytes.files: the loaders look for a tokenizer beside the weights."""
    lacking = has_tokenizer(checkpoint) and not has_tokenizer(artifact.folder.path)
    problems = [f"there is no {' and no '.join(TOKENIZERS)}"] if lacking and artifact.folder.layout == HF else []
    origin = "what TensorRT-LLM opens in a folder"
    return at_most("bytes.files", len(problems), 0, "files", origin, detail=named(problems) or "all are there")


def _scales(artifact: TrtllmArtifact) -> Iterator[str]:
    """Every array of scales or factors with one that is no number above zero."""
    for name, tensor in artifact.opened.items():
        parts = tensor.parts
        for what, array in (("scale", parts.scale), ("factor", parts.inputs), ("input scale", parts.step)):
            bad = 0 if array is None else _bad(array)
            if bad:
                yield f"{name}: {bad} of its {what}s"
    for name, step in artifact.cache.items():
        if not (np.isfinite(step) and step > 0):
            yield f"{name} is {step}"


def _bad(array: Array) -> int:
    values = array.floats()
    return int(values.size - np.count_nonzero(np.isfinite(values) & (values > 0)))


def _quantization(artifact: TrtllmArtifact) -> Iterator[str]:
    """Where the algorithm is not that of the tensors."""
    told = artifact.folder.quantization
    if told.algorithm not in STORED:
        yield f"{told.algorithm!r} is an algorithm that this llmx does not know"
        return
    stem = STORED[told.algorithm]
    scaled = {name: tensor for name, tensor in artifact.opened.items() if tensor.parts.scale is not None}
    wrong = [name for name, tensor in scaled.items() if not stem or not tensor.type_name.startswith(stem)]
    if wrong:
        yield f"{told.algorithm} is said, and {len(wrong)} matrices are kept otherwise: {wrong[0]}"
    if stem and not scaled:
        yield f"{told.algorithm} is said, and every matrix is kept in floats"
    groups = {_group(tensor) for tensor in scaled.values() if tensor.type_name.startswith(GROUPED)}
    if stem == GROUPED and groups - {told.group}:
        found = ", ".join(sorted(map(str, groups - {told.group})))
        yield f"groups of {told.group} weights are said, and there are some of {found}"
    if told.algorithm in STATIC:
        lacking = [name for name, tensor in scaled.items() if tensor.parts.step is None]
        if lacking:
            yield f"{len(lacking)} matrices have no scale for their inputs: {lacking[0]}"
    if told.told.get("pre_quant_scale") is False and any(one.parts.inputs is not None for one in scaled.values()):
        yield "factors of inputs are said not to be there, and they are"
    yield from _excluded(artifact, scaled)


def _group(tensor: Held) -> int | None:
    layout: GroupLayout = next(layout for layout, name in NAMES.items() if name == tensor.type_name)
    return layout.group


def _excluded(artifact: TrtllmArtifact, scaled: Mapping[str, Held]) -> Iterator[str]:
    """Matrices of a layer that are kept in floats and are not said to be, and the other way round."""
    if artifact.folder.layout != HF:
        return
    patterns = artifact.folder.quantization.excluded

    def said(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in patterns)

    both = [name for name in scaled if said(name)]
    if both:
        yield f"{len(both)} matrices are said to be in floats, and are not: {both[0]}"
    if not scaled:
        return
    linear = {_kind(name) for name in scaled}
    floats = [name for name in artifact.opened if name not in scaled and not said(name) and _kind(name) in linear]
    if "lm_head.weight" in artifact.opened and "lm_head.weight" not in scaled and not said("lm_head.weight"):
        floats.append("lm_head.weight")
    if floats:
        yield f"{len(floats)} matrices are in floats, and are not said to be: {floats[0]}"


def _kind(name: str) -> str:
    """A tensor's name without its numbers."""
    return LAYER.sub(".*.", name)


def _inline(artifact: TrtllmArtifact) -> Iterator[str]:
    """Where the two configurations of one folder part: some loaders read the one, some the other."""
    apart, inline = artifact.folder.beside.get(QUANTIZATION), artifact.folder.config.get(INLINE)
    if artifact.folder.layout != HF or apart is None:
        return
    told = apart.get("quantization")
    told = told if isinstance(told, dict) else {}
    if not isinstance(inline, dict):
        if told.get("quant_algo") or told.get("kv_cache_quant_algo"):
            yield f"{QUANTIZATION} has a quantization, and config.json has no {INLINE}"
        return
    if inline.get("quant_method") != METHOD:
        yield f"config.json names the method {inline.get('quant_method')!r}"
    if inline.get("quant_algo") != told.get("quant_algo"):
        yield f"config.json says {inline.get('quant_algo')}, {QUANTIZATION} {told.get('quant_algo')}"
    if sorted(inline.get("ignore") or []) != sorted(told.get("exclude_modules") or []):
        yield f"config.json ignores other modules than {QUANTIZATION} excludes"
    sizes = {inline.get("group_size"), *_group_sizes(inline)} - {None}
    if sizes and told.get("group_size") is not None and sizes != {told["group_size"]}:
        yield f"config.json has groups of {sorted(map(str, sizes))}, {QUANTIZATION} of {told['group_size']}"


def _group_sizes(inline: Mapping[str, Any]) -> Iterator[object]:
    groups = inline.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights.get("group_size")


def _cache(artifact: TrtllmArtifact) -> Iterator[str]:
    """A rounded cache needs a scale of the keys and one of the values of every layer; one of floats has none."""
    kind, steps = artifact.folder.quantization.cache, artifact.cache
    if kind is None:
        if steps:
            yield f"a cache of floats has {len(steps)} scales: {next(iter(steps))}"
        return
    if kind not in LARGEST_CACHE:
        yield f"{kind!r} is a kind of cache that this llmx does not know"
    wanted = WANTED_SCALES[artifact.folder.layout](artifact)
    for name in sorted(wanted - steps.keys()):
        yield f"{name} is missing"
    for name in sorted(steps.keys() - wanted) if wanted else ():
        yield f"{name} is of no layer"


def _of_keys_and_values(artifact: TrtllmArtifact) -> set[str]:
    keys = [name for name in artifact.opened if name.endswith("k_proj.weight")]
    return {f"{name.removesuffix('k_proj.weight')}{part}_proj.{part}_scale" for name in keys for part in "kv"}


def _of_ranks(artifact: TrtllmArtifact) -> set[str]:
    products = [name for name in artifact.opened if name.endswith("attention.qkv.weight")]
    return {f"{name.removesuffix('qkv.weight')}{CACHE_SCALE}" for name in products}


WANTED_SCALES: Mapping[str, Callable[[TrtllmArtifact], set[str]]] = {HF: _of_keys_and_values, RANKS: _of_ranks}


def differences(artifact: TrtllmArtifact, model: Model) -> list[str] | str:
    """One clause for every number of config.json that is not the checkpoint's."""
    if artifact.folder.layout == RANKS:
        return config_differences(artifact.folder, model)
    told, wanted = artifact.folder.config, dict(model.checkpoint.config)
    if wanted.get("head_dim", 0) is None:  # which the exporter fills in
        wanted["head_dim"] = model.architecture.head_dim
    keys = sorted((told.keys() | wanted.keys()) - NOT_NUMBERS)
    return [
        f"{key} is {told.get(key)!r}, the checkpoint's {wanted.get(key)!r}"
        for key in keys
        if told.get(key) != wanted.get(key)
    ]
