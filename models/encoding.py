"""The reference side of tokenization: Hugging Face's `tokenizers` or SentencePiece over the folder's own file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmx.errors import UnsupportedError
from llmx.models.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary


class JsonEncoder:
    """tokenizer.json in the `tokenizers` library; loaded at the first use."""

    def __init__(self, text: str, where: object) -> None:
        self._text, self._where = text, where
        self._loaded: dict[bool, Any] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Returns the ids of `text` without what the post-processor adds."""
        return list(self._tokenizer(parse_special).encode(text, add_special_tokens=False).ids)

    def _tokenizer(self, parse_special: bool) -> Any:
        if parse_special not in self._loaded:
            import tokenizers

            try:
                loaded = tokenizers.Tokenizer.from_str(self._text)
            except Exception as error:
                raise UnsupportedError(f"the tokenizers library refuses it: {error}", where=self._where) from error
            loaded.no_padding()
            loaded.no_truncation()
            loaded.encode_special_tokens = not parse_special
            self._loaded[parse_special] = loaded
        return self._loaded[parse_special]


class PieceEncoder:
    """tokenizer.model in the SentencePiece library; control and added tokens are cut out of the text before it."""

    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        self._data = data
        self._processor: Any = None
        tokens = {token: id for id, token in enumerate(vocabulary.tokens) if token}
        matched = {True: (CONTROL, UNKNOWN, USER_DEFINED), False: (USER_DEFINED,)}
        self._named = {
            parse: {token: id for token, id in tokens.items() if vocabulary.types[id] in types}
            for parse, types in matched.items()
        }

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Returns the ids of `text` without a beginning or end token."""
        if self._processor is None:
            import sentencepiece

            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._data)
        named: Mapping[str, int] = self._named[parse_special]
        names = "|".join(re.escape(name) for name in sorted(named, key=len, reverse=True))
        ids: list[int] = []
        for part in re.split(f"({names})", text) if names else [text]:
            if part in named:
                ids.append(named[part])
            elif part:
                ids += self._processor.encode(part, out_type=int)
        return ids
