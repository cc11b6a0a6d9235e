"""Rotary angles inside a graph: for the positions of one run, or as a table of all positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from llmx.exporters.onnx_graph import GraphRecorder
from llmx.models.architecture import Rope, RopeKind
from llmx.models.rope import inverse_frequencies, rope_tables


def cos_and_sin(
    graph: GraphRecorder, rope: Rope, positions: ir.Value, total: ir.Value, *, narrow: bool = True
) -> tuple[ir.Value, ir.Value]:
    """(cos, sin), each float[B, T, dim / 2], attention factor included, computed in float32 when the graph runs.

    positions: i64[B, T]. total: i64[1] or i64[B, 1, 1], the positions of whole sequences, cached ones included.
    narrow: given in the graph's float type, else in float32.
    """
    frequencies = FREQUENCIES.get(rope.kind, _static)(graph, rope, total)
    places = graph.node("Unsqueeze", graph.cast(positions, ir.DataType.FLOAT), graph.constant([-1]))
    angles = graph.node("Mul", places, frequencies)
    found = []
    for function in ("Cos", "Sin"):
        values = graph.node(function, angles)
        if rope.attention_factor is not None:
            values = graph.node("Mul", values, graph.constant(rope.attention_factor, "float32"))
        found.append(graph.floats(values) if narrow else values)
    return found[0], found[1]


def is_static(rope: Rope) -> bool:
    """Whether the angles of a position are the same in sequences of every length."""
    return rope.kind not in FREQUENCIES


def stored_tables(graph: GraphRecorder, rope: Rope, positions: int) -> tuple[ir.Value, ir.Value]:
    """(cos, sin), each float[positions, dim / 2], stored as weights of the artifact."""
    assert is_static(rope), "a table of all positions holds the angles of every length"
    name = f"rope.{len([name for name in graph.stored if name.endswith('.cos')])}"
    cos, sin = rope_tables(rope, np.arange(positions), positions)
    return graph.table(f"{name}.cos", cos), graph.table(f"{name}.sin", sin)


def _static(graph: GraphRecorder, rope: Rope, total: ir.Value) -> ir.Value:
    """f32[dim / 2] radians a position."""
    return graph.constant(inverse_frequencies(rope, 1), "float32")


def _dynamic(graph: GraphRecorder, rope: Rope, total: ir.Value) -> ir.Value:
    """As models/rope.py: past the original context the base grows with the length."""
    assert rope.original_context is not None
    length = graph.cast(graph.node("Max", total, graph.constant([rope.original_context])), ir.DataType.FLOAT)
    slope = graph.constant(rope.factor / rope.original_context, "float32")
    stretch = graph.node("Sub", graph.node("Mul", length, slope), graph.constant(rope.factor - 1, "float32"))
    # (theta · stretch^(dim / (dim - 2)))^(-2i / dim) = theta^(-2i / dim) · stretch^(-2i / (dim - 2))
    powers = graph.constant(-np.arange(0, rope.dim, 2) / (rope.dim - 2), "float32")
    plain = graph.constant(inverse_frequencies(rope, rope.original_context), "float32")
    return graph.node("Mul", plain, graph.node("Pow", stretch, powers))


def _longrope(graph: GraphRecorder, rope: Rope, total: ir.Value) -> ir.Value:
    """One set of factors up to the original context, another past it."""
    assert rope.original_context is not None
    short, long = (inverse_frequencies(rope, rope.original_context + more) for more in (0, 1))
    past = graph.node("Greater", total, graph.constant([rope.original_context]))
    return graph.node("Where", past, graph.constant(long, "float32"), graph.constant(short, "float32"))


# The kinds whose frequencies depend on the length.
FREQUENCIES: dict[RopeKind, Callable[[GraphRecorder, Rope, ir.Value], ir.Value]] = {
    "dynamic": _dynamic,
    "longrope": _longrope,
}
