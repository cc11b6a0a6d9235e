"""Every family and rope scaling, written to F32 and run by stock llama.cpp: the same logits as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stock_types import random_checkpoint

from llmx import api
from llmx.errors import UnsupportedError
from llmx.exporters.gguf_families import FAMILIES, gguf_family
from llmx.formats.gguf import read_gguf
from llmx.models.families import FAMILIES as DESCRIBED
from llmx.models.families import describe
from llmx.validate.case import Settings
from llmx.validate.report import Report
from llmx.validate.suite import validate

ROOT = Path(__file__).parents[2]


SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1.0 + 0.02 * i for i in range(16)], "long_factor": [1.0 + 0.5 * i for i in range(16)]}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}
PARTIAL = {"short_factor": FACTORS["short_factor"][:12], "long_factor": FACTORS["long_factor"][:12]}
MOE = {"num_experts_per_tok": 2}
GEMMA = {"sliding_window": 64, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"}
GPT2 = {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 512, "activation_function": "gelu_new"}
TOKENS = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}

CASES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "llama-biases": SMALL | {"attention_bias": True, "mlp_bias": True},
    "llama-linear": SMALL | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": SMALL | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
    "llama-yarn": SMALL | {"rope_scaling": YARN},
    "llama-yarn-own-factors": SMALL
    | {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    "llama-yarn-own-attention": SMALL | {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama-yarn-mscale": SMALL | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "llama-longrope": SMALL | {"rope_parameters": LONG | {"factor": 8.0, "rope_theta": 10000.0}},
    "llama-dynamic": SMALL | {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "mistral": SMALL | {"model_type": "mistral", "sliding_window": None},
    "mixtral": SMALL | MOE | {"model_type": "mixtral", "num_local_experts": 4},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen2-yarn": SMALL | {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen3-tied": SMALL | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3moe": SMALL
    | MOE
    | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 96, "norm_topk_prob": True},
    "gemma3": SMALL | GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7, "tie_word_embeddings": True},
    "gemma3-own-pattern-linear": SMALL
    | GEMMA
    | {"model_type": "gemma3_text", "tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    | {"layer_types": ["full_attention", "sliding_attention"]},
    "phi3-longrope": SMALL
    | {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope", **FACTORS}},
    "phi3-partial": SMALL
    | {"model_type": "phi3", "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
    | {"rope_scaling": {"type": "longrope", **PARTIAL}},
    "gpt2": GPT2 | TOKENS | {"model_type": "gpt2", "n_inner": 192},
}


def conversion(config: dict[str, Any], folder: Path) -> Report:
    random_checkpoint(folder / "model", config)
    request = api.ExportRequest(str(folder / "model"), type_name="F32", output=folder / "a.gguf", validate=False)
    artifact = api.export(request).artifact
    return validate(artifact, folder / "model", settings=Settings(positions=256))


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    report = conversion(CASES[name], tmp_path)
    assert {check.name for check in report.checks if check.passed} > {"conversion.kl", "conversion.decode"}
    assert report.passed, [(check.name, check.value, check.detail) for check in report.failed + report.missing]


@pytest.mark.parametrize("name", ["llama-yarn", "llama-longrope", "llama-linear"])
def test_a_dropped_scaling_would_have_been_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.exporters import gguf_metadata

    monkeypatch.setitem(
        gguf_metadata._SCALING, CASES[name].get("rope_scaling", LONG).get("type", name[6:]), lambda _: {}
    )
    report = conversion(CASES[name], tmp_path)
    assert not report.passed


def test_every_described_family_is_written_and_tested() -> None:
    assert set(FAMILIES) == set(DESCRIBED)
    assert {config["model_type"] for config in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CASES["qwen2"] | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}}, "rope scaling 'llama3'"),
        (CASES["qwen2"] | {"rope_scaling": YARN | {"beta_fast": 16.0}}, "beta_fast"),
        (CASES["gpt2"] | {"activation_function": "gelu"}, "activation gelu"),
        (CASES["gemma3"] | {"query_pre_attn_scalar": 99}, "attention scale"),
        (CASES["qwen3moe"] | {"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_the_runtime_would_compute_otherwise_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        gguf_family(describe(config))


def test_what_the_runtime_leaves_out_is_said_in_the_plan(tmp_path: Path) -> None:
    config = SMALL | {"model_type": "mistral", "sliding_window": 64}
    random_checkpoint(tmp_path / "model", config)
    planned = api.plan(api.ExportRequest(str(tmp_path / "model"))).exporter
    assert any("no sliding window: beyond 64 tokens" in note for note in planned.plan.notes)
    assert json.dumps(planned.plan.to_json())


def test_longrope_carries_both_tables_and_its_kind(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "model", CASES["llama-longrope"])
    request = api.ExportRequest(str(tmp_path / "model"), type_name="Q8_0", output=tmp_path / "a.gguf", validate=False)
    file = read_gguf(api.export(request).artifact)
    assert file.metadata["llama.rope.scaling.type"] == "longrope"
    assert {"rope_factors_long.weight", "rope_factors_short.weight"} <= file.tensors.keys()
