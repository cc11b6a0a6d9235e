"""Calibration input: a text of the user's or the built-in corpus, cut into sequences of token ids.

FILE.jsonl, .ndjson, .json   one JSON value a line: {"text"}, {"messages"}, {"prompt", "completion"}, or a string
any other file               one text

A calibration sees what a model sees when it runs: the beginning token is first in every sequence and nowhere else, as
trained models use it as an attention sink; conversations are rendered through the model's own chat template; the names
of special tokens are special in rendered conversations only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, UsageError
from llmx.formats.safetensors import shorten
from llmx.models import chat_template
from llmx.models.loaded_tokenizer import LoadedTokenizer, load_tokenizer, read_config, special_texts

CORPUS = Path(__file__).with_name("calibration_corpus.txt")
CORPUS_NAME = "built-in corpus"
CORPUS_MARK = "\n<|document|>\n"
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
SEPARATOR = "\n\n"  # between texts that are no conversations
TEXT_BYTES = 256 << 20  # read whole; a calibration takes some hundred thousand tokens of it, so more buys nothing
# Statistics from fewer positions than a layer has columns have no full rank, and even small layers have about a
# thousand columns; some of the positions are held out.
MINIMUM_TOKENS = 2048
BLOCK = 1 << 16  # characters that are kept or left out together, so that the text is read in long runs
THIN_ABOVE = 1 << 20  # characters that are tokenized whatever is asked for
CHARACTERS_A_TOKEN = 8  # twice what English takes; beyond so many a token asked for, the text is thinned unread


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with "role" and "content", and the line of the file that holds them."""

    messages: tuple[Mapping[str, Any], ...]
    line: int

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


Document = str | Conversation


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """What was read: the file's name, the sha256 of its bytes in hexadecimal, and its documents that are not empty."""

    name: str
    sha256: str
    documents: tuple[Document, ...] = field(repr=False)


def read_calibration(path: Path | None) -> CalibrationText:
    """Returns the documents of a UTF-8 text file, of a JSON Lines file, or of the built-in corpus (None).

    Raises: UsageError when the file does not exist, is too large or holds no text; IntegrityError when it is not UTF-8
    or has lines that are no JSON or have none of the known keys, each named.
    """
    data = _read(path or CORPUS)
    text = _decode(data, path or CORPUS)
    if path is None:
        documents: Sequence[Document] = text.split(CORPUS_MARK)
    else:
        documents = _read_lines(text, path) if path.suffix.lower() in LINE_SUFFIXES else [text]
    documents = [part for part in documents if not isinstance(part, str) or part.strip()]
    if not documents:
        raise UsageError("the calibration file holds no text", where=path, fix="give a file with text in it")
    name = CORPUS_NAME if path is None else path.name
    return CalibrationText(name, hashlib.sha256(data).hexdigest(), tuple(documents))


def _read(path: Path) -> bytes:
    fix = "give a UTF-8 text or JSON Lines file, or leave --calibration out for the built-in corpus"
    if not path.is_file():
        what = "the calibration file is no regular file" if path.exists() else "there is no such calibration file"
        raise UsageError(what, where=path, fix=fix)
    try:
        size = path.stat().st_size
        if size > TEXT_BYTES:
            raise UsageError(
                f"the calibration file has {size} bytes; at most {TEXT_BYTES} are read",
                where=path,
                fix="give a part of it",
            )
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the calibration file cannot be read: {error.strerror}", where=path, fix=fix) from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems: list[str] = []
        for number, line in enumerate(data.split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as bad:
                problems.append(f"line {number}: byte {bad.start + 1} is {line[bad.start]:#04x}")
        raise IntegrityError(
            "the calibration file is not UTF-8", problems=shorten(problems), where=path, fix="save it as UTF-8"
        ) from error


def _read_lines(text: str, path: Path) -> list[Document]:
    documents: list[Document] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at characters that JSON allows
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line), number)
            "".join([document] if isinstance(document, str) else [m["content"] for m in document.messages]).encode()
            documents.append(document)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: no JSON at column {error.colno}: {error.msg}")
        except UnicodeEncodeError:
            problems.append(f"line {number}: half of a surrogate pair, which is no Unicode text")
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise IntegrityError(
            "the calibration file has lines that cannot be used",
            problems=shorten(problems),
            where=path,
            fix='write one JSON value a line: {"text": ...}, {"messages": [{"role": ..., "content": ...}, ...]}, '
            '{"prompt": ..., "completion": ...} or a string; or rename the file to .txt if it is plain text',
        )
    return documents


