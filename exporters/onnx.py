"""The ONNX exporter: record the one forward pass as a graph, plan every byte, then write the weights in one pass.

forward pass -> [recorder: nodes, weights unread] -> [dialect: fuse] -> [placed graph] ; checkpoint rows -> [data file]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from llmx.errors import IntegrityError, UsageError
from llmx.exporters.encoding import GROUP_ENCODINGS
from llmx.exporters.gguf_metadata import SOLVER_KEY
from llmx.exporters.journal import Journal
from llmx.exporters.ledger import ledger
from llmx.exporters.onnx_attention import attend, attend_grouped
from llmx.exporters.onnx_experts import mix, mix_routed
from llmx.exporters.onnx_fusion import drop_unused, fuse_skips
from llmx.exporters.onnx_genai import NO_TOKENIZER, companions
from llmx.exporters.onnx_graph import GraphRecorder, Stored, onnx_type
from llmx.exporters.onnx_int8 import EXACT_OPTION
from llmx.exporters.onnx_linear import look_up_columns, look_up_packed, multiply_columns, multiply_packed
from llmx.exporters.onnx_matrices import MATRIX_ENCODINGS
from llmx.exporters.onnx_ops import Operators, RecordingOps
from llmx.exporters.onnx_ops import Rows as States
from llmx.exporters.onnx_run import Run
from llmx.exporters.onnx_write import MEMORY_PER_WEIGHT, Placed, Rows, chunk_weights, write_data
from llmx.exporters.plan import Plan, PlannedFile, Step
from llmx.exporters.sparsity import SPARSITY_KEY
from llmx.exporters.trt_graph import ENGINE_DIALECTS, EngineOptions, check_encodings, engine_notes, record_engine
from llmx.formats.onnx import (
    CODES,
    DATA_SUFFIX,
    FLOATS,
    IR_VERSION,
    IR_VERSION_2_BITS,
    IR_VERSION_PLAIN,
    LOGITS,
    MODEL_NAME,
    OPSET,
    OPSET_2_BITS,
    OPSET_PLAIN,
    TYPES_KEY,
    VALUES,
    VENDOR_DOMAIN,
    VENDOR_OPSET,
    places,
)
from llmx.models.architecture import Architecture
from llmx.models.decoder import forward
from llmx.models.model import Model, check_finite
from llmx.models.tokenizer import Tokenizer
from llmx.progress import track
from llmx.quant.activations import InputScale
from llmx.quant.grid import largest_weight
from llmx.quant.protocol import Effort

_BASE_MEMORY = 160 << 20  # the interpreter with numpy and onnx, measured


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which operators a graph may hold. opsets: domain -> version. finish: what is joined after recording.

    shares_cache: attention can write new keys and values into the buffer of the old ones.
    """

    name: str
    opsets: Mapping[str, int]
    operators: Operators
    finish: Callable[[ir.Graph], object]
    shares_cache: bool


_STANDARD = Operators(attend, mix, multiply_columns, look_up_columns, columns=True)
_ORT = Operators(attend_grouped, mix_routed, multiply_packed, look_up_packed, columns=False)
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("standard", {"": OPSET}, _STANDARD, lambda graph: None, shares_cache=False),
        Dialect("ort", {"": OPSET, VENDOR_DOMAIN: VENDOR_OPSET}, _ORT, fuse_skips, shares_cache=True),
    )
}


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """What the user chose. type_name: "F32" or "F16", of all that is not quantized.

    types: canonical name -> encoding, of the matrices that are; a float type is the same as none. wanted: the types
    that tensors would have had if their rows allowed it. mix: the name of it all, as plans show it. scales: canonical
    name -> the static scale of a matrix's inputs, where these are rounded to 8 bits; without one they are by row.
    capacity, wide_head: of graphs for TensorRT, see llmx.exporters.trt_graph.EngineOptions.
    """

    type_name: str = "F32"
    dialect: str = "ort"
    types: Mapping[str, str] = field(default_factory=dict)
    wanted: Mapping[str, str] = field(default_factory=dict)
    mix: str = ""
    scales: Mapping[str, InputScale] = field(default_factory=dict)
    threads: int = 1
    effort: Effort = "balanced"
    solver: str | None = None  # SOLVED or SCALED, where weights are not just rounded
    sparsity: str | None = None  # what stands under SPARSITY_KEY
    capacity: int | None = None
    wide_head: bool | None = None


