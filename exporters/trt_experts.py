"""Mixtures of experts for TensorRT: every expert computes every row, and the router's share, zero for most, is
multiplied in. An engine has no rows whose number depends on values, so rows cannot be sorted by their experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llmx.exporters.onnx_experts import Activate, Product
from llmx.exporters.onnx_graph import GraphRecorder
from llmx.exporters.trt_products import Products
from llmx.models.model import Weight


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """One layer's experts. matrices: gate, up, down, each [experts, out, in]. used: experts a row goes through."""

    matrices: tuple[Weight, Weight, Weight]
    used: int
    normalize: bool  # the shares of the used ones sum to one
    activate: Activate


def mix(products: Products, rows: ir.Value, scores: ir.Value, experts: DenseExperts) -> ir.Value:
    """f32[R, H] of rows f32[R, H] and the router's outputs f32[R, experts], of matrices in floats.

    With rows as columns, [experts, out, in] times [in, R], the stacked weights serve as they are stored.
    """
    graph = products.graph
    columns = graph.node("Transpose", products.narrow(rows), perm=[1, 0])
    gate, up, down = (graph.weight(matrix) for matrix in experts.matrices)
    gated = experts.activate(graph, products.wide(graph.node("MatMul", gate, columns)))
    states = graph.node("Mul", gated, products.wide(graph.node("MatMul", up, columns)))
    by_expert = graph.node(
        "Unsqueeze", graph.node("Transpose", shares(graph, scores, experts), perm=[1, 0]), _axis(graph, 1)
    )
    states = products.narrow(graph.node("Mul", states, by_expert))
    mixed = products.wide(graph.node("MatMul", down, states))
    return graph.node("Transpose", graph.node("ReduceSum", mixed, _axis(graph, 0), keepdims=0), perm=[1, 0])


def mix_quantized(
    products: Products, rows: ir.Value, scores: ir.Value, experts: DenseExperts, product: Product
) -> ir.Value:
    """f32[R, H], expert after expert. product: one expert's matrices times rows."""
    graph, (gate, up, down) = products.graph, experts.matrices
    count, width = gate.spec.shape[0], gate.spec.shape[-2]
    parts = graph.outputs(count, "Split", shares(graph, scores, experts), graph.constant([1] * count), axis=1)
    mixed: ir.Value | None = None
    for expert, share in enumerate(parts):
        both = product(rows, (gate, up), expert)
        gated, plain = graph.outputs(2, "Split", both, graph.constant([width, width]), axis=-1)
        states = graph.node("Mul", experts.activate(graph, gated), plain)
        result = graph.node("Mul", product(states, (down,), expert), share)
        mixed = result if mixed is None else graph.node("Add", mixed, result)
    assert mixed is not None, "a mixture has experts"
    return mixed


def shares(graph: GraphRecorder, scores: ir.Value, experts: DenseExperts) -> ir.Value:
    """f32[R, experts]: what each row takes of each expert."""
    found = graph.node("Softmax", scores, axis=-1)
    weights, chosen = graph.outputs(2, "TopK", found, graph.constant([experts.used]), axis=-1)
    if experts.normalize:
        weights = graph.node("Div", weights, graph.node("ReduceSum", weights, _axis(graph, -1), keepdims=1))
    nothing = graph.node("Mul", found, graph.constant(0, "float32"))
    return graph.node("ScatterElements", nothing, chosen, weights, axis=1)


def _axis(graph: GraphRecorder, axis: int) -> ir.Value:
    return graph.constant([axis])
