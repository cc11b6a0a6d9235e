"""TensorRT-LLM checkpoints of every family, read by a reader that knows the layouts' description alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_cases import Case, save  # noqa: E402
from trtllm_reader import Ranks, load, read_hf  # noqa: E402

from llmx.errors import IntegrityError, UnsupportedError, UsageError  # noqa: E402
from llmx.exporters.encoding import ENCODINGS  # noqa: E402
from llmx.exporters.shared_scales import SharedScales  # noqa: E402
from llmx.exporters.trtllm import TrtllmExport, TrtllmOptions, check_weights, prepare, write  # noqa: E402
from llmx.exporters.trtllm_ranks import Mesh  # noqa: E402
from llmx.exporters.trtllm_types import MIXES, find_mix, planned_types  # noqa: E402
from llmx.formats.safetensors import open_safetensors  # noqa: E402
from llmx.models.architecture import TensorSpec  # noqa: E402
from llmx.models.model import Model, open_model  # noqa: E402

WIDE = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_key_value_heads": 2}
NO_HEAD_DIM = {key: value for key, value in WIDE.items() if key != "head_dim"}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 3}
FAMILIES: Mapping[str, Case] = {
    "llama": Case("Llama", WIDE),
    "llama, tied": Case("Llama", {**WIDE, "tie_word_embeddings": True}),
    "llama, all biases": Case("Llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama, one head of keys": Case("Llama", {**WIDE, "num_key_value_heads": 1}),
    "mistral": Case("Mistral", {**WIDE, "sliding_window": 11}),
    "mixtral": Case("Mixtral", {**WIDE, **EXPERTS}),
    "qwen2": Case("Qwen2", NO_HEAD_DIM),
    "qwen3": Case("Qwen3", WIDE),
    "qwen3_moe": Case("Qwen3Moe", {**WIDE, **EXPERTS, "moe_intermediate_size": 256, "norm_topk_prob": True}),
    "gemma3": Case(
        "Gemma3Text",
        {**WIDE, "num_hidden_layers": 3, "sliding_window": 9, "sliding_window_pattern": 3, "tie_word_embeddings": True},
    ),
    "phi3": Case("Phi3", NO_HEAD_DIM),
    "gpt2": Case("GPT2", {"vocab_size": 97, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
MESHES = (Mesh(1, 1), Mesh(2, 1), Mesh(4, 1), Mesh(1, 2), Mesh(2, 2))
# What TensorRT-LLM calls the weights of a layer, by our roles.
ROLES = {
    "q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.dense",
    "gate": "mlp.fc", "up": "mlp.gate", "down": "mlp.proj", "router": "mlp.router",
    "expert_gate": "mlp.fc_gate", "expert_up": "mlp.fc_up", "expert_down": "mlp.proj",
    "attention_norm": "input_layernorm", "ffn_norm": "post_layernorm",
    "q_norm": "attention.q_layernorm", "k_norm": "attention.k_layernorm",
}  # fmt: skip
OTHER_ROLES: Mapping[str, Mapping[str, str]] = {
    "gemma3_text": {
        "attention_post_norm": "post_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    },
    "phi3": {"gate": "mlp.fc_gate", "up": "mlp.fc_up"},
    "gpt2": {"up": "mlp.fc"},
}
OUTSIDE = {
    "embedding": "transformer.vocab_embedding", "position_embedding": "transformer.position_embedding",
    "final_norm": "transformer.ln_f", "head": "lm_head",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """checkpoint(name): a random model of that family; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def run(name: str) -> Model:
        if not (folder / name).is_dir():
            save(FAMILIES[name], folder / name)
        return open_model(folder / name)

    return run


def options_of(model: Model, mix_name: str, **changed: Any) -> TrtllmOptions:
    mix = find_mix(mix_name)
    types = planned_types(model.architecture, mix, changed.pop("ruled", {}))
    inputs = {name: 0.25 + number for number, name in enumerate(types.encodings)} if mix.inputs else {}
    return TrtllmOptions(mix, types, inputs=inputs, **changed)


def exported(model: Model, options: TrtllmOptions, folder: Path, **given: Any) -> TrtllmExport:
    export = prepare(model, options)
    check_weights(export)
    folder.mkdir(parents=True)
    write(export, [folder / file.name for file in export.plan.files], **given)
    return export


