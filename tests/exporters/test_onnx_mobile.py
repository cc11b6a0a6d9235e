"""The .ort file of a graph, and what the accelerators of phones would take of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Done

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'llmx[onnx]'")

import onnxruntime
from onnx import defs

from llmx import api
from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.exporters import onnx_mobile
from llmx.exporters.onnx import DIALECTS, OnnxOptions, prepare, write
from llmx.exporters.onnx_mobile import ACCELERATORS, QNN_OPERATORS, convert, mobile_lines, mobile_report
from llmx.formats.onnx import VENDOR_DOMAIN, past
from llmx.models.model import open_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


def folder_of(folder: Path, dialect: str) -> Path:
    planned = prepare(open_model(EXAMPLE), OnnxOptions(dialect=dialect))
    write(planned, [folder / file.name for file in planned.plan.files])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("mobile"), "ort")


def logits(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}
    shapes = {one.name: one.shape for one in session.get_inputs()}
    caches = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items() if "past" in name
    }
    assert past(0, "key") in caches
    return np.asarray(session.run(["logits"], feeds | caches)[0])


def test_an_ort_file_is_one_file_and_computes_what_the_graph_does(folder: Path) -> None:
    made = convert(folder)
    assert made == folder / "model.ort" and made.stat().st_size > (folder / "model.onnx.data").stat().st_size
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "model.ort",
        "model.required_operators.config",
    }
    assert "GroupQueryAttention" in (folder / "model.required_operators.config").read_text()
    assert np.abs(logits(made) - logits(folder / "model.onnx")).max() < 1e-5


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_report_counts_nodes_partitions_and_what_is_left(dialect: str, tmp_path: Path) -> None:
    report = mobile_report(folder_of(tmp_path, dialect))
    assert report.keys() == ACCELERATORS.keys()
    attention = "Attention" if dialect == "standard" else f"{VENDOR_DOMAIN}.GroupQueryAttention"
    for one in report.values():
        assert 0 < one["taken"] <= one["taken_if_fixed"] < one["nodes"]
        assert one["left"][attention] == 4  # one in each layer
        assert one["nodes"] - one["taken_if_fixed"] >= sum(one["left"].values())
        assert 1 <= one["partitions_if_fixed"] <= one["nodes"]
    assert report["NNAPI"]["taken"] < report["NNAPI"]["taken_if_fixed"]
    assert report["CoreML"]["taken"] == report["CoreML"]["taken_if_fixed"]
    assert any("Gather" in caveat for caveat in report["NNAPI"]["unchecked"])
    lines = mobile_lines(report)
    assert len(lines) == 3 and f"{attention} (4)" in lines[2] and "if every size were fixed" in lines[2]


def test_every_operator_listed_for_qnn_is_one_of_onnx() -> None:
    known = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""}
    assert set(QNN_OPERATORS[""]) - known == {"Inverse"}  # onnxruntime's, which QNN's list puts among ONNX's


def test_what_does_not_fit_an_ort_file_is_said_before_it_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_mobile, "LARGEST_ORT", 1000)
    with pytest.raises(UnsupportedError, match="at most 1000"):
        convert(folder / "model.onnx")


def test_graphs_without_their_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    for ask in (convert, mobile_report):
        with pytest.raises(IntegrityError, match=r"model\.onnx\.data is not there"):
            ask(tmp_path)
        with pytest.raises(UsageError, match="no such file"):
            ask(tmp_path / "none")


def test_what_onnxruntime_says_of_a_graph_it_does_not_convert_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.graph.node[-1].op_type, graph.graph.node[-1].domain = "NoSuchOperator", VENDOR_DOMAIN
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes((folder / "model.onnx.data").read_bytes())
    with pytest.raises(IntegrityError, match="NoSuchOperator"):
        convert(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_the_command_writes_an_ort_file_of_the_artifact_and_no_old_one_stays(
    here: Callable[..., Done], tmp_path: Path
) -> None:
    made = tmp_path / "made"
    chosen = ("export", EXAMPLE, "--format", "onnx", "--no-validate", "--threads", 1, "-o", made)
    done = here(*chosen, "--type", "INT8", "--method", "rtn", "--ort", "--json")
    assert done.code == 0, done.stderr
    assert done.told["ort"] == str(made / "model.ort")
    assert np.abs(logits(made / "model.ort") - logits(made / "model.onnx")).max() < 1e-4
    assert here("verify", made / "model.onnx").code == 0
    done = here(*chosen, "--type", "F32", "--force")
    assert done.code == 0, done.stderr
    assert not list(made.glob("*.ort")) and not list(made.glob("*.config"))


def test_an_ort_file_is_for_onnx_and_for_what_fits(
    here: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = here("export", EXAMPLE, "--ort", "-o", tmp_path)
    assert done.code == 2 and "--ort" in done.stderr
    monkeypatch.setattr(onnx_mobile, "LARGEST_ORT", 1000)
    request = api.ExportRequest(str(EXAMPLE), "onnx", bits=32, ort=True, validate=False, output=tmp_path / "made")
    with pytest.raises(UnsupportedError, match="at most 1000"):
        api.export(request)
    assert not (tmp_path / "made").exists()


def test_inspecting_a_graph_tells_what_phones_take_of_it(here: Callable[..., Done], folder: Path) -> None:
    done = here("inspect", folder)
    assert done.code == 0 and "on phones" in done.stdout and "NNAPI" in done.stdout
    told = here("inspect", folder, "--json").told["phones"]
    assert told["accelerators"].keys() == ACCELERATORS.keys() and len(told["lines"]) == 3


def test_without_onnxruntime_a_report_says_that_there_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = onnx_mobile.report_or_reason(folder)
    assert told["accelerators"] is None and "onnxruntime" in told["lines"][0]
