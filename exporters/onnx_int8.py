"""Linear layers in 8-bit integers, weights and inputs both, in standard operators that every runtime knows.

    W ≈ C diag(w)      codes C int8[in, out], scales w f32[out], positive: the weights, by output channel
    x ≈ a (q − z)      codes q uint8[…, in]: the inputs, by one of
        static    a, z   constants, measured on calibration text (llmx.exporters.onnx_activations)
        by row    a = max|x| / 127 of each row, z = 128, computed as the graph runs

    static    x ───────────────── Quantize ── Dequantize ─┐
                                      C ── Dequantize ────┴── MatMul ─────────── + bias
    by row    x ── ÷ max|x| ───── Quantize ── Dequantize ─┐
                        │             C ── Dequantize ────┴── MatMul ── · max|x| ── + bias

A row divided by its largest magnitude fits one constant scale, so that both ways are the same pattern to a runtime:
onnxruntime makes QuantizeLinear and one product of integers of it. DynamicQuantizeLinear would be fewer operators, but
it has one scale for all rows of a run: what a row gives depends on its neighbours then, and what a prompt gives on how
it is cut. Measured over 1024 positions, KL against float: 0.0005 by row and 0.0018 by run.

A row of zeros is divided by zero. Whatever code NaN gets, its product is multiplied by the row's 0 again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmx.exporters.onnx_graph import GraphRecorder, Parts
from llmx.formats.onnx import INPUT_SCALE, INPUT_ZERO_POINT
from llmx.quant.activations import UNIT, InputScale

EXACT_OPTION = "session.x64quantprecision"
"""onnxruntime's entry ("1") for x86 processors without VNNI: there two products of 8 bits are added up in 16, which
saturate: in one sum of 2500, and ten times the loss (KL 0.0049 and 0.0005). With it weights are turned into unsigned
bytes, for products that are exact on any processor and slower on those with VNNI."""


@dataclass(frozen=True, slots=True)
class Int8Products:
    """A dialect's product (llmx.exporters.onnx_linear.Multiply) of matrices with one scale a channel.

    scales: canonical name -> the static scale of that matrix's inputs; those of all others are quantized by row.
    """

    scales: Mapping[str, InputScale]

    def multiply(self, graph: GraphRecorder, x: ir.Value, parts: Parts, bias: ir.Value | None) -> ir.Value:
        """float[…, out] of x float[…, in]."""
        name = parts.matrix.pieces[0].weight.spec.name
        if name in self.scales:
            product = _product(graph, _static(graph, x, self.scales[name], name.removesuffix(".weight")), parts)
        else:
            largest = graph.node("ReduceMax", graph.node("Abs", x), graph.constant([-1]), keepdims=1)
            divided = graph.node("Div", x, largest)
            step, zero = graph.constant(UNIT.scale, "float32"), graph.constant(UNIT.zero_point, "uint8")
            product = graph.node("Mul", _product(graph, _rounded(graph, divided, step, zero), parts), largest)
        return product if bias is None else graph.node("Add", product, bias)


def look_up_channels(graph: GraphRecorder, indices: ir.Value, parts: Parts) -> ir.Value:
    """float[B, T, in]: the channels at indices i64[B, T], which alone become floats."""
    codes = graph.node("Transpose", graph.node("Gather", parts.codes, indices, axis=1), perm=[1, 2, 0])
    scales = graph.node("Gather", parts.scales, graph.node("Unsqueeze", indices, graph.constant([-1])), axis=0)
    return graph.node("Mul", graph.cast(codes, ir.DataType.FLOAT), scales)


def _static(graph: GraphRecorder, x: ir.Value, scale: InputScale, name: str) -> ir.Value:
    """Constants with names of their own: equal ones stay apart, so a plan knows their bytes before their values."""
    step = graph.constant(scale.scale, "float32", name + INPUT_SCALE)
    return _rounded(graph, x, step, graph.constant(scale.zero_point, "uint8", name + INPUT_ZERO_POINT))


def _rounded(graph: GraphRecorder, x: ir.Value, step: ir.Value, zero: ir.Value) -> ir.Value:
    return graph.node("DequantizeLinear", graph.node("QuantizeLinear", x, step, zero), step, zero)


def _product(graph: GraphRecorder, x: ir.Value, parts: Parts) -> ir.Value:
    # Zeros that are not said are the same to the standard, but onnxruntime joins nothing without them. Each matrix has
    # its own: with shared ones onnxruntime refuses the graph once it is asked for EXACT_OPTION.
    zeros = graph.constant(np.zeros(parts.matrix.rows), "int8", f"{parts.matrix.name}.zeros")
    return graph.node("MatMul", x, graph.node("DequantizeLinear", parts.codes, parts.scales, zeros, axis=1))
