"""The metadata of a GGUF file: what the model is called and what its architecture's numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmx.exporters.gguf_families import GgufFamily, is_stock_yarn
from llmx.formats.gguf import Value, array, f32, flag, i32, text, u32
from llmx.models.architecture import Architecture, Rope
from llmx.models.rope import inverse_frequencies

if TYPE_CHECKING:
    from llmx.models.model import Model

QUANTIZATION_VERSION = 2
DIGESTS_KEY = "llmx.tensor_digests"
# general.file_type once more: a program that requantizes the file changes that one and copies ours, digests and all.
WRITTEN_TYPE_KEY = "llmx.file_type"


@dataclass(frozen=True, slots=True)
class Name:
    """The parts of a model's name, as the field's file names spell them."""

    full: str
    organization: str | None
    base: str | None
    finetune: str | None
    version: str | None
    size: str

    def file_stem(self, type_name: str) -> str:
        """Base-Size-FineTune-Version-Type, without the suffix."""
        from gguf.utility import naming_convention

        base = self.base or self.full
        # A base name that ends in its size already says it.
        size = None if self.size.lower() in base.lower().split("-") else self.size
        return naming_convention(self.full, base, self.finetune, self.version, size, type_name)


def name_of(model: Model) -> Name:
    """The parts of the checkpoint's name: its hub id, or its folder's name, and its parameter count."""
    from gguf.metadata import Metadata
    from gguf.utility import size_label

    source = model.checkpoint.source.id
    identity = source if source and not source.startswith((".", "/")) else model.checkpoint.folder.resolve().name
    total, shared, per_expert = _parameters(model.architecture)
    full, organization, base, finetune, version, size = Metadata.get_model_id_components(identity, total)
    label = size or size_label(total, shared, per_expert, model.architecture.experts)
    return Name(full or identity, organization, base, finetune, version, label)


def _parameters(a: Architecture) -> tuple[int, int, int]:
    """All parameters, those outside experts, and those of one expert."""
    counts = {t.name: math.prod(t.shape) for t in a.tensors}
    experts = sum(counts[t.name] for t in a.tensors if t.role.startswith("expert_"))
    total = sum(counts.values())
    return total, total - experts, experts // a.experts if a.experts else 0


def general_metadata(model: Model, name: Name, file_type_id: int) -> dict[str, Value]:
    """`general.*`: architecture excepted, which the architecture's own metadata carries."""
    values: dict[str, Value] = {"general.type": text("model"), "general.name": text(name.full)}
    optional = {
        "general.organization": name.organization,
        "general.basename": name.base,
        "general.finetune": name.finetune,
        "general.version": name.version,
    }
    values |= {key: text(value) for key, value in optional.items() if value}
    values["general.size_label"] = text(name.size)
    values |= _model_card(model) | _sampling(model.checkpoint.generation_config)
    values["general.quantization_version"] = u32(QUANTIZATION_VERSION)
    values["general.file_type"] = u32(file_type_id)
    return values


def _model_card(model: Model) -> dict[str, Value]:
    from gguf.metadata import Metadata

    card = Metadata.load_model_card(model.checkpoint.folder)
    values: dict[str, Value] = {}
    if isinstance(license_id := card.get("license"), str):
        values["general.license"] = text(license_id)
    for key, field in (("tags", "general.tags"), ("language", "general.languages")):
        listed = card.get(key)
        listed = [listed] if isinstance(listed, str) else listed
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            values[field] = array("str", listed)
    return values


_SAMPLING: Mapping[str, tuple[str, Callable[[float], Value]]] = {
    "top_k": ("general.sampling.top_k", lambda v: i32(int(v))),
    "top_p": ("general.sampling.top_p", f32),
    "min_p": ("general.sampling.min_p", f32),
    "temperature": ("general.sampling.temp", f32),
}


