"""The decoder's operations, recorded as an ONNX graph.

In a graph of floats, hidden states are rows float[B · T, H] (written R below), so that every linear layer is one Gemm
on the weight as the checkpoint stores it, bias included, and a tied head shares the embedding's bytes. Only attention
sees [B, T, …]. Where matrices are quantized R is [B, T] throughout: their operators take it, nothing is reshaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from llmx.exporters.encoding import Float8Encoding, GroupEncoding
from llmx.exporters.onnx_attention import Attend, Heads
from llmx.exporters.onnx_experts import Activate, Experts, Mix, mix_sorted
from llmx.exporters.onnx_graph import GraphRecorder, Parts, Piece, Stored, by_channel, whole
from llmx.exporters.onnx_int8 import Int8Products, look_up_channels
from llmx.exporters.onnx_linear import LookUp, Multiply
from llmx.exporters.onnx_matrices import Matrices
from llmx.exporters.onnx_run import Run
from llmx.formats.onnx import PARTS, joined_name, present
from llmx.models.architecture import Activation, NormKind, Rope
from llmx.models.model import Model, Weight
from llmx.quant.activations import InputScale


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor of the walk: its value, float[R, …] or i64[B, T]; heads, where it is split, as float[R, heads, D]
    or float[R, heads · D]; rope: how its heads are still to be turned."""

    value: ir.Value
    heads: int | None = None
    rope: Rope | None = None


