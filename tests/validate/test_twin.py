"""The float32 twins: exactly the artifact's numbers, whole or cut to the first layers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmx.exporters.gguf_tensors import decoded_rows, restore
from llmx.formats.gguf import read_gguf
from llmx.formats.safetensors import open_safetensors
from llmx.validate import twin
from llmx.validate.case import Settings
from llmx.validate.checks_conversion import check_conversion


def test_the_twin_holds_what_the_artifact_decodes_to_and_the_same_metadata(artifacts, tmp_path, monkeypatch):
    artifact, _ = artifacts("tiny-qwen3", "Q4_K_M")
    monkeypatch.setattr(twin, "CHUNK_BYTES", 10_000)  # many pieces
    file = read_gguf(artifact)
    twin.write_gguf_twin(file, tmp_path / "twin.gguf")
    made = read_gguf(tmp_path / "twin.gguf")
    assert made.metadata == file.metadata
    assert made.types == file.types
    assert list(made.tensors) == list(file.tensors)
    for name, tensor in made.tensors.items():
        assert tensor.type_name == "F32"
        assert tensor.shape == file.tensors[name].shape
        expected = decoded_rows(file, name, 0, tensor.shape[0] if len(tensor.shape) > 1 else 1)
        np.testing.assert_array_equal(made.bytes(name).view("<f4"), expected.reshape(-1))
    assert twin.is_its_own_twin(made) and not twin.is_its_own_twin(file)
    assert twin.twin_bytes(file) == sum(tensor.nbytes for tensor in made.tensors.values())


def test_the_checkpoint_twin_has_the_sources_names_shapes_and_config(artifacts, case_of, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    case = case_of(artifact, reference)
    twin.write_checkpoint_twin(restore(case.file, case.model, case.entries), case.model, tmp_path / "twin")
    made = open_safetensors(tmp_path / "twin" / "model.safetensors")
    source = case.model.checkpoint
    assert {name: tensor.shape for name, tensor in made.tensors.items()} == {
        n: t.shape for n, t in source.tensors.items()
    }
    assert json.loads((tmp_path / "twin" / "config.json").read_text()) == dict(source.config)


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-gemma3", "tiny-gpt2", "tiny-qwen3moe"])
def test_a_twin_over_its_budget_is_cut_to_the_first_layers_on_both_sides(model, artifacts, case_of, llama_cpp):
    artifact, reference = artifacts(model, "Q8_0")
    file = read_gguf(artifact)
    budget = twin.twin_bytes(file, 2)
    assert budget < twin.twin_bytes(file, 3)
    case = case_of(artifact, reference, llama_cpp, settings=Settings(positions=64, chunk=64, twin_bytes=budget))
    checks = list(check_conversion(case))
    assert all(check.passed for check in checks), checks
    compared = [check for check in checks if check.kind == "conversion" and check.name != "conversion.gelu_table"]
    assert compared and all("first 2 layers" in check.detail for check in compared)
    assert list(case.scratch.iterdir()) == []


def test_a_model_whose_single_layer_exceeds_the_budget_is_not_run_and_says_why(artifacts, case_of, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    case = case_of(artifact, reference, llama_cpp, settings=Settings(twin_bytes=1000))
    checks = list(check_conversion(case))
    assert {check.status for check in checks} == {"not run"}
    assert all("budget is 1000" in check.detail and check.required for check in checks)


def test_layer_lists_in_a_config_are_cut_with_the_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "mlp_only_layers": [0, 3],
        "architectures": ["w", "x", "y", "z"],
        "rope_scaling": None,
        "eos_token_id": [1, 2],
    }
    assert twin.cut_config(config, 2) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "b"],
        "mlp_only_layers": [0],
        "architectures": ["w", "x", "y", "z"],
        "rope_scaling": None,
        "eos_token_id": [1, 2],
    }
    assert twin.cut_config(config, None) == config
