"""The typed values of a GGUF file's metadata, and the container's constants. Source: the GGUF specification, version 3.

    value type   id   bytes            value type   id   bytes
    u8            0   1                 bool          7   1, only 0 or 1
    i8            1   1                 str           8   u64 length, then UTF-8 without a terminator
    u16           2   2                 array         9   u32 item type, u64 count, then the items
    i16           3   2                 u64          10   8
    u32           4   4                 i64          11   8
    i32           5   4                 f64          12   8
    f32           6   4

All little-endian. An array's type is written here with brackets: "[str]" is an array of strings. Arrays of arrays
exist in the specification only: llama.cpp refuses them, so do we.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
ALIGNMENT_KEY = "general.alignment"
SPLIT_NUMBER_KEY, SPLIT_COUNT_KEY, SPLIT_TENSORS_KEY = "split.no", "split.count", "split.tensors.count"
MAX_DIMS = 4  # ggml's limit
MAX_NAME_BYTES = 63  # ggml keeps 64 bytes for a tensor's name, one for the terminator

SCALARS = {
    "u8": (0, struct.Struct("<B")),
    "i8": (1, struct.Struct("<b")),
    "u16": (2, struct.Struct("<H")),
    "i16": (3, struct.Struct("<h")),
    "u32": (4, struct.Struct("<I")),
    "i32": (5, struct.Struct("<i")),
    "f32": (6, struct.Struct("<f")),
    "bool": (7, struct.Struct("<?")),
    "u64": (10, struct.Struct("<Q")),
    "i64": (11, struct.Struct("<q")),
    "f64": (12, struct.Struct("<d")),
}
STRING_ID, ARRAY_ID = 8, 9
TYPE_IDS = {**{name: number for name, (number, _) in SCALARS.items()}, "str": STRING_ID}
TYPE_NAMES = {number: name for name, number in TYPE_IDS.items()}

Scalar = int | float | bool | str
Plain = Scalar | list[int] | list[float] | list[bool] | list[str]


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value. type: a name of TYPE_IDS, or that name in brackets for an array of it."""

    type: str
    value: Scalar | tuple[Scalar, ...]


def u8(value: int) -> Value:
    """Returns an unsigned 8-bit value."""
    return Value("u8", index(value))


def i8(value: int) -> Value:
    """Returns a signed 8-bit value."""
    return Value("i8", index(value))


def u16(value: int) -> Value:
    """Returns an unsigned 16-bit value."""
    return Value("u16", index(value))


def i16(value: int) -> Value:
    """Returns a signed 16-bit value."""
    return Value("i16", index(value))


def u32(value: int) -> Value:
    """Returns an unsigned 32-bit value: llama.cpp's type for counts, sizes and token ids."""
    return Value("u32", index(value))


def i32(value: int) -> Value:
    """Returns a signed 32-bit value."""
    return Value("i32", index(value))


def u64(value: int) -> Value:
    """Returns an unsigned 64-bit value."""
    return Value("u64", index(value))


def i64(value: int) -> Value:
    """Returns a signed 64-bit value."""
    return Value("i64", index(value))


def f32(value: float) -> Value:
    """Returns a 32-bit float, rounded when it is written."""
    return Value("f32", float(value))


def f64(value: float) -> Value:
    """Returns a 64-bit float."""
    return Value("f64", float(value))


def flag(value: bool) -> Value:
    """Returns a bool."""
    return Value("bool", bool(value))


def text(value: str) -> Value:
    """Returns a string."""
    return Value("str", value)


def array(type: str, values: Sequence[Scalar]) -> Value:
    """Returns an array of `type`, a name of TYPE_IDS ("i32", "str", ...)."""
    return Value(f"[{type}]", tuple(values))
