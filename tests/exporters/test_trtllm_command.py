"""`llmx export --format trtllm` from the command's options to the folder, its plan and its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from trtllm_reader import Ranks, load, read_hf  # noqa: E402

from llmx import api  # noqa: E402
from llmx.errors import IntegrityError, UnsupportedError, UsageError  # noqa: E402
from llmx.exporters.manifest import json_schema  # noqa: E402
from llmx.exporters.trtllm_types import MIXES  # noqa: E402

MODEL = Path(__file__).parents[2] / "examples" / "tiny-qwen3"


def request(output: Path | None = None, **said: Any) -> api.ExportRequest:
    given: dict[str, Any] = {"model": str(MODEL), "threads": 1, "validate": False, "effort": "fast", **said}
    return api.ExportRequest(format="trtllm", output=output, **given)


def test_four_bits_are_awq_with_the_scales_folded_into_the_weights(tmp_path: Path, some_text: Path) -> None:
    made = api.export(request(tmp_path / "out", bits=4, calibration=some_text, calibration_tokens=600))
    assert made.artifact == tmp_path / "out/config.json"
    told = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert (told["quant_algo"], told["group_size"]) == ("W4A16_AWQ", 128)
    assert made.plan["scaling"]
    tensors = load(tmp_path / "out/model.safetensors")
    scales = [tensor for name, tensor in tensors.items() if name.endswith("pre_quant_scale")]
    assert len(scales) == 28
    assert all((scale == 1).all() for scale in scales)
    source = load(MODEL / "model.safetensors")
    changed = [
        name for name, tensor in source.items() if "layernorm" in name and not torch.equal(tensor.half(), tensors[name])
    ]
    assert changed  # the norms took the scales
    restored = read_hf(tmp_path / "out")
    assert restored.keys() == source.keys()


def test_fp8_matrices_of_a_product_are_solved_on_one_scale_and_inputs_are_measured(
    tmp_path: Path, some_text: Path
) -> None:
    said: dict[str, Any] = {"type_name": "FP8", "kv_cache": "fp8", "calibration": some_text, "calibration_tokens": 600}
    hf = api.export(request(tmp_path / "hf", **said))
    assert {line["method"] for line in hf.solved} == {"gptq"}
    api.export(request(tmp_path / "ranks", **said, layout="ranks", tp=2, pp=2))
    tensors, ranks = load(tmp_path / "hf/model.safetensors"), Ranks(tmp_path / "ranks")
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for module, names in ((f"{prefix}.self_attn", "qkv"), (f"{prefix}.mlp", ("gate", "up"))):
            for part in ("weight_scale", "input_scale"):
                found = {tensors[f"{module}.{name}_proj.{part}"].item() for name in names}
                assert len(found) == 1 and found.pop() > 0
        assert 0 < tensors[f"{prefix}.self_attn.k_proj.k_scale"].item() < 1
    whole, exact = ranks.whole(), read_hf(tmp_path / "hf")
    assert torch.equal(
        whole["transformer.layers.2.attention.v.weight"], exact["model.layers.2.self_attn.v_proj.weight"]
    )
    assert torch.equal(whole["transformer.layers.3.mlp.proj.weight"], exact["model.layers.3.mlp.down_proj.weight"])
    assert ranks.config["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert ranks.config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}


def test_smoothquant_rounds_inputs_on_measured_scales(tmp_path: Path, some_text: Path) -> None:
    made = api.export(request(tmp_path / "out", type_name="W8A8_SQ", calibration=some_text, calibration_tokens=600))
    assert made.plan["quantization"]["recipe"]["transform"] == "smoothquant"
    told = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert told["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    tensors = load(tmp_path / "out/model.safetensors")
    down = "model.layers.0.mlp.down_proj"
    assert tensors[f"{down}.weight"].dtype == torch.int8
    assert tensors[f"{down}.weight_scale"].shape == (256,)
    assert 0 < tensors[f"{down}.input_scale"].item() < 1


def test_a_cache_in_few_bits_needs_no_quantized_matrix(tmp_path: Path, some_text: Path) -> None:
    api.export(request(tmp_path / "out", bits=16, kv_cache="FP8", calibration=some_text, calibration_tokens=600))
    told = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert told == {"quant_algo": None, "kv_cache_quant_algo": "FP8"}


@pytest.mark.parametrize("layout", ["hf", "ranks"])
def test_the_plan_names_every_file_and_the_manifest_makes_the_same_bytes_again(tmp_path: Path, layout: str) -> None:
    dealt = {} if layout == "hf" else {"tp": 2, "pp": 2}
    asked = request(tmp_path / "out", type_name="W4A16", method="rtn", layout=layout, **dealt)
    planned = api.plan(asked).described()
    made = api.export(asked)
    assert [(file["name"], file["bytes"]) for file in planned["files"]] == [
        (file["name"], file["bytes"]) for file in made.files
    ]
    manifest = json.loads(made.manifest.read_text())
    assert manifest["options"]["layout"] == layout
    assert (manifest["options"]["tp"], manifest["options"]["pp"]) == ((None, None) if layout == "hf" else (2, 2))
    pytest.importorskip("jsonschema").validate(manifest, json_schema())
    again = api.export(
        api.ExportRequest(str(MODEL), output=tmp_path / "again", threads=1, validate=False, from_manifest=made.manifest)
    )
    assert again.files == tuple({**file} for file in made.files)


def test_another_checkpoint_does_not_pass_for_the_one_of_a_manifest(
    tmp_path: Path, solvable: Callable[[str], Path]
) -> None:
    made = api.export(request(tmp_path / "out", type_name="F16"))
    with pytest.raises(IntegrityError, match="not the checkpoint"):
        api.export(
            api.ExportRequest(
                str(solvable("llama")), output=tmp_path / "x", validate=False, from_manifest=made.manifest
            )
        )


def test_an_export_without_a_name_is_called_after_the_model_and_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = api.export(request(type_name="w4a16", method="rtn"))
    assert made.artifact.parent.name.endswith("W4A16-trtllm")
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in made.artifact.parent.iterdir()}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"layout": "engine"}, "there is no layout 'engine'"),
        ({"tp": 2}, "deal a model to ranks"),
        ({"kv_cache": "int4"}, "cannot be kept as 'int4'"),
        ({"layout": "ranks", "split_max_size": "1GB"}, "a rank has one file"),
        ({"type_name": "Q4_K_M"}, "is no type of TensorRT-LLM checkpoints"),
        ({"bits": 3}, "no 3-bit size class"),
        ({"dialect": "ort"}, "has no use for these options"),
        ({"layout": "ranks", "tp": 3}, "cannot be dealt out"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    said: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=told):
        api.export(request(tmp_path / "out", **{"method": "rtn", **said}))
    assert not list(tmp_path.iterdir())


def test_kernel_ordered_weights_are_refused_with_the_layout_that_works(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="one GPU generation") as refused:
        api.export(request(tmp_path / "out", type_name="W8A16", layout="ranks"))
    assert "--layout hf" in (refused.value.fix or "")


def test_every_type_is_a_choice_of_the_command() -> None:
    names = {mix.lower() for mix in MIXES}
    twins = {"w4a16_awq", "w4a16", "fp8", "w8a8_sq"}
    assert names == twins | {f"{name}_bf16" for name in twins} | {"w8a16", "f16", "bf16"}
