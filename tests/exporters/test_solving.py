"""Solved exports: the same bytes for any threads and after any interruption, and in the file what the solver meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmx import api
from llmx.errors import IntegrityError
from llmx.exporters import solving
from llmx.exporters.assignment import Assignment
from llmx.exporters.encoding import encoding
from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_tensors import entries, restore
from llmx.exporters.journal import start
from llmx.exporters.solving import MatrixSolver, solve_tensors
from llmx.formats.gguf import read_gguf
from llmx.formats.safetensors import write_safetensors
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps
from llmx.progress import track
from llmx.quant.activations import Rounding
from llmx.quant.calibrate import Calibration
from llmx.quant.grid import GRIDS
from llmx.quant.inputs import MatrixInputs, batches
from llmx.quant.solve import EFFORTS
from llmx.quant.statistics import Moments, Statistics
from llmx.quant.workers import Workers, workers

Meant = dict[tuple[str, int | None], np.ndarray[Any, Any]]


@pytest.fixture
def solve(solvable: Callable[[str], Path], some_text: Path, tmp_path: Path) -> Callable[..., api.ExportResult]:
    """solve(family, name, **options): a calibrated export, quickly."""

    def run(family: str, name: str, **options: Any) -> api.ExportResult:
        fields = {"method": "gptq", "effort": "fast", "calibration": some_text, "calibration_tokens": 3072}
        request = api.ExportRequest(
            str(solvable(family)), output=tmp_path / f"{name}.gguf", validate=False, **{**fields, **options}
        )
        return api.export(request)

    return run


@pytest.fixture
def one() -> Iterator[Workers]:
    with workers(1) as pool:
        yield pool


# The same bytes.


def test_the_libraries_own_threads_do_not_change_a_byte(
    solvable: Callable[[str], Path], some_text: Path, tmp_path: Path
) -> None:
    # The other tests run with these libraries on one thread; a user's are not.
    free = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    made = []
    for number, environment in enumerate((free, {**free, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})):
        target = tmp_path / f"{number}.gguf"
        command = [sys.executable, "-m", "llmx.cli", "export", str(solvable("llama")), "--method", "gptq"]
        command += ["--effort", "fast", "--calibration", str(some_text), "--calibration-tokens", "3072"]
        command += ["--threads", str(number + 1), "--no-validate", "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        made.append(target.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(("family", "method"), [("llama", "gptq"), ("mixtral", "gptq"), ("qwen3-tied", "awq")])
def test_one_and_two_threads_write_the_same_bytes(
    family: str, method: str, solve: Callable[..., api.ExportResult]
) -> None:
    one = solve(family, "one", threads=1, method=method)
    two = solve(family, "two", threads=2, method=method)
    assert one.artifact.read_bytes() == two.artifact.read_bytes()
    assert [{**line, "seconds": 0} for line in one.solved] == [{**line, "seconds": 0} for line in two.solved]


def forbid_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in ("attention", "route"):
        monkeypatch.setattr(TorchOps, operation, None)


@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "mixtral"])
def test_a_run_that_goes_on_from_statistics_writes_the_same_bytes(
    family: str, solve: Callable[..., api.ExportResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "statistics"
    plain = solve(family, "plain").artifact.read_bytes()
    assert solve(family, "kept", statistics=folder).artifact.read_bytes() == plain
    kept = sorted(path.name for path in folder.iterdir())
    told = json.loads((folder / "statistics.json").read_text())
    assert told["complete"] is True

    # Cut short: some files are not there, and one is half written.
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        if number % 3 != 1:
            path.rename(path.with_name(path.name + ".part")) if number % 3 else path.unlink()
    (folder / "statistics.json").write_text(json.dumps({**told, "complete": False}))
    assert solve(family, "resumed", statistics=folder, threads=1).artifact.read_bytes() == plain
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".part") == kept
    assert json.loads((folder / "statistics.json").read_text())["complete"] is True

    forbid_passes(monkeypatch)
    assert solve(family, "again", statistics=folder, threads=2).artifact.read_bytes() == plain


def test_an_export_that_fails_leaves_statistics_that_the_next_one_goes_on_from(
    solve: Callable[..., api.ExportResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "statistics"
    matrix = MatrixSolver.matrix

    def broken(self: MatrixSolver, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        if weight.spec.name == "layers.1.up.weight":
            raise IntegrityError("the power went")
        return matrix(self, weight, expert, inputs)

    monkeypatch.setattr(MatrixSolver, "matrix", broken)
    with pytest.raises(IntegrityError, match="power"):
        solve("llama", "broken", statistics=folder)
    assert json.loads((folder / "statistics.json").read_text())["complete"] is False
    assert {path.name for path in folder.glob("layers.1.*")} == {"layers.1.q.safetensors", "layers.1.o.safetensors"}
    assert not any(path.suffix == ".gguf" or path.name.startswith(".") for path in tmp_path.iterdir())
    monkeypatch.undo()
    resumed = solve("llama", "resumed", statistics=folder).artifact.read_bytes()
    assert resumed == solve("llama", "plain").artifact.read_bytes()


# What the file holds.


@pytest.fixture
def meant(monkeypatch: pytest.MonkeyPatch) -> Meant:
    """Every value that the solver gave back during the walk: (canonical name, expert) -> f32[out, in]."""
    seen: Meant = {}
    matrix, table = MatrixSolver.matrix, MatrixSolver.table

    def noted(self: MatrixSolver, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        value = matrix(self, weight, expert, inputs)
        if value is not None:
            seen[weight.spec.name, expert] = value.numpy()
        return value

    def noted_table(self: MatrixSolver, weight: Weight) -> torch.Tensor | None:
        value = table(self, weight)
        if value is not None:
            seen[weight.spec.name, None] = value.numpy()
        return value

    monkeypatch.setattr(MatrixSolver, "matrix", noted)
    monkeypatch.setattr(MatrixSolver, "table", noted_table)
    return seen


def reopened(artifact: Path, checkpoint: Path, folder: Path) -> Model:
    """The artifact's weights as a float32 checkpoint of the source's own layout."""
    model = open_model(checkpoint)
    a = model.architecture
    family = gguf_family(a)
    layout = entries(a, family, a.vocab)
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    tensors = [(name, thunk()) for name, thunk in restore(read_gguf(artifact), model, layout).items()]
    write_safetensors(
        folder / "model.safetensors",
        [(name, "F32", values.shape, [np.ascontiguousarray(values).tobytes()]) for name, values in tensors],
    )
    return open_model(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "gemma3", "phi3", "gpt2", "mixtral"])
def test_the_file_decodes_to_what_the_solver_meant(
    family: str, solve: Callable[..., api.ExportResult], solvable: Callable[[str], Path], meant: Meant, tmp_path: Path
) -> None:
    """Fused (phi3, gpt2), permuted (llama), stacked (mixtral) and tied ones: read back as a checkpoint."""
    result = solve(family, "solved", type_name="Q4_K_M")
    model = reopened(result.artifact, solvable(family), tmp_path / "reopened")
    source = open_model(solvable(family))
    stored = {name for name, _ in meant}
    assert stored == {line["name"] for line in result.solved}
    assert {"layers.1.q.weight", "layers.0.o.weight", "embedding.weight"} <= stored
    for (name, expert), value in meant.items():
        rows = len(value)
        found = model.weight(name).read(rows * (expert or 0), rows * ((expert or 0) + 1))
        assert np.allclose(found, value, rtol=1e-5, atol=1e-6), (name, expert)
        before = source.weight(name).read(rows * (expert or 0), rows * ((expert or 0) + 1))
        assert 0 < np.linalg.norm(found - before) < 0.5 * np.linalg.norm(before), (name, expert)
    for weight in source.weights():  # what is not quantized is what it was
        if weight.spec.name not in stored:
            assert np.allclose(model.weight(weight.spec.name).read(), weight.read(), rtol=1e-3), weight.spec.name


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mixtral"])
def test_a_scaled_file_decodes_to_the_scaled_model(
    *, family: str, solve: Callable[..., api.ExportResult], solvable: Callable[[str], Path], meant: Meant,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kept: list[solving.Solved] = []
    solver = solve_tensors
    monkeypatch.setattr(solving, "solve_tensors", lambda *given: kept.append(solver(*given)) or kept[0])
    result = solve(family, "scaled", method="awq")
    model, source, (solved,) = (
        reopened(result.artifact, solvable(family), tmp_path / "re"),
        open_model(solvable(family)),
        kept,
    )
    moved = 0
    for weight in solved.model.weights():
        name, found = weight.spec.name, model.weight(weight.spec.name).read()
        if (name, None) in meant:
            assert np.allclose(found, meant[name, None], rtol=1e-5, atol=1e-6), name
        elif (name, 0) not in meant:
            assert np.allclose(found, weight.read(), rtol=1e-3, atol=1e-6), name
            moved += not np.allclose(found, source.weight(name).read(), rtol=1e-3, atol=1e-6)
    assert moved > 0  # norms that were divided
    assert solved.scaling is not None and solved.scaling.folds.scales


def test_a_tied_embedding_is_solved_as_the_head_and_read_back_at_the_bottom(
    solve: Callable[..., api.ExportResult], meant: Meant
) -> None:
    lines = {line["name"]: line for line in solve("qwen3-tied", "tied").solved}
    line = lines["embedding.weight"]
    assert line["error_held_out"] is not None and line["error_held_out"] <= line["error_of_rounding"]
    untied = {line["name"]: line for line in solve("llama", "untied").solved}
    assert untied["embedding.weight"]["method"] == "rtn" and untied["embedding.weight"]["tokens"] is None
    assert untied["head.weight"]["tokens"] > 0


def test_the_report_has_a_line_for_every_solved_matrix_and_none_worse_than_rounding(
    solve: Callable[..., api.ExportResult],
) -> None:
    result = solve("mixtral", "lines")
    told = json.loads(result.report_path.read_text())["export"]
    assert told["solved"] == json.loads(json.dumps(list(result.solved)))
    experts = [line for line in told["solved"] if line["name"] == "layers.0.expert_down.weight"]
    assert [line["expert"] for line in experts] == [0, 1, 2, 3]
    assert sum(line["tokens"] for line in experts if not line["pooled"]) <= 2 * 3072
    for line in told["solved"]:
        assert line["seconds"] >= 0
        if line["error_held_out"] is not None:
            assert line["error_held_out"] <= line["error_of_rounding"]
            assert line["damping"] is not None and line["tokens"] > 0
    assert told["quantization"]["calibration"]["tokens"] <= 3072
    assert told["quantization"]["calibration"]["sha256"]


def test_awq_notes_its_scales_and_says_in_the_file_that_channels_were_scaled(
    solve: Callable[..., api.ExportResult],
) -> None:
    result = solve("llama", "awq", method="awq")
    assert read_gguf(result.artifact).metadata["llmx.solver"] == "solved and scaled"
    assert json.loads(result.report_path.read_text())["export"]["scaling"]
    assert read_gguf(solve("llama", "gptq").artifact).metadata["llmx.solver"] == "solved"
    rounded = solve("llama", "rtn", method="rtn", calibration=None, calibration_tokens=None)
    assert "llmx.solver" not in read_gguf(rounded.artifact).metadata


# Inputs that are hard.


def known(changes: Mapping[str, torch.Tensor | None]) -> Statistics:
    """Statistics of a matrix of 256 columns, with some sums replaced."""
    fields: dict[str, torch.Tensor | None] = {
        "hessian": torch.eye(256),
        "drift": torch.zeros(256, 256),
        "residual": torch.zeros(256, 256),
        "held_out": torch.eye(256),
        "squares": torch.ones(256),
        **changes,
    }
    fitted = Moments(fields["hessian"], fields["drift"], fields["residual"], 10)  # type: ignore[arg-type]
    judged = Moments(fields["held_out"], fields["drift"], fields["residual"], 10)  # type: ignore[arg-type]
    return Statistics(fitted, judged, fields["squares"])  # type: ignore[arg-type]


def spoilt(value: float, *shape: int) -> torch.Tensor:
    sums = torch.eye(256) if len(shape) == 2 else torch.ones(256)
    sums[(3,) * len(shape)] = value
    return sums


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["hessian", "drift", "residual", "held_out", "squares"])
def test_sums_that_are_not_finite_are_an_error_that_names_the_matrix(
    which: str, value: float, solvable: Callable[[str], Path], one: Workers, tmp_path: Path
) -> None:
    shape = (256,) if which == "squares" else (256, 256)
    found = known({which: spoilt(value, *shape)})
    weight = open_model(solvable("llama")).weight("layers.0.o.weight")
    given = {weight.spec.name: Assignment("Q4_K", "gptq")}
    with track(1, "solving") as progress:
        solver = MatrixSolver(given, EFFORTS["fast"], tmp_path, start(tmp_path, {}), "cpu", one, progress, tied=False)
        with pytest.raises(IntegrityError, match=r"not finite[\s\S]*layers\.0\.o\.weight"):
            solver.matrix(weight, None, MatrixInputs.known("layers.0.o", found, one))


def test_a_model_that_computes_nan_is_an_error_before_anything_is_written(
    solvable: Callable[[str], Path], some_text: Path, tmp_path: Path
) -> None:
    from llmx.formats.safetensors import open_safetensors

    broken = Path(shutil.copytree(solvable("llama"), tmp_path / "broken"))
    file = open_safetensors(broken / "model.safetensors")
    tensors = {n: (t.dtype, t.shape, file.bytes(n).tobytes()) for n, t in file.tensors.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    dtype, shape, data = tensors[name]
    huge = np.full(len(data) // 2, 0x7F00, np.uint16)  # 1.7e38: finite, and its products are not
    tensors[name] = (dtype, shape, huge.tobytes())
    write_safetensors(broken / "model.safetensors", [(n, d, s, [b]) for n, (d, s, b) in tensors.items()])
    request = api.ExportRequest(
        str(broken), method="gptq", calibration=some_text, calibration_tokens=2048, output=tmp_path / "out",
        validate=False, tensor_types=["ffn_up=BF16"],
    )  # fmt: skip
    with pytest.raises(IntegrityError, match="not finite"):
        api.export(request)
    assert not any((tmp_path / "out").glob("**/*"))


def test_only_what_is_assigned_is_solved(solvable: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(solvable("llama"))
    ids = np.random.default_rng(0).integers(3, 512, (8, 64)).tolist()
    given = {"layers.0.down.weight": Assignment("Q4_K", "gptq"), "layers.1.q.weight": Assignment("Q6_K", "rtn")}
    solved = solve_tensors(model, given, Calibration(batches(ids, 4)), "fast", tmp_path, start(tmp_path, {}), 1)
    assert set(solved.rows) == set(given)
    assert [(line.name, line.type_name) for line in solved.lines] == [
        ("layers.0.down.weight", "Q4_K"),
        ("layers.1.q.weight", "Q6_K"),
    ]
    assert solved.lines[1].method == "rtn"
    assert solved.tokens == 8 * 64
    assert solved.scaling is None


def test_smoothquant_folds_its_scales_before_matrices_are_solved_on_int8(
    solvable: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(solvable("llama"))
    ids = np.random.default_rng(0).integers(3, 512, (8, 64)).tolist()
    names = [f"layers.0.{role}.weight" for role in ("q", "k", "v", "up", "gate", "down")]
    given = {name: Assignment("int8-channel-pos-float32", "gptq", smoothed=True) for name in names}
    calibration = Calibration(batches(ids, 4))
    static: dict[str, Rounding] = {name: "uint8" for name in names if "down" not in name}
    solved = solve_tensors(model, given, calibration, "fast", tmp_path, start(tmp_path, {}), 1, static)
    assert solved.scaling is not None and solved.scaling.folds.scales
    assert all("alpha" in choice.line() or "no scaling" in choice.line() for choice in solved.scaling.choices)
    for name in names:
        folded, kept = solved.model.weight(name).read(), encoding(given[name].type_name)
        found = kept.decode(np.array(solved.rows[name]), folded.shape[1])
        assert np.linalg.norm(found - folded) < 0.02 * np.linalg.norm(folded)
    plain = {name: Assignment("int8-channel-pos-float32", "gptq") for name in names}
    (tmp_path / "plain").mkdir()
    assert (
        solve_tensors(model, plain, calibration, "fast", tmp_path / "plain", start(tmp_path / "plain", {}), 1).scaling
        is None
    )


def test_every_method_of_the_table_can_be_solved_with() -> None:
    assert set(solving.METHODS) == {"rtn", "gptq", "auto", "sparsegpt", "wanda", "magnitude"}
    assert all(chosen is None or "rtn" in chosen for chosen in solving.METHODS.values())
    assert all("rtn" in options.methods for options in EFFORTS.values())
    assert GRIDS["Q4_K"].name == "Q4_K"