def _silu(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _gelu(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    return graph.node("Gelu", x)


def _gelu_tanh(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    return graph.node("Gelu", x, approximate="tanh")


ACTIVATIONS: dict[Activation, Activate] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
NORMS: dict[NormKind, str] = {"rms": "RMSNormalization", "layer": "LayerNormalization"}


@dataclass(frozen=True, slots=True)
class Operators:
    """What a dialect records. columns: how its quantized matrices lie."""

    attend: Attend
    mix: Mix
    multiply: Multiply
    look_up: LookUp
    columns: bool


class RecordingOps:
    """Ops over values of a graph. presents: the caches a run leaves, by name.

    types: canonical name -> encoding, of the matrices that are quantized. scales: canonical name -> the static scale of
    that matrix's inputs, where it is multiplied in integers and they have one.
    """

    def __init__(
        self,
        run: Run,
        model: Model,
        operators: Operators,
        types: Mapping[str, str],
        scales: Mapping[str, InputScale],
    ) -> None:
        self.presents: dict[str, ir.Value] = {}
        self._run, self._graph, self._operators = run, run.graph, operators
        self._matrices, self._types, self._flat = Matrices(model, types), types, not types
        self._integers = Int8Products(scales)
        self._together: dict[str, tuple[ir.Value, ir.Value]] = {}  # weight -> the inputs and outputs of its product

    def embed(self, indices: Rows, table: Weight) -> Rows:
        encoding = self._matrices.encoding(table)
        if encoding is not None:
            look_up = look_up_channels if by_channel(encoding) else self._operators.look_up
            return Rows(look_up(self._graph, indices.value, self._parts([whole(table)], encoding)))
        flat = indices.value
        if self._flat:
            flat = self._graph.node("Reshape", flat, self._graph.constant([-1]))
        return Rows(self._graph.node("Gather", self._graph.weight(table), flat, axis=0))

    def norm(self, x: Rows, gain: Weight, bias: Weight | None, *, kind: NormKind, eps: float, offset: float) -> Rows:
        value = x.value
        if x.heads is not None:  # every head by itself
            rows = [-1] if self._flat else [0, 0]
            value = self._graph.node("Reshape", value, self._graph.constant([*rows, x.heads, gain.cols]))
        shift = () if bias is None else (self._graph.weight(bias),)
        scale = self._graph.weight(gain, offset)
        normed = self._graph.node(NORMS[kind], value, scale, *shift, axis=-1, epsilon=eps)
        if x.heads is not None and not self._flat:
            normed = self._graph.node("Reshape", normed, self._graph.constant([0, 0, -1]))
        return Rows(normed, x.heads, x.rope)

    def linear(self, x: Rows, weight: Weight, bias: Weight | None) -> Rows:
        encoding = self._matrices.encoding(weight)
        if encoding is None:
            return Rows(self._gemm(x.value, self._graph.weight(weight), bias))
        weights = self._matrices.sharing(weight)
        if len(weights) == 1:
            shift = None if bias is None else self._graph.weight(bias)
            return Rows(self._multiply(x.value, self._parts([whole(weight)], encoding), shift))
        name = weight.spec.name
        if name not in self._together:
            self._multiply_together(x.value, weights, encoding)
        inputs, output = self._together[name]
        assert inputs is x.value, "what is one product has the same inputs"
        return Rows(output)

    def _multiply_together(
        self, x: ir.Value, weights: Sequence[Weight], encoding: GroupEncoding | Float8Encoding
    ) -> None:
        graph, biases = self._graph, [bias for weight in weights if (bias := self._matrices.bias(weight)) is not None]
        shift = None
        if biases:
            name = joined_name([(bias.spec.name, None) for bias in biases])
            length = sum(bias.cols for bias in biases)
            shift = graph.keep(Stored(name, (length,), graph.type_name, tuple(map(whole, biases))))
        product = self._multiply(x, self._parts([whole(w) for w in weights], encoding), shift)
        sizes = graph.constant([weight.rows for weight in weights])
        for weight, output in zip(weights, graph.outputs(len(weights), "Split", product, sizes, axis=-1), strict=True):
            self._together[weight.spec.name] = x, output

    def _parts(self, pieces: Sequence[Piece], encoding: GroupEncoding | Float8Encoding) -> Parts:
        return self._graph.quantized(pieces, encoding, columns=self._operators.columns)

    def _multiply(self, x: ir.Value, parts: Parts, bias: ir.Value | None) -> ir.Value:
        multiply = self._integers.multiply if by_channel(parts.matrix.encoding) else self._operators.multiply
        return multiply(self._graph, x, parts, bias)

    def _gemm(self, x: ir.Value, matrix: ir.Value, bias: Weight | None = None) -> ir.Value:
        shift = () if bias is None else (self._graph.weight(bias),)
        product = self._graph.node("Gemm", self._rows(x), matrix, *shift, transB=1)
        return product if self._flat else self._run.batched(product)

    def _rows(self, x: ir.Value) -> ir.Value:
        """float[B · T, …]"""
        if self._flat:
            return x
        return self._graph.node("Flatten", x, axis=2)

    def add(self, a: Rows, b: Rows) -> Rows:
        return Rows(self._graph.node("Add", a.value, b.value))

    def multiply(self, a: Rows, b: Rows) -> Rows:
        return Rows(self._graph.node("Mul", a.value, b.value))

    def scale(self, x: Rows, factor: float) -> Rows:
        return Rows(self._graph.node("Mul", x.value, self._graph.number(factor)))

    def activation(self, x: Rows, kind: Activation) -> Rows:
        return Rows(ACTIVATIONS[kind](self._graph, x.value))

    def split_heads(self, x: Rows, heads: int) -> Rows:
        return Rows(x.value, heads)

    def merge_heads(self, x: Rows) -> Rows:
        return Rows(x.value)

    def rope(self, x: Rows, positions: Rows, rope: Rope) -> Rows:
        """Only noted: the dialect's attention turns the heads."""
        return Rows(x.value, x.heads, rope)

    def attention(
        self, layer: int, q: Rows, k: Rows, v: Rows, *, positions: Rows, scale: float, window: int | None
    ) -> Rows:
        heads = [self._heads(x) for x in (q, k, v)]
        mixed, *presents = self._operators.attend(self._run, layer, heads, scale=scale, window=window)
        self.presents |= {present(layer, part): value for part, value in zip(PARTS, presents, strict=True)}
        if self._flat:
            width = heads[0].count * self._run.architecture.head_dim
            mixed = self._graph.node("Reshape", mixed, self._graph.constant([-1, width]))
        return Rows(mixed)

    def _heads(self, x: Rows) -> Heads:
        assert x.heads is not None, "attention is given split heads"
        return Heads(self._run.batched(x.value) if self._flat else x.value, x.heads, x.rope)

    def experts(
        self,
        x: Rows,
        router: Weight,
        matrices: tuple[Weight, Weight, Weight],
        *,
        used: int,
        normalize: bool,
        activation: Activation,
    ) -> Rows:
        rows = self._rows(x.value)
        scores = self._graph.node("Gemm", rows, self._graph.weight(router), transB=1)
        experts = Experts(matrices, used, normalize, activation, ACTIVATIONS[activation])
        if any(matrix.spec.name in self._types for matrix in matrices):
            mixed = mix_sorted(self._graph, rows, scores, experts, self._expert)
        else:
            mixed = self._operators.mix(self._graph, rows, scores, experts)
        return Rows(mixed if self._flat else self._run.batched(mixed))

    def _expert(self, x: ir.Value, matrices: Sequence[Weight], expert: int) -> ir.Value:
        """float[R, outputs]: one expert's matrices times x float[R, in], their outputs one after another."""
        sizes = {matrix.spec.name: matrix.spec.shape[-2] for matrix in matrices}
        pieces = [Piece(m, expert * sizes[m.spec.name], (expert + 1) * sizes[m.spec.name]) for m in matrices]
        if len({self._types.get(name) for name in sizes}) > 1:
            return self._graph.node("Concat", *(self._expert(x, [one], expert) for one in matrices), axis=-1)
        encoding = self._matrices.encoding(matrices[0])
        if encoding is not None:
            return self._multiply(x, self._parts(pieces, encoding), None)
        shape = (sum(sizes.values()), matrices[0].cols)
        name = joined_name([(name, expert) for name in sizes])
        stored = Stored(name, shape, self._graph.type_name, tuple(pieces))
        return self._graph.node("Gemm", x, self._graph.keep(stored), transB=1)