def _document(value: object, line: int) -> Document:
    """Returns the document of one line. Raises: ValueError in words when it has none."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object or string was expected, not {type(value).__name__}")
    for keys, read in READERS.items():
        if all(key in value for key in keys):
            return read(*(value[key] for key in keys), line)
    names = ", ".join(repr(key)[:40] for key in list(value)[:8]) or "nothing"
    raise ValueError(f'no "text", no "messages", no "prompt" with "completion"; it has {names}')


def _text(text: object, line: int) -> str:
    if not isinstance(text, str):
        raise ValueError(f'"text" is no string but {type(text).__name__}')
    return text


def _pair(prompt: object, completion: object, line: int) -> str:
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError('"prompt" and "completion" must be strings')
    return prompt + completion


def _conversation(messages: object, line: int) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is no list of messages')
    for index, message in enumerate(messages):
        given = message if isinstance(message, dict) else {}
        if not isinstance(given.get("role"), str) or not isinstance(given.get("content"), str):
            raise ValueError(f'message {index + 1} has no "role" and "content" that are strings')
    return Conversation(tuple(messages), line)


READERS: dict[tuple[str, ...], Callable[..., Document]] = {
    ("text",): _text,
    ("messages",): _conversation,
    ("prompt", "completion"): _pair,
}


def sequences(
    text: CalibrationText, checkpoint_folder: Path, *, tokens: int, length: int, vocab: int
) -> tuple[tuple[int, ...], ...]:
    """Returns at most tokens // length (at least one) sequences of `length` ids, spread evenly over the whole text.

    Each begins with the beginning token where the tokenizer adds one. A last part that fills no sequence is left out,
    unless it is the only one. vocab: rows of the model's embedding. The same input gives the same ids.
    Raises: UsageError when the text has fewer than MINIMUM_TOKENS tokens; IntegrityError for ids that the model does
    not have, and for conversations that the chat template refuses; UnsupportedError for a tokenizer that does not load.
    """
    tokenizer = load_tokenizer(checkpoint_folder)
    ids = _encode(text, checkpoint_folder, tokenizer, max(THIN_ABOVE, CHARACTERS_A_TOKEN * tokens))
    largest = max((*tokenizer.before, *ids), default=0)
    if largest >= vocab:
        raise IntegrityError(
            f"token {largest} ({tokenizer.name(largest)!r}) is outside the model's vocabulary of {vocab} tokens: "
            "the tokenizer is of another model",
            where=tokenizer.path,
            fix="put the tokenizer files that belong to the model beside its weights",
        )
    if len(ids) < MINIMUM_TOKENS:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens; at least {MINIMUM_TOKENS} are needed",
            where=text.name,
            fix="give more text, or leave --calibration out for the built-in corpus",
        )
    packed = pack(ids, length=length, before=tokenizer.before)
    return tuple(packed[index] for index in spread(len(packed), max(1, tokens // length)))


def pack(ids: Sequence[int], *, length: int, before: Sequence[int] = ()) -> tuple[tuple[int, ...], ...]:
    """Returns the ids in order, in sequences of `length` ids that each begin with `before`; a short last one is left
    out unless it is the only one."""
    step = length - len(before)
    assert step > 0, "a sequence must have room for more than the beginning token"
    full = tuple((*before, *ids[start : start + step]) for start in range(0, len(ids) - step + 1, step))
    return full or ((*before, *ids),)


def spread(count: int, wanted: int) -> tuple[int, ...]:
    """Returns `wanted` indices below `count` at even distances, first and last among them; all when there are fewer."""
    if wanted >= count:
        return tuple(range(count))
    return tuple(index * (count - 1) // max(wanted - 1, 1) for index in range(wanted))


def _encode(text: CalibrationText, folder: Path, tokenizer: LoadedTokenizer, budget: int) -> list[int]:
    """Returns the ids of all documents joined, without beginning tokens; of a part when there is more than `budget`."""
    names = special_texts(folder)
    template = chat_template.read_templates(folder, read_config(folder)).get(chat_template.DEFAULT)
    documents = text.documents if template is not None else tuple(_joined(part) for part in text.documents)
    ids: list[int] = []
    problems: list[str] = []
    for document in _thinned(_pieces(documents), budget):
        if isinstance(document, str):
            ids += tokenizer.encode(document, False, False)
            continue
        try:
            rendered = chat_template.render(template or "", document.messages, add_generation_prompt=False, **names)
        except IntegrityError as error:
            problems.append(f"line {document.line}: {error.what}")
            continue
        found = tokenizer.encode(rendered, False, True)
        begins = found[: len(tokenizer.before)] == tokenizer.before
        ids += found[len(tokenizer.before) :] if begins else found
    if problems:
        raise IntegrityError("conversations cannot be rendered", problems=shorten(problems), where=text.name)
    return ids


def _joined(document: Document) -> str:
    return document if isinstance(document, str) else "\n".join(message["content"] for message in document.messages)


def _pieces(documents: Sequence[Document]) -> list[Document]:
    """Returns the documents with texts cut to at most BLOCK characters, at the ends of lines or words, and joined by
    SEPARATOR."""
    pieces: list[Document] = []
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            pieces.append(document)
            continue
        start, end = 0, len(document)
        while end - start > BLOCK:
            half, whole = start + BLOCK // 2, start + BLOCK
            cut = document.rfind("\n", half, whole) + 1 or max(document.rfind(" ", half, whole), 0) or whole
            pieces.append(document[start:cut])
            start = cut
        pieces.append(document[start:] + (SEPARATOR if index + 1 < len(documents) else ""))
    return pieces


def _thinned(pieces: list[Document], budget: int) -> list[Document]:
    """Returns all pieces, or blocks of them from start to end with about `budget` characters together."""
    *starts, total = accumulate((len(piece) for piece in pieces), initial=0)
    if total <= budget:
        return pieces
    chosen = set(spread(starts[-1] // BLOCK + 1, budget // BLOCK))
    return [piece for piece, start in zip(pieces, starts, strict=True) if start // BLOCK in chosen]
