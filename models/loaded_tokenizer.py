"""A folder's tokenizer in the library that runs it, whatever rules it has: what tokenizer.py describes, not described.

tokenizer.json is loaded as it stands by `tokenizers`, tokenizer.model by SentencePiece. Remote code is never run and
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.json_text import read_object
from llmx.models.tokenizer import FILE_BYTES, open_tokenizer

Encode = Callable[[str, bool, bool], list[int]]


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """encode(text, add_special, parse_special) gives ids; name(id) a token's text or None; path is what was loaded.

    before: the ids that are put before every text, the beginning token or none.
    """

    encode: Encode
    name: Callable[[int], str | None]
    path: Path
    before: list[int]


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """Returns the tokenizer of a checkpoint's folder.

    Raises: UnsupportedError when there is none or the library refuses it; IntegrityError when its file is larger than
    FILE_BYTES or broken.
    """
    path = folder / "tokenizer.json"
    encode, name, path = _with_tokenizers(path) if path.is_file() else _with_sentencepiece(folder)
    return LoadedTokenizer(encode, name, path, _before(encode))


def read_config(folder: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json; empty where there is none."""
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.is_file() else {}


def special_texts(folder: Path) -> dict[str, str]:
    """Returns bos_token, eos_token, ... as a chat template sees them."""
    path = folder / "special_tokens_map.json"
    named = {**(read_object(path) if path.is_file() else {}), **read_config(folder)}
    texts = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}


def _before(encode: Encode) -> list[int]:
    bare, full = encode("a", False, False), encode("a", True, False)
    return full[: next(cut for cut in range(len(full) + 1) if full[cut : cut + len(bare)] == bare)]


def _with_tokenizers(path: Path) -> tuple[Encode, Callable[[int], str | None], Path]:
    """Where the file adds nothing before a text, tokenizer_config.json may still want its beginning token there."""
    import tokenizers

    if path.stat().st_size > FILE_BYTES:
        raise IntegrityError(f"a tokenizer of more than {FILE_BYTES} bytes is refused", where=path)
    try:
        loaded: Any = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise UnsupportedError(f"the tokenizers library refuses it: {error}", where=path) from error
    loaded.no_padding()
    loaded.no_truncation()
    wanted = special_texts(path.parent).get("bos_token") if read_config(path.parent).get("add_bos_token") else None
    bos = None if wanted is None else loaded.token_to_id(wanted)

    def encode(text: str, add_special: bool, parse_special: bool) -> list[int]:
        loaded.encode_special_tokens = not parse_special
        ids = list(loaded.encode(text, add_special_tokens=add_special).ids)
        return [bos, *ids] if add_special and bos is not None and ids[:1] != [bos] else ids

    return encode, loaded.id_to_token, path


def _with_sentencepiece(folder: Path) -> tuple[Encode, Callable[[int], str | None], Path]:
    """Not transformers: its version 5 rebuilds the tokenizer and, unless the config insists, forgets the beginning."""
    tokenizer = open_tokenizer(folder)
    names = dict(enumerate(tokenizer.tokens))
    return tokenizer.encode, names.get, folder
