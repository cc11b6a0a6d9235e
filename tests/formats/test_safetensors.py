"""The safetensors reader and writer: equal to the reference library, and firm against broken and hostile files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_safetensors import HOSTILE, PAIR, safetensors_file
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UsageError
from llmx.formats.json_text import parse_object, read_object
from llmx.formats.safetensors import open_safetensors, shorten, write_safetensors


def test_files_of_the_reference_library_are_read(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    arrays = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
        "half": np.ones((2, 3), dtype=np.float16),
        "empty": np.zeros((0, 5), dtype=np.float32),
        "number": np.array(7, dtype=np.int64),
    }
    numpy_io.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = open_safetensors(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "np"}
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape
        assert file.bytes(name).tobytes() == array.tobytes()


def test_files_we_write_are_read_by_the_reference_library(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    chunks = [array[:1].tobytes(), array[1:].tobytes()]
    write_safetensors(tmp_path / "x.safetensors", [("ä", "F32", (2, 3), chunks)], metadata={"format": "pt"})
    assert np.array_equal(numpy_io.load_file(tmp_path / "x.safetensors")["ä"], array)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(["F32", "BF16", "I8", "F64"]),
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, shapes: Any, dtype: str) -> None:
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    size = {"F32": 4, "BF16": 2, "I8": 1, "F64": 8}[dtype]
    tensors = {
        f"t{i}": (shape, np.random.default_rng(i).bytes(int(np.prod(shape)) * size)) for i, shape in enumerate(shapes)
    }
    write_safetensors(path, [(name, dtype, shape, [data]) for name, (shape, data) in tensors.items()])
    file = open_safetensors(path)
    for name, (shape, data) in tensors.items():
        assert file.tensors[name].shape == tuple(shape)
        assert file.bytes(name).tobytes() == data


def test_a_range_of_bytes_is_read_alone(tmp_path: Path) -> None:
    file = open_safetensors(safetensors_file(tmp_path / "x.safetensors", PAIR, bytes(range(22))))
    assert file.bytes("b", 2, 4).tolist() == [18, 19]
    assert file.bytes("b", 4, 4).size == 0
    assert file.bytes("a").tolist() == list(range(16))


def test_a_file_that_is_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    """A memory map of it would end the process."""
    path = safetensors_file(tmp_path / "x.safetensors", PAIR, bytes(range(22)))
    file = open_safetensors(path)
    os.truncate(path, path.stat().st_size - 3)
    assert file.bytes("a").size == 16
    with pytest.raises(IntegrityError, match="the file was cut while it was read: 'b' is no longer whole"):
        file.bytes("b")


def test_a_disk_that_fails_is_told_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_safetensors(safetensors_file(tmp_path / "x.safetensors", PAIR, bytes(range(22))))

    def failing(*given: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(IntegrityError, match="'b' cannot be read: Input/output error"):
        file.bytes("b")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    header, message = HOSTILE[name]
    with pytest.raises(IntegrityError, match=message):
        open_safetensors(safetensors_file(tmp_path / "x.safetensors", header))


def test_every_problem_of_a_header_is_listed_at_once(tmp_path: Path) -> None:
    header = {"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 1]}, "b": 5}
    with pytest.raises(IntegrityError) as caught:
        open_safetensors(safetensors_file(tmp_path / "x.safetensors", header))
    assert len(caught.value.problems) == 2
    assert caught.value.where == str(tmp_path / "x.safetensors")


def test_a_long_list_of_problems_is_cut() -> None:
    assert shorten([str(n) for n in range(250)])[-2:] == ["99", "and 150 more"]
    assert shorten(["one"]) == ["one"]


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_shorter_than_its_prefix_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(bytes(size))
    with pytest.raises(IntegrityError, match="at least 8 bytes"):
        open_safetensors(tmp_path / "x.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = safetensors_file(tmp_path / "whole.safetensors", PAIR).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(IntegrityError):
            open_safetensors(tmp_path / "cut.safetensors")


def test_a_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    with pytest.raises(IntegrityError, match="limit is 100000000"):
        open_safetensors(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_within_bounds(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("flip", numbered=True)
    data = bytearray(safetensors_file(folder / "x.safetensors", PAIR).read_bytes())
    data[place % len(data)] = value
    (folder / "x.safetensors").write_bytes(data)
    try:
        file = open_safetensors(folder / "x.safetensors")
    except LlmxError:
        return
    for name, tensor in file.tensors.items():
        assert file.bytes(name).size == tensor.nbytes


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        open_safetensors(tmp_path / "absent.safetensors")


WRONG_WRITES: dict[str, list[tuple[str, str, tuple[int, ...], list[bytes]]]] = {
    "too few bytes": [("a", "F32", (2,), [bytes(4)])],
    "too many bytes": [("a", "F32", (1,), [bytes(4), bytes(4)])],
    "an unknown dtype": [("a", "F31", (1,), [bytes(4)])],
    "a name given twice": [("a", "F32", (1,), [bytes(4)]), ("a", "F32", (1,), [bytes(4)])],
}


@pytest.mark.parametrize("name", WRONG_WRITES)
def test_a_wrong_write_leaves_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'a'"):
        write_safetensors(tmp_path / "x.safetensors", WRONG_WRITES[name])
    assert not list(tmp_path.iterdir())


def test_a_json_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    with pytest.raises(IntegrityError, match="limit is 4"):
        read_object(path, limit=4)
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_object(tmp_path / "absent.json")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    with pytest.raises(IntegrityError, match="this is no file"):
        read_object(tmp_path / "endless.json")


def test_a_json_text_names_its_place_in_errors() -> None:
    with pytest.raises(IntegrityError, match="where: somewhere"):
        parse_object("[", "somewhere")
