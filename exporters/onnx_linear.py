"""Matrices of few bits in the operators of each dialect: as linear layers, and as tables whose rows are looked up.

    ort         x ── MatMulNBits(codes, scales, zero points, bias)
    standard    x ── MatMul(DequantizeLinear(codes, scales, zero points)) ── + bias

onnxruntime makes MatMulNBits of the second as well: its matrix has to be [inputs, outputs] for that.
"""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from llmx.errors import UnsupportedError
from llmx.exporters.onnx_graph import GraphRecorder, Parts
from llmx.formats.onnx import COLUMNS, TABLE, VENDOR_DOMAIN

# Inputs are rounded to 8 bits on their way into the kernel, each group of weights with a scale of its own: several
# times as fast, and what is lost is small beside what 4 bits lose.
ACCURACY_LEVEL = 4


class Multiply(Protocol):
    """A dialect's product."""

    def __call__(self, graph: GraphRecorder, x: ir.Value, parts: Parts, bias: ir.Value | None) -> ir.Value:
        """float[..., N] of x float[..., K]."""
        ...


class LookUp(Protocol):
    """A dialect's table."""

    def __call__(self, graph: GraphRecorder, indices: ir.Value, parts: Parts) -> ir.Value:
        """float[B, T, K]: the rows at indices i64[B, T]."""
        ...


def group_of(parts: Parts) -> int:
    """Weights of a group. Raises: UnsupportedError where a group is a whole row, which no kernel here takes."""
    group = parts.matrix.layout.group
    if group is None:
        raise UnsupportedError(
            f"{parts.matrix.encoding.name} has one scale a row: there is no operator for it without 8-bit inputs",
            where=parts.matrix.name,
            fix="choose groups of 16 to 256 weights",
        )
    return group


def multiply_packed(graph: GraphRecorder, x: ir.Value, parts: Parts, bias: ir.Value | None) -> ir.Value:
    """onnxruntime's MatMulNBits."""
    matrix = parts.matrix
    inputs = [x, parts.codes, parts.scales, parts.zero_points, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    return graph.node(
        "MatMulNBits",
        *inputs,
        domain=VENDOR_DOMAIN,
        K=matrix.cols,
        N=matrix.rows,
        bits=matrix.layout.bits,
        block_size=group_of(parts),
        accuracy_level=ACCURACY_LEVEL,
    )


def look_up_packed(graph: GraphRecorder, indices: ir.Value, parts: Parts) -> ir.Value:
    """onnxruntime's GatherBlockQuantized, on the bytes that a tied head multiplies by."""
    matrix, group = parts.matrix, group_of(parts)
    flat = (matrix.rows, matrix.groups * matrix.layout.group_bytes(matrix.cols))
    zeros = () if parts.zero_points is None else (parts.zero_points,)
    found = graph.node(
        "GatherBlockQuantized",
        *(graph.view(parts.codes, TABLE, ir.DataType.UINT8, flat), indices, parts.scales, *zeros),
        domain=VENDOR_DOMAIN,
        bits=matrix.layout.bits,
        block_size=group,
        gather_axis=0,
        quantize_axis=1,
    )
    return found if matrix.groups * group == matrix.cols else _first(graph, found, matrix.cols)


def multiply_columns(graph: GraphRecorder, x: ir.Value, parts: Parts, bias: ir.Value | None) -> ir.Value:
    """MatMul of what DequantizeLinear makes of the codes."""
    zeros = () if parts.zero_points is None else (parts.zero_points,)
    matrix = graph.node("DequantizeLinear", parts.codes, parts.scales, *zeros, axis=0, block_size=group_of(parts))
    product = graph.node("MatMul", x, matrix)
    if parts.matrix.pad:
        product = _first(graph, product, parts.matrix.rows)
    return product if bias is None else graph.node("Add", product, bias)


def look_up_columns(graph: GraphRecorder, indices: ir.Value, parts: Parts) -> ir.Value:
    """Codes, scales and zero points of the columns asked for are gathered, and these alone become floats.

    Gather takes no integers below 8 bits: it gathers bytes, from which the codes are shifted. It reads views of its
    own, because onnxruntime leaves a tied head as it is where anything else reads its parts.
    """
    columns = _Columns(graph, indices, parts.matrix.layout.bits)
    scales = columns.whole(parts.scales)
    codes = columns.codes(parts.codes)
    if parts.zero_points is not None:
        zeros = columns.codes(parts.zero_points)
    elif parts.matrix.layout.bits == 8:
        zeros = None
    else:  # signed numbers: their bits, the highest one turned, count from the middle
        middle = graph.constant(1 << parts.matrix.layout.bits >> 1, "uint8")
        codes = graph.node("BitwiseXor", codes, middle)
        zeros = graph.node("Expand", middle, graph.node("Shape", scales))
    found = graph.node(
        "DequantizeLinear", codes, scales, *(() if zeros is None else (zeros,)), axis=0, block_size=group_of(parts)
    )
    return graph.node("Transpose", found, perm=[1, 2, 0])


class _Columns:
    """Reads columns of packed tensors. indices: i64[B, T]."""

    def __init__(self, graph: GraphRecorder, indices: ir.Value, bits: int) -> None:
        self._graph, self._bits = graph, bits
        self._indices = indices
        if bits < 8:
            per_byte = graph.constant(8 // bits)
            self._bytes = graph.node("Div", indices, per_byte)
            places = graph.node("Mul", graph.node("Mod", indices, per_byte), graph.constant(bits))
            self._shifts = graph.cast(places, ir.DataType.UINT8)

    def whole(self, stored: ir.Value) -> ir.Value:
        """[lines, B, T] of a tensor [lines, columns] whose elements are whole bytes."""
        assert stored.dtype is not None, "a stored tensor has a type"
        found = self._graph.view(stored, COLUMNS, stored.dtype, _shape(stored))
        return self._graph.node("Gather", found, self._indices, axis=1)

    def codes(self, packed: ir.Value) -> ir.Value:
        """u8[lines, B, T] of a tensor of whole numbers [lines, columns]; as they are, where they have 8 bits."""
        if self._bits == 8:
            return self.whole(packed)
        lines, columns = _shape(packed)
        found = self._graph.view(packed, COLUMNS, ir.DataType.UINT8, (lines, columns * self._bits // 8))
        found = self._graph.node("Gather", found, self._bytes, axis=1)
        found = self._graph.node("BitShift", found, self._shifts, direction="RIGHT")
        return self._graph.node("BitwiseAnd", found, self._graph.constant((1 << self._bits) - 1, "uint8"))


def _shape(stored: ir.Value) -> list[int]:
    assert stored.shape is not None, "a stored tensor has a shape"
    return [int(size) for size in stored.shape]  # type: ignore[arg-type]


def _first(graph: GraphRecorder, x: ir.Value, count: int) -> ir.Value:
    """The first elements of the last axis."""
    return graph.node("Slice", x, graph.constant([0]), graph.constant([count]), graph.constant([-1]))
