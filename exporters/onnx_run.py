"""What is one for all layers of a recorded graph: its inputs, the sizes of a run, masks and rotary angles."""

from __future__ import annotations

from functools import cached_property

import onnx_ir as ir

from llmx.exporters.onnx_graph import GraphRecorder
from llmx.exporters.onnx_rope import cos_and_sin, stored_tables
from llmx.formats.onnx import MASK, PARTS, POSITIONS, TOKENS, past
from llmx.models.architecture import Architecture, Rope

I64 = ir.DataType.INT64


class Run:
    """Values that layers share, each recorded when it is first asked for. B sequences, T new positions, S in all."""

    def __init__(self, graph: GraphRecorder, architecture: Architecture) -> None:
        self.graph, self.architecture = graph, architecture
        self._angles: dict[Rope, tuple[ir.Value, ir.Value]] = {}
        self._tables: dict[Rope, tuple[ir.Value, ir.Value]] = {}
        self._seen: dict[int | None, ir.Value] = {}

    @property
    def tokens(self) -> ir.Value:
        """i64[B, T]"""
        return self.graph.input(TOKENS, I64, ("batch", "positions"))

    @property
    def mask(self) -> ir.Value:
        """i64[B, S]: 0 for padding, cached positions included."""
        return self.graph.input(MASK, I64, ("batch", "total"))

    @property
    def positions(self) -> ir.Value:
        """i64[B, T]"""
        return self.graph.input(POSITIONS, I64, ("batch", "positions"))

    def cached(self, layer: int) -> list[ir.Value]:
        """Keys and values of past positions, each float[B, kv heads, S - T, D]."""
        a = self.architecture
        shape = ("batch", a.kv_heads, "past", a.head_dim)
        return [self.graph.input(past(layer, part), self.graph.float_type, shape) for part in PARTS]

    @cached_property
    def batch_and_new(self) -> ir.Value:
        """i64[2]: B and T."""
        return self.graph.node("Shape", self.tokens)

    @cached_property
    def total(self) -> ir.Value:
        """i64[1]: S."""
        return self.graph.node("Shape", self.mask, start=1)

    @cached_property
    def last_seen(self) -> ir.Value:
        """i32[B]: each sequence's positions without padding, less one."""
        seen = self.graph.node("ReduceSum", self.mask, self.graph.constant([1]), keepdims=0)
        return self.graph.cast(self.graph.node("Sub", seen, self.graph.constant(1)), ir.DataType.INT32)

    @cached_property
    def total_i32(self) -> ir.Value:
        """i32[]: S."""
        return self.graph.cast(self.graph.node("Squeeze", self.total), ir.DataType.INT32)

    @cached_property
    def _batched(self) -> ir.Value:
        return self.graph.node("Concat", self.batch_and_new, self.graph.constant([-1]), axis=0)

    def batched(self, rows: ir.Value) -> ir.Value:
        """[B, T, …] of rows [B · T, …], all that follows in one axis."""
        return self.graph.node("Reshape", rows, self._batched)

    def angles(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """(cos, sin) of this run's positions, each float[B, T, dim / 2]."""
        if rope not in self._angles:
            self._angles[rope] = cos_and_sin(self.graph, rope, self.positions, self.total)
        return self._angles[rope]

    def tables(self, rope: Rope) -> tuple[ir.Value, ir.Value]:
        """(cos, sin) of every position of the context, each float[context, dim / 2], stored as weights."""
        if rope not in self._tables:
            self._tables[rope] = stored_tables(self.graph, rope, self.architecture.context_length)
        return self._tables[rope]

    def seen(self, window: int | None) -> ir.Value:
        """bool[B, 1, T, S]: which keys a query sees: none after it, none past its window, no padding."""
        if window not in self._seen:
            near = self._causal
            if window is not None:
                near = self.graph.node(
                    "And", near, self.graph.node("Less", self._distance, self.graph.constant(window))
                )
            self._seen[window] = self.graph.node("And", near, self._filled)
        return self._seen[window]

    @cached_property
    def _distance(self) -> ir.Value:
        """i64[T, S]: how far each key lies before each query. Places in the cache, which padding shifts for both."""
        graph, one = self.graph, self.graph.constant(1)
        total = graph.node("Squeeze", self.total)
        new = graph.node("Squeeze", graph.node("Shape", self.tokens, start=1))
        keys = graph.node("Range", graph.constant(0), total, one)
        queries = graph.node("Range", graph.node("Sub", total, new), total, one)
        return graph.node("Sub", graph.node("Unsqueeze", queries, graph.constant([1])), keys)

    @cached_property
    def _causal(self) -> ir.Value:
        return self.graph.node("GreaterOrEqual", self._distance, self.graph.constant(0))

    @cached_property
    def _filled(self) -> ir.Value:
        """bool[B, 1, T, S]: no padding, or the query itself, so that no row of the softmax is empty."""
        graph = self.graph
        kept = graph.node("Unsqueeze", graph.cast(self.mask, ir.DataType.BOOL), graph.constant([1, 2]))
        own = graph.node("Equal", self._distance, graph.constant(0))
        return graph.node("Or", kept, own)
