"""The GGUF container, every name an exporter or a check needs.

gguf_values.py: typed values; gguf_writer.py: header and layout; gguf_reader.py: bounded reader; gguf_split.py: sets.
"""

from __future__ import annotations

from llmx.formats.gguf_reader import GgufFile, GgufTensor, read_gguf
from llmx.formats.gguf_split import parse_size, read_gguf_set, shard_metadata, shard_name, split
from llmx.formats.gguf_values import (
    Plain,
    Value,
    array,
    f32,
    f64,
    flag,
    i8,
    i16,
    i32,
    i64,
    text,
    u8,
    u16,
    u32,
    u64,
)
from llmx.formats.gguf_writer import (
    Layout,
    Placement,
    TensorInfo,
    header_bytes,
    layout,
)

__all__ = [
    "GgufFile",
    "GgufTensor",
    "Layout",
    "Placement",
    "Plain",
    "TensorInfo",
    "Value",
    "array",
    "f32",
    "f64",
    "flag",
    "header_bytes",
    "i8",
    "i16",
    "i32",
    "i64",
    "layout",
    "parse_size",
    "read_gguf",
    "read_gguf_set",
    "shard_metadata",
    "shard_name",
    "split",
    "text",
    "u8",
    "u16",
    "u32",
    "u64",
]
