"""The same walk on whole numbers in groups: kept rows are what the solver meant, for any threads, short groups too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmx.exporters.assignment import Assignment
from llmx.exporters.encoding import encoding
from llmx.exporters.format_types import ONNX
from llmx.exporters.journal import start
from llmx.exporters.quantization import Wishes, assignments, calibration_of, quantization
from llmx.exporters.solved import Solved
from llmx.exporters.solving import MatrixSolver, solve_tensors
from llmx.models.model import Model, open_model
from llmx.quant.recipe import Recipe
from llmx.quant.sensitivity import candidates

Run = Callable[..., Solved]


@pytest.fixture
def solve(some_text: Path, tmp_path: Path) -> Run:
    """solve(model, type, method, threads): every matrix, quickly."""

    def run(model: Model, type_name: str, method: str = "gptq", threads: int = 1, name: str = "rows") -> Solved:
        folder = tmp_path / name
        folder.mkdir()
        wishes = Wishes(calibration=some_text, tokens=3072, calibrate=True)
        recipe = Recipe("test", type_name, method=method, effort="fast")  # type: ignore[arg-type]
        decided = quantization(model, wishes, recipe, type_name, threads, ONNX)
        planned = assignments(decided, {spec.name: type_name for spec in candidates(model.architecture)})
        calibration, _ = calibration_of(model, decided, planned)
        return solve_tensors(model, planned, calibration, "fast", folder, start(folder, {}), threads)

    return run


@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "mixtral"])
@pytest.mark.parametrize("type_name", ["int4-g32-zp-float32", "int8-channel-sym-float32"])
def test_the_kept_rows_decode_to_what_the_walk_went_on_with(
    family: str, type_name: str, solve: Run, solvable: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = {}
    matrix = MatrixSolver.matrix

    def noted(self, weight, expert, inputs):  # type: ignore[no-untyped-def]
        value = matrix(self, weight, expert, inputs)
        if value is not None:
            meant[weight.spec.name, expert] = value.numpy()
        return value

    monkeypatch.setattr(MatrixSolver, "matrix", noted)
    model = open_model(solvable(family))
    found = solve(model, type_name)
    kept = encoding(type_name)
    assert meant and {name for name, _ in meant} <= found.rows.keys()
    for (name, expert), value in meant.items():
        first, source = len(value) * (expert or 0), model.weight(name).read()
        rows = kept.decode(found.rows[name], model.weight(name).cols)[first : first + len(value)]
        assert np.allclose(rows, value, rtol=1e-5, atol=1e-6), (name, expert)
        source = source[first : first + len(value)]
        assert 0 < np.linalg.norm(rows - source) < 0.3 * np.linalg.norm(source), (name, expert)
    for line in found.lines:
        assert line.held_out is None or line.rounding is None or line.held_out <= line.rounding
    assert any(line.method == "gptq" for line in found.lines)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_one_and_two_threads_keep_the_same_rows(method: str, solve: Run, solvable: Callable[[str], Path]) -> None:
    model = open_model(solvable("llama"))
    one, two = (solve(model, "int4-g128-sym", method, threads, str(threads)) for threads in (1, 2))
    assert one.rows.keys() == two.rows.keys()
    assert all(np.array_equal(one.rows[name], two.rows[name]) for name in one.rows)
    assert (one.scaling is not None) == (method == "awq")


def test_rows_that_end_in_a_short_group_are_rounded_and_counted(solve: Run, solvable: Callable[[str], Path]) -> None:
    found = solve(open_model(solvable("llama-narrow")), "int4-g32-zp-float32", "awq")
    lines = {line.name: line for line in found.lines}
    short = [name for name in lines if name.endswith("down.weight")]
    assert len(short) == 2 and all(lines[name].method == "rtn" and lines[name].held_out is None for name in short)
    assert lines["layers.0.o.weight"].held_out is not None
    assert any("2 matrices with a short last group a row were rounded" in note for note in found.notes())
    kept = encoding("int4-g32-zp-float32")
    for name in short:
        weight = found.model.weight(name).read()
        rows = kept.decode(found.rows[name], 200)
        assert 0 < np.linalg.norm(rows - weight) < 0.15 * np.linalg.norm(weight)


def test_an_assignment_of_floats_is_none(solvable: Callable[[str], Path], some_text: Path) -> None:
    model = open_model(solvable("llama"))
    decided = quantization(model, Wishes(calibration=some_text), Recipe("r", "F16", method="gptq"), "F16", 1, ONNX)
    found = assignments(decided, {"layers.0.o.weight": "F16", "layers.0.up.weight": "int4-g32-sym"})
    assert found == {"layers.0.up.weight": Assignment("int4-g32-sym", "gptq")}