@dataclass(frozen=True, slots=True)
class OnnxExport:
    """A planned export: `plan` for the user, the rest for `write`.

    offsets: of each stored weight in the data file. companions: the files beside the graph, by name.
    """

    plan: Plan
    model: Model
    options: OnnxOptions
    graph: ir.Model
    stored: tuple[Stored, ...]
    offsets: tuple[int, ...]
    companions: Mapping[str, bytes]


def prepare(model: Model, options: OnnxOptions, tokenizer: Tokenizer | None = None) -> OnnxExport:
    """Record the graph and plan the export without reading a weight.

    tokenizer: with it, the folder is one that onnxruntime-genai loads.
    Raises: UsageError for a dialect or a type that there is not.
    """
    _check_options(model, options)
    recorder, graph = record(model, options)
    stored = tuple(recorder.stored.values())
    offsets, data_bytes = places(one.nbytes for one in stored)
    data_name = MODEL_NAME + DATA_SUFFIX
    lies = dict(zip(recorder.stored, zip(offsets, (one.nbytes for one in stored), strict=True), strict=True))
    for name, value in recorder.values.items():
        offset, nbytes = lies[recorder.views.get(name, name)]
        assert value.dtype is not None and isinstance(value.shape, ir.Shape), "a stored tensor has a type and a shape"
        value.const_value = ir.ExternalTensor(data_name, offset, nbytes, value.dtype, shape=value.shape, name=name)
    beside = {} if tokenizer is None else _beside(model, tokenizer, graph, options.dialect)
    plan = Plan(
        format="onnx",
        type_name=options.mix or options.type_name,
        steps=tuple(_step(one, options) for one in stored),
        files=(
            PlannedFile(MODEL_NAME, len(_serialized(graph))),
            PlannedFile(data_name, data_bytes),
            *(PlannedFile(name, len(content)) for name, content in beside.items()),
        ),
        notes=(*_notes(model, graph, options), *([NO_TOKENIZER] if tokenizer is not None and not beside else [])),
        peak_memory_bytes=_BASE_MEMORY
        + MEMORY_PER_WEIGHT * (2 * options.threads + 1) * max(chunk_weights(one) for one in stored),
    )
    return OnnxExport(plan, model, options, graph, stored, tuple(offsets), beside)


def _check_options(model: Model, options: OnnxOptions) -> None:
    engine = ENGINE_DIALECTS.get(options.dialect)
    if options.dialect not in DIALECTS and engine is None:
        raise UsageError(f"there is no dialect {options.dialect!r}", fix=f"choose one of {', '.join(DIALECTS)}")
    floats = FLOATS if engine is not None else {name: kind for name, kind in FLOATS.items() if name != "BF16"}
    if options.type_name not in floats:
        raise UsageError(f"ONNX holds no weights of type {options.type_name}", fix=f"choose one of {', '.join(floats)}")
    kinds = GROUP_ENCODINGS if engine is None else MATRIX_ENCODINGS
    unknown = {name for name in options.types.values() if name not in kinds and name not in floats}
    if unknown:
        raise UsageError(f"ONNX holds no weights of type {', '.join(sorted(unknown))}")
    if engine is not None:
        check_encodings(engine, model, _quantized(options))


def _quantized(options: OnnxOptions) -> dict[str, str]:
    return {name: kind for name, kind in options.types.items() if kind in MATRIX_ENCODINGS}


def _notes(model: Model, graph: ir.Model, options: OnnxOptions) -> tuple[str, ...]:
    engine = ENGINE_DIALECTS.get(options.dialect)
    if engine is None:
        return notes(model.architecture, graph)
    return engine_notes(model, engine, _quantized(options), options.scales)


def _beside(model: Model, tokenizer: Tokenizer, graph: ir.Model, dialect: str) -> dict[str, bytes]:
    if dialect in ENGINE_DIALECTS:  # onnxruntime-genai runs no graphs of theirs
        return {}
    inputs = {str(value.name) for value in graph.graph.inputs}
    folder = model.checkpoint.folder
    return companions(model.architecture, tokenizer, folder, inputs, shares_cache=DIALECTS[dialect].shares_cache)


