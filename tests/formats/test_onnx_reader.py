"""The bounded reader of ONNX graphs: what it tells of a sound one, and that a hostile one is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx.errors import IntegrityError, UsageError

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")

from llmx.formats import onnx_reader  # noqa: E402
from llmx.formats.onnx_reader import read_onnx  # noqa: E402

ROWS, COLS = 6, 4
WEIGHT = np.arange(ROWS * COLS, dtype=np.float32).reshape(ROWS, COLS)
BIAS = np.ones(ROWS, np.float32)


def external(name: str, shape: tuple[int, ...], offset: int, length: int) -> Any:
    proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=str(value))
    return proto


@pytest.fixture
def model() -> Any:
    """x [n, COLS] -> Gemm -> y [n, ROWS]; the weight and the bias lie beside it, a constant inside."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = [external("w", (ROWS, COLS), 0, WEIGHT.nbytes), external("b", (ROWS,), 128, BIAS.nbytes)]
    inside = onnx.numpy_helper.from_array(np.float32(2), "two")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["g"], transB=1), helper.make_node("Mul", ["g", "two"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", COLS])],
        [helper.make_tensor_value_info("y", kind, ["n", ROWS])],
        initializer=[*weights, inside],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="somebody")
    made.ir_version = 10
    made.metadata_props.add(key="about", value="a test")
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    def save(model: Any) -> Path:
        (tmp_path / "model.onnx.data").write_bytes(WEIGHT.tobytes().ljust(128, b"\0") + BIAS.tobytes())
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        return tmp_path / "model.onnx"

    return save


def refused(path: Path) -> str:
    with pytest.raises(IntegrityError) as error:
        read_onnx(path)
    assert error.value.exit_code == 6
    return str(error.value)


def weight(model: Any, name: str = "w") -> Any:
    return next(one for one in model.graph.initializer if one.name == name)


def say(model: Any, key: str, value: str, name: str = "w") -> None:
    next(entry for entry in weight(model, name).external_data if entry.key == key).value = value


def test_a_sound_graph_is_told_with_its_weights_and_nodes(model, saved):
    path = saved(model)
    file = read_onnx(path)
    assert read_onnx(path.parent).paths == file.paths == (path, path.with_name("model.onnx.data"))
    assert file.nbytes == sum(each.stat().st_size for each in path.parent.iterdir())
    assert file.values == ROWS * COLS + ROWS + 1
    assert file.operators == {"Gemm": 1, "Mul": 1} and file.nodes[0].attributes == {"transB": 1}
    assert (file.metadata, file.producer[0], file.opsets) == ({"about": "a test"}, "somebody", {"": 20})
    assert (file.inputs, file.outputs) == (("x",), ("y",))
    tensor = file.tensors["w"]
    assert (tensor.kind, tensor.shape, tensor.nbytes, tensor.offset) == ("FLOAT", (ROWS, COLS), WEIGHT.nbytes, 0)
    for name, value in (("w", WEIGHT), ("b", BIAS), ("two", np.float32([2]))):
        assert file.bytes(name).tobytes() == value.tobytes()
        file.release(name)


def test_weights_may_share_one_place_but_not_a_part_of_it(model, saved):
    model.graph.initializer.append(external("tied", (ROWS, COLS), 0, WEIGHT.nbytes))
    assert read_onnx(saved(model)).tensors["tied"].offset == 0
    model.graph.initializer.append(external("within", (2,), 8, 8))
    assert "weight 'within': its bytes overlap those of" in refused(saved(model))


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../model.onnx.data", "inner/data", "..", "", "a\\b", "model.onnx", "nul\0"]
)
def test_a_place_that_is_no_plain_name_beside_the_graph_is_refused(location, model, saved):
    say(model, "location", location)
    assert "weight 'w': its data is said to lie in" in refused(saved(model))


def test_a_data_file_that_is_a_link_a_folder_or_missing_is_refused(model, saved, tmp_path):
    path = saved(model)
    data = path.with_name("model.onnx.data")
    elsewhere = tmp_path / "elsewhere"
    data.rename(elsewhere)
    assert "the data file model.onnx.data is not there" in refused(path)
    data.symlink_to(elsewhere)
    assert "the data file model.onnx.data is a symbolic link" in refused(path)
    data.unlink()
    data.mkdir()
    assert "the data file model.onnx.data is no regular file" in refused(path)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("offset", "99999", "end past the 152 of model.onnx.data"),
        ("offset", "9223372036854775807", "end past the 152"),
        ("offset", "-4", "no number of bytes"),
        ("offset", " 4", "no number of bytes"),
        ("offset", "0x4", "no number of bytes"),
        ("offset", "9" * 40, "no number of bytes"),
        ("length", "95", "95 bytes are given; its shape and type take 96"),
    ],
)
def test_a_range_outside_the_file_or_of_another_length_is_refused(key, value, told, model, saved):
    say(model, key, value)
    assert told in refused(saved(model))


def test_a_data_file_that_is_cut_is_refused(model, saved):
    path = saved(model)
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:100])
    assert "weight 'b': its 24 bytes from 128 end past the 100 of model.onnx.data: the file is cut" in refused(path)


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


@pytest.mark.parametrize("offence", OFFENCES, ids=lambda offence: offence.__name__)
def test_a_graph_with_an_offence_is_refused_by_its_name(offence, model, saved):
    offence(model)
    assert OFFENCES[offence] in refused(saved(model))


def test_an_operator_that_onnxruntime_has_in_onnx_s_own_domain_is_admitted(model, saved):
    model.graph.node.append(onnx.helper.make_node("SimplifiedLayerNormalization", ["y", "b"], ["z"], axis=-1))
    assert read_onnx(saved(model)).operators["SimplifiedLayerNormalization"] == 1
    model.graph.node[0].op_type = "Gemmm"
    assert "No Op registered for Gemmm" in refused(saved(model))


def test_every_offence_is_told_at_once(model, saved):
    say(model, "location", "/etc/passwd")
    weight(model, "b").data_type = 99
    of_the_future(model)
    told = refused(saved(model))
    assert "weight 'w'" in told and "weight 'b'" in told and "IR version" in told


def test_what_is_no_graph_or_too_large_is_refused(model, saved, tmp_path, monkeypatch):
    path = saved(model)
    monkeypatch.setattr(onnx_reader, "MAX_GRAPH_BYTES", 50)
    assert "beside the graph" in refused(path)
    monkeypatch.undo()
    for content in (b"", b"<html>Not found</html>", path.read_bytes()[:40]):
        path.write_bytes(content)
        assert "this is no ONNX graph" in refused(path)
    with pytest.raises(UsageError, match="no such file"):
        read_onnx(tmp_path / "none")
