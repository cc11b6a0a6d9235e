"""The decoder's operations, recorded as a graph for TensorRT, of which an engine is built.

Hidden states are rows f32[B · T, H] (written R below), heads f32[B, T, heads, D]: all is float32 but what products
multiply and what the cache holds. A conversion beside a product costs nothing there, and what is added up over layers
(the states themselves, norms, softmax, rotary angles, logits) loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from llmx.errors import UnsupportedError
from llmx.exporters.encoding import Float8Encoding, GroupEncoding
from llmx.exporters.onnx_experts import Activate
from llmx.exporters.onnx_graph import GraphRecorder, Parts, Piece, Stored, by_channel, named, whole
from llmx.exporters.onnx_matrices import Matrices
from llmx.exporters.trt_experts import DenseExperts, mix, mix_quantized
from llmx.exporters.trt_products import Products
from llmx.exporters.trt_run import EngineRun
from llmx.formats.onnx import PARTS, joined_name, present
from llmx.models.architecture import Activation, NormKind, Rope
from llmx.models.model import Weight


@dataclass(frozen=True, slots=True)
class States:
    """f32[R, H], f32[B, T, heads, D], or i64[B, T]."""

    value: ir.Value


class Norm(Protocol):
    """A dialect's norm."""

    def __call__(
        self, graph: GraphRecorder, x: ir.Value, gain: ir.Value, bias: ir.Value | None, eps: float
    ) -> ir.Value:
        """f32[…, H], the last axis normalized, times gain f32[H], plus bias f32[H]."""
        ...


