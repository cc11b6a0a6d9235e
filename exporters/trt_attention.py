"""Attention over a cache of fixed places, in the operators of each TensorRT dialect. Heads are f32[B, T, heads, D].

    trt      TensorScatter writes the new keys and values into the cache; Attention reads all of it under a mask
    plain    ScatterElements in the place of TensorScatter; products and a softmax in that of Attention, all float32

Queries are scaled before they are rounded to the graph's type.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from llmx.exporters.trt_run import EngineRun
from llmx.formats.onnx import PARTS
from llmx.models.architecture import Rope

F32 = ir.DataType.FLOAT
MASKED = -6e4  # a score of nothing: far below every score, and still a number in half precision, where builders try it


def turn(run: EngineRun, x: ir.Value, rope: Rope) -> ir.Value:
    """ONNX's RotaryEmbedding on heads that lie one after another."""
    graph, whole = run.graph, rope.dim == run.architecture.head_dim
    heads = graph.node("Transpose", x, perm=[0, 2, 1, 3])
    turned = graph.node("RotaryEmbedding", heads, *run.angles(rope), rotary_embedding_dim=None if whole else rope.dim)
    return graph.node("Transpose", turned, perm=[0, 2, 1, 3])


def turn_plainly(run: EngineRun, x: ir.Value, rope: Rope) -> ir.Value:
    """The same in products and sums: element i of a head pairs with i + dim / 2.

    The other half is looked up: a head put together from two halves would be two kernels more in an engine.
    """
    graph, half, rest = run.graph, rope.dim // 2, run.architecture.head_dim - rope.dim
    head, *others = graph.outputs(2, "Split", x, graph.constant([rope.dim, rest]), axis=-1) if rest else (x,)
    cos, sin = run.whole_angles(rope)
    order = graph.constant([*range(half, rope.dim), *range(half)])
    other = graph.node("Mul", graph.node("Gather", head, order, axis=-1), sin)
    turned = graph.node("Add", graph.node("Mul", head, cos), other)
    return graph.node("Concat", turned, *others, axis=-1) if rest else turned


def attend(
    run: EngineRun, layer: int, heads: Sequence[ir.Value], *, scale: float, window: int | None
) -> tuple[ir.Value, list[ir.Value]]:
    """(f32[R, heads · D], the present keys and values) by ONNX's own operators."""
    graph = run.graph
    q, *new = (graph.floats(graph.node("Transpose", one, perm=[0, 2, 1, 3])) for one in heads)
    caches = [run.cached(layer, part) for part in PARTS]
    presents = [
        graph.node("TensorScatter", cache, update, run.start, axis=2) for cache, update in zip(caches, new, strict=True)
    ]
    mixed = graph.node("Attention", q, *presents, run.seen(window), scale=scale)
    return _rows(run, _wide(run, mixed)), presents


def attend_plainly(
    run: EngineRun, layer: int, heads: Sequence[ir.Value], *, scale: float, window: int | None
) -> tuple[ir.Value, list[ir.Value]]:
    """(f32[R, heads · D], the present keys and values) by products. Queries of one head of keys are one matrix."""
    graph, a = run.graph, run.architecture
    q, k, v = heads
    q = graph.node("Mul", q, graph.constant(scale, "float32"))
    q, *new = (graph.node("Transpose", one, perm=[0, 2, 1, 3]) for one in (q, k, v))
    presents = [
        graph.node("ScatterElements", run.cached(layer, part), run.places, update, axis=2)
        for part, update in zip(PARTS, new, strict=True)
    ]
    grouped = a.heads != a.kv_heads
    if grouped:
        q = graph.node("Reshape", q, graph.constant([0, a.kv_heads, -1, a.head_dim]))
    scores = graph.node("MatMul", q, graph.node("Transpose", presents[0], perm=[0, 1, 3, 2]))
    if grouped:
        scores = graph.node("Reshape", scores, run.shape(run.batch, a.heads, run.new, run.length))
    nothing = graph.constant(MASKED, "float32")
    shares = graph.node("Softmax", graph.node("Where", run.seen(window), scores, nothing), axis=-1)
    if grouped:
        shares = graph.node("Reshape", shares, run.shape(run.batch, a.kv_heads, -1, run.length))
    mixed = graph.node("MatMul", shares, presents[1])
    if grouped:
        mixed = graph.node("Reshape", mixed, run.shape(run.batch, a.heads, -1, a.head_dim))
    return _rows(run, mixed), presents


def _wide(run: EngineRun, x: ir.Value) -> ir.Value:
    """A value of the graph's type in float32."""
    return x if run.graph.type_name == "F32" else run.graph.cast(x, F32)


def _rows(run: EngineRun, mixed: ir.Value) -> ir.Value:
    """f32[R, heads · D] of f32[B, heads, T, D]."""
    graph, a = run.graph, run.architecture
    together = graph.node("Transpose", mixed, perm=[0, 2, 1, 3])
    return graph.node("Reshape", together, graph.constant([-1, a.heads * a.head_dim]))
