"""Importance matrices made to do harm, of both kinds; a GGUF one with the words that name its offence."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from llmx.formats.gguf import TensorInfo, array, layout, text, u32

KEYS = {
    "general.type": text("imatrix"),
    "imatrix.datasets": array("str", ["calib.txt"]),
    "imatrix.chunk_count": u32(2),
    "imatrix.chunk_size": u32(64),
}


def gguf_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    """A file of the GGUF kind, written."""
    planned = layout(
        KEYS if metadata is None else metadata,
        [
            TensorInfo(name, "F16" if values.dtype == np.float16 else "F32", values.shape)
            for name, values in tensors.items()
        ],
    )
    whole = bytearray(planned.size)
    whole[: len(planned.header)] = planned.header
    for name, values in tensors.items():
        place = planned.placements[name]
        whole[place.offset : place.offset + place.nbytes] = values.tobytes()
    path.write_bytes(whole)
    return path


ones = np.ones((2, 4), np.float32)
two = np.ones((2, 1), np.float32)
DAMAGED_GGUF = {
    "no entries": ({"other": ones}, None, "no entries"),
    "no counts": ({"w.in_sum2": ones}, None, "w: .counts is missing"),
    "no sums": ({"w.counts": two}, None, "w: .in_sum2 is missing"),
    "half floats": ({"w.in_sum2": ones.astype(np.float16), "w.counts": two}, None, "not F32"),
    "not a number": ({"w.in_sum2": ones * np.nan, "w.counts": two}, None, "not finite"),
    "negative sum": ({"w.in_sum2": -ones, "w.counts": two}, None, "negative"),
    "negative count": ({"w.in_sum2": ones, "w.counts": -two}, None, "negative"),
    "a count too large": ({"w.in_sum2": ones, "w.counts": two * np.float32(1e30)}, None, "a count is above"),
    "uneven": ({"w.in_sum2": ones, "w.counts": np.ones((3, 1), np.float32)}, None, "8 sums for 3 experts"),
    "no keys": ({"w.in_sum2": ones, "w.counts": two}, {"general.type": text("imatrix")}, "imatrix.datasets is missing"),
    "key of another type": (
        {"w.in_sum2": ones, "w.counts": two},
        {**KEYS, "imatrix.chunk_size": text("64")},
        "imatrix.chunk_size is str instead of u32",
    ),
}


def integer(value: int) -> bytes:
    return struct.pack("<i", value)


def entry(
    name: bytes = b"w", calls: int = 2, values: tuple[float, ...] = (2.0, 4.0), count: int | None = None
) -> bytes:
    many = len(values) if count is None else count
    return integer(len(name)) + name + integer(calls) + integer(many) + struct.pack(f"<{len(values)}f", *values)


END = integer(7) + integer(4) + b"text"
DAMAGED_LEGACY = {
    "empty": b"",
    "no entries": integer(0) + END,
    "negative number of entries": integer(-1) + entry(),
    "too many entries": integer(2**30) + entry(),
    "one entry too many": integer(2) + entry() + END,
    "name length": integer(1) + integer(2**30) + bytes(40),
    "negative name length": integer(1) + integer(-5) + bytes(40),
    "empty name": integer(1) + entry(name=b"") + END,
    "name not UTF-8": integer(1) + entry(name=b"\xff") + END,
    "negative calls": integer(1) + entry(calls=-1) + END,
    "no values": integer(1) + entry(values=()) + END,
    "too many values": integer(1) + entry(count=2**30) + END,
    "negative values": integer(1) + entry(values=(1.0, -1.0)) + END,
    "not a number": integer(1) + entry(values=(float("nan"),)) + END,
    "the same entry twice": integer(2) + entry() + entry() + END,
    "cut in the end": integer(1) + entry() + END[:-2],
    "bytes after the end": integer(1) + entry() + END + b"more",
}
