"""The ONNX exporter: record the one forward pass as a graph, plan every byte, then write the weights in one pass.

forward pass -> [recorder: nodes, weights unread] -> [dialect: fuse] -> [placed graph] ; checkpoint rows -> [data file]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmx.errors import IntegrityError, UsageError
from llmx.exporters.onnx_attention import Attend, attend, attend_grouped
from llmx.exporters.onnx_experts import Mix, mix, mix_routed
from llmx.exporters.onnx_fusion import fuse_skips
from llmx.exporters.onnx_genai import NO_TOKENIZER, companions
from llmx.exporters.onnx_graph import GraphRecorder, Stored
from llmx.exporters.onnx_ops import RecordingOps, Rows
from llmx.exporters.onnx_run import Run
from llmx.exporters.plan import Plan, PlannedFile, Step
from llmx.formats.onnx import (
    DATA_SUFFIX,
    FLOATS,
    IR_VERSION,
    LOGITS,
    MODEL_NAME,
    OPSET,
    VENDOR_DOMAIN,
    VENDOR_OPSET,
    places,
)
from llmx.models.architecture import Architecture
from llmx.models.decoder import forward
from llmx.models.model import Model, check_finite
from llmx.models.tokenizer import Tokenizer
from llmx.progress import track
from llmx.quant.grid import largest_weight

# Weights read and converted at once.
CHUNK_WEIGHTS = 1 << 20
_BASE_MEMORY = 160 << 20  # the interpreter with numpy and onnx, measured
_MEMORY_PER_WEIGHT = 16


@dataclass(frozen=True, slots=True)
class Dialect:
    """Which operators a graph may hold. opsets: domain -> version. finish: what is joined after recording.

    shares_cache: attention can write new keys and values into the buffer of the old ones.
    """

    name: str
    opsets: Mapping[str, int]
    attend: Attend
    mix: Mix
    finish: Callable[[ir.Graph], object]
    shares_cache: bool


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("standard", {"": OPSET}, attend, mix, lambda graph: None, shares_cache=False),
        Dialect(
            "ort", {"": OPSET, VENDOR_DOMAIN: VENDOR_OPSET}, attend_grouped, mix_routed, fuse_skips, shares_cache=True
        ),
    )
}


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """What the user chose. type_name: "F32" or "F16"."""

    type_name: str = "F32"
    dialect: str = "ort"


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
    if options.dialect not in DIALECTS:
        raise UsageError(f"there is no dialect {options.dialect!r}", fix=f"choose one of {', '.join(DIALECTS)}")
    if options.type_name not in FLOATS:
        raise UsageError(f"ONNX holds no weights of type {options.type_name}", fix=f"choose one of {', '.join(FLOATS)}")
    recorder, graph = record(model, options)
    stored = tuple(recorder.stored.values())
    offsets, data_bytes = places(one.nbytes for one in stored)
    data_name = MODEL_NAME + DATA_SUFFIX
    for one, offset in zip(stored, offsets, strict=True):
        recorder.values[one.name].const_value = ir.ExternalTensor(
            data_name, offset, one.nbytes, recorder.float_type, shape=ir.Shape(one.shape), name=one.name
        )
    beside = {} if tokenizer is None else _beside(model, tokenizer, graph, DIALECTS[options.dialect])
    plan = Plan(
        format="onnx",
        type_name=options.type_name,
        steps=tuple(_step(one) for one in stored),
        files=(
            PlannedFile(MODEL_NAME, len(_serialized(graph))),
            PlannedFile(data_name, data_bytes),
            *(PlannedFile(name, len(content)) for name, content in beside.items()),
        ),
        notes=(*notes(model.architecture, graph), *([NO_TOKENIZER] if tokenizer is not None and not beside else [])),
        peak_memory_bytes=_BASE_MEMORY + _MEMORY_PER_WEIGHT * max(_chunk_rows(one) * one.shape[-1] for one in stored),
    )
    return OnnxExport(plan, model, options, graph, stored, tuple(offsets), beside)


def _beside(model: Model, tokenizer: Tokenizer, graph: ir.Model, dialect: Dialect) -> dict[str, bytes]:
    inputs = {str(value.name) for value in graph.graph.inputs}
    folder = model.checkpoint.folder
    return companions(model.architecture, tokenizer, folder, inputs, shares_cache=dialect.shares_cache)


def record(model: Model, options: OnnxOptions) -> tuple[GraphRecorder, ir.Model]:
    """The forward pass as a graph of the dialect, its weights not yet placed.

    Inputs: tokens i64[B, T], mask i64[B, S], positions i64[B, T] where the dialect needs them, and a layer's keys and
    values float[B, kv heads, S - T, D] each. Outputs: logits f32[B, T, V], the keys and values of all S positions.
    """
    dialect, architecture = DIALECTS[options.dialect], model.architecture
    recorder = GraphRecorder(options.type_name)
    run = Run(recorder, architecture)
    ops = RecordingOps(run, dialect.attend, dialect.mix)
    tokens, _, positions = Rows(run.tokens), run.mask, Rows(run.positions)  # declared in this order
    logits = run.batched(forward(model, ops, tokens, positions).value)
    if options.type_name != "F32":
        logits = recorder.cast(logits, ir.DataType.FLOAT)
    _declare(logits, LOGITS, ir.DataType.FLOAT, ("batch", "positions", architecture.vocab))
    for name, value in ops.presents.items():
        shape = ("batch", architecture.kv_heads, "total", architecture.head_dim)
        _declare(value, name, recorder.float_type, shape)
    graph = ir.Graph(
        [value for value in recorder.inputs.values() if value.uses()],
        [logits, *ops.presents.values()],
        nodes=recorder.nodes,
        initializers=recorder.initializers,
        opset_imports=dict(dialect.opsets),
        name=architecture.family,
    )
    dialect.finish(graph)
    about = {"llmx.dialect": dialect.name, "llmx.type": options.type_name}
    made = ir.Model(graph, ir_version=IR_VERSION, producer_name="llmx", producer_version=metadata.version("llmx"))
    made.metadata_props.update(about)
    return recorder, made


def _declare(value: ir.Value, name: str, kind: ir.DataType, shape: Sequence[int | str]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape(shape)


def notes(architecture: Architecture, graph: ir.Model) -> tuple[str, ...]:
    """What the graph does otherwise than a user may expect."""
    if not any(architecture.sparse_layers) or any(node.op_type == "MoE" for node in graph.graph):
        return ()
    return (
        f"every token runs through all {architecture.experts} experts of a layer, not only through the "
        f"{architecture.experts_used} it uses: right, and slower than it could be",
    )


def _step(one: Stored) -> Step:
    spec = None if one.weight is None else one.weight.spec
    role, layer = (None, None) if spec is None else (spec.role, spec.layer)
    return Step(one.name, role, layer, one.shape, one.type_name, one.nbytes)


def _serialized(graph: ir.Model) -> bytes:
    return ir.serde.serialize_model(graph).SerializeToString(deterministic=True)


def check_weights(export: OnnxExport) -> None:
    """Look at every weight once, before anything is written.

    Raises: IntegrityError naming every tensor that holds NaN or infinity, or values that its type cannot hold.
    """
    problems = []
    limit = largest_weight(export.options.type_name)
    with track(export.model.checkpoint.nbytes, "checking weights") as progress:
        for weight in (weight for one in export.stored for weight in one.read):
            found = check_finite(weight)
            weight.release()
            progress.advance(weight.nbytes)
            name = weight.spec.name
            if found.first_bad is not None:
                problems.append(f"{name}: the value at {divmod(found.first_bad, weight.cols)} is NaN or infinite")
            elif found.largest > limit:
                told = f"the magnitude {found.largest:.6g} does not fit {export.options.type_name}"
                problems.append(f"{name}: {told} (at most {limit:.6g})")
    if problems:
        raise IntegrityError("the checkpoint holds weights that cannot be exported", problems=problems)


def write(export: OnnxExport, targets: Sequence[Path]) -> tuple[str, ...]:
    """Write all files, and return the sha256 of each weight's bytes, in file order.

    targets: a path for each file of the plan. The graph goes last: without it there is no artifact.
    """
    graph, data, *others = targets
    digests = []
    with data.open("wb") as stream, track(sum(one.nbytes for one in export.stored), "writing") as progress:
        stream.truncate(export.plan.files[1].nbytes)
        for one, offset in zip(export.stored, export.offsets, strict=True):
            stream.seek(offset)
            digest = hashlib.sha256()
            for block in _blocks(one):
                stream.write(block.data)
                digest.update(block.data)
                progress.advance(block.nbytes)
            digests.append(digest.hexdigest())
    for path, content in zip(others, export.companions.values(), strict=True):
        path.write_bytes(content)
    graph.write_bytes(_serialized(export.graph))
    return tuple(digests)


def _chunk_rows(one: Stored) -> int:
    return max(1, CHUNK_WEIGHTS // one.shape[-1])


def _blocks(one: Stored) -> Iterator[np.ndarray]:
    """The weight's rows as the file holds them, a few at a time; their pages go back to the system."""
    kind = FLOATS[one.type_name].numpy
    if one.table is not None:
        yield np.ascontiguousarray(one.table, kind)
        return
    weights, step = one.read, _chunk_rows(one)
    for start in range(0, weights[0].rows, step):
        stop = min(start + step, weights[0].rows)
        parts = [weight.read(start, stop) for weight in weights]
        for weight in weights:
            weight.release(start, stop)
        rows = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
        if one.offset:
            rows += np.float32(one.offset)
        yield np.ascontiguousarray(rows, kind)
