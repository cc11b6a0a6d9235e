"""ONNX folders made to do harm: the offences of hostile_onnx.py, links, and graphs that unfold beyond all memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hostile_case import Command, Hostile, inspected, rows


def onnx_rows() -> tuple[Hostile, ...]:
    """Those of graphs; none without the package."""
    if find_spec("onnx") is None:
        return ()
    import hostile_onnx as graphs

    def saved(change: Callable[[Any], object]) -> Callable[[Path], Command]:
        def make(folder: Path) -> Command:
            model = graphs.graph()
            change(model)
            graphs.save(model, folder)
            return "inspect", folder

        return make

    def beside(change: Callable[[Path], object]) -> Callable[[Path], Command]:
        def make(folder: Path) -> Command:
            change(graphs.save(graphs.graph(), folder).with_name("model.onnx.data"))
            return "inspect", folder

        return make

    def of(data: bytes) -> Callable[[Path], Command]:
        return inspected("model.onnx", data)

    elsewhere = lambda path: path.rename(path.with_name("elsewhere"))  # noqa: E731 - the old path is what is linked
    table = {
        **{offence.__name__: (saved(offence), says) for offence, says in graphs.OFFENCES.items()},
        **{
            f"data in {place!r}": (
                saved(lambda model, place=place: graphs.say(model, "location", place)),
                "which is no plain name of a file beside the graph",
            )
            for place in graphs.LOCATIONS
        },
        **{
            f"{key} {value}": (saved(lambda model, key=key, value=value: graphs.say(model, key, value)), says)
            for key, value, says in graphs.RANGES
        },
        "data that are a symbolic link": (
            beside(lambda path: path.symlink_to(elsewhere(path))),
            "model.onnx.data is a symbolic link",
        ),
        "data that are a hard link": (
            beside(lambda path: path.with_name("elsewhere").hardlink_to(path)),
            "model.onnx.data is a hard link",
        ),
        "data that are not there": (beside(Path.unlink), "model.onnx.data is not there"),
        "data that are cut": (beside(lambda path: path.write_bytes(bytes(9))), "the file is cut"),
        "empty": (of(b""), "this is no ONNX graph"),
        "a page of a web server": (of(b"<!doctype html>" + bytes(99)), "this is no ONNX graph"),
        "more nodes than memory holds": (of(bomb(b"\x0a\x00")), "too many parts; the limit is"),
        "more weights than memory holds": (of(bomb(b"\x2a\x00")), "too many parts; the limit is"),
        "more attributes than memory holds": (
            of(message(0x3A, message(0x0A, b"\x2a\x00" * (5 << 20)))),
            "too many parts",
        ),
        "more numbers than memory holds": (
            of(node(message(0x2A, message(0x42, b"\x01" * (20 << 20))))),
            "too many parts",
        ),
        "more metadata than memory holds": (of(b"\x72\x00" * (5 << 20) + bomb(b"")), "too many parts"),
        "more functions than memory holds": (of(b"\xca\x01\x00" * (3 << 20) + bomb(b"")), "too many parts"),
        "a group, which ended long ago": (of(b"\x3b\x3c" + bomb(b"")), "wire type 3"),
        "more inputs of a node than memory holds": (
            of(message(0x3A, message(0x0A, b"\x0a\x00" * (5 << 20)))),
            "too many parts",
        ),
    }
    return rows("ONNX", table)


def message(tag: int, body: bytes) -> bytes:
    """A protobuf field of that tag that holds a message."""
    size, length = len(body), bytearray()
    while True:
        length.append(size & 0x7F | (0x80 if size > 0x7F else 0))
        size >>= 7
        if not size:
            return bytes([tag]) + bytes(length) + body


def node(body: bytes) -> bytes:
    """A graph of one node."""
    return message(0x3A, message(0x0A, body))


def bomb(part: bytes) -> bytes:
    """A graph of five million empty parts."""
    return message(0x3A, part * (5 << 20))
