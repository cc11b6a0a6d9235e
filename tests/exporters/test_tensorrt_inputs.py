"""Which matrices of a TensorRT mix round their inputs, and what SmoothQuant is told of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_cases import CASES, save

from llmx.exporters.tensorrt_types import MIXES, input_roundings, planned_scales, planned_types
from llmx.models.architecture import Architecture
from llmx.models.model import open_model


def of(name: str, folder: Path) -> Architecture:
    save(CASES[name], folder)
    return open_model(folder).architecture


def role(name: str) -> str:
    return name.split(".")[2]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_int8_rounds_all_inputs_but_those_of_down(name: str, tmp_path: Path) -> None:
    architecture, mix = of(name, tmp_path), MIXES["W8A8"]
    types = planned_types(architecture, mix)
    told, scales = input_roundings(architecture, mix, types), planned_scales(architecture, mix, types)
    assert told.keys() == {name for name, kind in types.items() if kind == mix.base}
    assert {role(name) for name, how in told.items() if how == "float"} <= {"down", "expert_down"}
    assert {name: scale.kind for name, scale in scales.items()} == {n: how for n, how in told.items() if how == "int8"}
    assert all(scale.zero_point == 0 for scale in scales.values())
    assert not any(role(name).endswith("down") for name in scales)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_fp8_rounds_all_inputs(name: str, tmp_path: Path) -> None:
    architecture, mix = of(name, tmp_path), MIXES["FP8"]
    types = planned_types(architecture, mix)
    told = input_roundings(architecture, mix, types)
    assert set(told.values()) == {"fp8"} and told.keys() == planned_scales(architecture, mix, types).keys()
    assert any(role(name).endswith("down") for name in told)


def test_a_mix_of_float_inputs_rounds_none_and_a_ruled_matrix_takes_its_own_as_they_are(tmp_path: Path) -> None:
    architecture = of("llama", tmp_path)
    for name in ("F16", "W4A16", "W8A16"):
        assert not input_roundings(architecture, MIXES[name], planned_types(architecture, MIXES[name]))
    types = planned_types(architecture, MIXES["W8A8"], {"layers.0.q.weight": "F16"})
    assert "layers.0.q.weight" not in input_roundings(architecture, MIXES["W8A8"], types)
