"""Calibration input: what files are read and refused, and how text becomes sequences of ids."""

from __future__ import annotations

import hashlib
import json
import tomllib
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.models import calibration_text
from llmx.models.calibration_text import (
    CORPUS,
    CORPUS_NAME,
    MINIMUM_TOKENS,
    TEXT_BYTES,
    CalibrationText,
    Conversation,
    pack,
    read_calibration,
    sequences,
    spread,
)
from llmx.models.loaded_tokenizer import load_tokenizer, special_texts
from llmx.models.tokenizer import open_tokenizer
from llmx.validate.oracle import Tokens
from llmx.validate.sample_text import SAMPLE_TEXT

Folder = Callable[..., Path]
ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-qwen3"
VOCAB = 2**20  # larger than any tokenizer's here
CHAT = [{"role": "user", "content": "Where is the ball? "}, {"role": "assistant", "content": "In the garden."}]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _file(folder: Path, content: str | bytes, name: str = "given.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _lines(folder: Path, *values: object) -> Path:
    return _file(folder, "\n".join(json.dumps(value) for value in values), "given.jsonl")


def _text(*documents: str | Conversation) -> CalibrationText:
    return CalibrationText("test", "", documents)


def _ids(text: CalibrationText, folder: Path) -> list[int]:
    """All ids of a text, as one sequence without the beginning token."""
    before = load_tokenizer(folder).before
    return list(sequences(text, folder, tokens=1, length=2**22, vocab=VOCAB)[0])[len(before) :]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts are enough."""
    monkeypatch.setattr(calibration_text, "MINIMUM_TOKENS", 1)


# Reading


def test_a_text_file_is_one_document_with_its_name_and_digest(tmp_path: Path) -> None:
    data = "\ufeffOne line.\n\nGröße, {not json}\r\n".encode()
    text = read_calibration(_file(tmp_path, data))
    assert text == CalibrationText(
        "given.txt", hashlib.sha256(data).hexdigest(), ("One line.\n\nGröße, {not json}\r\n",)
    )


def test_lines_of_every_kind_are_read_and_empty_ones_skipped(tmp_path: Path) -> None:
    path = _lines(
        tmp_path, {"text": "a", "id": 1}, "b\u2028c", {"prompt": "2 + 2 =", "completion": " 4"}, {"messages": CHAT}
    )
    path.write_text(path.read_text().replace("\n", "\n\n") + '\n{"text": " "}\r\n')
    assert read_calibration(path).documents == ("a", "b\u2028c", "2 + 2 = 4", Conversation(tuple(CHAT), 7))


@pytest.mark.parametrize("name", ["given.jsonl", "given.NDJSON", "given.json"])
def test_the_suffix_says_that_lines_are_json(name: str, tmp_path: Path) -> None:
    assert read_calibration(_file(tmp_path, '{"text": "a"}\n"b"', name)).documents == ("a", "b")


BAD_LINES: dict[str, tuple[str, str]] = {
    "no JSON": ('{"text": "a"', r"line 2: no JSON at column 13: Expecting ',' delimiter"),
    "a number": ("17", "line 2: a JSON object or string was expected, not int"),
    "other keys": ('{"content": "a", "id": 3}', r"line 2: no \"text\", .* it has 'content', 'id'"),
    "no keys": ("{}", "it has nothing"),
    "a prompt alone": ('{"prompt": "a"}', "it has 'prompt'"),
    "a text that is a list": ('{"text": ["a"]}', 'line 2: "text" is no string but list'),
    "a completion that is null": ('{"prompt": "a", "completion": null}', '"prompt" and "completion" must be strings'),
    "messages that are a text": ('{"messages": "a"}', '"messages" is no list'),
    "no messages": ('{"messages": []}', '"messages" is no list'),
    "a message without content": ('{"messages": [{"role": "user"}]}', 'message 1 has no "role" and "content"'),
    "a message that is a text": ('{"messages": ["hello"]}', 'message 1 has no "role" and "content"'),
    "half a character": ('{"text": "\\ud800"}', "line 2: half of a surrogate pair"),
    "half a character in a message": ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "surrogate"),
    "nested without end": ("[" * 100_000, "line 2: "),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_what_is_wrong(name: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[name]
    with pytest.raises(IntegrityError, match=message) as caught:
        read_calibration(_file(tmp_path, f'"fine"\n{line}\n"fine"', "given.jsonl"))
    assert len(caught.value.problems) == 1
    assert "one JSON value a line" in str(caught.value)
    assert "given.jsonl" in str(caught.value)


def test_all_bad_lines_are_listed_and_a_flood_is_shortened(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"line 1: (.|\n)*line 3: ") as caught:
        read_calibration(_file(tmp_path, 'oops\n"fine"\n{}', "given.jsonl"))
    assert len(caught.value.problems) == 2
    with pytest.raises(IntegrityError, match="and 900 more"):
        read_calibration(_file(tmp_path, "oops\n" * 1000, "given.jsonl"))


def test_a_file_that_is_not_utf8_is_refused_with_its_lines(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"not UTF-8(.|\n)*line 2: byte 3 is 0xe9(.|\n)*line 4: byte 1 is 0xff"):
        read_calibration(_file(tmp_path, b"a\nbc\xe9\nd\n\xff\n"))


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such calibration file(.|\n)*missing\.txt(.|\n)*built-in corpus"):
        read_calibration(tmp_path / "missing.txt")


def test_a_folder_is_no_calibration_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no regular file"):
        read_calibration(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("b.txt", " \n\n"), ("c.jsonl", '\n{"text": ""}\n""\n')])
def test_a_file_without_text_is_refused(name: str, content: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no text"):
        read_calibration(_file(tmp_path, content, name))


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(TEXT_BYTES + 1)
    with pytest.raises(UsageError, match=f"at most {TEXT_BYTES} are read"):
        read_calibration(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = _file(tmp_path, "a")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UsageError, match=r"cannot be read: Permission denied(.|\n)*given\.txt"):
        read_calibration(path)


# Sequences


@pytest.mark.parametrize("kind", ["byte_bpe", "spm_bpe", "unigram"])
def test_ids_are_those_of_hugging_face(kind: str, tokenizer_folder: Folder, small: None) -> None:
    folder = tokenizer_folder(kind)
    story = "Once upon a time there was a little girl.\nShe said: “Größe!” 🦙\n"
    assert _ids(_text(story), folder) == Tokens(folder).encode(story, add_special=False)


def test_a_folder_with_tokenizer_model_alone_begins_every_sequence_too(tokenizer_folder: Folder) -> None:
    folder = tokenizer_folder("sentencepiece_bpe")
    found = sequences(read_calibration(None), folder, tokens=4096, length=64, vocab=VOCAB)
    assert {(len(ids), ids[0], ids.count(1)) for ids in found} == {(64, 1, 1)}
    config = {**LLAMA, "add_bos_token": True}  # without it transformers 5 leaves the beginning token out
    folder = tokenizer_folder("sentencepiece_bpe", **{"tokenizer_config.json": config})
    assert load_tokenizer(folder).encode("Hello dog", True, False) == Tokens(folder).encode("Hello dog", True)


def test_every_sequence_begins_with_the_beginning_token_and_has_the_length(tokenizer_folder: Folder) -> None:
    found = sequences(read_calibration(None), tokenizer_folder("spm_bpe"), tokens=5000, length=128, vocab=VOCAB)
    assert len(found) == 5000 // 128
    assert {(len(ids), ids[0], ids.count(1)) for ids in found} == {(128, 1, 1)}


def test_no_beginning_token_is_invented(tokenizer_folder: Folder, small: None) -> None:
    folder = tokenizer_folder("byte_bpe")
    assert load_tokenizer(folder).before == []
    assert sequences(_text("hello"), folder, tokens=64, length=64, vocab=VOCAB) == (
        tuple(_ids(_text("hello"), folder)),
    )


def test_an_end_token_is_never_added(tokenizer_folder: Folder, small: None) -> None:
    folder = tokenizer_folder("unigram")
    assert Tokens(folder).encode("a", add_special=True)[-1] == 2
    assert load_tokenizer(folder).before == []
    assert 2 not in _ids(_text("a", "b"), folder)


def test_the_config_may_want_the_beginning_token(tokenizer_folder: Folder) -> None:
    config = {"bos_token": "<|im_start|>", "add_bos_token": True}
    folder = tokenizer_folder("byte_bpe", **{"tokenizer_config.json": config})
    assert load_tokenizer(folder).before == [1]
    assert load_tokenizer(folder).encode("a", True, False) == open_tokenizer(folder).encode("a")


def test_documents_are_joined_with_a_blank_line(tokenizer_folder: Folder, small: None) -> None:
    folder = tokenizer_folder("byte_bpe")
    assert _ids(_text("One day", "a dog", "ran"), folder) == _ids(_text("One day\n\na dog\n\nran"), folder)


def test_names_of_special_tokens_are_plain_in_a_text_and_special_in_a_conversation(
    tokenizer_folder: Folder, small: None
) -> None:
    folder = tokenizer_folder("byte_bpe")
    written = "<|im_start|>user\nHi<|im_end|>\n"
    assert not {0, 1, 2} & set(_ids(_text(written), folder))
    rendered = _ids(_text(Conversation(({"role": "user", "content": " Hi "},), 1)), folder)
    assert rendered == Tokens(folder).encode(written, add_special=False)
    assert {1, 2} <= set(rendered)


def test_conversations_are_rendered_as_transformers_does(tmp_path: Path, tokenizer_folder: Folder, small: None) -> None:
    folder = tokenizer_folder("byte_bpe")
    tokens = Tokens(folder)
    text = read_calibration(_lines(tmp_path, {"messages": CHAT}, {"messages": CHAT[:1]}))
    expected = tokens.render(CHAT, False) + tokens.render(CHAT[:1], False)
    assert _ids(text, folder) == tokens.encode(expected, add_special=False)


def test_a_beginning_token_that_the_template_writes_does_not_stand_twice(tokenizer_folder: Folder, small: None) -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    folder = tokenizer_folder("spm_bpe", **{"tokenizer_config.json": config})
    found = sequences(_text(*[Conversation(tuple(CHAT), 1)] * 40), folder, tokens=10**6, length=64, vocab=VOCAB)
    assert {(ids[0], ids.count(1)) for ids in found} == {(1, 1)}


def test_without_a_template_a_conversation_is_its_contents_in_lines(tokenizer_folder: Folder, small: None) -> None:
    folder = tokenizer_folder("byte_bpe", **{"tokenizer_config.json": {}})
    contents = "Where is the ball? \nIn the garden."
    assert _ids(_text(Conversation(tuple(CHAT), 1), "end"), folder) == _ids(_text(contents, "end"), folder)


def test_special_tokens_of_the_template_come_from_either_file(tokenizer_folder: Folder) -> None:
    beside = {"bos_token": {"content": "<one>"}, "pad_token": "<pad>", "additional_special_tokens": ["<x>"]}
    config = {"bos_token": "<two>", "add_bos_token": True}
    folder = tokenizer_folder("byte_bpe", **{"special_tokens_map.json": beside, "tokenizer_config.json": config})
    assert special_texts(folder) == {"bos_token": "<two>", "pad_token": "<pad>"}


def test_conversations_that_the_template_refuses_are_listed_by_line(tmp_path: Path, tokenizer_folder: Folder) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with user') }}{% endif %}ok"
    folder = tokenizer_folder("byte_bpe", **{"tokenizer_config.json": {"chat_template": template}})
    good, bad = {"messages": CHAT}, {"messages": CHAT[1:]}
    with pytest.raises(IntegrityError, match=r"line 2: .*begin with user(.|\n)*line 3: ") as caught:
        sequences(read_calibration(_lines(tmp_path, good, bad, bad)), folder, tokens=64, length=64, vocab=VOCAB)
    assert len(caught.value.problems) == 2


def test_too_little_text_is_refused_with_both_counts(tokenizer_folder: Folder) -> None:
    folder = tokenizer_folder("byte_bpe")
    with pytest.raises(UsageError, match=rf"has 1 tokens; at least {MINIMUM_TOKENS} are needed(.|\n)*built-in corpus"):
        sequences(_text("a"), folder, tokens=64, length=64, vocab=VOCAB)


def test_an_id_outside_the_models_vocabulary_is_named(tokenizer_folder: Folder) -> None:
    folder = tokenizer_folder("byte_bpe")
    with pytest.raises(IntegrityError, match=r"token \d+ \('.+'\) is outside .* 300 tokens: .*of another model"):
        sequences(read_calibration(None), folder, tokens=64, length=64, vocab=300)


def test_a_tokenizer_that_does_not_load_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no tokenizer that is known"):
        load_tokenizer(tmp_path)
    _file(tmp_path, '{"model": 7}', "tokenizer.json")
    with pytest.raises(UnsupportedError, match="refuses"):
        load_tokenizer(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(IntegrityError, match="bytes is refused"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_the_file_are_not_applied(
    tokenizer_folder: Folder, tokenizer_files: Callable[[str], dict[str, Any]], small: None
) -> None:
    plain = _ids(_text("a dog " * 50), tokenizer_folder("byte_bpe"))
    short = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 900}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    pad |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    document = tokenizer_files("byte_bpe")["tokenizer.json"] | {"truncation": short, "padding": pad}
    assert _ids(_text("a dog " * 50), tokenizer_folder("byte_bpe", **{"tokenizer.json": document})) == plain


NUMBERED = "".join(f"{number:06d} line\n" for number in range(60_000))


@pytest.mark.parametrize("thinned", [False, True])
def test_a_long_text_is_covered_from_start_to_end(
    thinned: bool, tokenizer_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tokenizers

    if thinned:
        monkeypatch.setattr(calibration_text, "THIN_ABOVE", 1 << 17)
        monkeypatch.setattr(calibration_text, "BLOCK", 1 << 12)
    folder = tokenizer_folder("byte_bpe")
    decode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    found = sequences(_text(NUMBERED), folder, tokens=4096, length=128, vocab=VOCAB)
    # The first number that a sequence holds whole.
    firsts = [int(decode(list(ids)).split("\n")[1][:6]) for ids in found]
    assert len(found) == 32
    assert firsts[0] < 20
    assert firsts[-1] > 59_000
    steps = [after - before for before, after in pairwise(firsts)]
    assert min(steps) > 0
    assert max(steps) < 2.2 * 60_000 / 32


def test_a_thinned_text_is_tokenized_in_part_only(
    tokenizer_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration_text, "THIN_ABOVE", 1 << 15)
    monkeypatch.setattr(calibration_text, "BLOCK", 1 << 10)
    folder = tokenizer_folder("byte_bpe", **{"tokenizer_config.json": {}})
    documents = [{"text": f"{number} " * 20} for number in range(3000)]
    text = read_calibration(_lines(tmp_path, *documents, {"messages": CHAT}))
    total = sum(len(document) for document in text.documents)
    found = sequences(text, folder, tokens=10**3, length=100, vocab=VOCAB)
    everything = sequences(text, folder, tokens=10**9, length=100, vocab=VOCAB)
    assert len(found) == 10
    assert set(found) != set(everything)
    assert total > 8 * (1 << 15)


def test_a_line_longer_than_a_block_loses_nothing(
    tokenizer_folder: Folder, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    import tokenizers

    monkeypatch.setattr(calibration_text, "BLOCK", 64)
    folder = tokenizer_folder("byte_bpe")
    decode = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode
    for text in ("x" * 1000, "word " * 300, "line\n" * 300, "山の上の小さな駅" * 50):
        assert decode(_ids(_text(text), folder)) == text


def test_the_same_text_gives_the_same_sequences(tokenizer_folder: Folder) -> None:
    folder = tokenizer_folder("spm_bpe")
    first, second = (sequences(read_calibration(None), folder, tokens=9000, length=96, vocab=VOCAB) for _ in range(2))
    assert first == second


@given(
    ids=st.lists(st.integers(2, 99), max_size=300),
    length=st.integers(2, 64),
    before=st.sampled_from([(), (1,)]),
)
def test_packing_loses_and_invents_nothing_but_a_short_end(
    ids: list[int], length: int, before: tuple[int, ...]
) -> None:
    packed = pack(ids, length=length, before=before)
    assert all(sequence[: len(before)] == before for sequence in packed)
    joined = [id for sequence in packed for id in sequence[len(before) :]]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < length - len(before)
    assert len(packed) == 1 or {len(sequence) for sequence in packed} == {length}
    assert joined == ids or len(packed[-1]) == length


@given(count=st.integers(0, 500), wanted=st.integers(1, 500))
def test_indices_are_spread_evenly_in_order_from_first_to_last(count: int, wanted: int) -> None:
    found = spread(count, wanted)
    assert len(found) == min(count, wanted)
    assert list(found) == sorted(set(found))
    assert not found or (min(found) == 0 and max(found) < count)
    steps = {after - before for before, after in pairwise(found)}
    assert not steps or max(steps) - min(steps) <= 1
    assert wanted == 1 or not found or max(found) == count - 1


# The built-in corpus


def test_the_corpus_is_read_when_no_file_is_given() -> None:
    text = read_calibration(None)
    assert (text.name, text.sha256) == (CORPUS_NAME, hashlib.sha256(CORPUS.read_bytes()).hexdigest())
    assert len(text.documents) > 100
    assert len(set(text.documents)) == len(text.documents)
    assert not any("<|document|>" in document for document in text.documents if isinstance(document, str))
    assert max(len(document) for document in text.documents) < 2500


def test_the_corpus_gives_enough_tokens() -> None:
    """28,400 with Llama 3's tokenizer, 29,200 with Gemma 2's, 33,800 with Llama 2's; far more with a small one."""
    found = sequences(read_calibration(None), TINY, tokens=10**6, length=256, vocab=512)
    assert sum(len(ids) for ids in found) > 60_000


def test_the_corpus_is_english_code_and_a_share_of_other_scripts() -> None:
    """97.8 % of its characters are ASCII, 2.5 % of its letters are of other scripts than Latin (about 10 % of its
    bytes are in twenty other languages)."""
    text = CORPUS.read_text("utf-8")
    letters = [character for character in text if character.isalpha()]
    foreign = [character for character in letters if not unicodedata.name(character).startswith("LATIN")]
    assert 0.95 < sum(character.isascii() for character in text) / len(text) < 0.99
    assert 0.02 < len(foreign) / len(letters) < 0.1
    scripts = {unicodedata.name(character).split()[0] for character in foreign}
    assert {"CYRILLIC", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ARABIC", "DEVANAGARI"} <= scripts
    assert unicodedata.normalize("NFC", text) == text


def test_the_corpus_shares_no_run_of_eight_words_with_the_text_of_validation() -> None:
    """Otherwise a validation would measure what the calibration has seen."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    assert not runs(CORPUS.read_text("utf-8")) & runs(SAMPLE_TEXT)


def test_the_corpus_is_installed_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["llmx.models"] == ["*.txt"]
