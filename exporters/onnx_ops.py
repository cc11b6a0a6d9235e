"""The decoder's operations, recorded as an ONNX graph.

Hidden states are rows float[B · T, H] (written R below), so that every linear layer is one Gemm on the weight as the
checkpoint stores it, bias included, and a tied head shares the embedding's bytes. Only attention sees [B, T, …].
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from llmx.exporters.onnx_attention import Attend, Heads
from llmx.exporters.onnx_experts import Activate, Experts, Mix
from llmx.exporters.onnx_graph import GraphRecorder
from llmx.exporters.onnx_run import Run
from llmx.formats.onnx import PARTS, present
from llmx.models.architecture import Activation, NormKind, Rope
from llmx.models.model import Weight


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


class RecordingOps:
    """Ops over values of a graph. attend, mix: as the dialect does it. presents: the caches a run leaves, by name."""

    def __init__(self, run: Run, attend: Attend, mix: Mix) -> None:
        self.presents: dict[str, ir.Value] = {}
        self._run, self._graph, self._attend, self._mix = run, run.graph, attend, mix

    def embed(self, indices: Rows, table: Weight) -> Rows:
        flat = self._graph.node("Reshape", indices.value, self._graph.constant([-1]))
        return Rows(self._graph.node("Gather", self._graph.weight(table), flat, axis=0))

    def norm(self, x: Rows, gain: Weight, bias: Weight | None, *, kind: NormKind, eps: float, offset: float) -> Rows:
        value = x.value
        if x.heads is not None:  # every head by itself
            value = self._graph.node("Reshape", value, self._graph.constant([-1, x.heads, gain.cols]))
        shift = () if bias is None else (self._graph.weight(bias),)
        scale = self._graph.weight(gain, offset)
        return Rows(self._graph.node(NORMS[kind], value, scale, *shift, axis=-1, epsilon=eps), x.heads, x.rope)

    def linear(self, x: Rows, weight: Weight, bias: Weight | None) -> Rows:
        shift = () if bias is None else (self._graph.weight(bias),)
        return Rows(self._graph.node("Gemm", x.value, self._graph.weight(weight), *shift, transB=1))

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
        mixed, *presents = self._attend(self._run, layer, heads, scale=scale, window=window)
        self.presents |= {present(layer, part): value for part, value in zip(PARTS, presents, strict=True)}
        width = heads[0].count * self._run.architecture.head_dim
        return Rows(self._graph.node("Reshape", mixed, self._graph.constant([-1, width])))

    def _heads(self, x: Rows) -> Heads:
        assert x.heads is not None, "attention is given split heads"
        return Heads(self._run.batched(x.value), x.heads, x.rope)

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
        scores = self._graph.node("Gemm", x.value, self._graph.weight(router), transB=1)
        experts = Experts(matrices, used, normalize, activation, ACTIVATIONS[activation])
        return Rows(self._mix(self._graph, x.value, scores, experts))
