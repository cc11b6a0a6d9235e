"""What a tokenizer file says, before the other files of its folder add roles and templates to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["byte_bpe", "spm_bpe", "unigram"]

# SentencePiece's piece types; GGUF uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # U+2581, SentencePiece's visible space


class Encoder(Protocol):
    """The reference tokenizer library over the folder's own file."""

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Returns the ids of `text`; without parse_special, the names of special tokens are ordinary text."""
        ...


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in the text before the model's own rules see it."""

    id: int
    content: str
    special: bool = False
    strips_left: bool = False  # swallows whitespace before it
    strips_right: bool = False
    whole_word: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One tokenizer file, made neutral. Index = id in `tokens`, `types` and `scores`.

    tokens: ids that no token has are None. Byte-level pieces are in GPT-2's byte alphabet, added tokens in plain text.
    scores: spm_bpe and unigram; higher merges first. merges: byte_bpe, in rank order.
    pre: llama.cpp's name for the pre-tokenizer's rules.
    adds: what the file itself puts around a text, (bos id or None, eos id or None); None when it does not say.
    differences: rules of this file that a GGUF vocabulary cannot express, in words.
    """

    kind: Kind
    tokens: tuple[str | None, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    pre: str
    unknown: int | None
    adds: tuple[int | None, int | None] | None
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    normalization: str | None = None  # a Unicode normal form
    charsmap: bytes | None = None  # SentencePiece's compiled character map
    roles: Mapping[str, int] = field(default_factory=dict)  # what the file itself names: {"bos": 1, ...}
    strips_right: tuple[int, ...] = ()  # added tokens that swallow the whitespace after them
    differences: tuple[str, ...] = ()


def added_token(id: int, content: str, entry: Mapping[str, Any]) -> AddedToken:
    """Returns an added token from the flags that Hugging Face's files use."""
    flags = (bool(entry.get(name)) for name in ("special", "lstrip", "rstrip", "single_word"))
    return AddedToken(id, content, *flags)
