"""A TensorRT-LLM checkpoint as a transformers model in float32, and what of it is rounded while it runs."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmx.errors import IntegrityError, UnsupportedError
from llmx.exporters.encoding import encoding
from llmx.formats.safetensors import write_safetensors
from llmx.formats.trtllm import HF, KEY_SCALE, MODEL_NAME, RANKS, VALUE_SCALE
from llmx.models.families import FAMILIES
from llmx.validate.runtimes.emulation import Inputs, RoundedCache, rounded
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_folder import INLINE
from llmx.validate.trtllm_kind import KIND
from llmx.validate.trtllm_opening import mapped
from llmx.validate.trtllm_rank_model import as_transformers
from llmx.validate.trtllm_ranks import steps as rank_steps
from llmx.validate.trtllm_weights import Held

DECODED_WEIGHTS = 1 << 21  # at a time
INPUT_KINDS: Mapping[str | None, str | None] = {
    # algorithm -> how the inputs of its matrices are rounded
    None: None,
    "NO_QUANT": None,
    "W4A16": None,
    "W4A16_AWQ": None,
    "W4A16_GPTQ": None,
    "W8A16": None,
    "FP8": "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8",
    **{f"W8A8_SQ_PER_{rest}": "INT8" for rest in ("CHANNEL", "TENSOR_PLUGIN", "CHANNEL_PER_TENSOR_PLUGIN")},
    **{f"W8A8_SQ_PER_{rest}_PER_TOKEN_PLUGIN": "INT8" for rest in ("CHANNEL", "TENSOR")},
}
BY_TOKEN = "PER_TOKEN"  # in the name of an algorithm whose inputs each have a scale of their own
CACHES = ("FP8", "INT8")
NOT_FLOATS = (INLINE, "dtype", "torch_dtype")  # of the configuration
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<part>w1|w2|w3|gate_proj|up_proj|down_proj)")
FUSED: Mapping[str, str] = {
    # an expert's matrix in a checkpoint -> the one of all experts that transformers holds it in
    **dict.fromkeys(("w1", "w3", "gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w2", "down_proj"), "down_proj"),
}
LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Source:
    """What a transformers model is made of. modules: the name of its linear layers -> what holds their weights.

    steps: layer -> the scales of its cached keys and values; only of layers that have both.
    """

    artifact: TrtllmArtifact
    modules: tuple[tuple[str, Held], ...]
    steps: Mapping[int, tuple[float, float]]


def write_floats(artifact: TrtllmArtifact, folder: Path) -> Source:
    """Writes a checkpoint folder of transformers with the artifact's configuration and its weights decoded.

    Raises: UnsupportedError, IntegrityError where its configuration makes no model.
    """
    return WRITERS[artifact.folder.layout](artifact, folder)


def _write_hf(artifact: TrtllmArtifact, folder: Path) -> Source:
    """The tensors under their own names, and the configuration without what tells of their types."""
    config = {key: value for key, value in artifact.folder.config.items() if key not in NOT_FLOATS}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    turned = _turned_names(str(config.get("model_type")))
    tensors = (
        (name, "F32", held.shape[::-1], _turned(held))
        if turned(name, held)
        else (name, "F32", held.shape, _decoded(held))
        for name, held in artifact.opened.items()
    )
    write_safetensors(folder / MODEL_NAME, tensors, {"format": "pt"})
    modules = tuple((name.removesuffix(".weight"), held) for name, held in artifact.opened.items())
    named = {name.rpartition(".")[2]: {} for name in artifact.cache}
    for name, step in artifact.cache.items():
        if (layer := LAYER.search(name)) is not None:
            named[name.rpartition(".")[2]][int(layer[1])] = step
    keys, values = (named.get(part, {}) for part in (KEY_SCALE, VALUE_SCALE))
    return Source(artifact, modules, {layer: (keys[layer], values[layer]) for layer in keys.keys() & values.keys()})


def _write_ranks(artifact: TrtllmArtifact, folder: Path) -> Source:
    """The ranks put together under the names of the model that their configuration describes."""
    model = as_transformers(artifact.folder, folder)
    whole = mapped(artifact, model.architecture)
    entries = KIND.entries(whole, model, model.architecture.vocab)
    restored = KIND.restored(whole, model, entries)
    shapes = model.checkpoint.tensors
    tensors = ((name, "F32", shapes[name].shape, _bytes(read)) for name, read in restored.items())
    write_safetensors(folder / MODEL_NAME, tensors, {"format": "pt"})
    specs = {spec.name: spec for spec in model.architecture.tensors}
    modules = tuple(
        (specs[name].source.names[0].removesuffix(".weight"), replace(held, inputs=None))  # decoded with them
        for name, held in whole.tensors.items()
        if name in specs
    )
    steps = rank_steps(artifact, model.architecture.layers)
    return Source(artifact, modules, {layer: (step, step) for layer, step in steps.items()})


WRITERS: Mapping[str, Callable[[TrtllmArtifact, Path], Source]] = {HF: _write_hf, RANKS: _write_ranks}


def _bytes(read: Callable[[], np.ndarray]) -> Iterator[memoryview]:
    yield np.ascontiguousarray(read(), "<f4").reshape(-1).view(np.uint8).data


def _decoded(held: Held) -> Iterator[memoryview]:
    cols = held.shape[-1]
    step = max(2, DECODED_WEIGHTS // cols // 2 * 2)
    for start in range(0, held.count, step):
        rows = held.rows(start, min(start + step, held.count))
        yield np.ascontiguousarray(encoding(held.type_name).decode(rows, cols), "<f4").reshape(-1).view(np.uint8).data
    held.release()


def _turned(held: Held) -> Iterator[memoryview]:
    """A matrix [outputs, inputs] as [inputs, outputs], whole."""
    whole = np.concatenate([np.frombuffer(part, "<f4") for part in _decoded(held)]).reshape(held.shape)
    yield np.ascontiguousarray(whole.T).reshape(-1).view(np.uint8).data


def _turned_names(family: str) -> Callable[[str, Held], bool]:
    """Which tensors transformers has the other way round: of GPT-2's matrices, those that are quantized."""
    found = [rule.source for rule in FAMILIES[family].tensors if rule.transpose] if family in FAMILIES else []
    endings = tuple(source.rpartition("{layer}")[2] for source in found)
    return lambda name, held: held.parts.scale is not None and bool(endings) and name.endswith(endings)