def expected(model: Model, options: TrtllmOptions) -> dict[str, np.ndarray]:
    """Canonical name -> f32 in the canonical shape: what every weight's bytes stand for."""
    types = options.types.encodings
    shared, made = SharedScales(model, types), {}
    for weight in model.weights():
        spec = weight.spec
        if spec.name not in types:
            made[spec.name] = (
                torch.from_numpy(weight.read()).to(HALVES[options.mix.floats]).float().numpy().reshape(spec.shape)
            )
            continue
        experts = range(spec.shape[0]) if len(spec.shape) == 3 else (None,)
        parts = []
        for expert in experts:
            first, count = spec.shape[-2] * (expert or 0), spec.shape[-2]
            kept = shared.bound(spec, expert)
            parts.append(kept.decode(kept.encode(weight.read(first, first + count)), weight.cols))
        made[spec.name] = np.concatenate(parts).reshape(spec.shape)
    return made


def hf_names(spec: TensorSpec, values: np.ndarray) -> dict[str, np.ndarray]:
    names = spec.source.names
    return {names[0]: values} if len(names) == 1 else dict(zip(names, values, strict=True))


@pytest.mark.parametrize("mix", [name for name in MIXES if not name.endswith("_BF16") or name == "W4A16_BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_under_the_names_of_hugging_face_is_what_its_encoding_stands_for(
    family: str, mix: str, checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    model = checkpoint(family)
    options = options_of(model, mix)
    exported(model, options, tmp_path / "out")
    found = read_hf(tmp_path / "out")
    wanted: dict[str, list[np.ndarray]] = {}
    exact = expected(model, options)
    for spec in model.architecture.tensors:
        for name, values in hf_names(spec, exact[spec.name]).items():
            turned = spec.source.transpose and spec.name not in options.types.encodings
            wanted.setdefault(name, []).append(values.T if turned else values)
    assert found.keys() == wanted.keys()
    for name, parts in wanted.items():
        assert np.array_equal(found[name].numpy(), np.concatenate(parts, axis=_axis(model, name, options))), name


def _axis(model: Model, name: str, options: TrtllmOptions) -> int:
    """The axis of outputs, along which matrices of one tensor follow each other."""
    spec = next(spec for spec in model.architecture.tensors if name in spec.source.names)
    turned = spec.source.transpose and len(spec.shape) > 1 and spec.name not in options.types.encodings
    return 1 if turned else 0


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"tp{mesh.tp}-pp{mesh.pp}")
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_put_together_are_the_whole_model(
    family: str, mesh: Mesh, checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    if family == "qwen3_moe" and mesh.tp == 4:
        mix = "FP8"
    else:
        mix = {1: "W4A16_AWQ", 2: "F16" if mesh.pp == 1 else "W4A16", 4: "W4A16_AWQ"}[mesh.tp]
    _compare_ranks(checkpoint(family), options_of(checkpoint(family), mix, layout="ranks", mesh=mesh), tmp_path / "out")


@pytest.mark.parametrize("mix", ["FP8", "FP8_BF16", "W8A8_SQ", "BF16", "F16", "W4A16", "W4A16_BF16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2", "mixtral"])
def test_ranks_of_every_type_put_together_are_the_whole_model(
    family: str, mix: str, checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    mesh = Mesh(2, 1)
    _compare_ranks(checkpoint(family), options_of(checkpoint(family), mix, layout="ranks", mesh=mesh), tmp_path / "out")


def _compare_ranks(model: Model, options: TrtllmOptions, folder: Path) -> None:
    exported(model, options, folder)
    found, values = Ranks(folder).whole(), expected(model, options)
    names = {**ROLES, **OTHER_ROLES.get(model.architecture.family, {})}
    wanted = {}
    for spec in model.architecture.tensors:
        outside = spec.layer is None
        module = OUTSIDE[spec.role] if outside else f"transformer.layers.{spec.layer}.{names[spec.role]}"
        wanted[f"{module}.{spec.part}"] = _in_ranks(model, spec, values[spec.name], options)
    if model.architecture.tied and options.mesh.ranks > 1:
        wanted["lm_head.weight"] = wanted["transformer.vocab_embedding.weight"]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[name].numpy(), value), name


def _in_ranks(model: Model, spec: TensorSpec, values: np.ndarray, options: TrtllmOptions) -> np.ndarray:
    if spec.role == "router":  # in float32, whatever the others are
        return model.weight(spec.name).read().reshape(spec.shape)
    if "norm" in spec.role and spec.part == "weight" and model.architecture.norm_offset:
        exact = torch.from_numpy(model.weight(spec.name).read()[0] + np.float32(1))
        return exact.to(HALVES[options.mix.floats]).float().numpy()
    return values


def test_ranks_hold_the_same_model_however_it_is_dealt(checkpoint: Callable[[str], Model], tmp_path: Path) -> None:
    """Also where a rank's share of the inputs is a part of a group: the group's scale is told for each part."""
    model = checkpoint("qwen3")
    wholes = []
    for number, mesh in enumerate(MESHES):
        exported(model, options_of(model, "W4A16_AWQ", layout="ranks", mesh=mesh), tmp_path / f"{number}")
        made = Ranks(tmp_path / f"{number}")
        assert made.config["quantization"]["group_size"] == (64 if mesh.tp == 4 else 128)
        wholes.append(made.whole())
    for other in wholes[1:]:
        assert other.keys() == wholes[0].keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in wholes[0].items())


def test_the_configuration_tells_what_the_loaders_ask_for(checkpoint: Callable[[str], Model], tmp_path: Path) -> None:
    model = checkpoint("mixtral")
    exported(model, options_of(model, "W4A16_AWQ", cache="FP8", cache_scales=_caches(model)), tmp_path / "out")
    told = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    excluded = told.pop("exclude_modules")
    assert told == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": "FP8",
        "group_size": 128,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
    assert excluded == ["lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    inline = config["quantization_config"]
    assert inline["quant_method"] == "modelopt"
    assert inline["ignore"] == inline["exclude_modules"] == excluded
    assert {key: inline[key] for key in told} == told
    assert config["torch_dtype"] == "float16"
    assert config["num_local_experts"] == 3
    assert config["head_dim"] == 64


def _caches(model: Model) -> dict[str, float]:
    return {f"layers.{n}.{part}": n + 1 + (part == "v") / 2 for n in range(model.architecture.layers) for part in "kv"}


@pytest.mark.parametrize(
    ("family", "prefix"), [("qwen3", "model.layers.{}.self_attn"), ("gpt2", "transformer.h.{}.attn")]
)
def test_scales_of_the_cache_stand_where_loaders_look(
    family: str, prefix: str, checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    model = checkpoint(family)
    for layout in ("hf", "ranks"):
        options = options_of(model, "W4A16", layout=layout, cache="INT8", cache_scales=_caches(model))
        exported(model, options, tmp_path / layout)
    hf, ranks = load(tmp_path / "hf/model.safetensors"), load(tmp_path / "ranks/rank0.safetensors")
    for layer in range(2):
        assert hf[f"{prefix.format(layer)}.k_proj.k_scale"].item() == layer + 1
        assert hf[f"{prefix.format(layer)}.v_proj.v_scale"].item() == layer + 1.5
        assert ranks[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"].tolist() == [layer + 1.5]


def test_inputs_of_a_product_have_one_scale_and_the_shape_that_each_layout_gives_it(
    checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    model = checkpoint("mixtral")
    for layout in ("hf", "ranks"):
        exported(model, options_of(model, "FP8", layout=layout), tmp_path / layout)
    hf, ranks = load(tmp_path / "hf/model.safetensors"), load(tmp_path / "ranks/rank0.safetensors")
    first = "model.layers.0.self_attn"
    assert hf[f"{first}.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert {hf[f"{first}.{name}_proj.weight_scale"].item() for name in "qkv"} == {
        ranks["transformer.layers.0.attention.qkv.weights_scaling_factor"].item()
    }
    assert hf[f"{first}.q_proj.input_scale"].shape == hf[f"{first}.q_proj.weight_scale"].shape == ()
    assert ranks["transformer.layers.0.attention.qkv.activation_scaling_factor"].shape == (1,)
    assert ranks["transformer.layers.0.mlp.fc.weights_scaling_factor"].shape == (3, 1)
    assert ranks["transformer.layers.0.mlp.router.weight"].dtype == torch.float32


def test_files_keep_to_a_size_and_an_index_leads_to_every_tensor(
    checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    model = checkpoint("qwen2")
    whole = exported(model, options_of(model, "W4A16"), tmp_path / "whole")
    parts = exported(model, options_of(model, "W4A16", split_max_bytes=200_000), tmp_path / "parts")
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(t.nbytes for t in open_safetensors(path).tensors.values()) <= 200_000 for path in shards)
    told, found = read_hf(tmp_path / "parts"), read_hf(tmp_path / "whole")
    assert all(torch.equal(told[name], tensor) for name, tensor in found.items()) and told.keys() == found.keys()
    assert [one.name for one in whole.contents.tensors] == [one.name for one in parts.contents.tensors]


@pytest.mark.parametrize("mix", ["W4A16", "FP8"])
def test_the_plan_tells_every_size_and_the_bytes_do_not_depend_on_threads(
    mix: str, checkpoint: Callable[[str], Model], tmp_path: Path
) -> None:
    model = checkpoint("mixtral")
    digests = []
    for threads in (1, 3):
        folder = tmp_path / f"{threads}"
        export = exported(model, options_of(model, mix, threads=threads, layout="ranks", mesh=Mesh(2, 2)), folder)
        assert {file.name: file.nbytes for file in export.plan.files} == {
            p.name: p.stat().st_size for p in folder.iterdir()
        }
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
    assert digests[0] == digests[1]
    weights = sum(np.prod(spec.shape) for spec in model.architecture.tensors)
    assert export.plan.parameters == weights + sum(
        step.parameters for step in export.plan.steps if step.role is None
    )  # what ranks have twice counts once


def test_digests_are_of_the_bytes_at_their_offsets(checkpoint: Callable[[str], Model], tmp_path: Path) -> None:
    model = checkpoint("llama, tied")
    export = prepare(model, options_of(model, "W4A16", layout="ranks", mesh=Mesh(2, 1)))
    (tmp_path / "out").mkdir()
    digests = write(export, [tmp_path / "out" / file.name for file in export.plan.files])
    assert len(set(export.labels())) == len(digests)
    for one, offset, digest in zip(export.contents.tensors, export.offsets(), digests, strict=True):
        data = (tmp_path / f"out/rank{one.file}.safetensors").read_bytes()[offset : offset + one.nbytes]
        assert hashlib.sha256(data).hexdigest() == digest
        assert open_safetensors(tmp_path / f"out/rank{one.file}.safetensors").tensors[one.name].offset == offset


def test_solved_rows_are_written_instead_of_rounded_ones(checkpoint: Callable[[str], Model], tmp_path: Path) -> None:
    model = checkpoint("qwen3")
    options = options_of(model, "W4A16")
    name = "layers.1.down.weight"
    kept, weight = ENCODINGS[options.types.encodings[name]], model.weight(name)
    rows = kept.encode(weight.read() * 2)
    exported(model, options, tmp_path / "out", rows={name: rows})
    found = read_hf(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"].numpy()
    assert np.array_equal(found, kept.decode(rows, weight.cols))
    with pytest.raises(UsageError, match="not those of the plan"):
        exported(model, options, tmp_path / "other", rows={name: rows[:-1]})


def test_rows_that_groups_of_128_do_not_divide_get_smaller_groups_or_stay_floats(tmp_path: Path) -> None:
    save(Case("Llama", {"hidden_size": 192, "intermediate_size": 200, "num_attention_heads": 4}), tmp_path / "model")
    model = open_model(tmp_path / "model")
    options = options_of(model, "W4A16")
    assert options.types.group == 64
    assert "layers.0.down.weight" not in options.types.encodings
    export = exported(model, options, tmp_path / "out")
    told = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert told["exclude_modules"] == ["lm_head", *(f"model.layers.{n}.mlp.down_proj" for n in range(2))]
    assert any(step.wanted == "int4-g128-pos" and step.type_name == "F16" for step in export.plan.fall_backs)
    _compare_ranks(model, replace(options, layout="ranks"), tmp_path / "ranks")
    config = json.loads((tmp_path / "ranks/config.json").read_text())
    assert "*.mlp.proj" in config["quantization"]["exclude_modules"]


def test_groups_that_no_kernel_takes_are_told(tmp_path: Path) -> None:
    save(Case("Llama", {"hidden_size": 32, "intermediate_size": 96}), tmp_path / "model")
    model = open_model(tmp_path / "model")
    export = prepare(model, options_of(model, "W4A16"))
    assert export.options.types.group == 32
    assert any("kernels" in note for note in export.plan.notes)


def test_a_model_without_any_group_is_refused(tmp_path: Path) -> None:
    save(Case("Llama", {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4}), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="no matrix of this model has rows"):
        options_of(open_model(tmp_path / "model"), "W4A16")


@pytest.mark.parametrize(
    ("family", "mesh", "told"),
    [
        ("qwen3", Mesh(3, 1), "does not divide 4 attention heads"),
        ("qwen3", Mesh(1, 3), "--pp 3 is more than 2 layers"),
        ("qwen3", Mesh(8, 1), "does not divide 4 attention heads"),
        ("qwen3", Mesh(0, 1), "whole numbers from 1"),
        ("qwen3_moe", Mesh(16, 1), "does not divide 4 attention heads"),
    ],
)
def test_a_mesh_that_the_model_does_not_fit_is_refused_before_anything_is_read(
    family: str, mesh: Mesh, told: str, checkpoint: Callable[[str], Model]
) -> None:
    model = checkpoint(family)
    with pytest.raises(UsageError, match=told):
        prepare(model, options_of(model, "F16", layout="ranks", mesh=mesh))


def test_heads_of_keys_that_neither_divide_nor_are_divided_are_refused(tmp_path: Path) -> None:
    shape = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 8}
    save(Case("Llama", shape), tmp_path / "model")
    model = open_model(tmp_path / "model")
    with pytest.raises(UsageError, match="neither divides 3 key-value heads"):
        prepare(model, options_of(model, "F16", layout="ranks", mesh=Mesh(2, 1)))


def test_a_split_inside_the_smallest_group_is_refused(tmp_path: Path) -> None:
    save(Case("Llama", {"hidden_size": 64, "intermediate_size": 96}), tmp_path / "model")
    model = open_model(tmp_path / "model")
    with pytest.raises(UsageError, match="cuts matrices inside groups"):
        prepare(model, options_of(model, "W4A16", layout="ranks", mesh=Mesh(2, 1)))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (Case("Llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4, "original_max_position_embeddings": 24}}), "LongRoPE"),
        (Case("Qwen3", {"attention_bias": True}), "a bias in attention.dense"),
        (Case("Gemma3Text", {"head_dim": 8, "num_hidden_layers": 3, "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}), "no pattern"),
    ],
    ids=["longrope", "bias", "layers"],
)  # fmt: skip
def test_what_the_engines_model_does_not_compute_is_refused_with_the_layout_that_works(
    case: Case, told: str, tmp_path: Path
) -> None:
    save(case, tmp_path / "model")
    model = open_model(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=told) as refused:
        prepare(model, options_of(model, "F16", layout="ranks"))
    assert refused.value.fix == "--layout hf"
    prepare(model, options_of(model, "F16"))


def test_values_that_a_half_cannot_hold_are_named_before_anything_is_written(tmp_path: Path) -> None:
    made = save(Case("Llama", WIDE), tmp_path / "model")
    with torch.no_grad():
        made.model.norm.weight[3] = 1e6
    made.save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model")
    with pytest.raises(IntegrityError, match=r"final_norm.weight: the magnitude 1e\+06 does not fit F16"):
        check_weights(prepare(model, options_of(model, "W4A16")))
    check_weights(prepare(model, options_of(model, "BF16")))


def test_rules_may_leave_matrices_floats_but_not_a_part_of_a_product(checkpoint: Callable[[str], Model]) -> None:
    model = checkpoint("qwen3")
    ruled = {"layers.0.down.weight": "F16"}
    export = prepare(model, options_of(model, "W4A16", ruled=ruled))
    assert export.contents.excluded == ("lm_head", "model.layers.0.mlp.down_proj")
    with pytest.raises(UnsupportedError, match="in all layers or in none"):
        prepare(model, options_of(model, "W4A16", ruled=ruled, layout="ranks"))
    with pytest.raises(UnsupportedError, match="multiplies these matrices as one"):
        options_of(model, "W4A16", ruled={"layers.0.k.weight": "F16"})
    with pytest.raises(UnsupportedError, match="floats alone"):
        options_of(model, "W4A16", ruled={"layers.0.down.weight": "int8-channel-pos"})
