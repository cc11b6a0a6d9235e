"""onnxruntime-genai's tokenizer and template engine of one folder, inside the worker process; no weight is read."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmx.errors import CheckFailed, IntegrityError, UnsupportedError
from llmx.formats.json_text import read_object

genai: Any = importlib.import_module("onnxruntime_genai")

ADDS = "add_special_tokens"
TEMPLATE_FILE = "chat_template.jinja"
PROBE = "a"
LOST = "\ufffd"  # what genai writes for bytes that are no whole character
SPACE, FIRST_BYTE = "\u2581", "<0x"  # SentencePiece's space, and the name of a token that is one byte: <0x0A>

T = TypeVar("T")


class FolderText:
    """The tokenizer as genai makes it of tokenizer.json and tokenizer_config.json."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = refused(lambda: genai.Tokenizer(str(folder)), folder)
        written = read_object(folder / "tokenizer.json")
        config = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        self._added = {int(one["id"]): str(one["content"]) for one in written.get("added_tokens", ())}
        self._pieces = _pieces(written)
        self.has_template = bool(config.get("chat_template")) or (folder / TEMPLATE_FILE).is_file()

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of text.

        Raises: UnsupportedError for a text with the name of an added token that is not to be read as that token:
        genai has no such switch.
        """
        if not parse_special and (named := [name for name in self._added.values() if name and name in text]):
            what = f"onnxruntime-genai always reads {named[0]!r} in a text as that token"
            raise UnsupportedError(what, fix="leave its name out of the text")
        self._tokenizer.update_options(**{ADDS: "true" if add_special else "false"})
        return [int(token) for token in failed(lambda: self._tokenizer.encode(text))]

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; genai decodes no special token and no part of a character, so tokenizer.json
        has the last word on these."""
        if token in self._added:
            return self._added[token].encode()
        text = failed(lambda: self._tokenizer.decode([token]))
        if text and LOST not in text:
            return text.encode()
        return _bytes_of(self._pieces.get(token, ""))

    def special(self) -> dict[str, Any]:
        """Return bos, eos, add_bos and end_of_generation, as genai has them; -1 is none."""
        ends = [int(token) for token in self._tokenizer.eos_token_ids]
        bos = int(self._tokenizer.bos_token_id)
        adds = bos in self.tokenize(PROBE, True, True)[:1]
        return {
            "bos": bos if bos >= 0 else None,
            "eos": ends[0] if ends else None,
            "add_bos": adds,
            "end_of_generation": ends,
        }

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """Return the conversation as genai's template engine writes it."""
        told = json.dumps(list(messages), ensure_ascii=False)
        return failed(
            lambda: self._tokenizer.apply_chat_template(told, add_generation_prompt=add_generation_prompt),
        )


def refused(run: Callable[[], T], where: Path) -> T:
    """What run returns. Raises: IntegrityError with genai's words where it refuses the folder."""
    try:
        return run()
    except (RuntimeError, ValueError) as error:
        raise IntegrityError("onnxruntime-genai refuses this folder", where=where, problems=[str(error)]) from error


def failed(run: Callable[[], T]) -> T:
    """What run returns. Raises: CheckFailed with genai's words where it fails."""
    try:
        return run()
    except (RuntimeError, ValueError) as error:
        raise CheckFailed("onnxruntime-genai cannot do this", problems=[str(error)]) from error


def _pieces(written: Mapping[str, Any]) -> dict[int, str]:
    """id -> the vocabulary's own spelling."""
    vocabulary = written.get("model", {}).get("vocab", {})
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((one[0], at) for at, one in enumerate(vocabulary))
    return {int(token): piece for piece, token in pairs}


def _bytes_of(piece: str) -> bytes:
    """The bytes that a spelling stands for: one byte by its name, or the characters that GPT-2 writes for bytes."""
    if piece.startswith(FIRST_BYTE) and piece.endswith(">"):
        return bytes.fromhex(piece[len(FIRST_BYTE) : -1])
    if all(character in BYTES for character in piece):
        return bytes(BYTES[character] for character in piece)
    return piece.replace(SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the others are numbered on from 256."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _byte_characters()
