"""The graphs of which TensorRT builds engines, in two dialects.

trt      opset 24: TensorScatter, Attention, RotaryEmbedding, norms and quantized matrices as operators, for
         TensorRT 10 and later and TensorRT-RTX, strongly typed
plain    opset 17: sums, products and what all builders have had for long, for TensorRT 8.5 and 8.6

inputs    input_ids i64[B, T] · start i64[B] · past_key_values.N.key, .value float[B, kv heads, M, D]
outputs   logits f32[B, T, V] · present.N.key, .value float[B, kv heads, M, D]: the cache with T more positions,
          float32 in plain, of the graph's type in trt
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import onnx_ir as ir

from llmx.errors import UnsupportedError
from llmx.exporters.encoding import Float8Encoding
from llmx.exporters.onnx_graph import GraphRecorder, by_channel
from llmx.exporters.onnx_matrices import MATRIX_ENCODINGS, Matrices
from llmx.exporters.trt_attention import attend, attend_plainly, turn, turn_plainly
from llmx.exporters.trt_ops import EngineOperators, EngineOps, States
from llmx.exporters.trt_products import Products
from llmx.exporters.trt_run import EngineRun
from llmx.formats.onnx import LOGITS, OPSET, OPSET_PLAIN, PARTS, past, present
from llmx.models.decoder import forward
from llmx.models.model import Model
from llmx.quant.activations import InputScale

GROUPS = (32, 64, 128)  # weights of a group of 4 bits


@dataclass(frozen=True, slots=True)
class EngineDialect:
    """Which operators a graph may hold. wide_head: whether logits are products in float32, where nobody says.

    fixed_cache: whether a cache has one size in all runs, where that is said. wide_cache: whether it is float32 in
    graphs of half precision, too: TensorRT 8 converts a half cache to float32 and back, all of it in every step.
    """

    name: str
    opset: int
    operators: EngineOperators
    wide_head: bool
    fixed_cache: bool
    wide_cache: bool

    @property
    def fixed_types(self) -> bool:
        """Whether every value's type is the graph's to say, that of dequantized values too."""
        return self.opset >= OPSET


# ── norms and activations ────────────────────────────────────────────────────────────────────────────────────────────


def _rms(graph: GraphRecorder, x: ir.Value, gain: ir.Value, bias: ir.Value | None, eps: float) -> ir.Value:
    normed = graph.node("RMSNormalization", x, gain, axis=-1, epsilon=eps)
    return normed if bias is None else graph.node("Add", normed, bias)


def _layer(graph: GraphRecorder, x: ir.Value, gain: ir.Value, bias: ir.Value | None, eps: float) -> ir.Value:
    return graph.node("LayerNormalization", x, gain, *(() if bias is None else (bias,)), axis=-1, epsilon=eps)


def _plain_rms(graph: GraphRecorder, x: ir.Value, gain: ir.Value, bias: ir.Value | None, eps: float) -> ir.Value:
    mean = graph.node("ReduceMean", graph.node("Mul", x, x), axes=[-1], keepdims=1)
    size = graph.node("Sqrt", graph.node("Add", mean, graph.constant(eps, "float32")))
    normed = graph.node("Mul", graph.node("Div", x, size), gain)
    return normed if bias is None else graph.node("Add", normed, bias)


def _plain_layer(graph: GraphRecorder, x: ir.Value, gain: ir.Value, bias: ir.Value | None, eps: float) -> ir.Value:
    centered = graph.node("Sub", x, graph.node("ReduceMean", x, axes=[-1], keepdims=1))
    return _plain_rms(graph, centered, gain, bias, eps)


def _silu(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _gelu(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    return graph.node("Gelu", x)


def _gelu_tanh(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    return graph.node("Gelu", x, approximate="tanh")


def _plain_gelu(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    """x · (1 + erf(x / √2)) / 2"""
    inner = graph.node("Erf", graph.node("Mul", x, graph.constant(math.sqrt(0.5), "float32")))
    return _half_of(graph, x, inner)


def _plain_gelu_tanh(graph: GraphRecorder, x: ir.Value) -> ir.Value:
    """x · (1 + tanh(√(2 / π) · (x + 0.044715 x³))) / 2"""
    cube = graph.node("Mul", graph.node("Mul", x, x), x)
    bent = graph.node("Add", x, graph.node("Mul", cube, graph.constant(0.044715, "float32")))
    inner = graph.node("Tanh", graph.node("Mul", bent, graph.constant(math.sqrt(2 / math.pi), "float32")))
    return _half_of(graph, x, inner)


def _half_of(graph: GraphRecorder, x: ir.Value, inner: ir.Value) -> ir.Value:
    half = graph.node("Mul", x, graph.constant(0.5, "float32"))
    return graph.node("Mul", half, graph.node("Add", inner, graph.constant(1, "float32")))


# ── dialects ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_OPERATORS = EngineOperators(
    {"rms": _rms, "layer": _layer}, {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}, turn, attend
)
_PLAIN = EngineOperators(
    {"rms": _plain_rms, "layer": _plain_layer},
    {"silu": _silu, "gelu": _plain_gelu, "gelu_tanh": _plain_gelu_tanh},
    turn_plainly,
    attend_plainly,
)
ENGINE_DIALECTS: Mapping[str, EngineDialect] = {
    dialect.name: dialect
    for dialect in (
        EngineDialect("trt", OPSET, _OPERATORS, wide_head=False, fixed_cache=True, wide_cache=False),
        EngineDialect("plain", OPSET_PLAIN, _PLAIN, wide_head=True, fixed_cache=False, wide_cache=True),
    )
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a graph is made for an engine.

    capacity: positions that a cache holds at most, None for the model's context. Graphs of `trt` that are given one
    have caches of that size only, which TensorRT's own cache update asks for; in `plain` M differs from run to run.
    wide_head: logits from products in float32; None: as the dialect does.
    """

    capacity: int | None = None
    wide_head: bool | None = None


