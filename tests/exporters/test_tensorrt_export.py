"""Engines of every family, built here by TensorRT-RTX, which needs no GPU to build; running one does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'llmx[tensorrt-rtx]'")

from family_cases import CASES, Case, save  # noqa: E402

from llmx.errors import UnsupportedError, UsageError  # noqa: E402
from llmx.exporters import tensorrt, tensorrt_target  # noqa: E402
from llmx.exporters.quantization import Wishes, quantization  # noqa: E402
from llmx.exporters.target import Asked  # noqa: E402
from llmx.exporters.tensorrt_build import Installed, installed  # noqa: E402
from llmx.exporters.tensorrt_target import TensorRtFormat, TensorRtTarget  # noqa: E402
from llmx.formats.tensorrt import check_engine, read_config  # noqa: E402
from llmx.models.model import open_model  # noqa: E402
from llmx.quant.recipe import Recipe  # noqa: E402
from llmx.quant.recipe_reader import from_data  # noqa: E402

FORMAT = TensorRtFormat()
FOUND = installed("tensorrt_rtx")
# Wide enough for a matrix to outweigh what every engine has.
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "head_dim": 64, "num_attention_heads": 8}
ROPE3 = CASES["llama, llama3 rope"].changes["rope_parameters"]
FAMILIES: dict[str, Case] = {
    "llama": Case("Llama", WIDE),
    "llama, llama3 rope": Case("Llama", {**WIDE, "rope_parameters": ROPE3}),
    "mistral": Case("Mistral", {**WIDE, "sliding_window": 11}),
    "qwen2": Case("Qwen2", WIDE),
    "qwen3": Case("Qwen3", WIDE),
    "qwen3_moe": Case("Qwen3Moe", {**CASES["qwen3_moe"].changes, **WIDE, "moe_intermediate_size": 256}),
    "mixtral": Case("Mixtral", {**WIDE, "num_experts_per_tok": 2, "num_local_experts": 3, "intermediate_size": 512}),
    "gemma3": Case("Gemma3Text", {**CASES["gemma3"].changes, **WIDE, "num_hidden_layers": 1}),
    "phi3": Case("Phi3", {**WIDE, "sliding_window": None}),
    "gpt2": Case("GPT2", {**CASES["gpt2"].changes, "n_embd": 512, "n_layer": 1, "n_head": 8}),
}
TYPES = ("F16", "W4A16", "W8A16", "FP8")
# The kernels are in an engine as their source text, of about a megabyte a layer whatever the weights are.
TEXT = re.compile(rb"[\t\n\r -~]{24,}")


@pytest.fixture(autouse=True)
def looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_target, "installed", lambda package: FOUND)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(family): the folder of a random one, saved once."""
    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoint")
            save(FAMILIES[family], made[family])
        return made[family]

    return run


def planned(folder: Path, type_name: str, recipe: dict[str, Any] | None = None, **asked: Any) -> TensorRtTarget:
    told = {"name": "test", "type": type_name, "method": "rtn", "effort": "fast", **(recipe or {})}
    made: Recipe = from_data(told, where="test")
    model, draft = open_model(folder), FORMAT.draft(made, Asked(**asked))
    decided = quantization(model, Wishes(), made, draft.base, 1, FORMAT.types)
    return draft.planned(model, decided, 1)


