"""The GGUF container against the gguf package and llama.cpp, and against files made to do harm."""

from __future__ import annotations

import ctypes
import struct
import time
from importlib.util import find_spec
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from hostile_gguf import OFFENCES, build, info, long, pair, word
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UnsupportedError, UsageError
from llmx.formats.gguf import (
    TensorInfo,
    Value,
    array,
    f32,
    f64,
    flag,
    header_bytes,
    i8,
    i16,
    i32,
    i64,
    layout,
    parse_size,
    read_gguf,
    read_gguf_set,
    shard_metadata,
    shard_name,
    split,
    text,
    u8,
    u16,
    u32,
    u64,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "container.gguf"  # made by gguf.GGUFWriter 0.19
QUANTIZED = reference.GGMLQuantizationType.Q8_0

METADATA = {
    "general.architecture": text("llama"),
    "a.u8": u8(3),
    "a.i8": i8(-3),
    "a.u16": u16(3),
    "a.i16": i16(-3),
    "a.u32": u32(3),
    "a.i32": i32(-3),
    "a.f32": f32(1.1),
    "a.u64": u64(2**60),
    "a.i64": i64(-(2**60)),
    "a.f64": f64(0.1),
    "a.b": flag(True),
    "a.s": text("hé"),
    "a.as": array("str", ["a", "bé"]),
    "a.ai": array("i32", [1, -2]),
    "a.af": array("f32", [1.5, 2.5]),
}
TENSORS = [TensorInfo("a", "F32", (3, 64)), TensorInfo("b", "F32", (5,)), TensorInfo("q", "Q8_0", (3, 64))]


class InitParameters(ctypes.Structure):
    """llama.cpp's gguf_init_params, passed by value."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def sample_data() -> dict[str, np.ndarray]:
    weights = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    return {
        "a": weights,
        "b": np.arange(5, dtype=np.float32),
        "q": reference.quants.quantize(weights, QUANTIZED),
    }


def write(path: Path, metadata: dict[str, Value], tensors: list[TensorInfo], data: dict[str, np.ndarray]) -> Path:
    planned = layout(metadata, tensors)
    whole = bytearray(planned.size)
    whole[: len(planned.header)] = planned.header
    for tensor in tensors:
        place = planned.placements[tensor.name]
        whole[place.offset : place.offset + place.nbytes] = data[tensor.name].tobytes()
    path.write_bytes(whole)
    return path


# Writing


def test_the_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    theirs = reference.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    adders = {
        "u8": theirs.add_uint8,
        "i8": theirs.add_int8,
        "u16": theirs.add_uint16,
        "i16": theirs.add_int16,
        "u32": theirs.add_uint32,
        "i32": theirs.add_int32,
        "f32": theirs.add_float32,
        "u64": theirs.add_uint64,
        "i64": theirs.add_int64,
        "f64": theirs.add_float64,
        "bool": theirs.add_bool,
        "str": theirs.add_string,
    }
    for key, value in list(METADATA.items())[1:]:
        adders.get(value.type, theirs.add_array)(key, value.value)
    for name, values in sample_data().items():
        theirs.add_tensor(name, values, raw_dtype=QUANTIZED if name == "q" else None)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    theirs.write_tensors_to_file()
    theirs.close()
    ours = write(tmp_path / "ours.gguf", METADATA, TENSORS, sample_data())
    assert ours.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_the_bytes_are_the_golden_ones(tmp_path: Path) -> None:
    assert write(tmp_path / "ours.gguf", METADATA, TENSORS, sample_data()).read_bytes() == GOLDEN.read_bytes()


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    theirs = reference.GGUFReader(write(tmp_path / "ours.gguf", METADATA, TENSORS, sample_data()))
    assert theirs.fields["a.as"].contents() == ["a", "bé"]
    assert [tensor.name for tensor in theirs.tensors] == ["a", "b", "q"]
    assert all((tensor.data == sample_data()[tensor.name]).all() for tensor in theirs.tensors)


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="the llama.cpp wheel is not installed")
def test_llama_cpp_parses_what_we_write(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(next(Path(find_spec("xllamacpp").origin).parent.glob("xllamacpp*.so"))))
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParameters]
    library.gguf_init_from_file.restype = ctypes.c_void_p
    for function in (library.gguf_get_n_kv, library.gguf_get_n_tensors):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int64
    library.gguf_free.argtypes = [ctypes.c_void_p]
    path = write(tmp_path / "ours.gguf", {**METADATA, "general.alignment": u32(64)}, TENSORS, sample_data())
    opened = library.gguf_init_from_file(str(path).encode(), InitParameters(True, None))
    assert opened
    assert (library.gguf_get_n_kv(opened), library.gguf_get_n_tensors(opened)) == (len(METADATA) + 1, 3)
    library.gguf_free(opened)


def test_the_layout_is_known_before_any_data() -> None:
    planned = layout(METADATA, TENSORS)
    assert planned.header == header_bytes(METADATA, TENSORS)
    assert planned.placements["a"].offset == len(planned.header)
    assert planned.placements["b"].nbytes == 20
    assert planned.placements["q"].offset == planned.placements["b"].offset + 32
    assert planned.size == GOLDEN.stat().st_size


def test_another_alignment_is_kept(tmp_path: Path) -> None:
    metadata = {**METADATA, "general.alignment": u32(64)}
    path = write(tmp_path / "a.gguf", metadata, TENSORS, sample_data())
    read = read_gguf(path)
    assert read.alignment == 64
    assert all(tensor.offset % 64 == 0 for tensor in read.tensors.values())
    assert reference.GGUFReader(path).tensors[2].data_offset == read.tensors["q"].offset


def test_everything_that_cannot_be_written_is_listed_at_once() -> None:
    metadata = {
        "": u8(1),
        "big": u32(-1),
        "surrogate": text("\ud800"),
        "unknown": Value("u128", 1),
        "nested": Value("[[i32]]", ()),
        "f": f32(1e40),
        "general.alignment": u32(48),
    }
    tensors = [
        TensorInfo("twice", "F32", (1,)),
        TensorInfo("twice", "F32", (1,)),
        TensorInfo("n" * 64, "F32", (1,)),
        TensorInfo("type", "Q9_9", (32,)),
        TensorInfo("row", "Q4_K", (2, 32)),
        TensorInfo("scalar", "F32", ()),
        TensorInfo("empty", "F32", (0, 4)),
        TensorInfo("deep", "F32", (1, 1, 1, 1, 1)),
    ]
    with pytest.raises(UnsupportedError) as refused:
        header_bytes(metadata, tensors)
    assert len(refused.value.problems) == len(metadata) + len(tensors) - 1


# Reading


def test_metadata_types_shapes_and_data_come_back() -> None:
    read = read_gguf(GOLDEN)
    assert read.version == 3 and read.alignment == 32 and read.trailing_bytes == 0
    assert read.types == {key: value.type for key, value in METADATA.items()}
    assert read.metadata["a.as"] == ["a", "bé"] and read.metadata["a.b"] is True
    assert read.metadata["a.f32"] == np.float32(1.1) and type(read.metadata["a.u64"]) is int
    assert read.tensors["q"].shape == (3, 64) and read.tensors["q"].type_name == "Q8_0"
    for name, values in sample_data().items():
        assert read.bytes(name).tobytes() == values.tobytes()
        read.release(name)
        assert read.bytes(name).tobytes() == values.tobytes()


def test_a_file_that_is_cut_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    """What is gone of a mapped file ends the process that touches it."""
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOLDEN.read_bytes())
    read = read_gguf(path)
    last = max(read.tensors, key=lambda name: read.tensors[name].offset)
    with path.open("r+b") as stream:
        stream.truncate(read.tensors[last].offset)
    with pytest.raises(IntegrityError, match="the file was cut while it was read"):
        read.bytes(last)


def test_version_2_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 2) + GOLDEN.read_bytes()[8:])
    assert read_gguf(path).version == 2


def test_bytes_after_the_data_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "trailing.gguf"
    path.write_bytes(GOLDEN.read_bytes() + b"hidden")
    assert read_gguf(path).trailing_bytes == 6


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_gguf(tmp_path / "nothing.gguf")


def test_a_vocabulary_of_262144_tokens_is_read_in_under_a_second(tmp_path: Path) -> None:
    tokens = [f"token{number}" for number in range(262144)]
    metadata = {"tokens": array("str", tokens), "scores": array("f32", [0.5] * len(tokens))}
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(header_bytes(metadata, []))
    start = time.perf_counter()
    read = read_gguf(path)
    assert time.perf_counter() - start < 1.0
    assert read.metadata["tokens"] == tokens


INTEGERS = {"u8": (0, 8), "i8": (7, 7), "u16": (0, 16), "i16": (15, 15), "u32": (0, 32), "i32": (31, 31)}
INTEGERS |= {"u64": (0, 64), "i64": (63, 63)}
ITEMS = {
    **{name: st.integers(-(2**low) if low else 0, 2**high - 1) for name, (low, high) in INTEGERS.items()},
    "f32": st.floats(width=32, allow_nan=False),
    "f64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": st.text(max_size=20),
}
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: key != "general.alignment")  # which has rules of its own
VALUES = st.one_of(
    *[items.map(lambda item, name=name: Value(name, item)) for name, items in ITEMS.items()],
    *[st.lists(items, max_size=5).map(lambda some, name=name: array(name, some)) for name, items in ITEMS.items()],
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(metadata=st.dictionaries(KEYS, VALUES, max_size=8))
def test_metadata_of_every_type_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Value]
) -> None:
    path = tmp_path_factory.mktemp("round") / "some.gguf"
    path.write_bytes(header_bytes(metadata, []))
    read = read_gguf(path)
    assert read.types == {key: value.type for key, value in metadata.items()}
    plain = {k: list(v.value) if isinstance(v.value, tuple) else v.value for k, v in metadata.items()}
    assert read.metadata == plain


# Hostile files


@pytest.mark.parametrize(("raw", "named"), OFFENCES.values(), ids=OFFENCES)
def test_an_offence_is_refused_by_name_and_place(tmp_path: Path, raw: bytes, named: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    with pytest.raises(IntegrityError) as refused:
        read_gguf(path)
    assert named in refused.value.what
    assert str(path) in str(refused.value.where)


def test_a_tensor_type_without_a_known_size_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "unknown.gguf"
    path.write_bytes(build((), (info(kind=4000),)))
    with pytest.raises(UnsupportedError, match="ggml type 4000"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (pair("k", 9, word(0) + long(2**23)), "a file may hold"),
        (pair("k", 8, long(2**29)), "a header may have"),
    ],
    ids=["array", "string"],
)
def test_metadata_too_large_for_memory_is_refused(tmp_path: Path, head: bytes, named: str) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.write(build((head,)))
        file.truncate(2**30)  # sparse: takes no disk
    with pytest.raises(IntegrityError, match=named):
        read_gguf(path)


def read_all(path: Path) -> None:
    read = read_gguf(path)
    for name, tensor in read.tensors.items():
        assert read.bytes(name).size == tensor.nbytes


@settings(max_examples=400, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=4), cut=st.integers(0, 1600))
def test_only_our_own_errors_come_out_of_a_damaged_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(GOLDEN.read_bytes())
    for at, byte in changes:
        raw[at] = byte
    path = tmp_path_factory.mktemp("fuzz") / "damaged.gguf"
    path.write_bytes(raw[: 1600 if cut % 2 else cut])
    try:
        read_all(path)
    except LlmxError as error:
        assert error.where is not None


def test_every_single_damaged_byte_of_a_header_is_survived(tmp_path: Path) -> None:
    golden = GOLDEN.read_bytes()
    for at in range(576):
        for byte in (0, 0x7F, 0xFF, golden[at] ^ 1):
            path = tmp_path / f"{at}-{byte}.gguf"
            path.write_bytes(golden[:at] + bytes([byte]) + golden[at + 1 :])
            try:
                read_all(path)
            except LlmxError as error:
                assert error.where is not None
            path.unlink()


# Split sets


def write_set(folder: Path, limit: int = 800) -> list[Path]:
    shards = split(TENSORS, limit)
    paths = []
    for number, tensors in enumerate(shards):
        path = folder / shard_name("model", number, len(shards))
        paths.append(write(path, shard_metadata(METADATA, shards, number), tensors, sample_data()))
    return paths


def test_a_split_set_is_read_from_any_of_its_shards(tmp_path: Path) -> None:
    paths = write_set(tmp_path)
    assert [path.name for path in paths] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    for path in paths:
        read = read_gguf_set(path)
        assert read.paths == tuple(paths) and list(read.tensors) == ["a", "b", "q"]
        assert [tensor.shard for tensor in read.tensors.values()] == [0, 0, 1]
        assert read.metadata["general.architecture"] == "llama"
        assert all(read.bytes(name).tobytes() == values.tobytes() for name, values in sample_data().items())


def test_only_the_first_shard_holds_the_metadata(tmp_path: Path) -> None:
    first, second = (read_gguf(path) for path in write_set(tmp_path))
    assert first.metadata.keys() == METADATA.keys() | second.metadata.keys()
    assert second.metadata == {"split.no": 1, "split.count": 2, "split.tensors.count": 3}
    assert second.types == {"split.no": "u16", "split.count": "u16", "split.tensors.count": "i32"}


def test_a_file_of_its_own_is_a_set_of_one(tmp_path: Path) -> None:
    assert read_gguf_set(GOLDEN).paths == (GOLDEN,)
    merged = write(tmp_path / "merged.gguf", {**METADATA, "split.count": u16(0)}, TENSORS, sample_data())
    assert read_gguf_set(merged).paths == (merged,)


def test_a_missing_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    first, second = write_set(tmp_path)
    second.unlink()
    with pytest.raises(IntegrityError, match=r"model-00002-of-00002\.gguf"):
        read_gguf_set(first)


def test_exchanged_shards_are_refused(tmp_path: Path) -> None:
    first, second = write_set(tmp_path)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(IntegrityError, match="exchanged or doubled"):
        read_gguf_set(first)


def test_a_doubled_shard_is_refused(tmp_path: Path) -> None:
    first, second = write_set(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(IntegrityError) as refused:
        read_gguf_set(first)
    assert "tensor 'a' is in another shard too" in str(refused.value)


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    first, _ = write_set(tmp_path)
    for name in ("other.gguf", "model-00001-of-00009.gguf", "model-00003-of-00002.gguf"):
        renamed = first.rename(tmp_path / name)
        with pytest.raises(IntegrityError, match="contradicts"):
            read_gguf_set(renamed)
        renamed.rename(first)


def test_a_shard_of_another_model_is_refused(tmp_path: Path) -> None:
    first, second = write_set(tmp_path)
    other = {"split.no": u16(1), "split.count": u16(2), "split.tensors.count": i32(9), "a.u8": u8(4)}
    write(second, other, TENSORS[2:], sample_data())
    with pytest.raises(IntegrityError) as refused:
        read_gguf_set(first)
    assert [problem.rpartition(": ")[2] for problem in refused.value.problems] == [
        "split.tensors.count contradicts the first shard",
        "a.u8 contradicts the first shard",
    ]


def test_a_tensor_larger_than_a_shard_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(UsageError, match="at least 768 bytes"):
        split(TENSORS, 700)


def test_more_shards_than_a_set_may_have_are_refused() -> None:
    with pytest.raises(UsageError, match="65535"):
        split([TensorInfo(str(number), "F32", (8,)) for number in range(65536)], 32)


SIZES = {"2GB": 2 * 10**9, "500M": 5 * 10**8, "1.5g": 15 * 10**8, "1GiB": 2**30, "64 KiB": 2**16, "123": 123, "7b": 7}


@pytest.mark.parametrize(("given_size", "count"), SIZES.items())
def test_sizes_are_read_as_people_write_them(given_size: str, count: int) -> None:
    assert parse_size(given_size) == count


@pytest.mark.parametrize("given_size", ["", "GB", "-1G", "2X", "0", "0.2", "1e9", "I", "4IB"])
def test_what_is_not_a_size_is_refused(given_size: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(given_size)