def record(model: Model, options: OnnxOptions) -> tuple[GraphRecorder, ir.Model]:
    """The forward pass as a graph of the dialect, its weights not yet placed; of its inputs and outputs tells
    `record_padded`, and llmx.exporters.trt_graph of those of graphs for TensorRT."""
    recorder = GraphRecorder(options.type_name)
    quantized = _quantized(options)
    engine = ENGINE_DIALECTS.get(options.dialect)
    if engine is not None:
        chosen = EngineOptions(options.capacity, options.wide_head)
        graph = record_engine(recorder, model, engine, quantized, options.scales, chosen)
    else:
        graph = record_padded(recorder, model, options, quantized)
    drop_unused(graph)
    if engine is None:
        DIALECTS[options.dialect].finish(graph)
    about = {"llmx.dialect": options.dialect, "llmx.type": options.mix or options.type_name}
    if quantized:
        about[TYPES_KEY] = json.dumps(quantized)
    if options.solver is not None:
        about[SOLVER_KEY] = options.solver
    if options.sparsity is not None:
        about[SPARSITY_KEY] = options.sparsity
    version = IR_VERSION_2_BITS if _has_2_bits(recorder) else IR_VERSION
    if engine is not None and engine.opset == OPSET_PLAIN:
        version = IR_VERSION_PLAIN
    made = ir.Model(graph, ir_version=version, producer_name="llmx", producer_version=metadata.version("llmx"))
    made.metadata_props.update(about)
    return recorder, made


def record_padded(
    recorder: GraphRecorder, model: Model, options: OnnxOptions, quantized: Mapping[str, str]
) -> ir.Graph:
    """The graph whose cache grows, under a mask of padding on the left.

    Inputs: tokens i64[B, T], mask i64[B, S], positions i64[B, T] where the dialect needs them, and a layer's keys and
    values float[B, kv heads, S - T, D] each. Outputs: logits f32[B, T, V], the keys and values of all S positions.
    """
    dialect, architecture = DIALECTS[options.dialect], model.architecture
    run = Run(recorder, architecture)
    ops = RecordingOps(run, model, dialect.operators, quantized, options.scales)
    tokens, _, positions = States(run.tokens), run.mask, States(run.positions)  # declared in this order
    logits = forward(model, ops, tokens, positions).value
    logits = logits if quantized else run.batched(logits)
    if options.type_name != "F32":
        logits = recorder.cast(logits, ir.DataType.FLOAT)
    _declare(logits, LOGITS, ir.DataType.FLOAT, ("batch", "positions", architecture.vocab))
    for name, value in ops.presents.items():
        shape = ("batch", architecture.kv_heads, "total", architecture.head_dim)
        _declare(value, name, recorder.float_type, shape)
    return ir.Graph(
        [value for value in recorder.inputs.values() if value.uses()],
        [logits, *ops.presents.values()],
        nodes=recorder.nodes,
        initializers=[value for value in recorder.initializers if value.uses()],
        opset_imports=_opsets(dialect, recorder),
        name=architecture.family,
    )


def _has_2_bits(recorder: GraphRecorder) -> bool:
    return any(onnx_type(one.type_name).bitwidth == 2 for one in recorder.stored.values())


def _opsets(dialect: Dialect, recorder: GraphRecorder) -> dict[str, int]:
    return {**dialect.opsets, "": OPSET_2_BITS if _has_2_bits(recorder) else OPSET}


