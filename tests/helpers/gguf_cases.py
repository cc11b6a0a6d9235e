"""Checkpoints as GGUF files of our own, for tests that read them back."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmx.errors import UnsupportedError
from llmx.exporters.gguf import GgufOptions, prepare, write
from llmx.exporters.gguf_types import file_type
from llmx.models.model import open_model
from llmx.models.tokenizer import Tokenizer

FAMILIES = ("llama", "qwen3-tied", "gemma3", "phi3", "gpt2", "mixtral")  # of the fixture `solvable`


def letters(count: int) -> Tokenizer:
    """A tokenizer of single characters: enough for a file of random weights."""
    return Tokenizer(
        kind="byte_bpe",
        tokens=tuple(chr(33 + id) for id in range(count)),
        types=(1,) * count,
        scores=(),
        merges=(),
        pre="gpt-2",
        special={"bos": 1, "eos": 2},
        end_ids=(2,),
        add_bos=False,
        add_eos=False,
        add_space_prefix=False,
        remove_extra_whitespaces=False,
        normalization=None,
        charsmap=None,
        templates={},
        strips_right=(),
        differences=(),
    )


def gguf_of(folder: Path, path: Path, type_name: str) -> Path:
    """The checkpoint as a GGUF file of our own. Skips what llama.cpp cannot compute."""
    model = open_model(folder)
    try:
        export = prepare(model, letters(model.architecture.vocab), GgufOptions(file_type=file_type(type_name)))
    except UnsupportedError as error:
        pytest.skip(f"no GGUF file holds it: {error.problems}")
    write(export, [path])
    return path
