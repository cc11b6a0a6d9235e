"""llama.cpp's own tokenizer over a file that holds a vocabulary and no tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmx.exporters.gguf_vocab import vocabulary
from llmx.formats.gguf import f32, header_bytes, text, u32
from llmx.models.tokenizer import Tokenizer
from llmx.validate.runtimes.llamacpp_library import LogCallback, RawParams, available_backend

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