def _declare(value: ir.Value, name: str, kind: ir.DataType, shape: Sequence[int | str]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(shape)


def notes(architecture: Architecture, graph: ir.Model) -> tuple[str, ...]:
    """What the graph does otherwise than a user may expect."""
    operators = {node.op_type for node in graph.graph}
    told = {
        "ScatterElements": f"every token runs through all {architecture.experts} experts of a layer, not only through "
        f"the {architecture.experts_used} it uses: right, and slower than it could be",
        "QuantizeLinear": "on x86 processors without VNNI onnxruntime loses more than it has to in products of 8 bits: "
        f"there, open the graph with the session option {EXACT_OPTION}=1",
    }
    return tuple(note for operator, note in told.items() if operator in operators)


def _step(one: Stored, options: OnnxOptions) -> Step:
    pieces = one.pieces if one.quantized is None else one.quantized.pieces
    spec = pieces[0].weight.spec if pieces else None
    role, layer = (None, None) if spec is None else (spec.role, spec.layer)
    if one.quantized is None or spec is None:
        return Step(one.name, role, layer, one.shape, one.type_name, one.nbytes)
    codes = f"{one.quantized.name}.{VALUES if one.quantized.decoded else CODES}"
    if one.name != codes:
        return Step(one.name, role, layer, one.shape, one.type_name, one.nbytes, beside=codes)
    shape, type_name = (one.quantized.rows, one.quantized.cols), one.quantized.encoding.name
    wanted = options.wanted.get(spec.name, type_name)
    return Step(one.name, role, layer, shape, type_name, one.nbytes, wanted if wanted != type_name else None)


def _serialized(graph: ir.Model) -> bytes:
    return ir.serde.serialize_model(graph).SerializeToString(deterministic=True)


def check_weights(export: OnnxExport) -> None:
    """Look at every weight once, before anything is written.

    Raises: IntegrityError naming every tensor that holds NaN or infinity, or values that its type cannot hold.
    """
    problems = []
    limits = {
        piece.weight.spec.name: (piece.weight, _type_of(one), _limit(one))
        for one in export.stored
        for piece in one.pieces or (one.quantized.pieces if one.quantized else ())
    }
    with track(export.model.checkpoint.nbytes, "checking weights") as progress:
        for name, (weight, type_name, limit) in limits.items():
            found = check_finite(weight)
            weight.release()
            progress.advance(weight.nbytes)
            if found.first_bad is not None:
                problems.append(f"{name}: the value at {divmod(found.first_bad, weight.cols)} is NaN or infinite")
            elif found.largest > limit:
                problems.append(
                    f"{name}: the magnitude {found.largest:.6g} does not fit {type_name} (at most {limit:.6g})"
                )
    if problems:
        raise IntegrityError("the checkpoint holds weights that cannot be exported", problems=problems)


def _type_of(one: Stored) -> str:
    return one.type_name if one.quantized is None else one.quantized.encoding.name


def _limit(one: Stored) -> float:
    """The largest weight that is kept as it is."""
    if one.quantized is None:
        return largest_weight(one.type_name)
    return one.quantized.encoding.limit(one.quantized.cols)


def write(
    export: OnnxExport, targets: Sequence[Path], rows: Rows | None = None, journal: Journal | None = None
) -> tuple[str, ...]:
    """Write all files, and return the sha256 of each stored tensor's bytes, in the order of export.stored.

    targets: a path for each file of the plan. The graph goes last: without it there is no artifact.
    rows: solved before, canonical name -> u8[rows, row bytes]; what is missing there is rounded on the way.
    journal: notes tensors that are written, and knows those that an earlier run wrote to the same file.
    Raises: UsageError for rows of other shapes than the plan's.
    """
    graph, data, *others = targets
    solved = {} if rows is None else rows
    _check_rows(export, solved)
    placed = [Placed(one, offset) for one, offset in zip(export.stored, export.offsets, strict=True)]
    with (
        ledger([data], [export.plan.files[1].nbytes], journal) as (notes, [stream]),
        track(sum(one.nbytes for one in export.stored), "writing") as progress,
    ):
        found = write_data(stream, placed, solved, export.options.effort, export.options.threads, progress, notes)
    for path, content in zip(others, export.companions.values(), strict=True):
        path.write_bytes(content)
    graph.write_bytes(_serialized(export.graph))
    return found


def _check_rows(export: OnnxExport, rows: Rows) -> None:
    problems = []
    for name, got in rows.items():
        weight, type_name = export.model.weight(name), export.options.types.get(name, "")
        if type_name in MATRIX_ENCODINGS:
            wanted = (weight.rows, MATRIX_ENCODINGS[type_name].row_bytes(weight.cols))
            if got.shape != wanted:
                problems.append(f"{name}: {list(got.shape)} bytes, {list(wanted)} of {type_name} are planned")
        else:
            problems.append(f"{name}: it is not quantized in this plan")
    if problems:
        raise UsageError("the solved rows are not those of the plan", problems=problems)
