"""The numbers of a GGUF file's metadata beside those that the checkpoint's config makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_metadata import architecture_metadata
from llmx.formats.gguf import GgufFile
from llmx.models.architecture import Architecture

CLOSE = 1e-6  # relative: the metadata's floats are float32
# What runtimes read from the tensors, or only print.
UNSTATED = ("vocab_size", "expert_feed_forward_length", "rope.scaling.finetuned")
DEFAULTS: Mapping[str, Callable[[Architecture], object]] = {
    # what the runtime takes where a file says nothing
    "attention.head_count_kv": lambda a: a.heads,
    "attention.key_length": lambda a: a.hidden // a.heads,
    "attention.value_length": lambda a: a.hidden // a.heads,
    "rope.dimension_count": lambda a: a.head_dim,
    "rope.freq_base": lambda _: 10_000.0,
    "rope.freq_base_swa": lambda _: 10_000.0,
    "rope.scaling.attn_factor": lambda _: 1.0,
    # The tensors of its factors say that a rope is a longrope.
    "rope.scaling.type": lambda a: "longrope" if a.rope is not None and a.rope.kind == "longrope" else "linear",
    "attention.sliding_window": lambda _: 0,
    "attention.sliding_window_pattern": lambda a: [layer % 6 != 5 for layer in range(a.layers)],  # of gemma3
}
CHANGING: Mapping[str, object] = {
    # what changes the function where it stands, and the value that does not
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scale_linear": 1.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "expert_weights_scale": 1.0,
}


def differences(file: GgufFile, architecture: Architecture) -> list[str]:
    """Returns one clause a number: the file's key, its value there, and what the checkpoint's config makes of it."""
    return list(_differences(file, architecture))


def _differences(file: GgufFile, a: Architecture) -> Iterator[str]:
    family = gguf_family(a)
    found = file.metadata
    arch = found.get("general.architecture")
    if arch != family.arch:
        yield f"general.architecture is {arch!r}, the checkpoint's is {family.arch!r}"
        return
    expected = {key: value.value for key, value in architecture_metadata(a, family, a.vocab).items()}
    for key, value in expected.items():
        short = key.removeprefix(f"{family.arch}.")
        unread = short == "attention.sliding_window" and not family.window
        if short in UNSTATED or unread or key == "general.architecture":
            continue
        if key not in found:
            usual = DEFAULTS[short](a) if short in DEFAULTS else None
            if usual is None or not _same(usual, value):
                yield f"{key} is not there, the checkpoint's is {_shown(value)}"
        elif not _same(found[key], value):
            yield f"{key} is {_shown(found[key])}, the checkpoint's is {_shown(value)}"
    for short, harmless in CHANGING.items():
        key = f"{family.arch}.{short}"
        if key in found and key not in expected and not _same(found[key], harmless):
            yield f"{key} is {_shown(found[key])}, and the checkpoint has no such number"


def _same(a: object, b: object) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple)):  # one number a layer where one would do
        return all(_same(item, b) for item in a)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=CLOSE)
    return a == b


def _shown(value: object) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
