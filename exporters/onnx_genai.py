"""What onnxruntime-genai needs beside a graph to take text: its configuration and the tokenizer's own files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmx.formats.json_text import read_object
from llmx.formats.onnx import LOGITS, MASK, MODEL_NAME, PARTS, POSITIONS, TOKENS
from llmx.models.architecture import Architecture
from llmx.models.tokenizer import Tokenizer

CONFIG_NAME = "genai_config.json"
REQUIRED = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    REQUIRED,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
)
# genai knows models by names of its own and refuses some of our families', though all are one plain decoder to it.
DECODER = "llama"
# It refuses a tokenizer_class that it does not know, though tokenizer.json says all: those that 0.18 takes, all of
# transformers' names tried.
CLASSES = frozenset(
    f"{name}{suffix}"
    for name in (
        "CLIPTokenizer",
        "CodeGenTokenizer",
        "CodeLlamaTokenizer",
        "DebertaV2Tokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "GemmaTokenizer",
        "LlamaTokenizer",
        "Phi3Tokenizer",
        "PreTrainedTokenizer",
        "Qwen2Tokenizer",
        "TokenizersBackend",
    )
    for suffix in ("", "Fast")
)
ROLES = ("bos", "eos")
ANY_CLASS = "PreTrainedTokenizerFast"
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
    return {CONFIG_NAME: _written(told), TOKENIZER_CONFIG: tokenizer_config(tokenizer, folder), **copied}


def tokenizer_config(tokenizer: Tokenizer, folder: Path) -> bytes:
    """tokenizer_config.json: the checkpoint's own bytes where genai reads them as they are meant.

    genai takes no class that it does not know and only one template, as text; it learns only here which tokens have a
    role, and adds BOS or not by the class where add_bos_token does not say.
    """
    path = folder / TOKENIZER_CONFIG
    found = read_object(path) if path.is_file() else {}
    told = {**found, "add_bos_token": tokenizer.add_bos}
    lacking = [role for role in ROLES if role in tokenizer.special and found.get(f"{role}_token") is None]
    told |= {f"{role}_token": tokenizer.tokens[tokenizer.special[role]] for role in lacking}
    if told.get("tokenizer_class") not in CLASSES:
        told["tokenizer_class"] = ANY_CLASS
    if tokenizer.chat_template is None:
        told.pop("chat_template", None)
    elif not isinstance(found.get("chat_template"), str) and not (folder / TEMPLATE_FILE).is_file():
        told["chat_template"] = tokenizer.chat_template
    return path.read_bytes() if told == found else _written(told)


def _written(told: Mapping[str, Any]) -> bytes:
    return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()


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