def written(target: TensorRtTarget, folder: Path) -> dict[str, Any]:
    """Everything written into a folder; what the builder told."""
    folder.mkdir()
    files = target.targets(folder)
    tensors = target.write(files, None)
    assert [file.name for file in files] == sorted(
        (p.name for p in folder.iterdir()), key=[f.name for f in files].index
    )
    assert all(tensor.file is None and tensor.offset is None for tensor in tensors)
    return json.loads((folder / "build-report.json").read_text())


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_of_every_family_build_and_their_weights_stay_as_small_as_they_were_packed(
    family: str, type_name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    target = planned(checkpoint(family), type_name, max_input=16, max_length=32)
    built = written(target, tmp_path / "made")
    engine = (tmp_path / "made" / "rank0.engine").read_bytes()
    assert built["engine_bytes"] == len(engine)
    text = sum(len(found) for found in TEXT.findall(engine))
    assert len(engine) - text <= 1.15 * built["weights_bytes"]
    assert len(engine) <= 1.5 * target.plan.files[0].nbytes
    config = read_config(tmp_path / "made")
    check_engine(tmp_path / "made", config)
    kinds = {kind for name, kind in config.encodings.items() if name.endswith("up.weight")}
    assert kinds == {tensorrt_target.find_mix(type_name).base}


@pytest.mark.parametrize("type_name", ["F32", "BF16", "W8A8", "W4A16_BF16", "W8A16_BF16", "FP8_BF16"])
def test_the_other_types_build_too(type_name: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    built = written(planned(checkpoint("qwen3"), type_name, max_input=16, max_length=32), tmp_path / "made")
    assert built["version"] == FOUND.version and built["gpu"] is None and built["engine"] is None
    config = read_config(tmp_path / "made")
    assert config.type_name == type_name and config.floats == tensorrt_target.find_mix(type_name).floats
    assert config.compute_capability is None and config.cache == "in place"


def test_the_same_weights_make_the_same_engine_here(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(planned(checkpoint("llama"), "W4A16", max_input=16, max_length=32), tmp_path / name)
    first, second = ((tmp_path / name / "rank0.engine").read_bytes() for name in ("one", "two"))
    assert first == second


def test_the_sizes_asked_for_are_those_of_the_engine(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    target = planned(checkpoint("llama"), "F16", max_batch=3, max_input=8, max_length=24)
    written(target, tmp_path / "made")
    config = read_config(tmp_path / "made")
    assert (config.max_batch, config.max_input, config.max_length) == (3, 8, 24)
    [profile] = config.profiles
    assert (profile.batch, profile.positions, profile.capacity) == ((1, 1, 3), (1, 1, 8), (24, 24, 24))
    assert "3 sequences, 8 positions at once, 24 in all" in " ".join(target.plan.notes)


def test_two_profiles_are_one_for_prompts_and_one_for_tokens(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    written(planned(checkpoint("llama"), "F16", max_input=8, max_length=24, profiles=2), tmp_path / "made")
    config = read_config(tmp_path / "made")
    assert {profile.name: profile.positions for profile in config.profiles} == {
        "prefill": (1, 4, 8),
        "decode": (1, 1, 1),
    }


def test_without_sizes_the_engine_takes_the_models_context(checkpoint: Callable[[str], Path]) -> None:
    limits = planned(checkpoint("llama"), "F16").export.options.limits
    assert (limits.batch, limits.input, limits.length) == (1, 64, 64)


def test_a_longer_engine_than_the_models_context_is_told_and_refused_where_positions_are_learned(
    checkpoint: Callable[[str], Path],
) -> None:
    assert "made for 64 positions" in " ".join(planned(checkpoint("llama"), "F16", max_length=65).plan.notes)
    with pytest.raises(UsageError, match="the model has learned 128 positions"):
        planned(checkpoint("gpt2"), "F16", max_length=129)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_batch": 0}, "--max-batch is 0, and the least is 1"),
        ({"max_input": 65}, "--max-input 65 does not fit a cache of --max-length 64"),
        ({"max_length": -1}, "--max-length is -1"),
        ({"optimization_level": 6}, "--optimization-level is one of 0, 1, 2, 3, 4, 5"),
        ({"profiles": 3}, "--profiles is 1, for all lengths, or 2"),
        ({"portable": True}, "every engine of tensorrt_rtx .* is portable"),
        ({"timing_cache": Path("timings")}, "times nothing while it builds"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_weight_is_read(
    asked: dict[str, Any], words: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match=words):
        planned(checkpoint("llama"), "F16", **asked)


def test_rows_that_no_group_divides_stay_in_floats_and_smaller_groups_are_taken_before(tmp_path: Path) -> None:
    save(Case("Llama", {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}), tmp_path / "model")
    target = planned(tmp_path / "model", "W4A16")
    types = target.export.graph.options.types
    assert types["layers.0.q.weight"] == "int4-g64-pos" and types["layers.0.down.weight"] == "F16"
    assert any(step.role == "down" and step.wanted == "int4-g128-pos" for step in target.plan.fall_backs)
    assert "layers.0.down.weight" not in target.types_to_solve()
    rule = {"roles": ["down"], "type": "int4-g32-pos"}
    with pytest.raises(UnsupportedError, match=r"layers\.0\.down\.weight: rows of 48 weights in groups of 32"):
        planned(tmp_path / "model", "W4A16", {"rules": [rule]})


def test_rules_give_single_matrices_other_types_but_no_other_floats(checkpoint: Callable[[str], Path]) -> None:
    rules = [{"roles": ["down"], "type": "int8-channel-pos-float32"}, {"roles": ["v"], "type": "F16"}]
    types = planned(checkpoint("llama"), "W4A16", {"rules": rules}).export.graph.options.types
    assert (types["layers.0.down.weight"], types["layers.0.v.weight"]) == ("int8-channel-pos-float32", "F16")
    with pytest.raises(UnsupportedError, match="has one float type, F16"):
        planned(checkpoint("llama"), "W4A16", {"rules": [{"roles": ["v"], "type": "BF16"}]})


def test_recipes_of_serving_engines_name_the_mixes() -> None:
    named = {"int4-g128-sym": None, "int8-channel-sym": "smoothquant", "fp8-tensor-float32": None}
    assert [tensorrt_target.find_mix(*item).name for item in named.items()] == ["W4A16", "W8A8", "FP8"]
    assert tensorrt_target.find_mix("int8-channel-sym").name == "W8A16"
    with pytest.raises(UnsupportedError, match=r"Q4_K_M is no type of TensorRT engines"):
        tensorrt_target.find_mix("Q4_K_M")


def test_a_build_that_fails_leaves_no_graph_and_tells_the_builders_own_words(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    target = planned(checkpoint("llama"), "F16", max_input=16, max_length=32)
    refit = replace(target.export, options=replace(target.export.options, refit=True))  # which needs a GPU
    folder = tmp_path / "made"
    folder.mkdir()
    with pytest.raises(UnsupportedError, match=r"(?s)cannot build this graph.*CUDA"):
        tensorrt.write(refit, target.targets(folder))
    assert [path.name for path in folder.iterdir() if path.name != "rank0.engine"] == []


def test_types_of_values_are_read_from_the_graph_for_builders_that_would_choose_them(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from llmx.exporters import onnx
    from llmx.exporters.onnx import OnnxOptions

    graph = onnx.prepare(open_model(checkpoint("llama")), OnnxOptions("F16", "plain", capacity=32))
    files = [tmp_path / file.name for file in graph.plan.files]
    onnx.write(graph, files)
    types = tensorrt.value_types(files[0])
    assert types["logits"] == "F32" and set(types.values()) == {"F32", "F16"}


def test_inputs_of_down_stay_in_floats_where_rounding_them_to_int8_costs_the_most(
    checkpoint: Callable[[str], Path],
) -> None:
    rounding = planned(checkpoint("llama"), "W8A8").static_inputs()
    assert rounding["layers.0.down.weight"] == "float" and rounding["layers.0.up.weight"] == "int8"
    assert set(planned(checkpoint("llama"), "FP8").static_inputs().values()) == {"fp8"}
    assert planned(checkpoint("llama"), "W8A16").static_inputs() == {}


@pytest.mark.parametrize(
    ("type_name", "flags"),
    [
        ("F32", ("OBEY_PRECISION_CONSTRAINTS",)),
        ("F16", ("OBEY_PRECISION_CONSTRAINTS", "FP16")),
        ("W8A16", ("OBEY_PRECISION_CONSTRAINTS", "FP16")),
        ("W8A8", ("OBEY_PRECISION_CONSTRAINTS", "FP16", "INT8")),
    ],
)
def test_a_weakly_typed_builder_is_allowed_the_types_of_its_graph_and_no_others(
    type_name: str, flags: tuple[str, ...], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Installed("tensorrt", "8.6.0", "NVIDIA H200", (9, 0), "3.10.13")
    monkeypatch.setattr(tensorrt_target, "installed", lambda package: old)
    export = planned(checkpoint("llama"), type_name).export
    assert tensorrt._flags(export) == flags
    assert export.cache == "two buffers" and len(export.profiles) == 2
    assert {bounds.capacity for bounds in export.profiles} == {(64, 64, 64)}
    [single] = planned(checkpoint("llama"), type_name, max_input=1).export.profiles
    assert single.positions == (1, 1, 1)
