"""The messages between llmx and a runtime's worker process.

    frame    | u32 little-endian n | n bytes of UTF-8 JSON: one object |
    block    | rows * columns float32, row-major, machine order        |

A block follows only an object that has "block": [rows, columns].
Both ends run on one machine, so floats cross as they lie in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

_LENGTH = struct.Struct("<I")
# A frame holds ids and short texts; more means that the stream is out of step.
_LONGEST_FRAME = 1 << 28


def write_frame(stream: BinaryIO, message: Mapping[str, Any], block: np.ndarray | None = None) -> None:
    """Write message, and block (f32[rows, columns], C order) after it where given. Raises OSError: the peer is gone."""
    if block is not None:
        message = {**message, "block": list(block.shape)}
    text = json.dumps(message, separators=(",", ":")).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    if block is not None:
        stream.write(_bytes_of(np.ascontiguousarray(block, np.float32)))
    stream.flush()


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return the next message and its block, or None for no block. Raises EOFError: the peer is gone."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > _LONGEST_FRAME:
        raise EOFError(f"the worker's answer claims {length} bytes")
    message = json.loads(_exactly(stream, length))
    shape = message.pop("block", None)
    if shape is None:
        return message, None
    block = np.empty(shape, np.float32)
    view = _bytes_of(block)
    if _fill(stream, view) != view.nbytes:
        raise EOFError("the worker's answer ends within a block")
    return message, block


def _bytes_of(block: np.ndarray) -> memoryview:
    return block.reshape(-1).view(np.uint8).data


def _fill(stream: BinaryIO, view: memoryview) -> int:
    done = 0
    while done < view.nbytes:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]  # typeshed: BinaryIO lacks readinto
        if not count:
            break
        done += count
    return done


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError("the worker's answer ends early")
    return data
