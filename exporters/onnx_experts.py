"""Mixtures of experts, in the operators of each dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from llmx.exporters.onnx_graph import GraphRecorder, Stored, whole
from llmx.formats.onnx import VENDOR_DOMAIN
from llmx.models.architecture import Activation
from llmx.models.model import Weight

Activate = Callable[[GraphRecorder, ir.Value], ir.Value]


@dataclass(frozen=True, slots=True)
class Experts:
    """One layer's experts. matrices: gate, up, down, each [experts, out, in]. used: experts a row goes through."""

    matrices: tuple[Weight, Weight, Weight]
    used: int
    normalize: bool  # the shares of the used ones sum to one
    activation: Activation
    activate: Activate


class Mix(Protocol):
    """A dialect's mixture."""

    def __call__(self, graph: GraphRecorder, rows: ir.Value, scores: ir.Value, experts: Experts) -> ir.Value:
        """float[R, H] of rows float[R, H] and the router's outputs float[R, experts]."""
        ...


class Product(Protocol):
    """How an expert's matrices are recorded."""

    def __call__(self, x: ir.Value, matrices: Sequence[Weight], expert: int) -> ir.Value:
        """float[R, outputs]: one expert's matrices times x float[R, in], their outputs one after another."""
        ...


def mix(graph: GraphRecorder, rows: ir.Value, scores: ir.Value, experts: Experts) -> ir.Value:
    """Every expert computes every row; the router's share, zero for most, multiplies what it gives.

    With rows as columns, [experts, out, in] times [in, R], the stacked weights serve as they are stored.
    """
    columns = graph.node("Transpose", rows, perm=[1, 0])
    gate, up, down = (graph.weight(matrix) for matrix in experts.matrices)
    gated = experts.activate(graph, graph.node("MatMul", gate, columns))
    states = graph.node("Mul", gated, graph.node("MatMul", up, columns))
    mixed = graph.node("MatMul", down, graph.node("Mul", states, _shares(graph, scores, experts)))
    summed = graph.node("ReduceSum", mixed, graph.constant([0]), keepdims=0)
    return graph.node("Transpose", summed, perm=[1, 0])


def _shares(graph: GraphRecorder, scores: ir.Value, experts: Experts) -> ir.Value:
    """float[experts, 1, R]: what each row takes of each expert."""
    shares, weights, chosen = _chosen(graph, scores, experts)
    nothing = graph.node("Mul", shares, graph.number(0))
    spread = graph.node("ScatterElements", nothing, chosen, weights, axis=1)
    return graph.node("Unsqueeze", graph.node("Transpose", spread, perm=[1, 0]), graph.constant([1]))


def _chosen(graph: GraphRecorder, scores: ir.Value, experts: Experts) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(float[R, experts] all shares, float[R, used] those of the experts used, i64[R, used] which these are)."""
    shares = graph.node("Softmax", scores, axis=-1)
    weights, chosen = graph.outputs(2, "TopK", shares, graph.constant([experts.used]), axis=-1)
    if experts.normalize:
        weights = graph.node("Div", weights, graph.node("ReduceSum", weights, graph.constant([-1]), keepdims=1))
    return shares, weights, chosen


def mix_sorted(graph: GraphRecorder, rows: ir.Value, scores: ir.Value, experts: Experts, product: Product) -> ir.Value:
    """Rows sorted by their experts, so that each expert multiplies the rows that chose it, possibly none.

    onnxruntime's QMoE does the same in one operator, but its CPU kernel turns 4-bit weights into floats on every run
    (128 rows and 8 experts of 1024: 172 ms where this takes 13), and rounds to 8 bits with no way to switch it off.
    """
    gate, up, down = experts.matrices
    _, weights, chosen = _chosen(graph, scores, experts)
    flat = graph.node("Reshape", chosen, graph.constant([-1]))
    sorted_places = _ascending(graph, flat)
    sources = graph.node("Div", sorted_places, graph.constant(experts.used))
    numbers = graph.constant(np.arange(gate.spec.shape[0]))
    own = graph.cast(
        graph.node("Equal", graph.node("Unsqueeze", flat, graph.constant([1])), numbers), ir.DataType.INT64
    )
    counts = graph.node("ReduceSum", own, graph.constant([0]), keepdims=0)

    def multiplied(x: ir.Value, matrices: Sequence[Weight]) -> ir.Value:
        parts = graph.outputs(gate.spec.shape[0], "Split", x, counts, axis=0)
        return graph.node("Concat", *(product(part, matrices, n) for n, part in enumerate(parts)), axis=0)

    both = multiplied(graph.node("Gather", rows, sources, axis=0), (gate, up))
    gated, plain = graph.outputs(2, "Split", both, axis=-1, num_outputs=2)
    states = graph.node("Mul", experts.activate(graph, gated), plain)
    results = graph.node("Gather", multiplied(states, (down,)), _ascending(graph, sorted_places), axis=0)
    by_row = graph.node("Reshape", results, graph.constant([-1, experts.used, down.spec.shape[-2]]))
    shares = graph.node("Unsqueeze", weights, graph.constant([2]))
    return graph.node("ReduceSum", graph.node("Mul", by_row, shares), graph.constant([1]), keepdims=0)


def _ascending(graph: GraphRecorder, values: ir.Value) -> ir.Value:
    """i64[n]: the places of values i64[n] in their order; of a permutation, its inverse."""
    _, places = graph.outputs(2, "TopK", values, graph.node("Shape", values), largest=0)
    return places


def mix_routed(graph: GraphRecorder, rows: ir.Value, scores: ir.Value, experts: Experts) -> ir.Value:
    """onnxruntime's MoE, where a row runs through the experts it uses only; `mix` where there is no kernel for it."""
    if not routes(graph.type_name, experts.activation):
        return mix(graph, rows, scores, experts)
    gate, up, down = experts.matrices
    count, out, columns = gate.spec.shape
    name = gate.spec.name.replace("expert_gate", "expert_gate_up")
    both = Stored(name, (count, 2 * out, columns), graph.type_name, (whole(gate), whole(up)), alternate=True)
    return graph.node(
        "MoE",
        *(rows, scores, graph.keep(both), None, graph.weight(down)),
        domain=VENDOR_DOMAIN,
        k=experts.used,
        normalize_routing_weights=int(experts.normalize),
        # SwiGLU as its makers wrote it is swish(gate) · up: alpha scales the sigmoid's argument, beta is added to up.
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )


def routes(type_name: str, activation: Activation) -> bool:
    """Whether onnxruntime's CPU kernel of MoE runs such experts."""
    return type_name == "F32" and activation == "silu"
