"""A graph of float16 in float32: the same nodes and weights, so that rounding on the way hides no wrong conversion.

Float16 activations alone move KL by 1e-6, and by 1e-3 where a router's close call falls the other way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from llmx.formats.onnx import DATA_SUFFIX, MODEL_NAME, WORD
from llmx.formats.onnx_file import OnnxFile

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

COPIED_BYTES = 1 << 22  # at once


def has_halves(file: OnnxFile) -> bool:
    """Whether any tensor is of float16."""
    return any(tensor.kind == "FLOAT16" for tensor in file.tensors.values())


def write_widened(file: OnnxFile, folder: Path) -> Path:
    """Writes the graph and all its weights with float32 in place of float16; returns the graph's path."""
    import onnx

    model = onnx.load(file.paths[0], load_external_data=False)
    target = folder / MODEL_NAME
    with target.with_name(MODEL_NAME + DATA_SUFFIX).open("wb") as data:
        for proto in model.graph.initializer:
            _moved(file, proto, data)
    _widen(model.graph)
    target.write_bytes(model.SerializeToString())
    return target


def _moved(file: OnnxFile, proto: TensorProto, data: BinaryIO) -> None:
    """Writes a tensor's bytes behind those before it, widened where they are float16."""
    from onnx import TensorProto

    halves = proto.data_type == TensorProto.FLOAT16
    if not halves and proto.data_location != TensorProto.EXTERNAL:
        return
    data.write(bytes(-data.tell() % WORD))
    start, stored = data.tell(), file.bytes(proto.name)
    for at in range(0, len(stored), COPIED_BYTES):
        piece = stored[at : at + COPIED_BYTES]
        data.write(piece.view("<f2").astype("<f4").data if halves else np.ascontiguousarray(piece).data)
    file.release(proto.name)
    told = {"location": MODEL_NAME + DATA_SUFFIX, "offset": str(start), "length": str(data.tell() - start)}
    for field in ("raw_data", "int32_data", "external_data"):
        proto.ClearField(field)
    for key, value in told.items():
        proto.external_data.add(key=key, value=value)
    proto.data_location = TensorProto.EXTERNAL
    proto.data_type = TensorProto.FLOAT if halves else proto.data_type


def _widen(graph: GraphProto) -> None:
    """Float32 for every value that is said to be float16, and for what is cast to it."""
    from onnx import TensorProto

    for value in (*graph.input, *graph.output, *graph.value_info):
        kind: Any = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT16:
            kind.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: NodeProto) -> None:
    from onnx import AttributeProto, TensorProto, numpy_helper

    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == AttributeProto.GRAPH:
            _widen(attribute.g)
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