def load(folder: Path, origin: Path) -> Any:
    """The transformers model of a folder in float32. origin: what the folder was made of, for the error.

    Raises: UnsupportedError with transformers' words where it does not load; IntegrityError where it lacks tensors or
    has others than the configuration's model.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            low_cpu_mem_usage=True,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UnsupportedError(f"transformers cannot load this folder's model: {error}", where=origin) from error
    model, told = loaded
    words = {"missing_keys": "is missing", "unexpected_keys": "has no place", "mismatched_keys": "has another shape"}
    problems = [f"{name} {word}" for key, word in words.items() for name in sorted(map(str, told.get(key) or ()))]
    if problems:
        raise IntegrityError("the folder does not hold its own model", where=origin, problems=problems)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Rounded:
    """What is rounded. inputs: (matrix, what is done to its inputs). kind: of the cache. steps: its scales by layer."""

    inputs: tuple[tuple[torch.Tensor, Inputs], ...]
    kind: str | None
    steps: Mapping[int, tuple[float, float]]
    told: str

    @classmethod
    def of(cls, source: Source, model: Any, *, exact: bool) -> Rounded:
        """exact: inputs are multiplied, where they are, and nothing is rounded.

        Raises: UnsupportedError for an algorithm that is not known; IntegrityError for a scale that is not there.
        """
        artifact, quantization = source.artifact, source.artifact.folder.quantization
        algorithm, kind = quantization.algorithm, None if exact else quantization.cache
        if algorithm not in INPUT_KINDS or (quantization.cache or "FP8") not in CACHES:
            told = algorithm if algorithm not in INPUT_KINDS else quantization.cache
            raise UnsupportedError(f"nothing here emulates {told}", where=artifact.folder.path)
        inputs = tuple(_inputs(source, model, None if exact else INPUT_KINDS[algorithm]))
        steps = source.steps
        if kind is not None and (missing := set(range(int(model.config.num_hidden_layers))) - steps.keys()):
            problems = [f"layer {layer}" for layer in sorted(missing)]
            raise IntegrityError("scales of the cache are missing", where=artifact.folder.path, problems=problems)
        cache = "" if quantization.cache is None else f", {quantization.cache} cache"
        return cls(inputs, kind, steps, f"{algorithm or 'floats'}{cache}")

    def cache(self, model: Any) -> Any:
        """An empty key-value cache."""
        if self.kind is not None:
            return RoundedCache(model.config, self.kind, self.steps)
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def rounding(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the model's inputs are rounded."""
        return rounded(self.inputs)


def _inputs(source: Source, model: Any, kind: str | None) -> Iterator[tuple[torch.Tensor, Inputs]]:
    """Every matrix whose inputs change, once."""
    folder = source.artifact.folder
    by_token = BY_TOKEN in (folder.quantization.algorithm or "")
    fused: dict[int, tuple[torch.Tensor, list[Held]]] = {}
    for name, held in source.modules:
        rounds = kind is not None and held.parts.scale is not None
        if not rounds and held.inputs is None:
            continue
        if rounds and not by_token and held.parts.step is None:
            raise IntegrityError(f"{name} has no scale for its inputs", where=folder.path)
        matrix = _matrix(model, name)
        fused.setdefault(matrix.data_ptr(), (matrix, []))[1].append(held)
    for matrix, held in fused.values():
        yield matrix, _of_all(held, kind, by_token=by_token)


def _of_all(held: list[Held], kind: str | None, *, by_token: bool) -> Inputs:
    """What is done to the inputs of matrices that are held in one: TensorRT-LLM takes the largest scale of experts."""
    factors = [one.inputs for one in held if one.inputs is not None]
    if factors and (len(factors) < len(held) or any(not np.array_equal(one, factors[0]) for one in factors)):
        raise UnsupportedError("experts of one layer multiply their inputs by different factors")
    step = None
    if kind is not None and not by_token:
        step = torch.tensor(max(float(one.parts.step.floats().max()) for one in held if one.parts.step is not None))
    return Inputs(torch.from_numpy(factors[0][0].copy()) if factors else None, kind, step)


def _matrix(model: Any, module: str) -> torch.Tensor:
    """The parameter that holds a module's weight. Raises: UnsupportedError where the model has none of that name."""
    with contextlib.suppress(AttributeError):
        return model.get_submodule(module).weight
    with contextlib.suppress(AttributeError):
        return model.get_parameter(module)
    expert = EXPERT.fullmatch(module)
    if expert is not None and (layer := LAYER.search(module)) is not None:
        wanted = FUSED[expert["part"]]
        for name, parameter in model.named_parameters():
            if f".{layer[1]}." in name and name.endswith(f".experts.{wanted}"):
                return parameter
    raise UnsupportedError(f"transformers' model has no matrix of the name {module}")
