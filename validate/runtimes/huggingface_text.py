"""The text of a folder in Hugging Face's layout, as transformers reads it, and runtimes that serve such folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmx.errors import CheckFailed
from llmx.formats.json_text import read_object
from llmx.validate.oracle import Tokens, end_ids

GENERATION = "generation_config.json"
NO_TEMPLATE = "the folder has no chat template"
PROBE = "a"
SPACE, FIRST_BYTE = "\u2581", "<0x"  # SentencePiece's space, and the name of a token that is one byte: <0x0A>


class FolderText:
    """The tokenizer and chat template of a folder; see Session for what each method returns."""

    def __init__(self, folder: Path) -> None:
        """Raises: UnsupportedError where transformers cannot load the tokenizer."""
        self._tokens = Tokens(folder)
        generation = folder / GENERATION
        self._generation: Mapping[str, Any] = read_object(generation) if generation.is_file() else {}

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        return self._tokens.encode(text, add_special, parse_special)

    def piece(self, token: int) -> bytes:
        """Raises: CheckFailed for an id that is none."""
        spelling = self._tokens.spelling(token)
        if spelling is None:
            raise CheckFailed(f"{token} is no token of this tokenizer")
        return spelling.encode() if token in self._tokens.added else bytes_of(spelling)

    def special(self) -> dict[str, object]:
        adds = self._tokens.bos is not None and self._tokens.encode(PROBE, True)[:1] == [self._tokens.bos]
        return {
            "bos": self._tokens.bos,
            "eos": self._tokens.eos,
            "add_bos": adds,
            "end_of_generation": frozenset(end_ids(self._generation, self._tokens)),
        }

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool) -> str | None:
        if self.template_unavailable() is not None:
            return None
        told = [{key: str(value) for key, value in message.items()} for message in messages]
        return self._tokens.render(told, add_generation_prompt)

    def template_unavailable(self) -> str | None:
        return None if self._tokens.has_template else NO_TEMPLATE


def bytes_of(spelling: str) -> bytes:
    """The bytes that a vocabulary's spelling stands for: one byte by its name, or GPT-2's characters for bytes."""
    if spelling.startswith(FIRST_BYTE) and spelling.endswith(">"):
        return bytes.fromhex(spelling[len(FIRST_BYTE) : -1])
    if all(character in BYTES for character in spelling):
        return bytes(BYTES[character] for character in spelling)
    return spelling.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the others are numbered on from 256."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _byte_characters()