class Attend(Protocol):
    """A dialect's attention."""

    def __call__(
        self, run: EngineRun, layer: int, heads: Sequence[ir.Value], *, scale: float, window: int | None
    ) -> tuple[ir.Value, list[ir.Value]]:
        """(f32[R, heads · D], the present keys and values) of turned queries, keys and values."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOperators:
    """What a dialect records."""

    norms: Mapping[NormKind, Norm]
    activations: Mapping[Activation, Activate]
    turn: Callable[[EngineRun, ir.Value, Rope], ir.Value]
    attend: Attend


class EngineOps:
    """Ops over values of a graph. presents: the caches a run leaves, by name. wide_head: logits from products in
    float32, for which the head's matrix is converted when the engine is built."""

    def __init__(
        self, run: EngineRun, matrices: Matrices, operators: EngineOperators, products: Products, *, wide_head: bool
    ) -> None:
        self.presents: dict[str, ir.Value] = {}
        self._run, self._graph, self._matrices, self._operators = run, run.graph, matrices, operators
        self._products, self._wide_head = products, wide_head
        self._together: dict[str, tuple[ir.Value, ir.Value]] = {}  # weight -> the inputs and outputs of its product

    def embed(self, indices: States, table: Weight) -> States:
        if self._matrices.encoding(table) is not None:
            raise UnsupportedError(
                "TensorRT looks up rows of floats only",
                where=table.spec.name,
                fix="leave the embedding, and a head tied to it, in floats",
            )
        flat = self._graph.node("Reshape", indices.value, self._graph.constant([-1]))
        return States(self._products.wide(self._graph.node("Gather", self._graph.weight(table), flat, axis=0)))

    def norm(
        self, x: States, gain: Weight, bias: Weight | None, *, kind: NormKind, eps: float, offset: float
    ) -> States:
        scale = self._graph.weight(gain, offset, "F32")
        shift = None if bias is None else self._graph.weight(bias, type_name="F32")
        return States(self._operators.norms[kind](self._graph, x.value, scale, shift, eps))

    def linear(self, x: States, weight: Weight, bias: Weight | None) -> States:
        name, weights = weight.spec.name, self._matrices.sharing(weight)
        if name not in self._together:
            product = self._shifted(self._product(x.value, [whole(one) for one in weights]), weights)
            outputs: Sequence[ir.Value] = [product]
            if len(weights) > 1:
                sizes = self._graph.constant([one.rows for one in weights])
                outputs = self._graph.outputs(len(weights), "Split", product, sizes, axis=-1)
            for one, output in zip(weights, outputs, strict=True):
                self._together[one.spec.name] = x.value, output
        inputs, output = self._together[name]
        assert inputs is x.value, "what is one product has the same inputs"
        return States(output)

    def _shifted(self, product: ir.Value, weights: Sequence[Weight]) -> ir.Value:
        biases = [bias for weight in weights if (bias := self._matrices.bias(weight)) is not None]
        if not biases:
            return product
        if len(biases) == 1:
            return self._graph.node("Add", product, self._graph.weight(biases[0], type_name="F32"))
        name = joined_name([(bias.spec.name, None) for bias in biases])
        shape = (sum(bias.cols for bias in biases),)
        return self._graph.node("Add", product, self._graph.keep(Stored(name, shape, "F32", tuple(map(whole, biases)))))

    def _product(self, x: ir.Value, pieces: Sequence[Piece]) -> ir.Value:
        """f32[R, outputs] of matrices of one encoding, their outputs one after another."""
        first = pieces[0].weight
        wide = self._wide_head and first.spec.role in ("embedding", "head")
        encoding = self._matrices.encoding(first)
        if encoding is not None and self._products.strong:
            return self._products.quantized(x, self._parts(pieces, encoding), wide=wide)
        if encoding is not None:
            assert isinstance(encoding, GroupEncoding), "FP8 needs a strongly typed builder"
            return self._products.decoded(x, pieces, encoding, wide=wide)
        if len(pieces) == 1 and pieces[0].rows == first.rows:
            return self._products.floats(x, self._graph.weight(first), wide=wide)
        name = joined_name([named(piece) for piece in pieces])
        shape = (sum(piece.rows for piece in pieces), first.cols)
        matrix = self._graph.keep(Stored(name, shape, self._graph.type_name, tuple(pieces)))
        return self._products.floats(x, matrix, wide=wide)

    def _parts(self, pieces: Sequence[Piece], encoding: GroupEncoding | Float8Encoding) -> Parts:
        return self._graph.quantized(
            pieces, encoding, columns=False, signed=True, scale_type=self._scale_type(encoding)
        )

    def _scale_type(self, encoding: GroupEncoding | Float8Encoding) -> str:
        """By channel scales are float32, as they are kept; in groups of the kept type, unless all is float32."""
        if isinstance(encoding, Float8Encoding) or by_channel(encoding) or self._graph.type_name == "F32":
            return "F32"
        return SCALE_TYPES[encoding.layout.store]

    def add(self, a: States, b: States) -> States:
        return States(self._graph.node("Add", a.value, b.value))

    def multiply(self, a: States, b: States) -> States:
        return States(self._graph.node("Mul", a.value, b.value))

    def scale(self, x: States, factor: float) -> States:
        return States(self._graph.node("Mul", x.value, self._graph.constant(factor, "float32")))

    def activation(self, x: States, kind: Activation) -> States:
        return States(self._operators.activations[kind](self._graph, x.value))

    def split_heads(self, x: States, heads: int) -> States:
        return States(self._graph.node("Reshape", x.value, self._run.heads_shape(heads)))

    def merge_heads(self, x: States) -> States:
        return x  # attention gives rows

    def rope(self, x: States, positions: States, rope: Rope) -> States:
        return States(self._operators.turn(self._run, x.value, rope))

    def attention(
        self, layer: int, q: States, k: States, v: States, *, positions: States, scale: float, window: int | None
    ) -> States:
        heads = [x.value for x in (q, k, v)]
        mixed, presents = self._operators.attend(self._run, layer, heads, scale=scale, window=window)
        self.presents |= {present(layer, part): value for part, value in zip(PARTS, presents, strict=True)}
        return States(mixed)

    def experts(
        self,
        x: States,
        router: Weight,
        matrices: tuple[Weight, Weight, Weight],
        *,
        used: int,
        normalize: bool,
        activation: Activation,
    ) -> States:
        scores = self._products.floats(x.value, self._graph.weight(router, type_name="F32"), wide=True)
        experts = DenseExperts(matrices, used, normalize, self._operators.activations[activation])
        if any(self._matrices.encoding(matrix) is not None for matrix in matrices):
            return States(mix_quantized(self._products, x.value, scores, experts, self._expert))
        return States(mix(self._products, x.value, scores, experts))

    def _expert(self, x: ir.Value, matrices: Sequence[Weight], expert: int) -> ir.Value:
        """f32[R, outputs]: one expert's matrices times x f32[R, in], their outputs one after another."""
        if len({self._matrices.types.get(matrix.spec.name) for matrix in matrices}) > 1:
            return self._graph.node("Concat", *(self._expert(x, [one], expert) for one in matrices), axis=-1)
        sizes = [matrix.spec.shape[-2] for matrix in matrices]
        pieces = [Piece(m, expert * n, (expert + 1) * n) for m, n in zip(matrices, sizes, strict=True)]
        return self._product(x, pieces)


# How a scale of a group is kept -> its type in the graph.
SCALE_TYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
