"""Text that strangers wrote, on somebody's terminal: names and messages may hold what terminals obey."""

from __future__ import annotations

import re

# Control characters but for the end of a line and the tabulator, marks that turn the direction of writing, and halves
# of surrogate pairs, which stand for bytes of a file's name that are no UTF-8 and which no stream takes.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LINES = {"\n": "\\n", "\t": "\\t"}


def harmless(text: str) -> str:
    """The text with what a terminal obeys spelled out: ESC becomes \\x1b. Lines stay lines."""
    return _OBEYED.sub(lambda found: _spelled(found[0]), text)


def on_one_line(text: str) -> str:
    """The same, and the ends of lines spelled out too: for a name in a table."""
    return harmless(text).translate(str.maketrans(_LINES))


def harmless_json(text: str) -> str:
    """The same JSON, as these characters stand inside its texts only."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
