"""Past the sliding window and past the original context: where they begin, and the faults that only show there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_llama import SMALL_LLAMA
from stock_types import random_checkpoint

from llmx.formats.gguf import read_gguf, u32
from llmx.models.model import open_model
from llmx.validate.case import PAST, Settings, boundaries
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_quality import check_quality

# As the demo checkpoint, with another rope: the original context lies within a chunk.
SCALED = {
    **SMALL_LLAMA,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that claims four times its original context."""
    folder = tmp_path_factory.mktemp("scaled") / "model"
    random_checkpoint(folder, SCALED)
    return folder


def test_boundaries_are_those_within_the_context(checkpoint_of, scaled) -> None:
    assert boundaries(open_model(scaled).architecture) == {"context": 128}
    assert boundaries(open_model(checkpoint_of("tiny-qwen3")).architecture) == {}


def test_the_positions_past_the_original_context_are_judged_twice(scaled, export, case_of, tmp_path, llama_cpp):
    artifact = export(scaled, "F32", tmp_path / "scaled.gguf")
    case = case_of(artifact, scaled, llama_cpp, settings=Settings(positions=64, chunk=64))
    found = {check.name: check for check in (*check_conversion(case), *check_quality(case))}
    for name in ("conversion.context", "quality.context"):
        assert found[name].passed, found[name]
        assert f"{PAST} positions past the original context of 128" in found[name].detail


def test_a_scaling_that_is_missing_is_seen_past_the_original_context(scaled, export, case_of, tmp_path, llama_cpp):
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in scaled.iterdir():
        (plain / path.name).write_bytes(path.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    del config["rope_scaling"]
    (plain / "config.json").write_text(json.dumps(config))
    bad = export(plain, "F32", tmp_path / "bad.gguf")
    case = case_of(bad, scaled, llama_cpp, settings=Settings(positions=64, chunk=64))
    failed = {check.name for check in check_conversion(case) if check.passed is False}
    assert "conversion.context" in failed


@pytest.mark.parametrize("step", [-1, 1])
def test_a_sliding_window_that_is_off_by_one_is_caught(step, artifacts, case_of, rewrite, tmp_path, llama_cpp):
    artifact, reference = artifacts("tiny-gemma3", "Q4_K_M")
    stored = read_gguf(artifact).metadata
    key = next(key for key in stored if key.endswith("attention.sliding_window"))
    bad = rewrite(artifact, tmp_path / "bad.gguf", metadata={key: u32(int(stored[key]) + step)})  # type: ignore[call-overload]
    case = case_of(bad, reference, llama_cpp)
    found = {check.name: check for check in check_conversion(case)}
    assert found["conversion.kl"].passed  # chunks of 64 do not reach the window of 128
    assert found["conversion.window"].passed is False, found["conversion.window"]


def test_a_boundary_that_the_text_does_not_reach_is_not_run_and_says_why(scaled, export, case_of, tmp_path, llama_cpp):
    artifact = export(scaled, "F32", tmp_path / "scaled.gguf")
    short = case_of(artifact, scaled, llama_cpp, text="Once upon a time there was a little otter named Pip. " * 2)
    found = {check.name: check for check in (*check_conversion(short), *check_quality(short))}
    for name in ("conversion.context", "quality.context"):
        assert found[name].status == "not run" and not found[name].required
        assert "it takes 192 tokens; the text has" in found[name].detail


def test_a_boundary_that_takes_too_much_memory_is_not_run_and_says_why(scaled, export, case_of, tmp_path):
    artifact = export(scaled, "F32", tmp_path / "scaled.gguf")
    case = case_of(artifact, scaled, settings=replace(Settings(positions=64), attention_bytes=4 * 4 * 100**2))
    assert case.longest == 100
    assert case.past(128) == "it takes 192 tokens; the reference runs at most 100 at once"
