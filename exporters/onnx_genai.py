"""What onnxruntime-genai needs beside a graph to take text: its configuration and the tokenizer's own files."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llmx.formats.onnx import LOGITS, MASK, MODEL_NAME, PARTS, POSITIONS, TOKENS
from llmx.models.architecture import Architecture
from llmx.models.tokenizer import Tokenizer

CONFIG_NAME = "genai_config.json"
REQUIRED = "tokenizer.json"
TOKENIZER_FILES = (
    REQUIRED,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# genai knows models by names of its own and refuses some of our families', though all are one plain decoder to it.
DECODER = "llama"
# genai reserves its cache for so many positions at once: 128 thousand would take all the memory of a phone.
LONGEST = 4096
NO_TOKENIZER = f"without {REQUIRED}, onnxruntime-genai cannot read text with this folder: onnxruntime alone runs it"


def companions(
    architecture: Architecture, tokenizer: Tokenizer, folder: Path, inputs: Collection[str], *, shares_cache: bool
) -> dict[str, bytes]:
    """File name -> bytes of all that stands beside the graph; nothing where the checkpoint has no tokenizer.json.

    inputs: the graph's. shares_cache: attention writes new keys and values into the buffer of the old ones.
    """
    if not (folder / REQUIRED).is_file():
        return {}
    copied = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    told = configuration(architecture, tokenizer, inputs, shares_cache=shares_cache)
    return {CONFIG_NAME: (json.dumps(told, indent=1) + "\n").encode(), **copied}


def configuration(
    architecture: Architecture, tokenizer: Tokenizer, inputs: Collection[str], *, shares_cache: bool
) -> dict[str, Any]:
    """genai_config.json, as https://onnxruntime.ai/docs/genai/reference/config.html has it."""
    ends = list(tokenizer.end_ids)
    first_end = ends[0] if ends else 0
    caches = {f"{{}}_{part}_names": f"{{}}.%d.{part}" for part in PARTS}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": MODEL_NAME,
        "head_size": architecture.head_dim,
        "hidden_size": architecture.hidden,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "num_hidden_layers": architecture.layers,
        "inputs": {name: name for name in (TOKENS, MASK, POSITIONS) if name in inputs}
        | {key.format("past"): name.format("past_key_values") for key, name in caches.items()},
        "outputs": {LOGITS: LOGITS} | {key.format("present"): name.format("present") for key, name in caches.items()},
    }
    return {
        "model": {
            "type": DECODER,
            "bos_token_id": tokenizer.special.get("bos", first_end),
            "eos_token_id": ends,
            "pad_token_id": tokenizer.special.get("pad", first_end),
            "context_length": architecture.context_length,
            "vocab_size": architecture.vocab,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": min(architecture.context_length, LONGEST),
            "past_present_share_buffer": shares_cache,
        },
    }
