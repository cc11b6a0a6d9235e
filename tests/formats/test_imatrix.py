"""Importance matrices, against files that llama-imatrix wrote.

golden/imatrix.gguf and golden/imatrix.dat come from one run over a random model with four experts, two of which its
router never chooses (2 chunks of 64 tokens).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UnsupportedError, UsageError
from llmx.formats.gguf import TensorInfo, array, layout, read_gguf, text, u32
from llmx.formats.imatrix import read_imatrix, write_imatrix

GOLDEN = Path(__file__).parents[1] / "golden"
EXPERTS = "blk.0.ffn_down_exps.weight"
KEYS = {
    "general.type": text("imatrix"),
    "imatrix.datasets": array("str", ["calib.txt"]),
    "imatrix.chunk_count": u32(2),
    "imatrix.chunk_size": u32(64),
}


def test_the_gguf_kind_holds_mean_squares_for_each_expert() -> None:
    read = read_imatrix(GOLDEN / "imatrix.gguf")
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("calib.txt",), 2, 64)
    assert read.entries[EXPERTS].shape == (4, 32) and read.entries[EXPERTS].dtype == np.float32
    assert read.counts[EXPERTS].tolist() == [74, 54, 0, 0]
    sums = read_gguf(GOLDEN / "imatrix.gguf").bytes(f"{EXPERTS}.in_sum2").view("<f4").reshape(4, 32)
    np.testing.assert_array_equal(read.entries[EXPERTS][0], sums[0] / np.float32(74))


def test_experts_without_data_are_reported_and_weigh_evenly() -> None:
    read = read_imatrix(GOLDEN / "imatrix.gguf")
    assert read.entries_without_data == {f"blk.0.ffn_{name}_exps.weight": (2, 3) for name in ("down", "gate", "up")}
    assert (read.entries[EXPERTS][2:] == 1).all()


def test_both_kinds_of_one_run_agree() -> None:
    new, legacy = read_imatrix(GOLDEN / "imatrix.gguf"), read_imatrix(GOLDEN / "imatrix.dat")
    assert (legacy.datasets, legacy.chunk_count, legacy.chunk_size) == (("calib.txt",), 2, 0)
    assert legacy.entries.keys() == new.entries.keys()
    for name, entry in new.entries.items():
        rows = legacy.rows(name, *entry.shape)
        assert rows is not None
        np.testing.assert_allclose(rows, entry, rtol=1e-6)


def test_a_weight_of_another_shape_is_refused() -> None:
    read = read_imatrix(GOLDEN / "imatrix.gguf")
    assert read.rows("output.weight", 1, 32) is None
    for experts, cols in ((1, 32), (8, 32), (1, 64)):
        with pytest.raises(IntegrityError, match="made from this model"):
            read.rows(EXPERTS, experts, cols)


def test_what_we_write_is_what_llama_imatrix_writes(tmp_path: Path) -> None:
    golden = read_gguf(GOLDEN / "imatrix.gguf")
    counts = read_imatrix(GOLDEN / "imatrix.gguf").counts
    sums = {name: golden.bytes(f"{name}.in_sum2").view("<f4").reshape(len(counts[name]), -1) for name in counts}
    backwards = dict(reversed(sums.items()))
    path = tmp_path / "ours.gguf"
    write_imatrix(path, backwards, counts, datasets=["calib.txt"], chunk_count=2, chunk_size=64)
    assert path.read_bytes() == (GOLDEN / "imatrix.gguf").read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_and_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_imatrix(tmp_path / "none")
    with pytest.raises(UnsupportedError, match="is a model"):
        read_imatrix(GOLDEN / "container.gguf")


def gguf_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
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


@pytest.mark.parametrize(("tensors", "metadata", "named"), DAMAGED_GGUF.values(), ids=DAMAGED_GGUF)
def test_a_damaged_gguf_kind_is_refused(tmp_path: Path, tensors: dict, metadata: dict | None, named: str) -> None:
    with pytest.raises(IntegrityError) as refused:
        read_imatrix(gguf_file(tmp_path / "imatrix.gguf", tensors, metadata))
    assert named in str(refused.value)


def integer(value: int) -> bytes:
    return struct.pack("<i", value)


def entry(
    name: bytes = b"w", calls: int = 2, values: tuple[float, ...] = (2.0, 4.0), count: int | None = None
) -> bytes:
    many = len(values) if count is None else count
    return integer(len(name)) + name + integer(calls) + integer(many) + struct.pack(f"<{len(values)}f", *values)


END = integer(7) + integer(4) + b"text"
LEGACY = {
    "whole": (integer(1) + entry() + END, (("text",), 7, [1.0, 2.0])),
    "without the end": (integer(1) + entry(), ((), 0, [1.0, 2.0])),
    "without a data set": (integer(1) + entry() + integer(7), ((), 7, [1.0, 2.0])),
    "without calls": (integer(1) + entry(calls=0) + END, (("text",), 7, [2.0, 4.0])),
}


@pytest.mark.parametrize(("raw", "expected"), LEGACY.values(), ids=LEGACY)
def test_every_form_of_the_legacy_kind_is_read(tmp_path: Path, raw: bytes, expected: tuple) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(raw)
    read = read_imatrix(path)
    assert (read.datasets, read.chunk_count, read.entries["w"].tolist()) == (*expected[:2], [expected[2]])


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


@pytest.mark.parametrize("raw", DAMAGED_LEGACY.values(), ids=DAMAGED_LEGACY)
def test_a_damaged_legacy_kind_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(raw)
    with pytest.raises(IntegrityError):
        read_imatrix(path)


@pytest.mark.parametrize("start", [b"GGUF", b"\x01\0\0\0"], ids=["gguf", "legacy"])
def test_a_file_too_large_for_an_importance_matrix_is_refused_unread(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(2**33)  # sparse: takes no disk
    with pytest.raises(IntegrityError, match="is no importance matrix"):
        read_imatrix(path)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["imatrix.gguf", "imatrix.dat"]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 4000),
)
def test_only_our_own_errors_come_out_of_a_damaged_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray((GOLDEN / name).read_bytes())
    for at, byte in changes:
        raw[at] = byte
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(raw[: len(raw) if cut % 2 else cut])
    try:
        read = read_imatrix(path)
    except LlmxError:
        return
    assert all(np.isfinite(values).all() for values in read.entries.values())
