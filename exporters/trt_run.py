"""What is one for all layers of a TensorRT graph: its inputs, where new positions go, which keys are seen, angles.

    cache of one sequence, M positions     | 0 … start − 1: past | start … start + T − 1: new | free |
    token t of a run is position start + t and sees keys j ≤ start + t, inside its window

Prompts of other lengths are padded on the right: what a pad writes lies where the next run writes, and nothing sees it.
Only a rope that depends on the length takes pads for positions: such prompts are run one by one.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from llmx.exporters.onnx_graph import GraphRecorder, Stored
from llmx.exporters.onnx_rope import cos_and_sin, is_static
from llmx.formats.onnx import PARTS, START, TOKENS, past
from llmx.models.architecture import Architecture, Rope
from llmx.models.rope import rope_tables

I64 = ir.DataType.INT64
Angles = tuple[ir.Value, ir.Value]


class EngineRun:
    """Values that layers share, each recorded when it is first asked for. B sequences, T new positions, M cached.

    capacity: positions that caches have at most, None for the model's context. fixed: M is that number in every run;
    otherwise a run may bring caches of another size. wide: caches are float32, whatever the graph's type.
    """

    def __init__(
        self, graph: GraphRecorder, architecture: Architecture, capacity: int | None, *, fixed: bool, wide: bool
    ) -> None:
        self.graph, self.architecture = graph, architecture
        self.cache_type = ir.DataType.FLOAT if wide else graph.float_type
        self.longest = capacity or architecture.context_length
        self._fixed = capacity if fixed else None
        self._angles: dict[Rope, Angles] = {}
        self._whole_angles: dict[Rope, Angles] = {}
        self._seen: dict[int | None, ir.Value] = {}
        self._heads: dict[int, ir.Value] = {}

    @property
    def tokens(self) -> ir.Value:
        """i64[B, T]"""
        return self.graph.input(TOKENS, I64, ("batch", "positions"))

    @property
    def start(self) -> ir.Value:
        """i64[B]: positions that the cache holds already."""
        return self.graph.input(START, I64, ("batch",))

    def cached(self, layer: int, part: str) -> ir.Value:
        """float[B, kv heads, M, D]: a layer's keys or values."""
        return self.graph.input(past(layer, part), self.cache_type, self.cache_shape)

    @property
    def cache_shape(self) -> tuple[int | str, ...]:
        a = self.architecture
        return ("batch", a.kv_heads, self._fixed or "capacity", a.head_dim)

    @cached_property
    def batch_and_new(self) -> ir.Value:
        """i64[2]: B and T."""
        return self.graph.node("Shape", self.tokens)

    @cached_property
    def batch(self) -> ir.Value:
        """i64[1]: B."""
        return self._size(self.batch_and_new, [0])

    @cached_property
    def new(self) -> ir.Value:
        """i64[1]: T."""
        return self._size(self.batch_and_new, [1])

    @cached_property
    def length(self) -> ir.Value:
        """i64[1]: M."""
        if self._fixed is not None:
            return self.graph.constant([self._fixed])
        return self._size(self.graph.node("Shape", self.cached(0, PARTS[0])), [2])

    def _size(self, shape: ir.Value, axis: int | list[int]) -> ir.Value:
        return self.graph.node("Gather", shape, self.graph.constant(axis), axis=0)

    def shape(self, *sizes: ir.Value | int) -> ir.Value:
        """i64[sizes]: a shape of sizes known now and sizes (i64[1]) known in a run."""
        parts = [self.graph.constant([one]) if isinstance(one, int) else one for one in sizes]
        return self.graph.node("Concat", *parts, axis=0)

    def heads_shape(self, heads: int) -> ir.Value:
        """i64[4]: that of f32[B, T, heads, D]."""
        if heads not in self._heads:
            self._heads[heads] = self.shape(self.batch, self.new, heads, self.architecture.head_dim)
        return self._heads[heads]

    @cached_property
    def positions(self) -> ir.Value:
        """i64[B, T]"""
        return self.graph.node(
            "Add", self.graph.node("Unsqueeze", self.start, self.graph.constant([1])), self._range(self.new)
        )

    @cached_property
    def total(self) -> ir.Value:
        """i64[B, 1, 1]: the positions of each sequence after this run."""
        whole = self.graph.node("Add", self.start, self.new)
        return self.graph.node("Unsqueeze", whole, self.graph.constant([1, 2]))

    def _range(self, count: ir.Value) -> ir.Value:
        """i64[n]: 0 … n − 1."""
        stop = self.graph.node("Squeeze", count, self.graph.constant([0]))
        return self.graph.node("Range", self.graph.constant(0), stop, self.graph.constant(1))

    @cached_property
    def _keys(self) -> ir.Value:
        return self._range(self.length)

    @cached_property
    def _queries(self) -> ir.Value:
        """i64[B, 1, T, 1]"""
        return self.graph.node("Unsqueeze", self.positions, self.graph.constant([1, 3]))

    def seen(self, window: int | None) -> ir.Value:
        """bool[B, 1, T, M]: which keys a query sees."""
        if window not in self._seen:
            near = self._past_and_own
            if window is not None:
                distance = self.graph.node("Sub", self._queries, self._keys)
                within = self.graph.node("Less", distance, self.graph.constant(window))
                near = self.graph.node("And", near, within)
            self._seen[window] = near
        return self._seen[window]

    @cached_property
    def _past_and_own(self) -> ir.Value:
        return self.graph.node("LessOrEqual", self._keys, self._queries)

    @cached_property
    def places(self) -> ir.Value:
        """i64[B, kv heads, T, D]: where along the cache each new key and value goes."""
        a = self.architecture
        return self.graph.node("Expand", self._queries, self.shape(self.batch, a.kv_heads, self.new, a.head_dim))

    def angles(self, rope: Rope) -> Angles:
        """(cos, sin) of this run's positions, each f32[B, T, dim / 2]: read from tables where lengths allow it.

        A processor's own cosine may be a fast one, which is wrong by far at angles of thousands.
        """
        if rope not in self._angles:
            self._angles[rope] = self._looked_up(rope) if rope.kind != "dynamic" else self._computed(rope)
        return self._angles[rope]

    def whole_angles(self, rope: Rope) -> Angles:
        """(cos, sin) for both halves of a head at once, each f32[B, T, 1, dim]; sin's first half is negative."""
        if rope not in self._whole_angles:
            cos, sin = (self.graph.node("Unsqueeze", one, self.graph.constant([2])) for one in self.angles(rope))
            self._whole_angles[rope] = (
                self.graph.node("Concat", cos, cos, axis=-1),
                self.graph.node("Concat", self.graph.node("Neg", sin), sin, axis=-1),
            )
        return self._whole_angles[rope]

    def _computed(self, rope: Rope) -> Angles:
        return cos_and_sin(self.graph, rope, self.positions, self.total, narrow=False)

    def _looked_up(self, rope: Rope) -> Angles:
        longest = self.longest
        if is_static(rope):
            return self._rows(self._tables(rope, longest, longest))
        assert rope.original_context is not None, "a rope that depends on the length has a length it was made for"
        short = self._rows(self._tables(rope, longest, rope.original_context))
        if longest <= rope.original_context:
            return short
        long = self._rows(self._tables(rope, longest, longest))
        past_it = self.graph.node("Greater", self.total, self.graph.constant([rope.original_context]))
        cos, sin = (self.graph.node("Where", past_it, *both) for both in zip(long, short, strict=True))
        return cos, sin

    def _rows(self, tables: Angles) -> Angles:
        cos, sin = (self.graph.node("Gather", table, self.positions, axis=0) for table in tables)
        return cos, sin

    def _tables(self, rope: Rope, positions: int, length: int) -> Angles:
        """(cos, sin), each f32[positions, dim / 2], as in sequences of that length; stored as weights."""
        number = len([name for name in self.graph.stored if name.endswith(".cos")])
        found = zip(("cos", "sin"), rope_tables(rope, np.arange(positions), length), strict=True)
        cos, sin = (self.graph.keep(Stored(f"rope.{number}.{n}", t.shape, "F32", table=t)) for n, t in found)
        return cos, sin
