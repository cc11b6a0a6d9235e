"""GGUF files made to do harm: how each is made, and the words that name its offence. All else of a file is sound."""

from __future__ import annotations

import struct


def word(value: int) -> bytes:
    return struct.pack("<I", value)


def long(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return long(len(raw)) + raw


def pair(key: bytes | str, kind: int, raw: bytes) -> bytes:
    return string(key) + word(kind) + raw


def info(name: bytes | str = "t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + word(len(dims)) + b"".join(long(dim) for dim in dims) + word(kind) + long(offset)


def build(
    pairs: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: int = 64,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, keys = (len(infos), len(pairs)) if counts is None else counts
    head = magic + word(version) + long(tensors) + long(keys) + b"".join(pairs) + b"".join(infos)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


ONE = pair("k", 4, word(1))
OFFENCES = {
    "empty file": (b"", "0 bytes"),
    "three bytes": (b"GGU", "3 bytes"),
    "magic": (build(magic=b"GGML"), "magic"),
    "cut after the magic": (b"GGUF", "version"),
    "version 0": (build(version=0), "version 0"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "cut in the counts": (build()[:20], "metadata count"),
    "tensor count": (build(counts=(2**60, 0)), "cannot fit"),
    "negative tensor count": (build(counts=(2**64 - 1, 0)), "cannot fit"),
    "metadata count": (build(counts=(0, 2**61)), "cannot fit"),
    "counts that wrap around together": (build(counts=(2**63, 2**63)), "cannot fit"),
    "more pairs than there are": (build((ONE,), counts=(0, 3)), "metadata key 1"),
    "empty key": (build((pair("", 4, word(1)),)), "is empty"),
    "duplicate key": (build((ONE, ONE)), "'k': the key occurs twice"),
    "key not UTF-8": (build((pair(b"\xff\xfe", 4, word(1)),)), "UTF-8"),
    "key length": (build((long(2**40) + b"k",)), "metadata key 0"),
    "key length that wraps around": (build((long(2**64 - 8) + b"k" * 20,)), "metadata key 0"),
    "value type": (build((pair("k", 13, word(1)),)), "value type 13"),
    "string length": (build((pair("k", 8, long(2**33)),)), "'k''s text"),
    "string not UTF-8": (build((pair("k", 8, string(b"\xc3\x28")),)), "UTF-8"),
    "flag": (build((pair("k", 7, b"\x02"),)), "neither 0 nor 1"),
    "flag in an array": (build((pair("k", 9, word(7) + long(3) + b"\0\1\7"),)), "neither 0 nor 1"),
    "array of arrays": (build((pair("k", 9, word(9) + long(1) + word(4) + long(0)),)), "array of arrays"),
    "array item type": (build((pair("k", 9, word(99) + long(1)),)), "value type 99"),
    "array count": (build((pair("k", 9, word(5) + long(2**20)),)), "past the end"),
    "array count that wraps around": (build((pair("k", 9, word(5) + long(2**62)),)), "items"),
    "string array count": (build((pair("k", 9, word(8) + long(2**20)),)), "past the end"),
    "string array item": (build((pair("k", 9, word(8) + long(2) + string("a") + long(2**50)),)), "item 1"),
    "string array cut": (build((pair("k", 9, word(8) + long(3) + string("a" * 90)),), data=0), "item 2"),
    "string array item not UTF-8": (build((pair("k", 9, word(8) + long(1) + string(b"\xff")),)), "item 0"),
    "alignment 0": (build((pair("general.alignment", 4, word(0)),)), "power of two"),
    "alignment 48": (build((pair("general.alignment", 4, word(48)),)), "power of two"),
    "alignment huge": (build((pair("general.alignment", 4, word(2**31)),)), "power of two"),
    "alignment type": (build((pair("general.alignment", 8, string("32")),)), "instead of u32"),
    "alignment as u64": (build((pair("general.alignment", 10, long(32)),)), "instead of u32"),
    "no dimensions": (build((), (info(dims=()),)), "0 dimensions"),
    "five dimensions": (build((), (info(dims=(1,) * 5),)), "5 dimensions"),
    "a dimension of 0": (build((), (info(dims=(8, 0)),)), "is empty"),
    "dimensions that overflow": (build((), (info(dims=(2**32, 2**32)),)), "overflows"),
    "dimensions that wrap to 0": (build((), (info(dims=(2**63, 2)),)), "overflows"),
    "bytes that overflow": (build((), (info(dims=(2**62,)),)), "overflow"),
    "row not in blocks": (build((), (info(dims=(33,), kind=2),)), "Q4_0 blocks"),
    "empty tensor name": (build((), (info(""),)), "1 to 63"),
    "long tensor name": (build((), (info("n" * 64),)), "1 to 63"),
    "tensor name not UTF-8": (build((), (info(b"\xff"),)), "UTF-8"),
    "duplicate tensor": (build((), (info(), info(offset=32))), "'t': the name occurs twice"),
    "offset not aligned": (build((), (info(offset=4),)), "not a multiple"),
    "offset past the end": (build((), (info(offset=2**40),)), "gap"),
    "offset that wraps around": (build((), (info(offset=2**64 - 32),)), "gap"),
    "overlap": (build((), (info("a", (16,)), info("b", offset=32))), "overlaps"),
    "gap": (build((), (info("a"), info("b", offset=64)), data=128), "gap"),
    "exchanged order": (
        build(
            (),
            (info("a", offset=32), info("b")),
        ),
        "gap",
    ),
    "data cut": (build((), (info(dims=(17,)),)), "cut"),
    "info cut": (build((), (info(),), data=0)[:60], "'t'"),
}
