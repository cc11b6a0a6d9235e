"""Runs a kernel of one block from its text in PTX, thread by thread: what a test without a GPU can see of it.

It knows the few instructions that our kernels have; another one is an error.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

FORMATS = {"u32": "<I", "u64": "<Q", "f32": "<f"}
MASKS = {"u32": 0xFFFFFFFF, "u64": 0xFFFFFFFFFFFFFFFF}
COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "ge": lambda a, b: a >= b,
    "gt": lambda a, b: a > b,
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
SHARED = 1 << 40  # where shared memory begins


class Block:
    """A kernel's text, and memory: bytes by address."""

    def __init__(self, ptx: str, threads: int) -> None:
        body = ptx[ptx.index("{") + 1 : ptx.rindex("}")]
        self.parameters = re.findall(r"\.param\s+\.\w+\s+(\w+)", ptx[: ptx.index("{")])
        self._code, self._labels, self._shared = [], {}, {}
        self._threads, self.memory = threads, bytearray(1 << 16)
        place = SHARED
        for line in filter(None, (part.strip() for part in body.replace(":", ":;").replace("\n", " ").split(";"))):
            if line.endswith(":"):
                self._labels[line[:-1]] = len(self._code)
            elif line.startswith(".shared"):
                name, count = re.findall(r"(\w+)\[(\d+)\]", line)[0]
                self._shared[name] = place
                place += 4 * int(count)
            elif not line.startswith(".reg"):
                guard, rest = re.fullmatch(r"(?:@(%\w+)\s+)?(.*)", line).groups()  # type: ignore[union-attr]
                operation, _, arguments = rest.partition(" ")
                self._code.append((guard, operation, [one.strip() for one in arguments.split(",")]))
        self._local = bytearray(place - SHARED)

    def run(self, arguments: Mapping[str, int]) -> None:
        """Run every thread up to each barrier in turn, to the end."""
        running = [self._thread(number, arguments) for number in range(self._threads)]
        while running:
            running = [thread for thread in running if next(thread, None) is not None]

    def _thread(self, number: int, arguments: Mapping[str, int]) -> Iterator[bool]:
        known: dict[str, Any] = {"%tid.x": number, **self._shared}
        at = 0
        while at < len(self._code):
            guard, operation, names = self._code[at]
            at += 1
            if guard is not None and not known[guard]:
                continue
            if operation == "bra":
                at = self._labels[names[0]]
            elif operation == "bar.sync":
                yield True
            elif operation == "ret":
                return
            else:
                self._step(operation, names, known, arguments)

    def _step(self, operation: str, names: list[str], known: dict[str, Any], arguments: Mapping[str, int]) -> None:
        word, *rest = operation.split(".")
        kind = rest[-1] if rest else ""
        if word == "ld" and rest[0] == "param":
            known[names[0]] = arguments[names[1].strip("[]")]
        elif word == "ld":
            memory, place = self._place(names[1], known)
            known[names[0]] = struct.unpack_from(FORMATS[kind], memory, place)[0]
        elif word == "st":
            memory, place = self._place(names[0], known)
            struct.pack_into(FORMATS[kind], memory, place, self._value(names[1], known))
        elif word == "setp":
            held = COMPARED[rest[0]](*(self._value(name, known) for name in names[1:3]))
            known[names[0]] = held and known[names[3]] if rest[1] == "and" else held
        elif (word, kind) in ARITHMETIC:
            values = [self._value(name, known) for name in names[1:]]
            known[names[0]] = ARITHMETIC[word, kind](*values)
        else:
            raise NotImplementedError(operation)

    def _place(self, name: str, known: Mapping[str, Any]) -> tuple[bytearray, int]:
        address = known[name.strip("[]")]
        return (self._local, address - SHARED) if address >= SHARED else (self.memory, address)

    @staticmethod
    def _value(name: str, known: Mapping[str, Any]) -> Any:
        if name.startswith("0f"):
            return struct.unpack(">f", bytes.fromhex(name[2:]))[0]
        return int(name) if name.isdigit() else known[name]


ARITHMETIC: dict[tuple[str, str], Callable[..., Any]] = {
    **{("mov", kind): lambda a: a for kind in FORMATS},
    ("cvta", "u64"): lambda a: a,
    ("or", "pred"): lambda a, b: a or b,
    ("mul", "u32"): lambda a, b: a * b,  # mul.wide: the product is of 64 bits
    ("shr", "u32"): lambda a, b: a >> b,
    **{("add", kind): lambda a, b, mask=mask: (a + b) & mask for kind, mask in MASKS.items()},
}


def array_at(memory: bytearray, address: int, count: int, dtype: Any) -> np.ndarray:
    """A view of the memory."""
    return np.frombuffer(memory, dtype, count, address)
