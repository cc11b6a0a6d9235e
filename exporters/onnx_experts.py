"""Mixtures of experts, in the operators of each dialect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from llmx.exporters.onnx_graph import GraphRecorder, Stored
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
    shares = graph.node("Softmax", scores, axis=-1)
    weights, chosen = graph.outputs(2, "TopK", shares, graph.constant([experts.used]), axis=-1)
    if experts.normalize:
        weights = graph.node("Div", weights, graph.node("ReduceSum", weights, graph.constant([-1]), keepdims=1))
    nothing = graph.node("Mul", shares, graph.number(0))
    spread = graph.node("ScatterElements", nothing, chosen, weights, axis=1)
    return graph.node("Unsqueeze", graph.node("Transpose", spread, perm=[1, 0]), graph.constant([1]))


def mix_routed(graph: GraphRecorder, rows: ir.Value, scores: ir.Value, experts: Experts) -> ir.Value:
    """onnxruntime's MoE, where a row runs through the experts it uses only; `mix` where there is no kernel for it."""
    if not routes(graph.type_name, experts.activation):
        return mix(graph, rows, scores, experts)
    gate, up, down = experts.matrices
    count, out, columns = gate.spec.shape
    name = gate.spec.name.replace("expert_gate", "expert_gate_up")
    both = Stored(name, (count, 2 * out, columns), graph.type_name, weight=gate, between=up)
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
