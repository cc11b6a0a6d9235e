"""Importance matrices, against files that llama-imatrix wrote.

golden/imatrix.gguf and golden/imatrix.dat come from one run over a random model with four experts, two of which its
router never chooses (2 chunks of 64 tokens).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hostile_imatrix import DAMAGED_GGUF, DAMAGED_LEGACY, END, entry, gguf_file, integer
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UnsupportedError, UsageError
from llmx.formats.gguf import read_gguf
from llmx.formats.imatrix import read_imatrix, write_imatrix

GOLDEN = Path(__file__).parents[1] / "golden"
EXPERTS = "blk.0.ffn_down_exps.weight"


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
    for name, kept in new.entries.items():
        rows = legacy.rows(name, *kept.shape)
        assert rows is not None
        np.testing.assert_allclose(rows, kept, rtol=1e-6)


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


@pytest.mark.parametrize(("tensors", "metadata", "named"), DAMAGED_GGUF.values(), ids=DAMAGED_GGUF)
def test_a_damaged_gguf_kind_is_refused(tmp_path: Path, tensors: dict, metadata: dict | None, named: str) -> None:
    with pytest.raises(IntegrityError) as refused:
        read_imatrix(gguf_file(tmp_path / "imatrix.gguf", tensors, metadata))
    assert named in str(refused.value)


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
