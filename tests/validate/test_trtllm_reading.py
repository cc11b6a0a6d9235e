"""TensorRT-LLM checkpoints are read as what their numbers stand for, by whoever they were written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from modelopt_folders import Layout, is_linear, make
from safetensors.torch import load_file, save_file

from llmx.errors import IntegrityError
from llmx.models.model import open_model
from llmx.validate.kinds import find_kind
from llmx.validate.trtllm_kind import KIND
from llmx.validate.trtllm_opening import mapped, open_trtllm

LAYOUTS = {
    "4 bits": Layout("W4A16_AWQ", group=64, factors=True),
    "8 bits": Layout("W8A16"),
    "8 bits and inputs": Layout("W8A8_SQ_PER_CHANNEL", step=0.05, factors=True),
    "FP8": Layout("FP8", step=0.03, cache="FP8"),
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoint_of) -> Made:
    """made(name of a layout): a sound folder of tiny-qwen3, made once, by torch."""
    root = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else make(checkpoint_of("tiny-qwen3"), path, LAYOUTS[name])

    return folder


def decoded_by_torch(folder: Path, name: str) -> np.ndarray:
    """A weight from its stored parts, as the layout's description has it."""
    stored = load_file(folder / "model.safetensors")
    weight, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
    if weight.dtype == torch.uint8:
        low, high = weight & 15, weight >> 4
        codes = torch.stack([low, high], 1).reshape(-1, weight.shape[1]).to(torch.int16)
        codes = torch.where(codes > 7, codes - 16, codes)
        return (codes * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)).float().numpy()
    return (weight.float() * (scale[:, None] if scale.ndim else scale)).numpy()


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_decoded_as_the_layout_says(name, made, checkpoint_of):
    folder, model = made(name), open_model(checkpoint_of("tiny-qwen3"))
    artifact = mapped(open_trtllm(folder), model.architecture)
    for canonical, module in (("layers.1.q", "self_attn.q_proj"), ("layers.0.down", "mlp.down_proj")):
        tensor = artifact.tensors[f"{canonical}.weight"]
        found = KIND.decoded(artifact, f"{canonical}.weight", 0, tensor.count)
        layer = canonical.split(".")[1]
        np.testing.assert_array_equal(found, decoded_by_torch(folder, f"model.layers.{layer}.{module}"))


def test_odd_rows_of_packed_bytes_are_read_alone(made, checkpoint_of):
    artifact = mapped(open_trtllm(made("4 bits")), open_model(checkpoint_of("tiny-qwen3")).architecture)
    whole = KIND.decoded(artifact, "layers.0.k.weight", 0, 8)
    for start, stop in ((1, 2), (3, 6), (2, 7), (7, 8)):
        np.testing.assert_array_equal(KIND.decoded(artifact, "layers.0.k.weight", start, stop), whole[start:stop])


def test_a_folder_and_its_configuration_are_recognised_and_a_checkpoint_is_not(made, checkpoint_of):
    folder = made("FP8")
    assert find_kind(folder).name == find_kind(folder / "config.json").name == "trtllm"
    assert not KIND.recognises(checkpoint_of("tiny-qwen3"))


def test_factors_of_inputs_belong_to_the_weights_they_stand_for(made, checkpoint_of, tmp_path):
    folder = Path(shutil.copytree(made("4 bits"), tmp_path / "folder"))
    stored = load_file(folder / "model.safetensors")
    factors = torch.linspace(0.5, 2, 256, dtype=torch.float16)
    stored["model.layers.0.self_attn.o_proj.pre_quant_scale"] = factors
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    artifact = mapped(open_trtllm(folder), open_model(checkpoint_of("tiny-qwen3")).architecture)
    plain = decoded_by_torch(folder, "model.layers.0.self_attn.o_proj")
    found = KIND.decoded(artifact, "layers.0.o.weight", 0, 256)
    np.testing.assert_array_equal(found, plain * factors.float().numpy())


def test_shards_are_read_by_their_index(made, checkpoint_of, tmp_path):
    folder = Path(shutil.copytree(made("8 bits"), tmp_path / "folder"))
    stored = load_file(folder / "model.safetensors")
    names = sorted(stored)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: stored[name] for name in held}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, cut = open_trtllm(made("8 bits")), open_trtllm(folder)
    assert {name: kept.shape for name, kept in whole.tensors.items()} == {
        name: kept.shape for name, kept in cut.tensors.items()
    }
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="index"):
        open_trtllm(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda stored, name: stored.update({f"{name}.weight_scale": torch.ones(3, 3)}), "scales"),
        (lambda stored, name: stored.pop(f"{name}.weight_scale"), "no scale"),
        (lambda stored, name: stored.update({f"{name}.pre_quant_scale": torch.ones(7)}), "factors"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change, words, made, tmp_path):
    folder = Path(shutil.copytree(made("4 bits"), tmp_path / "folder"))
    stored = load_file(folder / "model.safetensors")
    change(stored, "model.layers.0.mlp.up_proj")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError) as error:
        open_trtllm(folder)
    assert words in str(error.value)
    assert "up_proj" in str(error.value)


def test_what_is_told_of_a_folder_is_what_it_holds(made):
    told = KIND.described(open_trtllm(made("FP8")))
    assert (told["algorithm"], told["cache"], told["layout"]) == ("FP8", "FP8", "hf")
    kept = {tensor["name"]: tensor["type"] for tensor in told["tensors"]}
    assert {type_name for name, type_name in kept.items() if is_linear(name)} == {"fp8-tensor-float32"}
    assert len(told["cache_scales"]) == 8
