"""An artifact against another one: with and without the checkpoint, and what each way of failing exits with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmx import api
from llmx.errors import IntegrityError, UsageError
from llmx.formats.gguf import array, read_gguf
from llmx.validate.case import Limits, Settings
from llmx.validate.report import Check, Report
from llmx.validate.runtimes import Runtime
from llmx.validate.suite import validate

Made = Callable[[str, str], tuple[Path, Path]]
MODEL = "tiny-qwen3"
QUICK = Settings(positions=96, chunk=64, threads=1)


class Missing:
    name = "missing"

    def unavailable(self) -> str:
        return "not installed"


def found(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_a_file_lies_at_nothing_from_itself_and_what_takes_the_checkpoint_is_not_applicable(
    artifacts: Made, llama_cpp: Runtime
) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    report = validate(artifact, None, against=artifact, runtime=llama_cpp, settings=QUICK)
    assert report.exit_code == 0 and report.passed
    assert found(report, "against.kl").value == found(report, "against.decode").value == 0
    assert found(report, "against.same_top1").value == found(report, "against.ppl_ratio").value == 1
    assert found(report, "against.positions").value >= 96  # type: ignore[operator]
    assert {found(report, name).status for name in ("bytes.error", "conversion.kl", "quality.kl", "tokens.ids")} == {
        "not applicable"
    }
    assert report.facts["reference"]["kind"] == "another artifact, on llama.cpp"  # type: ignore[index]


def test_a_coarser_type_fails_a_tight_limit_and_passes_a_wide_one(artifacts: Made, llama_cpp: Runtime) -> None:
    coarse, fine = artifacts(MODEL, "Q4_0")[0], artifacts(MODEL, "Q8_0")[0]
    report = validate(coarse, None, against=fine, runtime=llama_cpp, settings=QUICK, limits=Limits(max_kl=0.002))
    assert report.exit_code == 4
    assert {check.name for check in report.failed} == {"against.kl", "against.decode"}
    assert validate(coarse, None, against=fine, runtime=llama_cpp, settings=QUICK).exit_code == 0


def test_a_limit_below_the_noise_floor_is_a_wrong_use(artifacts: Made, llama_cpp: Runtime) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    report = validate(artifact, None, against=artifact, runtime=llama_cpp, settings=QUICK, limits=Limits(max_kl=1e-12))
    assert report.exit_code == 2
    assert "refused" in found(report, "floor.limit").detail


def test_with_the_checkpoint_both_are_judged_and_the_curve_stays_that_of_the_checkpoint(
    artifacts: Made, llama_cpp: Runtime
) -> None:
    coarse, model = artifacts(MODEL, "Q4_0")
    fine, _ = artifacts(MODEL, "Q8_0")
    report = validate(coarse, model, against=fine, runtime=llama_cpp, settings=QUICK)
    assert report.exit_code == 0
    quality, against = found(report, "quality.kl").value, found(report, "against.kl").value
    assert against != quality and against == pytest.approx(quality, rel=0.2)
    assert report.details["quality"]["prefill"]["kl_mean"] == quality  # type: ignore[index]
    assert report.details["against"]["prefill"]["kl_mean"] == against  # type: ignore[index]
    assert report.facts["against"]["name"] == fine.name  # type: ignore[index]


def test_another_tokenizer_is_told_first_and_nothing_is_compared(
    artifacts: Made, llama_cpp: Runtime, rewrite: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    tokens = list(read_gguf(artifact).metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    tokens[65], tokens[66] = tokens[66], tokens[65]
    changed = {"tokenizer.ggml.tokens": array("str", tokens)}
    other = rewrite(artifact, tmp_path / "other.gguf", metadata=changed, honest=False)
    report = validate(artifact, None, against=other, runtime=llama_cpp, settings=QUICK)
    assert report.exit_code == 2
    check = found(report, "against.tokens")
    assert check.status == "FAILED"
    assert "same token ids" in check.detail and "token 65 is" in check.detail and "same model" in check.detail
    assert found(report, "against.kl").status == "not run" and found(report, "floor.batch").status == "not run"


def test_another_artifact_that_its_runtime_refuses_is_named(
    artifacts: Made, llama_cpp: Runtime, rewrite: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    other = rewrite(artifact, tmp_path / "other.gguf", tensors={"blk.0.attn_q.weight": None}, honest=False)
    report = validate(artifact, None, against=other, runtime=llama_cpp, settings=QUICK)
    assert report.exit_code == 4
    assert found(report, "against.loads").detail.startswith("other.gguf: ")
    assert found(report, "runtime.loads").passed


def test_without_the_runtime_nothing_passes_and_the_code_is_7(artifacts: Made) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    report = validate(artifact, None, against=artifact, runtime=Missing(), settings=QUICK)  # type: ignore[arg-type]
    assert report.exit_code == 7 and not any(check.passed for check in report.checks)


def test_a_gate_that_names_a_check_of_the_checkpoint_cannot_pass_without_it(
    artifacts: Made, llama_cpp: Runtime
) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    limits = Limits(gate={"conversion.kl": 1e-6, "against.kl": 0.01}, gate_name="gate.yaml")
    report = validate(artifact, None, against=artifact, runtime=llama_cpp, settings=QUICK, limits=limits)
    assert report.exit_code == 2
    assert [check.name for check in report.missing] == ["conversion.kl"]
    assert "gate.yaml" in found(report, "conversion.kl").detail


def test_files_that_are_not_there_or_cut_and_options_of_the_checkpoint_are_told(
    artifacts: Made, tmp_path: Path
) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    with pytest.raises(UsageError, match="nothing to judge"):
        api.validate(artifact, None)
    with pytest.raises(UsageError, match="no such artifact"):
        api.validate(artifact, None, against=tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="about the checkpoint"):
        api.validate(artifact, None, against=artifact, blame=True)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(artifact.read_bytes()[:5000])
    with pytest.raises(IntegrityError):
        api.validate(artifact, None, against=cut, threads=1)


def test_a_text_with_too_few_positions_is_refused(artifacts: Made, llama_cpp: Runtime) -> None:
    artifact, _ = artifacts(MODEL, "Q8_0")
    with pytest.raises(UsageError, match="10000 were asked for"):
        api.validate(artifact, None, against=artifact, positions=10_000, threads=1)
