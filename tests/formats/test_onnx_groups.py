"""Rows of whole numbers in groups: bytes known by heart, exact inverses, and what onnxruntime's own kernel reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError
from llmx.formats import onnx_groups
from llmx.formats.onnx_groups import STORES, GroupLayout, Groups, pack, pack_bits, parts, unpack, unpack_bits

BITS, GROUPS = (2, 4, 8), (16, 32, 64, 128, 256)


@st.composite
def kept_rows(draw: st.DrawFn) -> tuple[GroupLayout, Groups]:
    """A layout and rows of any length in it, short last groups among them."""
    layout = GroupLayout(
        draw(st.sampled_from(BITS)),
        draw(st.sampled_from((*GROUPS, None))),
        draw(st.sampled_from(sorted(STORES))),
        draw(st.booleans()),
    )
    rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 600))
    return layout, some_rows(layout, rows, cols, draw(st.integers(0, 2**32 - 1)))


def some_rows(layout: GroupLayout, rows: int, cols: int, seed: int = 0) -> Groups:
    random, count = np.random.default_rng(seed), layout.groups(cols)
    scales = random.normal(size=(rows, count)).astype(np.float32)
    store = STORES[layout.store]
    return Groups(
        random.integers(0, 1 << layout.bits, (rows, cols)).astype(np.uint8),
        store.take(store.put(scales)),
        random.integers(0, 1 << layout.bits, (rows, count)).astype(np.uint8) if layout.zero_points else None,
    )


def values_of(layout: GroupLayout, groups: Groups) -> np.ndarray[Any, Any]:
    """What the picture in the module says, weight by weight."""
    rows, cols = groups.codes.shape
    values = np.empty((rows, cols), np.float32)
    for column in range(cols):
        group = column // layout.group_weights(cols)
        zero = 1 << layout.bits >> 1 if groups.zero_points is None else groups.zero_points[:, group].astype(np.float32)
        values[:, column] = groups.scales[:, group] * (groups.codes[:, column].astype(np.float32) - zero)
    return values


def test_the_bytes_of_one_row_are_those_of_the_picture() -> None:
    layout = GroupLayout(4, 16, "float32", True)
    codes = np.array([[*range(16), 1, 2, 3]], np.uint8)
    data = pack(layout, Groups(codes, np.array([[1.0, -2.0]], np.float32), np.array([[7, 9]], np.uint8)))
    first = "10 32 54 76 98 ba dc fe"
    second = "21 93 99 99 99 99 99 99"  # filled up with the group's zero point
    assert data.tobytes().hex(" ") == f"{first} {second} 00 00 80 3f 00 00 00 c0 97"


@pytest.mark.parametrize(("bits", "told"), [(2, "e4 00"), (4, "10 32 00"), (8, "00 01 02 03 00")])
def test_the_first_numbers_lie_in_the_low_bits(bits: int, told: str) -> None:
    assert pack_bits(np.array([0, 1, 2, 3, 0], np.uint8), bits).tobytes().hex(" ") == told


@pytest.mark.parametrize(("store", "told"), [("float32", "00 00 c0 3f"), ("float16", "00 3e"), ("bfloat16", "c0 3f")])
def test_a_scale_of_one_and_a_half_is_stored_little_endian(store: str, told: str) -> None:
    data = STORES[store].put(np.full((1, 1), 1.5, np.float32))
    assert data.tobytes().hex(" ") == told and STORES[store].take(data) == 1.5


@given(kept_rows())
@settings(max_examples=150, deadline=None)
def test_unpacking_is_the_exact_inverse_of_packing(rows: tuple[GroupLayout, Groups]) -> None:
    layout, groups = rows
    count, cols = groups.codes.shape
    data = pack(layout, groups)
    assert data.shape == (count, layout.row_bytes(cols)) and data.dtype == np.uint8
    found = unpack(layout, data, cols)
    assert np.array_equal(found.codes, groups.codes)
    assert np.array_equal(found.scales, groups.scales)
    if groups.zero_points is None:
        assert found.zero_points is None
    else:
        assert found.zero_points is not None and np.array_equal(found.zero_points, groups.zero_points)
    assert np.array_equal(pack(layout, found), data)


@given(kept_rows())
@settings(max_examples=60, deadline=None)
def test_the_three_ranges_cover_a_row_without_a_gap(rows: tuple[GroupLayout, Groups]) -> None:
    layout, groups = rows
    cols = groups.codes.shape[1]
    ranges = layout.ranges(cols)
    assert ranges.codes.start == 0 and ranges.codes.stop == ranges.scales.start
    last = ranges.scales if ranges.zero_points is None else ranges.zero_points
    assert ranges.zero_points is None or ranges.zero_points.start == ranges.scales.stop
    assert last.stop == layout.row_bytes(cols)


@given(st.sampled_from(BITS), st.integers(0, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_numbers_of_any_count_come_back_from_their_bits(bits: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack_bits(values, bits)
    assert packed.shape == (3, -(-count * bits // 8)) and np.array_equal(unpack_bits(packed, bits, count), values)


def test_rows_are_packed_into_a_view_that_is_given() -> None:
    layout = GroupLayout(4, 32, "float32", True)
    groups = some_rows(layout, 3, 64)
    wide = np.full((3, layout.row_bytes(64) + 5), 0xAB, np.uint8)
    pack(layout, groups, wide[:, 2:-3])
    assert np.array_equal(wide[:, 2:-3], pack(layout, groups))
    assert (wide[:, :2] == 0xAB).all() and (wide[:, -3:] == 0xAB).all()


def test_rows_of_other_bytes_are_refused_with_both_numbers() -> None:
    layout = GroupLayout(4, 32, "float32", False)
    with pytest.raises(IntegrityError, match=r"64 weights in 4-bit groups takes 40 bytes, not 41"):
        unpack(layout, np.zeros((2, 41), np.uint8), 64)


def test_everything_that_is_not_a_number_of_a_part_stays_zero() -> None:
    layout = GroupLayout(2, 16, "float32", True)  # three zero points of two bits: two bits are left over
    ones = Groups(np.full((1, 48), 3, np.uint8), np.zeros((1, 3), np.float32), np.full((1, 3), 3, np.uint8))
    assert pack(layout, ones)[0, -1] == 0b00111111


# What onnxruntime's kernel reads.


def product(layout: GroupLayout, data: np.ndarray[Any, Any], cols: int) -> np.ndarray[Any, Any]:
    """f32[rows, cols]: MatMulNBits of the identity, in float32 arithmetic, turned round."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'llmx[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'llmx[onnx]'")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    found = parts(layout, data, cols)
    held = {"B": found.codes, "S": found.scales} | ({} if found.zero_points is None else {"Z": found.zero_points})
    node = helper.make_node(
        "MatMulNBits", ["A", *held], ["Y"], domain="com.microsoft", K=cols, N=len(data), bits=layout.bits,
        block_size=layout.group, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "identity",
        [helper.make_tensor_value_info("A", kind, [cols, cols])],
        [helper.make_tensor_value_info("Y", kind, [cols, len(data)])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in held.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"A": np.eye(cols, dtype=np.float32)})[0].T


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_onnxruntime_reads_every_weight_bit_for_bit(bits: int, group: int, zero_points: bool) -> None:
    layout = GroupLayout(bits, group, "float32", zero_points)
    for cols in (256, 80, 100):  # whole groups, and a short last one
        groups = some_rows(layout, 24, cols, bits + group)
        expected = values_of(layout, groups)
        assert np.array_equal(product(layout, pack(layout, groups), cols), expected), f"{cols} columns"


def test_the_kernel_would_see_codes_in_the_wrong_order() -> None:
    layout = GroupLayout(4, 32, "float32", False)
    groups = some_rows(layout, 8, 64)
    swapped = pack(layout, groups)
    codes = layout.ranges(64).codes
    swapped[:, codes] = (swapped[:, codes] >> 4) | (swapped[:, codes] << 4)
    assert not np.array_equal(product(layout, swapped, 64), values_of(layout, groups))


def test_the_ranges_of_the_rows_are_the_inputs_of_the_operator() -> None:
    layout = GroupLayout(4, 32, "float32", True)
    groups = some_rows(layout, 4, 96)
    data, found = pack(layout, groups), onnx_groups.parts(layout, pack(layout, groups), 96)
    assert found.codes.shape == (4, 3, 16) and found.scales.shape == (4, 3)
    assert found.zero_points is not None and found.zero_points.shape == (4, 2)
    ranges = layout.ranges(96)
    assert np.array_equal(found.codes.reshape(4, -1), data[:, ranges.codes])
    assert np.ascontiguousarray(found.scales).view(np.uint8).tobytes() == data[:, ranges.scales].tobytes()
