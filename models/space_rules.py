"""What a SentencePiece-like tokenizer.json does to spaces, read from its normalizer and pre-tokenizer.

The same habits have two spellings: older conversions use the normalizers Prepend and Replace, newer ones Metaspace.
They differ in two corners, which are reported and not hidden: Metaspace puts no prefix before a text that already
begins with a space, and with prepend_scheme "first" none after a special token. llama.cpp does what Prepend does.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError
from llmx.models.pretokenizers import Rule, flatten
from llmx.models.vocabulary import SPACE

NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
STARTS_WITH_SPACE = "a text that begins with a space: Hugging Face adds no second one, llama.cpp does"
AFTER_SPECIAL = "a text after a special token: Hugging Face puts no space before it, llama.cpp does"


@dataclass(frozen=True, slots=True)
class SpaceRules:
    """What happens to a text before the model runs."""

    escapes: bool = False  # spaces become SPACE
    prefix: bool = False  # a SPACE goes before the text
    joins: bool = False  # a run of spaces becomes one, and spaces at the end vanish
    words: bool = False  # the model never sees two words at once
    normalization: str | None = None
    charsmap: bytes | None = None  # SentencePiece's compiled character map
    differences: tuple[str, ...] = ()


def space_rules(document: Rule, where: object) -> SpaceRules:
    """Returns the rules of a parsed tokenizer.json.

    Raises: UnsupportedError listing every rule that is not known, IntegrityError for a broken character map.
    """
    rules, problems = SpaceRules(), []
    steps = [
        *flatten(document.get("normalizer"), "normalizers"),
        *flatten(document.get("pre_tokenizer"), "pretokenizers"),
    ]
    for step in steps:
        read = STEPS.get(str(step.get("type")))
        changed = None if read is None else read(rules, step)
        if changed is None:
            problems.append(json.dumps(step, ensure_ascii=False)[:300])
        else:
            rules = changed
    if not rules.escapes and not problems:
        problems.append(f"spaces are never turned into {SPACE!r}")
    if problems:
        raise UnsupportedError(
            "this tokenizer treats spaces or characters by rules that are not known", problems=problems, where=where
        )
    return rules


def _prepend(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    return replace(rules, prefix=True) if step.get("prepend") == SPACE else None


def _replace(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    pattern, content = step.get("pattern") or {}, step.get("content")
    if pattern.get("String") == " " and content == SPACE:
        return replace(rules, escapes=True)
    if pattern.get("Regex") == " {2,}" and content in (" ", SPACE):
        return replace(rules, joins=True)
    return None


def _strip(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    # SentencePiece conversions cut spaces at the end and join the others; the joining rule stands beside this one.
    return rules if step.get("strip_right") and not step.get("strip_left") else None


def _normal_form(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    return replace(rules, normalization=str(step["type"]))


def _precompiled(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    text: Any = step.get("precompiled_charsmap")
    if not text:
        return rules
    try:
        charsmap = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise IntegrityError("the normalizer's precompiled_charsmap is no base64") from error
    return replace(rules, charsmap=check_charsmap(charsmap))


def check_charsmap(charsmap: bytes) -> bytes:
    """Returns the compiled character map: u32 size of the trie, the trie, then the replacement texts.

    Raises: IntegrityError when the trie does not fit into it; llama.cpp would refuse the file.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size % 4 or size + 4 >= len(charsmap):
        raise IntegrityError(f"the compiled character map names a trie of {size} bytes but has {len(charsmap)} in all")
    return charsmap


def _metaspace(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
    if step.get("replacement") != SPACE or scheme not in ("always", "first", "never"):
        return None
    notes = {"always": (STARTS_WITH_SPACE,), "first": (STARTS_WITH_SPACE, AFTER_SPECIAL), "never": ()}[scheme]
    if rules.joins:
        notes = tuple(note for note in notes if note != STARTS_WITH_SPACE)  # joined with the prefix either way
    return replace(
        rules,
        escapes=True,
        prefix=rules.prefix or scheme != "never",
        words=rules.words or bool(step.get("split", True)),
        differences=(*rules.differences, *notes),
    )


def _whitespace_split(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    return replace(rules, joins=True, words=True)


def _split(rules: SpaceRules, step: Rule) -> SpaceRules | None:
    # Gemma's leftover: no plain space is left to split at once the normalizer has run.
    return rules if rules.escapes and step.get("pattern") == {"String": " "} else None


STEPS: dict[str, Callable[[SpaceRules, Rule], SpaceRules | None]] = {
    "Prepend": _prepend,
    "Replace": _replace,
    "Strip": _strip,
    "Precompiled": _precompiled,
    "Metaspace": _metaspace,
    "WhitespaceSplit": _whitespace_split,
    "Split": _split,
    **dict.fromkeys(NORMAL_FORMS, _normal_form),
}