def check_encodings(dialect: EngineDialect, model: Model, types: Mapping[str, str]) -> None:
    """Raise UnsupportedError naming the matrices (canonical name -> encoding) that the dialect has no operators for."""
    problems = [f"{name}: {kind}" for name, kind in types.items() if not _holds(dialect, kind, model.weight(name).cols)]
    if problems:
        groups = f"4 bits in groups of {', '.join(map(str, GROUPS))} without zero points, FP8 by channel, or "
        raise UnsupportedError(
            f"graphs for TensorRT in the dialect {dialect.name} cannot hold these matrices",
            problems=problems,
            fix=f"{groups if dialect.fixed_types else ''}8 bits by channel (int8-channel-pos-float32)",
        )


def _holds(dialect: EngineDialect, kind: str, cols: int) -> bool:
    encoding = MATRIX_ENCODINGS[kind]
    if isinstance(encoding, Float8Encoding):
        return dialect.fixed_types
    layout = encoding.layout
    if by_channel(encoding):
        return True
    whole_groups = layout.group in GROUPS and cols % layout.group == 0
    return dialect.fixed_types and layout.bits == 4 and not layout.zero_points and whole_groups


def record_engine(
    recorder: GraphRecorder,
    model: Model,
    dialect: EngineDialect,
    types: Mapping[str, str],
    scales: Mapping[str, InputScale],
    options: EngineOptions,
) -> ir.Graph:
    """The forward pass as a graph of the dialect, its weights not yet placed. types: of the quantized matrices."""
    architecture = model.architecture
    run = EngineRun(recorder, architecture, options.capacity, fixed=dialect.fixed_cache, wide=dialect.wide_cache)
    wide_head = dialect.wide_head if options.wide_head is None else options.wide_head
    products = Products(recorder, scales, dialect.fixed_types)
    ops = EngineOps(run, Matrices(model, types), dialect.operators, products, wide_head=wide_head)
    tokens, _ = run.tokens, run.start  # declared in this order
    rows = forward(model, ops, States(tokens), States(run.positions)).value
    logits = recorder.node("Reshape", rows, run.shape(run.batch, run.new, architecture.vocab))
    _declare(logits, LOGITS, ir.DataType.FLOAT, ("batch", "positions", architecture.vocab))
    for layer, part in product(range(architecture.layers), PARTS):
        kind = recorder.inputs[past(layer, part)].dtype
        assert kind is not None, "a declared input has a type"
        _declare(ops.presents[present(layer, part)], present(layer, part), kind, run.cache_shape)
    return ir.Graph(
        list(recorder.inputs.values()),
        [logits, *ops.presents.values()],
        nodes=recorder.nodes,
        initializers=[value for value in recorder.initializers if value.uses()],
        opset_imports={"": dialect.opset},
        name=architecture.family,
    )


def _declare(value: ir.Value, name: str, kind: ir.DataType, shape: tuple[int | str, ...]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(shape)


def engine_notes(
    model: Model, dialect: EngineDialect, types: Mapping[str, str], scales: Mapping[str, InputScale]
) -> tuple[str, ...]:
    """What the graph does otherwise than a user may expect. types, scales: as `record_engine`."""
    a, notes = model.architecture, []
    if any(a.sparse_layers):
        notes.append(
            f"every token runs through all {a.experts} experts of a layer, not only through the {a.experts_used} it "
            "uses: right, and slower than it could be"
        )
    alone = len([name for name in types if name not in scales])
    if alone and not dialect.fixed_types:
        notes.append(
            f"this builder multiplies weights of 8 bits by inputs of 8 bits only: {alone} matrices, whose inputs are "
            "floats, are stored as the floats that their codes stand for, and take as much room as those"
        )
    return tuple(notes)
