"""GPT-2 as a TensorRT-LLM checkpoint: its quantized matrices stand the other way round than transformers has them."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_cases import Case, save  # noqa: E402
from trtllm_reader import load, read_hf  # noqa: E402

from llmx.exporters.trtllm import TrtllmOptions, prepare, write  # noqa: E402
from llmx.exporters.trtllm_types import find_mix, planned_types  # noqa: E402
from llmx.models.model import open_model  # noqa: E402
from llmx.validate.runtimes.emulation import Inputs, rounded  # noqa: E402
from llmx.validate.runtimes.trtllm_model import write_floats  # noqa: E402
from llmx.validate.trtllm_kind import KIND  # noqa: E402

GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def test_decoded_weights_are_turned_to_where_transformers_has_them(tmp_path: Path) -> None:
    save(Case("GPT2", GPT2), tmp_path / "model")
    model, mix = open_model(tmp_path / "model"), find_mix("W4A16")
    export = prepare(model, TrtllmOptions(mix, planned_types(model.architecture, mix, {})))
    (tmp_path / "out").mkdir()
    write(export, [tmp_path / "out" / file.name for file in export.plan.files])
    (tmp_path / "floats").mkdir()
    write_floats(KIND.open(tmp_path / "out"), tmp_path / "floats")
    found, exact = load(tmp_path / "floats/model.safetensors"), read_hf(tmp_path / "out")
    assert torch.equal(found["transformer.h.1.mlp.c_fc.weight"], exact["transformer.h.1.mlp.c_fc.weight"].T)
    assert torch.equal(found["transformer.wte.weight"], exact["transformer.wte.weight"])
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "floats")


def test_inputs_of_its_matrices_are_rounded_too() -> None:
    layer = transformers.pytorch_utils.Conv1D(3, 2)
    x = torch.tensor([[0.6, -1.4]])
    with torch.no_grad(), rounded([(layer.weight, Inputs(None, "INT8", torch.tensor(1.0)))]):
        found = layer(x)
    with torch.no_grad():
        assert torch.equal(found, layer(torch.tensor([[1.0, -1.0]])))
        assert not torch.equal(found, layer(x))
