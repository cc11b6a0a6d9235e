"""How many parts an ONNX graph is made of, counted before anything is made of them.

On the wire an empty node takes two bytes, as an object a hundred and fifty: a file of 10 MB fills a gigabyte. So the
parts are counted where they lie. A field is a varint (number << 3 | wire type), then a varint (type 0), 8 bytes (1), a
varint length and so many bytes (2), or 4 bytes (5); a message is the fields in such bytes.

Source: onnx.proto of ONNX 1.23 and the protobuf encoding.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmx.errors import IntegrityError

MOST_PARTS = 1 << 20  # a mixture of 128 experts in 94 layers, each expert's nodes apart, has about as many
PACKED_BYTES = 16  # of numbers in one field that count as a part: each may take eight bytes afterwards

# message -> field -> the message that the field holds; what is not here is a number, a text or a list of numbers.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 8: "entry", 14: "entry", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph", 3: "entry", 4: "entry"},
    "function": {7: "node", 9: "entry", 11: "attribute", 12: "value", 14: "entry"},
    "graph": {
        **{1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value"},
        **{14: "annotation", 15: "sparse", 16: "entry"},
    },
    "node": {5: "attribute", 9: "entry", 10: "entry"},
    "attribute": {
        **{5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 14: "type", 15: "type", 22: "sparse", 23: "sparse"},
    },
    "tensor": {13: "entry", 16: "entry"},
    "sparse": {1: "tensor", 2: "tensor"},
    "value": {2: "type", 4: "entry"},
    "annotation": {2: "entry"},
    "type": {1: "typed", 4: "type", 5: "type", 8: "typed", 9: "type"},
    "typed": {1: "type", 2: "shape"},
    "shape": {1: "entry"},
    "entry": {},
}
_FIXED = {1: 8, 5: 4}


def check_parts(data: bytes, where: object) -> None:
    """Raises: IntegrityError where there are more than MOST_PARTS, or no fields."""
    found = 0
    waiting = [(0, len(data), "model")]
    while waiting:
        at, end, kind = waiting.pop()
        inner = MESSAGES[kind]
        while at < end:
            tag, at = _varint(data, at, end, where)
            wire, found = tag & 7, found + 1
            if wire == 2:
                size, at = _varint(data, at, end, where)
                if (held := inner.get(tag >> 3)) is not None:
                    waiting.append((at, min(at + size, end), held))
                elif kind != "tensor" or tag >> 3 != 9:  # raw bytes stay what they are
                    found += size // PACKED_BYTES
                at += size
            elif wire == 0:
                _, at = _varint(data, at, end, where)
            elif wire in _FIXED:
                at += _FIXED[wire]
            else:
                raise IntegrityError(f"this is no ONNX graph: wire type {wire} at byte {at}", where=where)
            if found > MOST_PARTS:
                raise IntegrityError(f"the graph has too many parts; the limit is {MOST_PARTS}", where=where)
            if at > end:
                raise IntegrityError(f"this is no ONNX graph: it is cut at byte {end}", where=where)


def _varint(data: bytes, at: int, end: int, where: object) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IntegrityError(f"this is no ONNX graph: a number at byte {at} does not end", where=where)
