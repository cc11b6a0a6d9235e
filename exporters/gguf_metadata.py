"""The metadata of a GGUF file: what the model is called and what its architecture's numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmx.exporters.gguf_families import GgufFamily, is_stock_yarn
from llmx.formats.gguf import Value, array, f32, flag, text, u32
from llmx.models.architecture import Architecture, Rope
from llmx.models.rope import inverse_frequencies

if TYPE_CHECKING:
    pass

DIGESTS_KEY = "llmx.tensor_digests"
# general.file_type once more: a program that requantizes the file changes that one and copies ours, digests and all.
WRITTEN_TYPE_KEY = "llmx.file_type"
# How weights were changed on purpose, beyond rounding. SOLVED: moved, to make up for what earlier layers lost.
# SCALED: channels scaled besides, the inverse folded into the tensor before.
SOLVER_KEY = "llmx.solver"
SOLVED, SCALED = "solved", "solved and scaled"


def short_digest(digest: bytes) -> int:
    """The first eight bytes of a SHA-256, little-endian, as DIGESTS_KEY holds them."""
    return int.from_bytes(digest[:8], "little")


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
