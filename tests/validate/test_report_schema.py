"""The JSON Schema: it takes every report that is made here, and refuses what would lie."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from sample_reports import FACTS, failed, sound

from llmx import api
from llmx.validate.case import Settings
from llmx.validate.report import SCHEMA, Report, as_json, json_schema, not_run, unproven
from llmx.validate.suite import validate

CHECKER = Draft202012Validator(json_schema())
ROOT = Path(__file__).parents[2]


def problems(told: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in CHECKER.iter_errors(told)]


def test_the_schema_is_itself_sound_and_names_its_version() -> None:
    Draft202012Validator.check_schema(json_schema())
    assert json_schema()["title"] == json_schema()["properties"]["schema"]["const"] == SCHEMA
    assert f"report-{SCHEMA.rpartition('/')[2]}.json" in {path.name for path in (ROOT / "validate/schemas").iterdir()}


def test_every_object_of_the_schema_says_which_keys_it_has() -> None:
    def objects(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, list):
            return [found for item in node for found in objects(item)]
        if not isinstance(node, dict):
            return []
        here = [node] if "object" in node.get("type", ()) else []
        return here + [found for item in node.values() for found in objects(item)]

    found = objects(json_schema())
    assert len(found) > 15
    assert all("additionalProperties" in node for node in found)


@pytest.mark.parametrize("told", [sound(), failed(), sound(kl_by_position=[]), unproven({})])
def test_reports_with_every_curve_and_table_keep_to_the_schema(told: dict[str, Any]) -> None:
    assert problems(told) == []
    assert problems(json.loads(as_json(told))) == []


def test_a_report_whose_checks_could_not_run_keeps_to_the_schema() -> None:
    assert problems(Report((not_run("quality.kl", "llama.cpp is missing"),)).to_dict()) == []
    assert problems(Report(()).to_dict()) == []


def test_a_name_that_utf_8_cannot_write_is_escaped_and_comes_back() -> None:
    text = as_json(failed("blk.\ud800.weight"))
    assert text.encode()
    assert json.loads(text)["details"]["blame"]["tensor"] == "blk.\ud800.weight"


def test_a_validation_that_leaves_an_undescribed_table_fails_every_test() -> None:
    with pytest.raises(ValidationError, match="surprise"):
        Report((not_run("quality.kl", "no runtime"),), FACTS, {"surprise": []})


def _passed_without_a_check(told: dict[str, Any]) -> None:
    told["checks"] = []


def _passed_with_a_failed_check(told: dict[str, Any]) -> None:
    told["checks"][0] |= {"passed": False, "status": "failed"}


def _passed_with_a_required_check_that_did_not_run(told: dict[str, Any]) -> None:
    told["checks"][0] |= {"passed": None, "status": "not run"}


def _a_skipped_check_that_counts_as_passed(told: dict[str, Any]) -> None:
    told["checks"][-1]["passed"] = True


def _a_skipped_check_without_a_reason(told: dict[str, Any]) -> None:
    told["checks"][-1]["detail"] = ""


def _checks_in_a_report_that_was_not_validated(told: dict[str, Any]) -> None:
    told["passed"] = None


def _another_version(told: dict[str, Any]) -> None:
    told["schema"] = "llmx.report/2"


def _an_unknown_table(told: dict[str, Any]) -> None:
    told["details"]["extras"] = []


def _a_tensor_without_its_role(told: dict[str, Any]) -> None:
    del told["details"]["tensors"][0]["role"]


def _a_hash_that_is_none(told: dict[str, Any]) -> None:
    told["settings"]["text_sha256"] = "none"


LIES = [
    _passed_without_a_check,
    _passed_with_a_failed_check,
    _passed_with_a_required_check_that_did_not_run,
    _a_skipped_check_that_counts_as_passed,
    _a_skipped_check_without_a_reason,
    _checks_in_a_report_that_was_not_validated,
    _another_version,
    _an_unknown_table,
    _a_tensor_without_its_role,
    _a_hash_that_is_none,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__.strip("_"))
def test_the_schema_refuses(lie: Callable[[dict[str, Any]], None]) -> None:
    told = copy.deepcopy(sound())
    lie(told)
    with pytest.raises(ValidationError):
        CHECKER.validate(told)


def test_what_an_export_writes_keeps_to_the_schema(solved: Callable[..., tuple[Path, Path]]) -> None:
    artifact, _ = solved("tiny-qwen3", "gptq")
    stem = artifact.with_name("report.json")
    (path,) = [p for p in (stem, artifact.with_name(f"{artifact.name}.report.json")) if p.exists()][-1:]
    told = json.loads(path.read_text())
    assert told["passed"] is None and told["export"]["solved"]
    assert problems(told) == []


def test_what_a_validation_finds_keeps_to_the_schema(
    artifacts: Callable[..., tuple[Path, Path]], llama_cpp: Any, rewrite: Callable[..., Path], tmp_path: Path
) -> None:
    artifact, model = artifacts("tiny-qwen3", "Q4_K_M")
    settings = Settings(positions=64, chunk=64, threads=1)
    told = validate(artifact, model, runtime=llama_cpp, settings=settings).to_dict()
    assert told["passed"] is True
    assert problems(told) == []
    broken = rewrite(artifact, tmp_path / "broken.gguf", tensors={"blk.0.attn_q.weight": None})
    told = validate(broken, model, runtime=llama_cpp, settings=settings).to_dict()
    assert told["passed"] is False
    assert problems(told) == []


def test_a_missing_runtime_keeps_to_the_schema(artifacts: Callable[..., tuple[Path, Path]]) -> None:
    class Missing:
        name = "llama.cpp"

        def unavailable(self) -> str:
            return "not installed"

        def open(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("it is missing")

    artifact, model = artifacts("tiny-qwen3", "Q8_0")
    told = validate(artifact, model, runtime=Missing()).to_dict()
    assert told["passed"] is False
    assert problems(told) == []


def test_a_command_writes_all_three_reports(
    artifacts: Callable[..., tuple[Path, Path]], llama_cpp: Any, tmp_path: Path
) -> None:
    artifact, model = artifacts("tiny-qwen3", "Q4_K_M")
    report = api.validate(artifact, model, output=tmp_path / "out", threads=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.html", "junit.xml"}
    assert problems(json.loads((tmp_path / "out" / "report.json").read_text())) == []
    assert report.passed
