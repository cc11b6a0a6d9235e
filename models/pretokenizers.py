r"""Pre-tokenizers by their rules: which of llama.cpp's pre-tokenizer names splits text as a tokenizer.json does.

A pre-tokenizer is flattened to a list of steps, each step brought to one spelling, and the list looked up in RULES.
So a new model with known rules needs no change here, and one with unknown rules is refused with the rule's own text.

One spelling means: literal line ends are written \r and \n; the English contractions have one form; possessive
quantifiers that cannot change a match are greedy; `\s*[\r\n]` and `\s*[\r\n]+` match the same (the first part takes
every line end but the last); a final `|\s+` after `|\s+(?!\S)` is dropped, because Isolated keeps what no rule matched
as a piece of its own. Digits is \p{N} or \p{N}+; ByteLevel with use_regex is GPT-2's regex.

Source: llama.cpp b11549, src/llama-vocab.cpp: the regexes that each name stands for, and which names take a whole
word's token before trying merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmx.errors import UnsupportedError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END_OF_RUN = r"|\s+(?!\S)"

# Applied in order; every pair matches the same text wherever these regexes use it.
SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
    ("]?+", "]?"),
    ("]++", "]+"),
    ("}++", "}+"),
    ("{1,3}+", "{1,3}"),
    (r"\p{N}{1}", r"\p{N}"),
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
    (END_OF_RUN + r"|\s+", END_OF_RUN),
    (END_OF_RUN + r"|\s", END_OF_RUN),
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" + END_OF_RUN
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LINE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_SLASH_LINE = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
LLAMA3 = CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _LINE + END_OF_RUN
QWEN2 = CONTRACTIONS + _WORD + r"|\p{N}" + _LINE + END_OF_RUN
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+" + END_OF_RUN
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_EDGE = r"[^\r\n\p{L}\p{N}]?"
_CASED = f"{_EDGE}{_UPPER}*{_LOWER}+{{0}}|{_EDGE}{_UPPER}+{_LOWER}*{{0}}"
TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}" + _SLASH_LINE + END_OF_RUN
GPT4O = _CASED.replace("{0}", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _SLASH_LINE + END_OF_RUN
YOUTU = _CASED.replace("{0}", CONTRACTIONS + "?") + r"|\p{N}" + _SLASH_LINE + END_OF_RUN
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
DEEPSEEK3 = _ASCII_PUNCTUATION + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+" + END_OF_RUN
# Cased letters of all scripts, in escapes: several of them are changed by a copy through Unicode normalization.
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~" "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
CJK_KANA = "[一-龥぀-ゟ゠-ヿ]+"
YOUTU_CJK = f"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{CJK_KANA}"
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", "[0-9][0-9][0-9]"


@dataclass(frozen=True, slots=True)
class Pre:
    """A pre-tokenizer name of llama.cpp. ignores_merges: a word that is a token is that token, whatever the merges."""

    name: str
    ignores_merges: bool = False
    note: str | None = None  # how llama.cpp's rule departs from the tokenizer's own


_CASE_NOTE = "llama.cpp tells upper from lower case in ASCII letters only, and combining marks are no letters to it"

# steps -> names that split so. The first whose ignores_merges equals the tokenizer's is taken, else the first.
# Names absent here that share a rule: phi-2, mpt, olmo, jais, exaone4 = gpt-2; refact, command-r, codeshell, exaone,
# minerva-7b = starcoder or smollm; stablelm2, deepseek-r1-qwen, megrez, hunyuan, grok-2, bailingmoe = qwen2;
# smaug-bpe, chatglm-bpe = dbrx; glm4, falcon3, lfm2, pixtral = llama-bpe; llama4, minimax-m2 = gpt-4o;
# hunyuan-dense, joyai-llm = deepseek-v3; poro-chat, gpt3-finnish = bloom; kormo, f2llmv2 = qwen2.
RULES: dict[tuple[str, ...], tuple[Pre, ...]] = {
    (GPT2,): (Pre("gpt-2"),),
    (DIGIT, GPT2): (Pre("starcoder"),),
    (LLAMA3,): (Pre("llama-bpe", True), Pre("dbrx")),
    (QWEN2,): (Pre("qwen2"),),
    (QWEN35,): (Pre("qwen35"),),
    (TEKKEN,): (Pre("tekken", True, _CASE_NOTE),),
    (GPT4O,): (Pre("gpt-4o", False, _CASE_NOTE),),
    (YOUTU_CJK, YOUTU): (Pre("youtu", True, _CASE_NOTE),),
    (DIGITS, r"(?=(\d{3})+(?!\d))"): (Pre("superbpe"),),
    (r"\p{N}{1,3}", CJK_KANA, DEEPSEEK3): (Pre("deepseek-v3"),),
    (r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, DIGIT): (Pre("deepseek-llm"),),
    (r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, DIGITS): (Pre("deepseek-llm"),),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, DIGIT): (Pre("deepseek-coder"),),
    ("punctuation contiguous", GPT2, THREE_DIGITS): (Pre("falcon"),),
    ("punctuation contiguous", GPT2, DIGITS, THREE_DIGITS): (Pre("falcon"),),
    (BLOOM,): (Pre("bloom"),),
    (BLOOM, DIGIT): (Pre("viking"),),
    (r"\p{N}{1,3}", CONTRACTIONS + _WORD + r"|\p{N}+" + _LINE + END_OF_RUN): (Pre("minicpm5", True),),
    (CONTRACTIONS + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+" + END_OF_RUN,): (Pre("seed-coder"),),
    (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O): (Pre("tiny_aya", False, _CASE_NOTE),),
}
# The same rule, for tokenizers that do not delete spaces before punctuation when they decode.
KEEPS_SPACES = {"starcoder": "smollm"}

Rule = Mapping[str, Any]


def flatten(rule: Rule | None, inner: str) -> list[Rule]:
    """Returns nested Sequences as one list of rules; `inner` is the key of a Sequence's parts."""
    if rule is None:
        return []
    if rule.get("type") != "Sequence":
        return [rule]
    return [step for part in rule.get(inner, ()) for step in flatten(part, inner)]


