"""Every kind of vocabulary, tokenized by llama.cpp as by the reference libraries."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_cases import letters

from llmx.errors import IntegrityError, UnsupportedError
from llmx.exporters.gguf_vocab import end_tokens, limits, model_name, vocabulary, vocabulary_rows
from llmx.models.tokenizer import Tokenizer, open_tokenizer
from llmx.models.vocabulary import CONTROL, NORMAL, USER_DEFINED
from llmx.validate.corpus import CORPUS, DECOMPOSED, special_texts

SHARED = Path(__file__).parents[2].parent / "shared"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


def _disagreements(tokenizer: Tokenizer, runtime: Any, texts: tuple[str, ...]) -> list[tuple[Any, ...]]:
    cases = [(text, parse) for text in texts for parse in (True, False)]
    found = [
        (text, parse, tokenizer.encode(text, True, parse), runtime.tokenize(text, True, parse)) for text, parse in cases
    ]
    return [case for case in found if case[2] != case[3]]


def _texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    kinds = (CONTROL, USER_DEFINED)
    added = [str(token) for token, type in zip(tokenizer.tokens, tokenizer.types, strict=True) if type in kinds]
    return (*CORPUS, *special_texts(added[:10]))


@pytest.mark.parametrize("kind", ["byte_bpe", "spm_bpe", "sentencepiece_bpe"])
def test_llama_cpp_tokenizes_as_the_reference(
    kind: str, tokenizer_folder: Callable[..., Path], load: Callable[..., Any]
) -> None:
    tokenizer = open_tokenizer(tokenizer_folder(kind))
    runtime = load(tokenizer, len(tokenizer.tokens) + 5)
    assert runtime.size == len(tokenizer.tokens) + 5
    assert not _disagreements(tokenizer, runtime, _texts(tokenizer))
    assert not limits(tokenizer, len(tokenizer.tokens))


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece_unigram"])
def test_llama_cpp_finds_the_same_most_likely_pieces(
    kind: str, tokenizer_folder: Callable[..., Path], load: Callable[..., Any]
) -> None:
    tokenizer = open_tokenizer(tokenizer_folder(kind))
    runtime = load(tokenizer)
    assert not _disagreements(tokenizer, runtime, CORPUS)


@pytest.mark.parametrize("name", ["stories42m-llama", "stories260k-llama"])
def test_the_real_tokenizers_here_agree_with_llama_cpp(name: str, load: Callable[..., Any]) -> None:
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    tokenizer = open_tokenizer(folder)
    assert not _disagreements(tokenizer, load(tokenizer), (*_texts(tokenizer), *DECOMPOSED))


def test_the_example_agrees_with_llama_cpp(load: Callable[..., Any]) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    runtime = load(tokenizer)
    assert not _disagreements(tokenizer, runtime, _texts(tokenizer))
    assert (runtime.bos, runtime.eos, runtime.ends(2)) == (1, 2, True)


def test_a_normal_form_is_named_as_a_limit(tokenizer_folder: Callable[..., Path], tokenizer_files: Any) -> None:
    document = tokenizer_files("byte_bpe")["tokenizer.json"] | {"normalizer": {"type": "NFC"}}
    tokenizer = open_tokenizer(tokenizer_folder("byte_bpe", **{"tokenizer.json": document}))
    assert tokenizer.normalization == "NFC"
    assert ["NFC" in limit for limit in limits(tokenizer, len(tokenizer.tokens))] == [True]


def test_the_corpus_is_in_normal_form_and_its_counterpart_is_not() -> None:
    assert all(unicodedata.is_normalized("NFC", text) for text in CORPUS)
    assert not any(unicodedata.is_normalized("NFC", text) for text in DECOMPOSED)
    assert len(CORPUS) == len(set(CORPUS)) >= 60


def _made(tokens: list[str | None], types: list[int], **changes: Any) -> Tokenizer:
    made = replace(letters(0), tokens=tuple(tokens), types=tuple(types), special={"eos": 0}, end_ids=(0,))
    return replace(made, **changes)


def test_padding_rows_have_names_of_their_own_and_the_type_unused() -> None:
    metadata = vocabulary(_made(["</s>", "[PAD3]", None], [3, 1, 5]), 5)
    assert metadata["tokenizer.ggml.tokens"].value == ("</s>", "[PAD3]", "[PAD2]", "[[PAD3]]", "[PAD4]")
    assert metadata["tokenizer.ggml.token_type"].value == (3, 1, 5, 5, 5)


def test_more_tokens_than_rows_are_refused_with_their_names() -> None:
    with pytest.raises(IntegrityError, match=r"3 tokens but the embedding 2 rows(.|\n)*'b'"):
        vocabulary(_made(["</s>", "a", "b"], [3, NORMAL, NORMAL]), 2)


def test_a_special_token_without_a_row_is_left_out_and_named() -> None:
    tokenizer = _made(["</s>", "a", "<image>"], [3, NORMAL, CONTROL])
    assert vocabulary(tokenizer, 2)["tokenizer.ggml.tokens"].value == ("</s>", "a")
    assert "<image>" in " ".join(limits(tokenizer, 2))


def test_an_end_token_without_a_row_is_refused() -> None:
    with pytest.raises(IntegrityError, match="'</s>' has no row"):
        vocabulary(_made(["a", "</s>"], [NORMAL, CONTROL], special={"eos": 1}, end_ids=(1,)), 1)


def test_padding_rows_can_be_cut() -> None:
    tokenizer = _made(["</s>", "a"], [3, 1])
    assert vocabulary_rows(tokenizer, 5) == 5
    assert vocabulary_rows(tokenizer, 5, cut_padding=True) == 2


def test_end_tokens_that_the_text_does_not_tell_get_the_two_keys_that_are_left() -> None:
    names: list[str | None] = ["<|eot_id|>", "<stop1>", "</s>", "<stop2>", "<stop3>"]
    ends = end_tokens(_made(names, [CONTROL] * 5, end_ids=(0, 1, 2, 3, 4)))
    assert (ends.eos, ends.eot, ends.eom, ends.uncovered) == (0, 1, 3, (4,))
    assert "<stop3>" in " ".join(limits(_made(names, [CONTROL] * 5, end_ids=(0, 1, 2, 3, 4)), 5))


def test_a_turn_end_that_llama_cpp_takes_back_is_named() -> None:
    names: list[str | None] = ["<|return|>", "<|call|>", "<|end|>"]
    assert end_tokens(_made(names, [CONTROL] * 3, end_ids=(0, 1, 2))).uncovered == (2,)


def test_every_end_token_ends_generation_in_llama_cpp(
    tokenizer_folder: Callable[..., Path], load: Callable[..., Any]
) -> None:
    ends = {"eos_token_id": [0, 2, 5, 6]}
    tokenizer = open_tokenizer(tokenizer_folder("byte_bpe", **{"generation_config.json": ends}))
    assert tokenizer.end_ids == (2, 0, 5, 6)
    runtime = load(tokenizer)
    assert [runtime.ends(id) for id in (0, 1, 2, 3, 5, 6)] == [True, False, True, False, True, True]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="eos_token"):
        vocabulary(_made(["a"], [1], special={}, end_ids=()), 1)


def test_a_sentencepiece_bpe_without_all_bytes_is_refused() -> None:
    tokenizer = _made(["</s>", "a"], [3, 1], kind="spm_bpe", scores=(0.0, 0.0))
    with pytest.raises(UnsupportedError, match="0 of the 256 byte tokens"):
        vocabulary(tokenizer, 2)


def test_names_that_llama_cpp_would_read_as_equal_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="NUL"):
        vocabulary(_made(["</s>", "a", "a\0b"], [3, 1, 1]), 3)


def test_a_model_is_not_called_phi_3_unless_its_special_tokens_swallow_whitespace() -> None:
    tokenizer = _made(["</s>"], [3])
    assert model_name(tokenizer, "tiny phi3 x") == "tiny Phi 3 x"
    assert model_name(replace(tokenizer, strips_right=(0,)), "phi-3-mini") == "phi-3-mini"


def test_chat_templates_go_along_by_name() -> None:
    metadata = vocabulary(_made(["</s>"], [3], templates={"default": "a", "tool_use": "b"}), 1)
    assert metadata["tokenizer.chat_template"].value == "a"
    assert metadata["tokenizer.chat_template.tool_use"].value == "b"
    assert metadata["tokenizer.chat_templates"].value == ("tool_use",)


def test_without_a_bos_the_end_token_stands_in_and_is_not_added() -> None:
    metadata = vocabulary(_made(["</s>"], [3]), 1)
    assert metadata["tokenizer.ggml.bos_token_id"].value == 0
    assert metadata["tokenizer.ggml.add_bos_token"].value is False
