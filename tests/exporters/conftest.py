"""llama.cpp's own tokenizer over a file that holds a vocabulary and no tensors; small checkpoints of every family."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stock_types import random_checkpoint

from llmx.exporters.gguf_vocab import vocabulary
from llmx.formats.gguf import f32, header_bytes, text, u32
from llmx.models.tokenizer import Tokenizer
from llmx.validate.runtimes.llamacpp_library import LogCallback, RawParams, available_backend
from llmx.validate.sample_text import SAMPLE_TEXT

VOCAB_ONLY_BYTE = 72  # of llama_model_params, in the build whose layout llamacpp_library.py checks


@LogCallback
def _silent(level: int, message: bytes, data: Any) -> None:
    """llama.cpp warns about every unusual token."""


@dataclass(frozen=True)
class RuntimeVocabulary:
    """A loaded vocabulary."""

    api: Any
    pointer: int

    def tokenize(self, content: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        data = content.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.api.llama_tokenize(self.pointer, data, len(data), ids, room, add_special, parse_special)
        assert count >= 0
        return list(ids[:count])

    @property
    def size(self) -> int:
        return self.api.llama_vocab_n_tokens(self.pointer)

    @property
    def bos(self) -> int:
        return self.api.llama_vocab_bos(self.pointer)

    @property
    def eos(self) -> int:
        return self.api.llama_vocab_eos(self.pointer)

    def ends(self, id: int) -> bool:
        return self.api.llama_vocab_is_eog(self.pointer, id)


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., RuntimeVocabulary]]:
    """load(tokenizer, rows, name): its vocabulary as llama.cpp reads it from a GGUF file."""
    backend = available_backend()
    if backend is None or backend.name != "xllamacpp":
        pytest.skip("xllamacpp is not installed")
    api = backend.load().api
    api.llama_log_set(_silent, None)
    models = []

    def run(tokenizer: Tokenizer, rows: int | None = None, name: str = "test") -> RuntimeVocabulary:
        path = tmp_path / f"{len(models)}.gguf"
        metadata = _model_keys(name) | vocabulary(tokenizer, rows or len(tokenizer.tokens))
        path.write_bytes(header_bytes(metadata, []))
        params: RawParams = api.llama_model_default_params()
        params.data[VOCAB_ONLY_BYTE] = 1
        model = api.llama_model_load_from_file(str(path).encode(), params)
        assert model, "llama.cpp refuses the vocabulary"
        models.append(model)
        return RuntimeVocabulary(api, api.llama_model_get_vocab(model))

    yield run
    for model in models:
        api.llama_model_free(model)


def _model_keys(name: str) -> dict[str, Any]:
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    return {
        "general.architecture": text("llama"),
        "general.name": text(name),
        **{f"llama.{key}": u32(64) for key in sizes},
        "llama.rope.dimension_count": u32(1),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    }


_TOKENS = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
_WIDE: dict[str, Any] = _TOKENS | {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_GPT2 = {
    "n_embd": 256,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 512,
    "activation_function": "gelu_new",
    "n_inner": 256,
}
# As wide as a block of the k-quants, so that each tensor gets the type that it would in a real model.
SOLVABLE: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "llama-narrow": _WIDE | {"intermediate_size": 200},  # rows that groups of no size divide
    "qwen3-tied": _WIDE | {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma3": _WIDE
    | {"model_type": "gemma3_text", "sliding_window": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}
    | {"hidden_activation": "gelu_pytorch_tanh"},
    "phi3": _WIDE | {"model_type": "phi3", "original_max_position_embeddings": 512},
    "gpt2": _GPT2 | _TOKENS | {"model_type": "gpt2"},
    "mixtral": _WIDE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def solvable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """solvable(family): a random checkpoint of it; not to be changed."""
    folder = tmp_path_factory.mktemp("solvable")

    def run(name: str) -> Path:
        if not (folder / name).is_dir():
            random_checkpoint(folder / name, SOLVABLE[name])
        return folder / name

    return run


@pytest.fixture(scope="session")
def some_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of a few thousand tokens: the built-in corpus takes longer to read than a small model."""
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(SAMPLE_TEXT)
    return path