def canonical(regex: str) -> str:
    """Returns the one spelling of a regex (see the top of the file)."""
    for old, new in SPELLINGS:
        regex = regex.replace(old, new)
    return regex


def classify(pre_tokenizer: Rule | None, ignore_merges: bool, cleans_spaces: bool) -> tuple[str, tuple[str, ...]]:
    """Returns llama.cpp's name for a byte-level pre-tokenizer, and how the two differ, in words.

    Raises: UnsupportedError with every rule that is not known.
    """
    rules = flatten(pre_tokenizer, "pretokenizers")
    steps = _steps(rules)
    found = RULES.get(tuple(steps))
    if found is None:
        raise UnsupportedError(
            "no pre-tokenizer of llama.cpp is known to split text by these rules",
            problems=[step if len(step) < 300 else step[:300] + "..." for step in steps]
            or ["no splitting rule at all"],
            fix="add the rules and the matching name to RULES in models/pretokenizers.py",
        )
    pre = next((pre for pre in found if pre.ignores_merges == ignore_merges), found[0])
    differences = [] if pre.note is None else [f"pre-tokenizer {pre.name}: {pre.note}"]
    if pre.ignores_merges != ignore_merges:
        order = "before" if pre.ignores_merges else "only through"
        differences.append(f"pre-tokenizer {pre.name}: llama.cpp takes a whole word's token {order} its merges")
    name = pre.name if cleans_spaces else KEEPS_SPACES.get(pre.name, pre.name)
    return name, tuple(differences)


def _steps(rules: Sequence[Rule]) -> list[str]:
    if not any(rule.get("type") == "ByteLevel" for rule in rules):
        raise UnsupportedError(
            "this BPE works neither on bytes nor on characters with byte fallback",
            problems=[_shown(rule) for rule in rules],
        )
    steps, problems = [], []
    for rule in rules:
        read = STEPS.get(str(rule.get("type")))
        step = None if read is None else read(rule)
        if step is None:
            problems.append(_shown(rule))
        elif step:
            steps.append(step)
    if problems:
        raise UnsupportedError("this tokenizer's pre-tokenizer has rules that are not known", problems=problems)
    return steps


def _shown(rule: Rule) -> str:
    text = json.dumps(rule, ensure_ascii=False)
    return text if len(text) < 400 else text[:400] + "..."


# Each returns the step's text, "" for a rule that splits nothing, None for one that is not known.
def _byte_level(rule: Rule) -> str | None:
    if rule.get("add_prefix_space", True):
        return None
    return GPT2 if rule.get("use_regex", True) else ""


def _digits(rule: Rule) -> str | None:
    return DIGIT if rule.get("individual_digits") else DIGITS


def _punctuation(rule: Rule) -> str | None:
    return "punctuation " + str(rule.get("behavior", "Isolated")).lower()


def _split(rule: Rule) -> str | None:
    pattern = rule.get("pattern", {}).get("Regex")
    if not isinstance(pattern, str):
        return None
    regex, way = canonical(pattern), (rule.get("behavior"), bool(rule.get("invert")))
    # "Remove what does not match" equals "isolate what matches" for a regex that matches every character.
    isolates = way == ("Isolated", False) or (way == ("Removed", True) and regex.endswith(END_OF_RUN))
    return regex if isolates else None


STEPS = {"ByteLevel": _byte_level, "Digits": _digits, "Punctuation": _punctuation, "Split": _split}
