"""The noise floor: what is measured, and what a limit below it means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from runtime_double import Double, noise

from llmx.validate.case import Case, Limits
from llmx.validate.checks_floor import ODD_BATCH, check_floor, limit_check, resolvable
from llmx.validate.checks_quality import check_quality
from llmx.validate.gate import Limit
from llmx.validate.report import Check, at_most

Made = Callable[..., Case]


def only(checks: Iterable[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def noisy(artifacts, case_of) -> Made:
    """noisy(sizes): a case on a runtime whose logits move by sizes[option] where that option is not as usual."""

    def made(sizes: Mapping[str, float], always: float = 0.0, **changes: object) -> Case:
        artifact, reference = artifacts("tiny-qwen3", "Q8_0")

        def disturb(logits: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
            unusual = {
                "threads": options["threads"] != 1,
                "batch": options.get("batch") == ODD_BATCH,
                "cache": options.get("exact", False),
                "decode": options["decode"],
            }
            for seed, (name, size) in enumerate(sizes.items(), 1):
                if unusual[name]:
                    logits = noise(size, seed)(logits)
            return noise(always)(logits)

        return case_of(artifact, reference, Double(reference, disturb), **changes)

    return made


def test_each_way_of_running_is_measured_by_itself(noisy: Made) -> None:
    case = noisy({"threads": 0.0, "batch": 0.01, "cache": 0.02, "decode": 0.04})
    checks = list(check_floor(case))
    values = {check.name: check.value for check in checks}
    assert list(values) == ["floor.threads", "floor.batch", "floor.cache", "floor.decode", "floor.limit"]
    assert values["floor.threads"] == 0.0
    # Independent noise of size s on every logit costs s² / 2 where many tokens are likely, less where one is.
    for name, size in (("floor.batch", 0.01), ("floor.cache", 0.02), ("floor.decode", 0.04)):
        assert 0.3 < values[name] / (size**2 / 2) < 1.1
    assert case.noise.usual == values["floor.limit"] == values["floor.decode"]
    assert all(check.passed for check in checks)
    assert not list(case.scratch.iterdir())


def test_a_limit_below_the_floor_is_refused_and_what_lies_below_both_is_undecided(noisy: Made) -> None:
    case = noisy({"batch": 0.1}, limits=Limits(max_kl=1e-6))
    refused = only(check_floor(case), "floor.limit")
    assert (refused.passed, refused.limit, refused.code) == (False, 1e-6, 2)
    assert "refused: a limit of 1e-06 (asked for) lies below the noise floor" in refused.detail
    checks = list(check_quality(case))
    for name in ("quality.kl", "quality.decode"):
        undecided = only(checks, name)
        assert (undecided.status, undecided.required, undecided.code) == ("not run", True, 2)
        assert "refused" in undecided.detail


def test_an_artifact_that_is_worse_than_the_floor_fails_a_limit_below_it(noisy: Made) -> None:
    case = noisy({"batch": 0.01}, always=1.0, limits=Limits(max_kl=1e-6))
    assert only(check_floor(case), "floor.limit").passed is False
    assert only(check_quality(case), "quality.kl").passed is False


def test_a_default_limit_below_the_floor_is_refused_as_well(noisy: Made) -> None:
    case = noisy({"threads": 1.0})
    refused = only(check_floor(case), "floor.limit")
    assert (refused.passed, refused.code) == (False, 4)
    assert only(check_quality(case), "quality.kl").status == "not run"


def test_a_runtime_that_gives_nan_fails_and_leaves_no_floor_to_hide_behind(noisy: Made) -> None:
    case = noisy({}, always=float("nan"))
    checks = list(check_floor(case))
    assert checks and all(check.passed is False for check in checks)
    assert only(check_quality(case), "quality.kl").passed is False


def test_a_check_is_undecided_only_where_limit_and_value_are_both_below_the_floor() -> None:
    def status(value: float, limit: float, floor: float | None) -> str:
        return resolvable(at_most("quality.kl", value, limit, "nats", "asked for"), floor).status

    assert status(1e-5, 1e-3, 1e-4) == "passed"
    assert status(1e-5, 1e-6, 1e-4) == "not run"
    assert status(1e-7, 1e-6, 1e-4) == "not run"
    assert status(1e-3, 1e-6, 1e-4) == "FAILED"
    assert status(float("nan"), 1e-6, 1e-4) == "FAILED"
    assert status(1e-7, 1e-6, None) == "passed"
    assert status(float("inf"), 1e-6, float("inf")) == "FAILED"


def test_a_limit_that_equals_the_floor_is_taken() -> None:
    assert limit_check("floor.limit", 1e-5, Limit(1e-5, "asked for", asked=True), "floor.batch").passed


def test_llama_cpp_agrees_with_itself_far_better_than_the_limits_ask(artifacts, case_of, llama_cpp) -> None:
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    case = case_of(artifact, reference, llama_cpp)
    checks = list(check_floor(case))
    assert all(check.passed for check in checks), checks
    assert case.noise.usual is not None and case.noise.usual < 1e-3
