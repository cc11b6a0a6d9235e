"""Artifacts side by side: the same figures as the quality check's, a row for each, and codes that a pipeline trusts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from llmx.comparing import compare
from llmx.errors import IntegrityError, UsageError
from llmx.validate.compare import json_schema
from llmx.validate.runtimes import Runtime
from llmx.validate.runtimes.llamacpp import LlamaCpp

Made = Callable[[str, str], tuple[Path, Path]]


def test_a_broken_artifact_has_its_row_and_a_kept_reference_gives_the_same_figures(
    artifacts: Made, llama_cpp: Runtime, tmp_path: Path
) -> None:
    small, model = artifacts("tiny-qwen3", "Q4_0")
    large, _ = artifacts("tiny-qwen3", "Q8_0")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(small.read_bytes()[:5000])
    kept = tmp_path / "kept"
    found = compare([large, broken, small], str(model), positions=64, keep_reference=kept, output=tmp_path, threads=1)
    assert found.exit_code == 4
    rows = {row.name: row for row in found.rows}
    assert rows["broken.gguf"].status == "failed" and rows["broken.gguf"].error
    first, second = rows[small.name], rows[large.name]
    assert first.kl_mean is not None and second.kl_mean is not None and first.kl_mean > second.kl_mean > 0
    assert first.pareto and second.pareto and first.positions >= 64
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["schema"] == "llmx.compare/1" and written == found.to_dict()
    Draft202012Validator(json_schema()).validate(written)
    again = compare([small], str(kept), threads=1)
    assert again.exit_code == 0 and again.rows[0].kl_mean == first.kl_mean
    content = bytearray(kept.read_bytes())
    content[-100] ^= 1
    kept.write_bytes(content)
    with pytest.raises(IntegrityError, match="changed"):
        compare([small], str(kept))


def test_without_its_runtime_an_artifact_is_not_run_and_the_code_is_7(
    artifacts: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, model = artifacts("tiny-qwen3", "Q8_0")
    monkeypatch.setattr(LlamaCpp, "unavailable", lambda self: "not installed")
    found = compare([artifact], str(model), positions=16)
    assert found.exit_code == 7 and found.rows[0].status == "not run" and found.rows[0].kl_mean is None


def test_an_artifact_named_twice_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        compare([tmp_path / "a", tmp_path / "a"], "model")
