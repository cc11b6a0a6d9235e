"""Matrix products of a TensorRT graph: float32 goes in and comes out, what is multiplied is of the graph's type.

    floats      x ── Cast ── Gemm(W) ── Cast                                                W [out, in]
    4 bits      x ── Cast ── Gemm(DequantizeLinear(codes, scales)) ── Cast                  codes [out, in], in groups
    8 bits      x ── Cast ── MatMul(DequantizeLinear(codes, scales)) ── Cast                codes [in, out], by channel
    8-bit in    x ── QuantizeLinear ── DequantizeLinear ── MatMul(DequantizeLinear(codes, scales)) ── Cast

and for builders that are not strongly typed, which take no codes but find them again and keep these:

    8-bit in    x ── QuantizeLinear ── DequantizeLinear ── MatMul(Transpose(DequantizeLinear(QuantizeLinear(values))))
    8 bits      as floats, of the values that the codes stand for

TensorRT keeps codes as they are in the engine and multiplies by them; where inputs are rounded to the same kind of
8 bits it multiplies these. All zero points are zero: it takes no others. With 4 bits as rows onnxruntime computes what
stands here, too; it would replace columns by products that round their inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from llmx.exporters.encoding import GroupEncoding
from llmx.exporters.onnx_graph import GraphRecorder, Parts, Piece, onnx_type
from llmx.formats.onnx import INPUT_SCALE
from llmx.quant.activations import InputScale, Kind

F32 = ir.DataType.FLOAT
ZERO_TYPES: Mapping[Kind, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}  # as numpy calls them


@dataclass(slots=True)
class Products:
    """The products of one graph. scales: canonical name -> the static scale of that matrix's inputs.

    strong: whether the builder takes every value in the type it has in the graph, which can then say all types.
    """

    graph: GraphRecorder
    scales: Mapping[str, InputScale]
    strong: bool
    _narrow: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _wide: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _rounded: dict[tuple[ir.Value, InputScale, str], ir.Value] = field(default_factory=dict)

    def narrow(self, x: ir.Value) -> ir.Value:
        """A float32 value in the graph's type, cast once for all who multiply it."""
        if self.graph.type_name == "F32":
            return x
        if x not in self._narrow:
            self._narrow[x] = self.graph.cast(x, self.graph.float_type)
        return self._narrow[x]

    def wide(self, x: ir.Value) -> ir.Value:
        """A value of the graph's type in float32."""
        return x if x.dtype == F32 or self.graph.type_name == "F32" else self.graph.cast(x, F32)

    def floats(self, x: ir.Value, matrix: ir.Value, *, wide: bool) -> ir.Value:
        """f32[R, out] of f32[R, in] and float[out, in]. wide: multiplied in float32, not in the graph's type."""
        if wide:
            return self.graph.node("Gemm", x, self.wide(matrix), transB=1)
        return self._added_up(self.narrow(x), matrix)

    def _added_up(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        """x times the matrix's transpose, both of the graph's type, in float32.

        A strongly typed builder multiplies in half precision and adds up in float32 where it reads just this: casts
        before and behind. Without them it may add up in half precision.
        """
        graph = self.graph
        if not self.strong or graph.type_name == "F32":
            return self.wide(graph.node("Gemm", x, matrix, transB=1))
        product = graph.node("Gemm", self._cast(x), self._cast(matrix), transB=1)
        return self.wide(graph.floats(product))

    def _cast(self, value: ir.Value) -> ir.Value:
        if value not in self._wide:
            self._wide[value] = self.graph.cast(value, F32)
        return self._wide[value]

    def quantized(self, x: ir.Value, parts: Parts, *, wide: bool) -> ir.Value:
        """f32[R, out] of f32[R, in] and a matrix of few bits, for a strongly typed builder."""
        graph, name = self.graph, parts.matrix.pieces[0].weight.spec.name
        scale, type_name = self.scales.get(name), "F32" if wide else graph.type_name
        if scale is None:
            inputs = x if wide else self.narrow(x)
        else:
            inputs = self._rounded_to_8_bits(x, scale, name, type_name)
        matrix = self._dequantized(parts, type_name, rounded=scale is not None)
        if parts.matrix.signed:
            product = graph.node("Gemm", inputs, matrix, transB=1)
        else:
            product = graph.node("MatMul", inputs, matrix)
        return product if type_name == "F32" else graph.cast(product, F32)

    def decoded(self, x: ir.Value, pieces: Sequence[Piece], encoding: GroupEncoding, *, wide: bool) -> ir.Value:
        """f32[R, out] of f32[R, in] and a matrix of 8 bits by channel, for a weakly typed builder."""
        graph, name = self.graph, pieces[0].weight.spec.name
        scale = self.scales.get(name)
        if scale is None:
            matrix, _ = graph.decoded(pieces, encoding, graph.type_name)
            return self.floats(x, matrix, wide=wide)
        values, kept = graph.decoded(pieces, encoding, "F32")
        steps = (graph.channel_scales(kept), graph.constant([0] * kept.rows, "int8"))
        codes = graph.node("QuantizeLinear", values, *steps, axis=0)
        matrix = graph.node("Transpose", graph.node("DequantizeLinear", codes, *steps, axis=0), perm=[1, 0])
        return graph.node("MatMul", self._rounded_to_8_bits(x, scale, name, "F32"), matrix)

    def _rounded_to_8_bits(self, x: ir.Value, scale: InputScale, name: str, type_name: str) -> ir.Value:
        graph, key = self.graph, (x, scale, type_name)
        if key not in self._rounded:
            step = graph.constant(scale.scale, "float32", name.removesuffix(".weight") + INPUT_SCALE)
            # The type of zero is what says the codes' type.
            zero = graph.constant(0, ZERO_TYPES[scale.kind], f"zero.{scale.kind}")
            codes = graph.node("QuantizeLinear", x, step, zero)
            self._rounded[key] = graph.node("DequantizeLinear", codes, step, zero, **self._given(type_name))
        return self._rounded[key]

    def _given(self, type_name: str) -> dict[str, Any]:
        return {"output_dtype": int(onnx_type(type_name))} if self.strong and type_name != "F32" else {}

    def _dequantized(self, parts: Parts, type_name: str, *, rounded: bool) -> ir.Value:
        """float[in, out] of that type, float[out, in] where codes lie in groups.

        rounded: whether the inputs are of 8 bits, too, so that nothing may stand between; otherwise the type is
        converted afterwards, as all runtimes take it.
        """
        graph, group, kind = self.graph, parts.matrix.group, onnx_type(type_name)
        given = self._given(type_name) if rounded else {}
        matrix = graph.node("DequantizeLinear", parts.codes, parts.scales, axis=1, block_size=group, **given)
        return matrix if given or parts.scales.dtype == kind else graph.cast(matrix, kind)
