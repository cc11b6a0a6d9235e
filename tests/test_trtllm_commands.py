"""Checkpoints for TensorRT-LLM on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done

MODEL = str(Path(__file__).parents[1] / "examples" / "tiny-qwen3")


def test_a_checkpoint_is_dealt_to_ranks(here: Callable[..., Done], tmp_path: Path) -> None:
    out = tmp_path / "out"
    dealt = ("--layout", "ranks", "--tp", "2", "--pp", "2")
    made = here(
        "export", MODEL, "--format", "trtllm", "--type", "w4a16", "--method", "rtn", *dealt, "--no-validate", "-o", out
    )
    assert made.code == 0, made.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert sorted(path.name for path in out.glob("rank*")) == [f"rank{rank}.safetensors" for rank in range(4)]
    refused = here(
        "export", MODEL, "--format", "trtllm", "--bits", "4", "--layout", "ranks", "--tp", "3", "-o", tmp_path / "x"
    )
    assert refused.code == 2
    assert "--tp 3 does not divide 4 attention heads" in refused.stderr


def test_a_cache_in_few_bits_is_planned(here: Callable[..., Done]) -> None:
    pytest.importorskip("torch")
    told = here("plan", MODEL, "--format", "trtllm", "--bits", "16", "--kv-cache", "fp8", "--json")
    assert told.code == 0, told.stderr
    names = [tensor["name"] for tensor in json.loads(told.stdout)["tensors"]]
    assert "model.layers.0.self_attn.k_proj.k_scale" in names
    assert here("plan", MODEL, "--format", "trtllm", "--bits", "16", "--kv-cache", "int3").code == 2
