"""Headers of safetensors files made to do harm, and the words that name the offence; the data are 22 bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAIR = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def safetensors_file(path: Path, header: Any, data: bytes = bytes(22)) -> Path:
    """The file, written: its header as JSON, or as the bytes that are given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _with(name: str, **changes: Any) -> dict[str, Any]:
    return {**PAIR, name: {**PAIR[name], **changes}}


HOSTILE: dict[str, tuple[Any, str]] = {
    "a range past the end": (_with("b", shape=[4], data_offsets=[16, 24]), "past the end of the file"),
    "ranges that overlap": (_with("b", data_offsets=[14, 20]), "inside the tensor before it"),
    "a gap between tensors": (_with("a", shape=[3], data_offsets=[0, 12]), "belong to no tensor"),
    "bytes after the last tensor": ({"a": PAIR["a"]}, "the last 6 bytes"),
    "a shape that does not fill its range": (_with("a", shape=[2, 3]), "takes 24 bytes, not 16"),
    "a range that ends before it begins": (_with("a", data_offsets=[16, 0]), "is no range"),
    "three offsets": (_with("a", data_offsets=[0, 8, 16]), "is no range"),
    "a negative dimension": (_with("a", shape=[-2, -2]), "whole numbers"),
    "a dimension that is a flag": (_with("a", shape=[True, 4]), "whole numbers"),
    "a dimension beyond 63 bits": (_with("a", shape=[1 << 63, 0]), "whole numbers"),
    "a fractional offset": (_with("a", data_offsets=[0, 16.0]), "whole numbers"),
    "a shape whose product overflows": (_with("a", shape=[1 << 62, 1 << 62]), "takes"),
    "seventeen dimensions": (_with("a", shape=[1] * 17), "the limit is 16"),
    "an unknown dtype": (_with("a", dtype="F31"), "unknown dtype 'F31'"),
    "a dtype that is no text": (_with("a", dtype=["F32"]), "unknown dtype"),
    "an entry with more keys": (_with("a", extra=1), "exactly dtype, shape and data_offsets"),
    "an entry that is no object": ({**PAIR, "a": 1}, "exactly dtype, shape and data_offsets"),
    "metadata that is no map of texts": ({**PAIR, "__metadata__": {"x": 1}}, "map of texts"),
    "a header that is a list": ([1, 2], "object was expected"),
    "a header that is no JSON": (b'{"a": ', "not valid JSON"),
    "a header that is no UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "a key that comes twice": (b'{"a": 1, "a": 2}', "given twice"),
    "a constant that JSON lacks": (b'{"a": NaN}', "NaN"),
    "a number of many digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "brackets nested too deep": (b'{"a": ' + b"[" * 100_000 + b"}", "not valid JSON"),
}
