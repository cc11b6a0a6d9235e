"""JSON that comes from strangers: bounded, one object, no key twice."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from llmx.errors import IntegrityError

# Brackets, commas and colons of one text: every value has one beside it and takes up to 60 bytes as a Python object,
# where it took two in the text. The index of the largest models has about 300,000.
MOST_SIGNS = 1 << 22
_SIGNS = ("[", "{", ",", ":")


def parse_object(text: bytes | str, where: object, most: int = MOST_SIGNS) -> dict[str, Any]:
    """The JSON object in `text`. most: brackets, commas and colons that it may have.

    Raises: IntegrityError when the text is no UTF-8, no JSON, no object, nested too deep, has more values than that, or
    names a key twice.
    """
    held = sum(text.count(sign.encode()) if isinstance(text, bytes) else text.count(sign) for sign in _SIGNS)
    if held > most:
        raise IntegrityError(f"This JSON has {held} brackets, commas and colons; the limit is {most}.", where=where)
    try:
        # Here, because of bytes json itself takes other encodings, too, and halves of surrogate pairs.
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # ValueError covers bad JSON, bad UTF-8 and numbers too long
        raise IntegrityError(f"This is not valid JSON: {error}.", where=where) from error
    if not isinstance(value, dict):
        raise IntegrityError(f"A JSON object was expected, not {type(value).__name__}.", where=where)
    return value


def read_object(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises: IntegrityError as parse_object, or when it is no file, a device behind a link say, which never ends, when it
    is larger than `limit`, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError("A JSON file was expected, and this is no file.", where=path)
        if status.st_size > limit:
            raise IntegrityError(f"A JSON file of {status.st_size} bytes is refused; the limit is {limit}.", where=path)
        with path.open("rb") as stream:
            text = stream.read(limit + 1)
        if len(text) > limit:  # it grew
            raise IntegrityError(f"A JSON file of over {limit} bytes is refused.", where=path)
    except OSError as error:
        raise IntegrityError(f"The file cannot be read: {error.strerror}.", where=path) from error
    return parse_object(text, path)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = sorted({key for key, _ in pairs if key in seen or seen.add(key)})
        raise ValueError(f"keys given twice: {', '.join(map(repr, twice[:10]))}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
