"""The bytes of a GGUF header and the place of every tensor, both known before any data is written.

    bytes    field
    4        "GGUF"
    4        u32 version = 3
    8        u64 number of tensors
    8        u64 number of metadata pairs
    ...      each pair:    str key, u32 value type, the value (see gguf_values.py)
    ...      each tensor:  str name, u32 n_dims, u64 dims[n_dims] (fastest first: the shape reversed), u32 ggml type,
                           u64 offset from the start of the data section
    ...      zeros up to a multiple of the alignment
    ...      the data section: tensors in the order of their infos, each padded with zeros to the alignment

Source: the GGUF specification; llama.cpp's loader, which wants every tensor exactly where the one before it ends.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from llmx.errors import UnsupportedError
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.gguf_values import (
    ALIGNMENT_KEY,
    ARRAY_ID,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_NAME_BYTES,
    SCALARS,
    TYPE_IDS,
    VERSION,
    Scalar,
    Value,
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a tensor is before it has a place. shape: as numpy has it, rows before columns."""

    name: str
    type_name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the data, without padding."""
        return prod(self.shape[:-1]) * row_bytes(self.type_name, self.shape[-1])


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor's data lies: `nbytes` bytes from `offset`, counted from the start of the file."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole file before its data: header bytes, tensors' places, and the file's size in bytes, padding included."""

    header: bytes
    placements: dict[str, Placement]
    size: int


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    """Returns everything before the data section, padded to the alignment.

    Raises: UnsupportedError listing every value and tensor that a GGUF file cannot hold.
    """
    pairs, problems = _pack_metadata(metadata)
    problems += _tensor_problems(tensors)
    if problems:
        raise UnsupportedError("this cannot be written as GGUF", problems=problems)
    alignment = _alignment(metadata)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata)), *pairs]
    offset = 0
    for tensor in tensors:
        parts.append(_pack_info(tensor, offset))
        offset += padded(tensor.nbytes, alignment)
    unpadded = b"".join(parts)
    return unpadded.ljust(padded(len(unpadded), alignment), b"\0")


def layout(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> Layout:
    """Returns the header, each tensor's place and the size of the file.

    The gaps between tensors, and after the last, are zeros: a file truncated to `size` first already has them.

    Raises: UnsupportedError, as header_bytes does.
    """
    header = header_bytes(metadata, tensors)
    alignment = _alignment(metadata)
    placements, at = {}, len(header)
    for tensor in tensors:
        placements[tensor.name] = Placement(at, tensor.nbytes)
        at += padded(tensor.nbytes, alignment)
    return Layout(header, placements, at)


def padded(size: int, alignment: int) -> int:
    """Returns `size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def _alignment(metadata: Mapping[str, Value]) -> int:
    given = metadata.get(ALIGNMENT_KEY)
    return DEFAULT_ALIGNMENT if given is None else int(given.value)  # pyright: ignore[reportArgumentType]


def _pack_text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _pack_items(type_name: str, values: Sequence[Scalar]) -> bytes:
    if type_name == "str":
        return b"".join(_pack_text(value) for value in values)  # pyright: ignore[reportArgumentType]
    return struct.pack(f"<{len(values)}{SCALARS[type_name][1].format[-1]}", *values)


def _pack_value(value: Value) -> bytes:
    if not value.type.startswith("["):
        return struct.pack("<I", TYPE_IDS[value.type]) + _pack_items(value.type, [value.value])  # pyright: ignore[reportArgumentType]
    item_type = value.type[1:-1]
    items: tuple[Scalar, ...] = value.value  # pyright: ignore[reportAssignmentType]
    return struct.pack("<IIQ", ARRAY_ID, TYPE_IDS[item_type], len(items)) + _pack_items(item_type, items)


def _pack_metadata(metadata: Mapping[str, Value]) -> tuple[list[bytes], list[str]]:
    pairs, problems = [], []
    for key, value in metadata.items():
        if not key:
            problems.append("a key is empty")
        try:
            pairs.append(_pack_text(key) + _pack_value(value))
        except (struct.error, OverflowError, UnicodeEncodeError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{key!r}: does not fit {value.type} ({error})")
    alignment = metadata.get(ALIGNMENT_KEY)
    if alignment is not None and not _usable_alignment(alignment):
        problems.append(f"{ALIGNMENT_KEY}: {alignment.value!r} is not a u32 power of two up to {MAX_ALIGNMENT}")
    return pairs, problems


def _usable_alignment(value: Value) -> bool:
    number = value.value
    return (
        value.type == "u32" and isinstance(number, int) and 0 < number <= MAX_ALIGNMENT and number & (number - 1) == 0
    )


def _pack_info(tensor: TensorInfo, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return _pack_text(tensor.name) + dims + struct.pack("<IQ", BLOCKS[tensor.type_name].id, offset)


def _tensor_problems(tensors: Sequence[TensorInfo]) -> list[str]:
    problems = []
    names = sorted(tensor.name for tensor in tensors)
    problems += [f"{name}: the name occurs twice" for name, following in pairwise(names) if name == following]
    for tensor in tensors:
        if not 0 < len(tensor.name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
            problems.append(f"{tensor.name!r}: a name has 1 to {MAX_NAME_BYTES} bytes")
        if tensor.type_name not in BLOCKS:
            problems.append(f"{tensor.name}: {tensor.type_name!r} is not a ggml type")
        elif not 0 < len(tensor.shape) <= MAX_DIMS or min(tensor.shape) < 1:
            problems.append(f"{tensor.name}: shape {tensor.shape}; a tensor has 1 to {MAX_DIMS} dimensions above 0")
        elif tensor.shape[-1] % BLOCKS[tensor.type_name].weights:
            weights = BLOCKS[tensor.type_name].weights
            problems.append(
                f"{tensor.name}: rows of {tensor.shape[-1]} are not whole {tensor.type_name} blocks of {weights}"
            )
    return problems
