"""`llmx export --format tensorrt` from the command line: folders with an engine, their manifests, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done
from jsonschema import Draft202012Validator

from llmx import api
from llmx.errors import CheckFailed
from llmx.exporters.manifest import json_schema
from llmx.exporters.sparsity import read_sparsity
from llmx.exporters.tensorrt import GRAPH_FOLDER
from llmx.formats.tensorrt import read_config
from llmx.interpreter import TENSORRT_PYTHON
from llmx.validate.report import json_schema as report_schema
from llmx.validate.sample_text import SAMPLE_TEXT
from llmx.validating import missing_runtime

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'llmx[tensorrt-rtx]'")

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
ENGINE = ("--format", "tensorrt", "--builder", "tensorrt_rtx", "--max-input", 32, "--max-length", 64)
PLAIN = (*ENGINE, "--no-validate", "--threads", 1, "--json")
FILES = {"rank0.engine", "config.json", "build-report.json", "tokenizer.json", "tokenizer_config.json"}
BESIDE = {"rank0.manifest.json", "report.json", "report.html", "generation_config.json"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(SAMPLE_TEXT)
    return path


def test_the_plan_tells_which_sizes_are_estimates_and_writes_nothing(
    tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = here("plan", EXAMPLE, *ENGINE, "--bits", 4, "--method", "rtn", "--json").told
    estimated = {file["name"]: file.get("estimated", False) for file in told["files"]}
    assert estimated["rank0.engine"] is True and estimated["tokenizer.json"] is False
    assert told["type"] == "W4A16" and "int4-g128-pos" in told["types"]
    assert not list(tmp_path.iterdir())
    shown = here("plan", EXAMPLE, *ENGINE, "--bits", 4, "--method", "rtn").stdout
    assert "rank0.engine  about " in shown and "tokenizer.json  10,614 bytes" in shown


def test_an_export_is_a_folder_that_its_manifest_verifies(tmp_path: Path, here: Callable[..., Done]) -> None:
    done = here("export", EXAMPLE, *PLAIN, "--bits", 16, "-o", tmp_path / "made")
    assert done.code == 0, done.stderr
    made = tmp_path / "made"
    assert {path.name for path in made.iterdir()} == FILES | BESIDE
    assert Path(done.told["artifact"]) == made / "rank0.engine"
    manifest = json.loads((made / "rank0.manifest.json").read_text())
    assert list(Draft202012Validator(json_schema()).iter_errors(manifest)) == []
    assert {tensor["file"] for tensor in manifest["tensors"]} == {None}
    assert manifest["options"]["builder"] == "tensorrt_rtx" and manifest["options"]["max_length"] == 64
    report = json.loads((made / "report.json").read_text())
    assert list(Draft202012Validator(report_schema()).iter_errors(report)) == []
    assert report["export"]["build"]["engine_bytes"] == (made / "rank0.engine").stat().st_size
    assert report["export"]["bytes"] == sum(file["bytes"] for file in report["export"]["files"])
    for given in ("", "rank0.engine", "rank0.manifest.json"):
        verified = here("verify", made / given, "--json")
        assert verified.code == 0 and verified.told["tensors"] == 0 and verified.told["files"] == len(manifest["files"])
    damaged = bytearray((made / "rank0.engine").read_bytes())
    damaged[-100] ^= 1
    (made / "rank0.engine").write_bytes(damaged)
    assert here("verify", made, "--json").code == 6


def test_logits_in_float32_take_a_larger_head(tmp_path: Path, here: Callable[..., Done]) -> None:
    built = {}
    for head in ("--wide-head", "--narrow-head"):
        done = here("export", EXAMPLE, *PLAIN, "--bits", 16, head, "-o", tmp_path / head)
        assert done.code == 0, done.stderr
        built[head] = (tmp_path / head / "rank0.engine").stat().st_size
    assert built["--wide-head"] > built["--narrow-head"] + 2 * 512 * 256  # vocabulary, width


def test_without_an_output_the_folder_is_named_after_the_model_and_its_type(
    tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("export", EXAMPLE, *PLAIN, "--bits", 8)
    assert done.code == 0, done.stderr
    assert done.told["artifact"] == "tiny-qwen3-3.3M-W8A16-tensorrt/rank0.engine"


def test_a_name_of_a_file_is_no_output(tmp_path: Path, here: Callable[..., Done]) -> None:
    done = here("export", EXAMPLE, *PLAIN, "--bits", 16, "-o", tmp_path / "model.engine")
    assert done.code == 2 and str(tmp_path / "model") in done.stderr


def test_inputs_are_measured_for_types_that_round_them(text: Path, tmp_path: Path, here: Callable[..., Done]) -> None:
    given = ("--calibration", text, "--calibration-tokens", 512, "--device", "cpu")
    done = here("export", EXAMPLE, *PLAIN, "--type", "fp8", *given, "-o", tmp_path / "made")
    assert done.code == 0, done.stderr
    manifest = json.loads((tmp_path / "made" / "rank0.manifest.json").read_text())
    assert manifest["type"] == "FP8" and manifest["calibration"]["tokens"] == 512
    config = read_config(tmp_path / "made")
    assert config.encodings["layers.0.down.weight"] == "fp8-channel-float32"
    assert config.encodings["embedding.weight"] == config.floats == "F16"


def test_solved_weights_make_another_engine_that_says_so(text: Path, tmp_path: Path, here: Callable[..., Done]) -> None:
    given = ("--calibration", text, "--calibration-tokens", 1024, "--effort", "fast", "--device", "cpu")
    solver = {}
    for method in ("rtn", "gptq", "awq"):
        how = given if method != "rtn" else ()
        done = here("export", EXAMPLE, *PLAIN, "--bits", 4, "--method", method, *how, "-o", tmp_path / method)
        assert done.code == 0, done.stderr
        solver[method] = read_config(tmp_path / method).solver
    assert solver == {"rtn": None, "gptq": "solved", "awq": "solved and scaled"}
    assert len({(tmp_path / method / "rank0.engine").read_bytes() for method in solver}) == 3


def test_what_the_builder_was_given_is_made_again_from_the_manifest(tmp_path: Path, here: Callable[..., Done]) -> None:
    first = here("export", EXAMPLE, *PLAIN, "--bits", 8, "-o", tmp_path / "first")
    assert first.code == 0, first.stderr
    manifest = tmp_path / "first" / "rank0.manifest.json"
    again = ("export", EXAMPLE, "--from-manifest", manifest, "--no-validate", "--threads", 1)
    assert here(*again, "-o", tmp_path / "again").code == 0
    # A builder that times its kernels makes another engine of the same weights; other weights are another matter.
    told = json.loads(manifest.read_text())
    told["files"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(told))
    assert here(*again, "-o", tmp_path / "timed").code == 0
    told["tensors"][0]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(told))
    with pytest.raises(CheckFailed, match=told["tensors"][0]["name"]):
        request = api.ExportRequest(str(EXAMPLE), from_manifest=manifest, output=tmp_path / "other", validate=False)
        api.export(request)
    assert not (tmp_path / "other").exists()


def test_a_graph_that_a_killed_build_left_does_not_get_into_the_artifact(
    tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmx.exporters import tensorrt

    write = tensorrt.write

    def after_a_killed_one(export: tensorrt.TensorRtExport, targets: list[Path], rows: object) -> object:
        left = targets[0].with_name(GRAPH_FOLDER)
        left.mkdir()
        (left / "model.onnx").write_text("half")
        return write(export, targets, rows)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(tensorrt, "write", after_a_killed_one)
    done = here("export", EXAMPLE, *PLAIN, "--bits", 16, "-o", tmp_path / "made")
    assert done.code == 0, done.stderr
    assert GRAPH_FOLDER not in {path.name for path in (tmp_path / "made").iterdir()}


def test_an_engine_that_cannot_run_here_is_not_said_to_be_proven(tmp_path: Path, here: Callable[..., Done]) -> None:
    reason = missing_runtime("tensorrt")
    if reason is None:
        pytest.skip("engines run here")
    done = here("export", EXAMPLE, *ENGINE, "--bits", 16, "-o", tmp_path / "made")
    assert done.code == 7 and "--no-validate" in done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--format", "tensorrt", "--bits", 3), 2, "choose one of 4, 8, 16, 32"),
        (("--format", "tensorrt", "--type", "Q4_K_M"), 2, "choose one of F32, F16, BF16, W4A16, W8A16, FP8, W8A8"),
        (("--format", "tensorrt", "--builder", "tensorrt_9"), 2, "choose one of tensorrt, tensorrt_rtx"),
        (("--format", "tensorrt", "--builder", "tensorrt_rtx", "--refit", "--bits", 16), 7, "leave out --refit"),
        ((*ENGINE, "--portable", "--bits", 16), 2, "leave out --portable"),
        ((*ENGINE, "--timing-cache", "timings", "--bits", 16), 2, "leave out --timing-cache"),
        ((*ENGINE, "--optimization-level", 7, "--bits", 16), 2, "one of 0, 1, 2, 3, 4, 5"),
        ((*ENGINE, "--profiles", 3, "--bits", 16), 2, "1, for all lengths, or 2"),
        (("--format", "tensorrt", "--dialect", "ort"), 2, "has no use for these options"),
        (("--format", "gguf", "--max-batch", 2), 2, "--max-batch"),
        (("--format", "onnx", "--builder", "tensorrt"), 2, "--builder"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(
    options: tuple[object, ...], code: int, words: str, tmp_path: Path, here: Callable[..., Done]
) -> None:
    done = here("export", EXAMPLE, *options, "--no-validate", "-o", tmp_path / "made")
    assert done.code == code and words in done.stderr
    assert not (tmp_path / "made").exists()


def test_another_python_without_tensorrt_is_told(
    tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("there is no other Python")
    monkeypatch.setenv(TENSORRT_PYTHON, python)
    done = here("export", EXAMPLE, "--format", "tensorrt", "--bits", 16, "--no-validate", "-o", tmp_path / "made")
    assert done.code == 7 and python in done.stderr and "not installed" in done.stderr


def test_sparse_weights_are_told_and_their_kernels_allowed(
    tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmx.exporters import tensorrt

    asked: list[tuple[str, ...]] = []
    build = tensorrt.build
    monkeypatch.setattr(tensorrt, "build", lambda *given: (asked.append(given[1].flags), build(*given))[1])
    for pattern in ("2:4", "50%"):
        given = ("--bits", 16, "--sparsity", pattern, "--method", "magnitude")
        done = here("export", EXAMPLE, *PLAIN, *given, "-o", tmp_path / pattern.rstrip("%").replace(":", "of"))
        assert done.code == 0, done.stderr
    assert asked == [("SPARSE_WEIGHTS",), ()]
    told = read_sparsity(read_config(tmp_path / "2of4").sparsity)
    assert (told.pattern, told.method) == ("2:4", "magnitude")
    assert read_config(tmp_path / "50").sparsity is not None