def _sampling(generation: Mapping[str, object]) -> dict[str, Value]:
    found = {field: (make, generation.get(key)) for key, (field, make) in _SAMPLING.items()}
    return {f: make(v) for f, (make, v) in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def architecture_metadata(a: Architecture, family: GgufFamily, vocabulary_rows: int) -> dict[str, Value]:
    """`general.architecture` and `{arch}.*`, for llama.cpp's loader of this family."""
    arch = family.arch
    norm_key = "layer_norm_rms_epsilon" if a.norm == "rms" else "layer_norm_epsilon"
    values: dict[str, Value] = {
        "general.architecture": text(arch),
        f"{arch}.vocab_size": u32(vocabulary_rows),
        f"{arch}.context_length": u32(a.context_length),
        f"{arch}.embedding_length": u32(a.hidden),
        f"{arch}.block_count": u32(a.layers),
        f"{arch}.feed_forward_length": u32(a.intermediate),
        f"{arch}.attention.head_count": u32(a.heads),
        f"{arch}.attention.head_count_kv": u32(a.kv_heads),
        f"{arch}.attention.key_length": u32(a.head_dim),
        f"{arch}.attention.value_length": u32(a.head_dim),
        f"{arch}.attention.{norm_key}": f32(a.norm_eps),
    }
    if a.experts:
        values[f"{arch}.expert_count"] = u32(a.experts)
        values[f"{arch}.expert_used_count"] = u32(a.experts_used)
        values[f"{arch}.expert_feed_forward_length"] = u32(a.expert_intermediate)
    if a.sliding_window is not None and "sliding" in a.layer_kinds:
        values |= _window_metadata(a, family)
    if a.rope is not None:
        values |= {f"{arch}.rope.{key}": value for key, value in _rope_metadata(a.rope).items()}
    if a.local_rope is not None:
        values[f"{arch}.rope.freq_base_swa"] = f32(a.local_rope.theta)
    return values


def _window_metadata(a: Architecture, family: GgufFamily) -> dict[str, Value]:
    window = a.sliding_window if family.window else 0
    values = {f"{family.arch}.attention.sliding_window": u32(window or 0)}
    if family.window:
        pattern = tuple(kind == "sliding" for kind in a.layer_kinds)
        values[f"{family.arch}.attention.sliding_window_pattern"] = array("bool", pattern)
    return values


def _rope_metadata(rope: Rope) -> dict[str, Value]:
    values = {"dimension_count": u32(rope.dim), "freq_base": f32(rope.theta)}
    return values | _SCALING[rope.kind](rope)


def _linear(rope: Rope) -> dict[str, Value]:
    return {"scaling.type": text("linear"), "scaling.factor": f32(rope.factor)}


def _yarn(rope: Rope) -> dict[str, Value]:
    if not is_stock_yarn(rope):
        return {"scaling.attn_factor": f32(rope.attention_factor or 1.0)}  # rope_freqs carries the rest
    # llama.cpp multiplies cos and sin by 1 + 0.1 ln(factor) itself; the key carries what differs from that.
    built_in = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    values = {
        "scaling.type": text("yarn"),
        "scaling.factor": f32(rope.factor),
        "scaling.original_context_length": u32(rope.original_context or 0),
        "scaling.finetuned": flag(True),
    }
    if not math.isclose(relative := (rope.attention_factor or 1.0) / built_in, 1.0, rel_tol=1e-7):
        values["scaling.attn_factor"] = f32(relative)
    return values


def _longrope(rope: Rope) -> dict[str, Value]:
    return {
        "scaling.type": text("longrope"),
        "scaling.original_context_length": u32(rope.original_context or 0),
        "scaling.attn_factor": f32(rope.attention_factor or 1.0),
    }


# Dynamic NTK scaling begins past the original context, where the written context length ends.
_SCALING: Mapping[str, Callable[[Rope], dict[str, Value]]] = {
    "default": lambda _: {},
    "dynamic": lambda _: {},
    "llama3": lambda _: {},  # carried by the tensor rope_freqs
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_tensors(rope: Rope | None) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors that carry a rope scaling: divisors of the frequencies, f32[dim / 2] each."""
    if rope is None:
        return {}
    if rope.kind == "llama3" or (rope.kind == "yarn" and not is_stock_yarn(rope)):
        context = rope.original_context or 0
        plain = inverse_frequencies(replace(rope, kind="default"), context)
        return {"rope_freqs.weight": (plain / inverse_frequencies(rope, context)).astype(np.float32)}
    if rope.kind == "longrope":
        return {
            "rope_factors_long.weight": np.asarray(rope.long_factor, np.float32),
            "rope_factors_short.weight": np.asarray(rope.short_factor, np.float32),
        }
    return {}


def runtime_notes(a: Architecture, family: GgufFamily) -> list[str]:
    """What the file will do otherwise than the checkpoint, in words for the plan and the report."""
    notes = []
    if a.sliding_window is not None and "sliding" in a.layer_kinds and not family.window:
        notes.append(
            f"llama.cpp's {family.arch!r} graph has no sliding window: beyond {a.sliding_window} tokens it attends "
            "to more than the checkpoint does"
        )
    if a.rope is not None and a.rope.kind == "dynamic":
        notes.append(
            f"llama.cpp has no dynamic rope scaling: exact up to {a.context_length} tokens, "
            "which is the context length written"
        )
    return notes
