"""Tokenizer files read as data: what is understood, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UnsupportedError
from llmx.models.sentencepiece_model import read_model
from llmx.models.tokenizer import open_tokenizer
from llmx.models.tokenizer_json import read_vocabulary
from llmx.models.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llmx.validate.corpus import CORPUS

Folder = Callable[..., Path]
Files = Callable[[str], dict[str, Any]]


def _document(files: Files, kind: str, **changes: Any) -> dict[str, Any]:
    return files(kind)["tokenizer.json"] | changes


def _with(folder: Folder, files: Files, kind: str, **changes: Any) -> Path:
    return folder(kind, **{"tokenizer.json": _document(files, kind, **changes)})


@pytest.mark.parametrize("kind", ["byte_bpe", "spm_bpe", "unigram"])
def test_encoding_equals_the_tokenizers_library_with_its_post_processor(kind: str, tokenizer_folder: Folder) -> None:
    import tokenizers

    path = tokenizer_folder(kind)
    reference = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer = open_tokenizer(path)
    assert [tokenizer.encode(text) for text in CORPUS] == [reference.encode(text).ids for text in CORPUS]


def test_each_kind_has_its_kind_types_and_roles(tokenizer_folder: Folder) -> None:
    tokenizer = open_tokenizer(tokenizer_folder("byte_bpe"))
    assert (tokenizer.kind, tokenizer.pre, tokenizer.add_bos, tokenizer.add_eos) == ("byte_bpe", "qwen2", False, False)
    assert tokenizer.special == {"eos": 2}
    assert [tokenizer.types[tokenizer.tokens.index(name)] for name in ("<|im_end|>", "<tool>", "a")] == [
        CONTROL,
        USER_DEFINED,
        NORMAL,
    ]


def test_bpe_with_byte_fallback_scores_its_pieces_by_rank(tokenizer_folder: Folder) -> None:
    tokenizer = open_tokenizer(tokenizer_folder("spm_bpe"))
    assert tokenizer.kind == "spm_bpe"
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (True, False, True)
    assert tokenizer.types.count(BYTE) == 256
    assert tokenizer.types[:4] == (UNKNOWN, CONTROL, CONTROL, USER_DEFINED)
    assert max(score for score, type in zip(tokenizer.scores, tokenizer.types, strict=True) if type == NORMAL) == 0


def test_a_unigram_has_its_scores_and_character_map(tokenizer_folder: Folder) -> None:
    tokenizer = open_tokenizer(tokenizer_folder("unigram"))
    assert (tokenizer.kind, tokenizer.remove_extra_whitespaces, tokenizer.add_eos) == ("unigram", True, True)
    assert tokenizer.charsmap
    assert not tokenizer.differences


def test_a_sentencepiece_model_alone_names_its_own_roles(tokenizer_folder: Folder) -> None:
    tokenizer = open_tokenizer(tokenizer_folder("sentencepiece_bpe", **{"tokenizer_config.json": {}}))
    assert tokenizer.special == {"unk": 0, "bos": 1, "eos": 2}
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.end_ids) == (True, False, (2,))


def test_tokens_beside_a_sentencepiece_model_are_added(tokenizer_folder: Folder) -> None:
    folder = tokenizer_folder("sentencepiece_bpe")
    size = len(open_tokenizer(folder).tokens)
    more = {"added_tokens_decoder": {str(size + 1): {"content": "<|user|>", "special": True, "rstrip": True}}}
    folder = tokenizer_folder(
        "sentencepiece_bpe", **{"tokenizer_config.json": more, "added_tokens.json": {"<x>": size}}
    )
    tokenizer = open_tokenizer(folder)
    assert tokenizer.tokens[size:] == ("<x>", "<|user|>")
    assert tokenizer.types[size:] == (USER_DEFINED, CONTROL)
    assert tokenizer.strips_right == (size + 1,)
    assert tokenizer.encode("a<|user|>b", False)[1:] == [size + 1, *tokenizer.encode("b", False)]
    assert size + 1 not in tokenizer.encode("a<|user|>b", False, parse_special=False)


def test_tokenizer_json_decides_where_both_files_stand(tokenizer_folder: Folder, tokenizer_files: Files) -> None:
    both = {"tokenizer.model": b"not a model"}
    assert open_tokenizer(tokenizer_folder("spm_bpe", **both)).kind == "spm_bpe"


def test_a_folder_without_a_tokenizer_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json or tokenizer\.model"):
        open_tokenizer(tmp_path)


def test_a_gap_in_the_ids_is_an_unused_token(tokenizer_folder: Folder, tokenizer_files: Files) -> None:
    document = _document(tokenizer_files, "byte_bpe")
    size = len(open_tokenizer(tokenizer_folder("byte_bpe")).tokens)
    document["added_tokens"].append(document["added_tokens"][0] | {"id": size + 1, "content": "<late>"})
    tokenizer = open_tokenizer(tokenizer_folder("byte_bpe", **{"tokenizer.json": document}))
    assert tokenizer.tokens[size:] == (None, "<late>")
    assert tokenizer.types[size] == UNUSED


def test_metaspace_is_read_with_its_corners_named(tokenizer_folder: Folder, tokenizer_files: Files) -> None:
    rule = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    folder = _with(tokenizer_folder, tokenizer_files, "spm_bpe", normalizer=None, pre_tokenizer=rule)
    tokenizer = open_tokenizer(folder)
    assert tokenizer.add_space_prefix
    assert ["begins with a space" in tokenizer.differences[0], "special token" in tokenizer.differences[1]] == [
        True,
        True,
    ]


def test_pieces_over_word_ends_contradict_splitting_into_words(
    tokenizer_folder: Folder, tokenizer_files: Files
) -> None:
    document = _document(tokenizer_files, "spm_bpe", normalizer=None)
    document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    document["model"]["vocab"]["a▁b"] = len(document["model"]["vocab"])
    with pytest.raises(UnsupportedError, match=r"reach over a word's end(.|\n)*a▁b"):
        open_tokenizer(tokenizer_folder("spm_bpe", **{"tokenizer.json": document}))


def test_older_files_spell_merges_as_one_text(tokenizer_folder: Folder, tokenizer_files: Files) -> None:
    document = _document(tokenizer_files, "byte_bpe")
    pairs = document["model"]["merges"]
    document["model"]["merges"] = [" ".join(pair) for pair in pairs]
    tokenizer = open_tokenizer(tokenizer_folder("byte_bpe", **{"tokenizer.json": document}))
    assert [list(pair) for pair in tokenizer.merges] == pairs


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an id twice": (lambda d: d["model"]["vocab"].update({"new": 5}), "id 5 has two tokens"),
    "a negative id": (lambda d: d["model"]["vocab"].update({"new": -1}), "'new' with id -1"),
    "a huge id": (lambda d: d["model"]["vocab"].update({"new": 10**9}), "'new' with id 1000000000"),
    "an id far away": (lambda d: d["model"]["vocab"].update({"new": 1_000_000}), "ids up to 1000000"),
    "an id that is a text": (lambda d: d["model"]["vocab"].update({"new": "7"}), "'new' with id '7'"),
    "half a character": (lambda d: d["model"]["vocab"].update({"\ud800": 9999}), "no Unicode text"),
    "a token with two ids": (lambda d: d["added_tokens"].append(d["added_tokens"][0] | {"id": 9}), "two ids"),
    "a merge without its token": (lambda d: d["model"]["merges"].append(["zz", "qq"]), "no pair of tokens"),
    "a merge that is a number": (lambda d: d["model"]["merges"].append(7), "no pair of tokens"),
    "an added token without text": (lambda d: d["added_tokens"].append({"id": 3}), "added token None"),
    "an added token that is a list": (lambda d: d["added_tokens"].append([]), "structure"),
    "no vocabulary": (lambda d: d["model"].pop("vocab"), "must be an object"),
    "no model": (lambda d: d.pop("model"), "no model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_contradictory_tokenizer_json_is_refused(name: str, tokenizer_files: Files) -> None:
    change, message = BROKEN[name]
    document = _document(tokenizer_files, "byte_bpe")
    change(document)
    with pytest.raises(IntegrityError, match=message):
        read_vocabulary(document, "here", cleans_spaces=True)


UNKNOWN_RULES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "another model": ("byte_bpe", lambda d: d["model"].update(type="WordPiece"), "WordPiece"),
    "dropout": ("byte_bpe", lambda d: d["model"].update(dropout=0.1), "dropout"),
    "another regex": (
        "byte_bpe",
        lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
        r"\\w\+",
    ),
    "another pre-tokenizer": ("byte_bpe", lambda d: d["pre_tokenizer"]["pretokenizers"].append({"type": "X"}), '"X"'),
    "a normalizer of words": ("byte_bpe", lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "another normalizer": ("spm_bpe", lambda d: d.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "spaces left alone": ("spm_bpe", lambda d: d.update(normalizer=None), "never turned"),
    "another post-processor": ("spm_bpe", lambda d: d.update(post_processor={"type": "X"}), "'X'"),
    "neither bytes nor fallback": ("spm_bpe", lambda d: d["model"].update(byte_fallback=False), "neither on bytes"),
}


@pytest.mark.parametrize("name", UNKNOWN_RULES)
def test_a_rule_that_is_not_known_is_refused_by_its_name(name: str, tokenizer_files: Files) -> None:
    kind, change, message = UNKNOWN_RULES[name]
    document = _document(tokenizer_files, kind)
    change(document)
    with pytest.raises(UnsupportedError, match=message):
        read_vocabulary(document, "here", cleans_spaces=True)


def test_a_template_of_two_tokens_is_refused(tokenizer_files: Files) -> None:
    document = _document(tokenizer_files, "spm_bpe")
    document["post_processor"]["single"].insert(0, document["post_processor"]["single"][0])
    with pytest.raises(UnsupportedError, match="2 tokens before"):
        read_vocabulary(document, "here", cleans_spaces=True)


def test_the_config_says_whether_bos_is_added_where_the_file_does_not(
    tokenizer_folder: Folder, tokenizer_files: Files
) -> None:
    document = _document(tokenizer_files, "byte_bpe", post_processor=None)
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "add_bos_token": True}
    folder = tokenizer_folder("byte_bpe", **{"tokenizer.json": document, "tokenizer_config.json": config})
    tokenizer = open_tokenizer(folder)
    assert (tokenizer.add_bos, tokenizer.special["bos"]) == (True, 1)


def test_tokenizer_json_alone_takes_its_roles_from_the_model_or_usual_names(
    tokenizer_folder: Folder, tokenizer_files: Files
) -> None:
    alone = {"tokenizer_config.json": {}}
    assert open_tokenizer(tokenizer_folder("spm_bpe", **alone)).special == {"bos": 1, "eos": 2, "unk": 0}
    model = {"config.json": {"eos_token_id": [2, 1]}, "generation_config.json": {"eos_token_id": 3}}
    tokenizer = open_tokenizer(tokenizer_folder("spm_bpe", **alone, **model))
    assert tokenizer.end_ids == (2, 3)


def test_special_tokens_that_do_not_exist_are_refused(tokenizer_folder: Folder) -> None:
    config = {"bos_token": "<nope>", "eos_token": "</s>", "pad_token": "<pad>"}
    with pytest.raises(IntegrityError, match="bos_token '<nope>'"):
        open_tokenizer(tokenizer_folder("spm_bpe", **{"tokenizer_config.json": config}))
    tokenizer = open_tokenizer(tokenizer_folder("spm_bpe", **{"tokenizer_config.json": config | {"bos_token": "<s>"}}))
    assert "<pad>" in tokenizer.differences[0]


def test_end_ids_that_do_not_exist_are_refused(tokenizer_folder: Folder) -> None:
    with pytest.raises(IntegrityError, match="99999"):
        open_tokenizer(tokenizer_folder("spm_bpe", **{"generation_config.json": {"eos_token_id": [2, 99999]}}))


def test_a_tokenizer_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(IntegrityError, match="limit"):
        open_tokenizer(tmp_path)


def test_a_cut_sentencepiece_model_is_refused(tokenizer_files: Files) -> None:
    data = tokenizer_files("sentencepiece_bpe")["tokenizer.model"]
    for size in (1, 10, 1001, len(data) - 1):
        with pytest.raises(IntegrityError):
            read_model(data[:size], "here")


def test_a_word_model_of_sentencepiece_is_not_known() -> None:
    piece = b"\x0a\x03\x0a\x01a"
    with pytest.raises(UnsupportedError, match="model type 3"):
        read_model(piece + b"\x12\x02\x18\x03", "here")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_never_a_crash(data: bytes) -> None:
    try:
        read_model(data, "here")
    except LlmxError as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(part=st.sampled_from(["normalizer", "pre_tokenizer", "post_processor", "added_tokens", "model"]), value=JSON)
def test_a_random_part_is_never_a_crash(part: str, value: object) -> None:
    model = {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    try:
        read_vocabulary({"model": model, "added_tokens": [], part: value}, "here", cleans_spaces=True)
    except LlmxError as error:
        assert str(error)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "a": 1}}}')
    with pytest.raises(IntegrityError, match="'a'"):
        open_tokenizer(tmp_path)


def test_a_folder_renders_its_template(tokenizer_folder: Folder) -> None:
    tokenizer = open_tokenizer(tokenizer_folder("byte_bpe"))
    messages = [{"role": "user", "content": " Hi "}]
    assert tokenizer.render(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert json.dumps(tokenizer.render(messages, add_generation_prompt=False)) == json.dumps(
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    assert open_tokenizer(tokenizer_folder("spm_bpe")).render(messages) is None
