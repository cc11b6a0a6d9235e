"""The bounded reader of ONNX graphs: what it tells of a sound one, and that a hostile one is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx.errors import IntegrityError, UsageError

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")

from hostile_onnx import (  # noqa: E402
    BIAS,
    COLS,
    LOCATIONS,
    OFFENCES,
    RANGES,
    ROWS,
    WEIGHT,
    external,
    graph,
    of_the_future,
    save,
    say,
    weight,
)

from llmx.formats import onnx_reader  # noqa: E402
from llmx.formats.onnx_reader import read_onnx  # noqa: E402


@pytest.fixture
def model() -> Any:
    return graph()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    return lambda model: save(model, tmp_path)


def refused(path: Path) -> str:
    with pytest.raises(IntegrityError) as error:
        read_onnx(path)
    assert error.value.exit_code == 6
    return str(error.value)


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


@pytest.mark.parametrize("location", LOCATIONS)
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


@pytest.mark.parametrize(("key", "value", "told"), RANGES)
def test_a_range_outside_the_file_or_of_another_length_is_refused(key, value, told, model, saved):
    say(model, key, value)
    assert told in refused(saved(model))


def test_a_data_file_that_is_cut_is_refused(model, saved):
    path = saved(model)
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:100])
    assert "weight 'b': its 24 bytes from 128 end past the 100 of model.onnx.data: the file is cut" in refused(path)


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
