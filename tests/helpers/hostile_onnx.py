"""ONNX graphs made to do harm: a sound one, its data beside it, what is changed in it, the words of the offence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROWS, COLS = 6, 4
WEIGHT = np.arange(ROWS * COLS, dtype=np.float32).reshape(ROWS, COLS)
BIAS = np.ones(ROWS, np.float32)


def external(name: str, shape: tuple[int, ...], offset: int, length: int) -> Any:
    proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


def graph() -> Any:
    """x [n, COLS] -> Gemm -> y [n, ROWS]; the weight and the bias lie beside it, a constant inside."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = [external("w", (ROWS, COLS), 0, WEIGHT.nbytes), external("b", (ROWS,), 128, BIAS.nbytes)]
    inside = onnx.numpy_helper.from_array(np.float32(2), "two")
    made = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["g"], transB=1), helper.make_node("Mul", ["g", "two"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", COLS])],
        [helper.make_tensor_value_info("y", kind, ["n", ROWS])],
        initializer=[*weights, inside],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], producer_name="somebody")
    model.ir_version = 10
    model.metadata_props.add(key="about", value="a test")
    return model


def save(model: Any, folder: Path) -> Path:
    """The graph and its data file, written into the folder; the graph's path."""
    (folder / "model.onnx.data").write_bytes(WEIGHT.tobytes().ljust(128, b"\0") + BIAS.tobytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def weight(model: Any, name: str = "w") -> Any:
    return next(one for one in model.graph.initializer if one.name == name)


def say(model: Any, key: str, value: str, name: str = "w") -> None:
    next(entry for entry in weight(model, name).external_data if entry.key == key).value = value


def twice(model: Any) -> None:
    model.graph.initializer.append(external("w", (ROWS, COLS), 0, WEIGHT.nbytes))


def said_twice(model: Any) -> None:
    weight(model).external_data.add(key="location", value="other")


def nameless(model: Any) -> None:
    weight(model).name = ""


def unknown_type(model: Any) -> None:
    weight(model).data_type = 99


def text(model: Any) -> None:
    weight(model).data_type = onnx.TensorProto.STRING


def overflowing(model: Any) -> None:
    weight(model).dims[:] = [2**40, 2**40]


def negative(model: Any) -> None:
    weight(model).dims[:] = [-1, 4]


def many_dims(model: Any) -> None:
    weight(model).dims[:] = [1] * 9


def in_both(model: Any) -> None:
    weight(model, "two").external_data.add(key="location", value="model.onnx.data")


def too_few_bytes(model: Any) -> None:
    weight(model, "two").raw_data = b"\0"


def too_few_values(model: Any) -> None:
    one = weight(model, "two")
    one.ClearField("raw_data")
    one.float_data.extend([1, 2])


def of_the_future(model: Any) -> None:
    model.ir_version = 99


def newer_operators(model: Any) -> None:
    model.opset_import[0].version = 999


def other_operators(model: Any) -> None:
    model.opset_import.add(domain="org.evil", version=1)


def not_imported(model: Any) -> None:
    model.graph.node[0].domain = "com.microsoft"


def doubled_import(model: Any) -> None:
    model.opset_import.add(domain="", version=20)


def doubled_metadata(model: Any) -> None:
    model.metadata_props.add(key="about", value="more")


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def training(model: Any) -> None:
    model.training_info.add()


def attribute_elsewhere(model: Any) -> None:
    made = model.graph.node[0].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    made.t.external_data.add(key="location", value="/etc/passwd")


def inner_weights(model: Any) -> None:
    made = model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
    made.g.initializer.append(external("inner", (2,), 0, 8))


def nested(model: Any) -> None:
    graph = model.graph
    for _ in range(20):
        made = graph.node.add(op_type="If").attribute.add(name="then", type=onnx.AttributeProto.GRAPH)
        made.g.name = "deep"
        graph = made.g


def dangling(model: Any) -> None:
    model.graph.node[1].input[0] = "nowhere"


OFFENCES: dict[Callable[[Any], None], str] = {
    twice: "weight 'w': the name stands there twice",
    said_twice: "where it lies is said twice",
    nameless: "it has no name",
    unknown_type: "its type is 99",
    text: "its type is STRING",
    overflowing: "overflows",
    negative: "is negative",
    many_dims: "more than 8 dims",
    in_both: "both inside the graph and in another file",
    too_few_bytes: "1 bytes; its shape and type take 4",
    too_few_values: "its values are not the 1",
    of_the_future: "IR version 99",
    newer_operators: "opset 999",
    other_operators: "operators of the domain 'org.evil'",
    not_imported: "nodes of the domain 'com.microsoft', which the graph does not import",
    doubled_import: "imported twice",
    doubled_metadata: "the metadata key 'about' stands there twice",
    sparse: "sparse weights",
    training: "training information",
    attribute_elsewhere: "an attribute that lies in another file",
    inner_weights: "holds a graph with weights of its own",
    nested: "graphs deep",
    dangling: "onnx.checker refuses the graph",
}

LOCATIONS = ("/etc/passwd", "../model.onnx.data", "inner/data", "..", "", "a\\b", "model.onnx", "nul\0")
RANGES = (
    # key, value, words
    ("offset", "99999", "end past the 152 of model.onnx.data"),
    ("offset", "9223372036854775807", "end past the 152"),
    ("offset", "-4", "no number of bytes"),
    ("offset", " 4", "no number of bytes"),
    ("offset", "0x4", "no number of bytes"),
    ("offset", "9" * 40, "no number of bytes"),
    ("length", "95", "95 bytes are given; its shape and type take 96"),
)
