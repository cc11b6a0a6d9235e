"""Pre-tokenizers known by their rules, in every spelling that splits the same."""

from __future__ import annotations

from typing import Any

import pytest

from llmx.errors import UnsupportedError
from llmx.models import pretokenizers as rules
from llmx.models.pretokenizers import RULES, canonical, classify

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
EACH_DIGIT = {"type": "Digits", "individual_digits": True}


def _split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# As the models' own files write them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
CASES = {
    "gpt-2": WORDS,
    "starcoder": _sequence(EACH_DIGIT, WORDS),
    "llama-bpe": _sequence(_split(LLAMA3), BYTES),
    "dbrx": _sequence(_split(LLAMA3), BYTES),
    "qwen2": _sequence(_split(LLAMA3.replace("{1,3}", "")), BYTES),
    "gpt-4o": _sequence(_split(O200K), BYTES),
    "tekken": _sequence(_split(O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")), BYTES),
    "deepseek-v3": _sequence(_split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(DEEPSEEK3), BYTES),
    "deepseek-coder": _sequence(
        _split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(rules.DEEPSEEK_CJK), EACH_DIGIT, BYTES
    ),
    "falcon": _sequence(
        {"type": "Punctuation", "behavior": "Contiguous"},
        WORDS,
        {"type": "Digits", "individual_digits": False},
        _split("[0-9][0-9][0-9]"),
    ),
    "viking": _sequence(_split(rules.BLOOM), EACH_DIGIT, BYTES),
}


@pytest.mark.parametrize("name", CASES)
def test_a_models_own_rules_have_a_name(name: str) -> None:
    assert classify(CASES[name], name in ("llama-bpe", "tekken"), True)[0] == name


def test_a_tokenizer_that_keeps_spaces_when_it_decodes_is_smollm() -> None:
    assert classify(CASES["starcoder"], False, False) == ("smollm", ())


def test_other_spellings_of_the_same_split_have_the_same_name() -> None:
    assert classify(_sequence(_split(CL100K), BYTES), True, True) == ("llama-bpe", ())
    assert classify(_sequence(_split(CL100K, "Removed", True), BYTES), False, True) == ("dbrx", ())
    assert classify(_sequence(_sequence(_split(r"\p{N}")), WORDS), False, True) == ("starcoder", ())


def test_the_spellings_split_the_same_text_the_same() -> None:
    import regex

    from llmx.validate.corpus import CORPUS

    patterns = [regex.compile(pattern) for pattern in (LLAMA3, CL100K)]
    assert all(patterns[0].findall(text) == patterns[1].findall(text) for text in CORPUS)


def test_every_rule_of_the_table_is_in_its_own_spelling() -> None:
    assert [step for steps in RULES for step in steps if canonical(step) != step] == []


def test_a_name_that_treats_merges_otherwise_says_so() -> None:
    assert "only through its merges" in classify(CASES["qwen2"], True, True)[1][0]
    assert "before its merges" in classify(CASES["tekken"], False, True)[1][1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (None, "neither on bytes"),
        (_sequence(BYTES), "no splitting rule"),
        ({**WORDS, "add_prefix_space": True}, "add_prefix_space"),
        (_sequence(_split(LLAMA3, "MergedWithNext"), BYTES), "MergedWithNext"),
        (_sequence(_split(r"\w+", "Removed", True), BYTES), "Removed"),
        (_sequence(_split(r"\w+"), BYTES), r"\\w\+"),
    ],
)
def test_unknown_rules_are_refused_in_their_own_words(rule: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        classify(rule, False, True)
