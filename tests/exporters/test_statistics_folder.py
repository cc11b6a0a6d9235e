"""Statistics on disk: exact, whole, and of one run only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmx.errors import IntegrityError, ResourceError, UsageError
from llmx.exporters.statistics_folder import StatisticsFolder
from llmx.models.checkpoint import open_checkpoint
from llmx.quant.statistics import Moments, Statistics

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
IDENTITY = {"text": "abc", "effort": "fast", "tensors": {"layers.0.q.weight": ["Q4_K", "gptq", False]}}


def some(seed: int = 0, *, drift: bool = True, residual: bool = True, pooled: bool = False) -> Statistics:
    random = np.random.default_rng(seed)

    def sums(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    def moments(tokens: int) -> Moments:
        return Moments(sums(6, 6), sums(6, 6) if drift else None, sums(4, 6) if residual else None, tokens)

    return Statistics(moments(2**24 + 1), moments(7), sums(6), pooled)


def folder(path: Path, **changes: Any) -> StatisticsFolder:
    return StatisticsFolder(path, {**IDENTITY, **changes}, "cpu")


def equal(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is two if one is None or two is None else torch.equal(one, two)


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_what_was_saved_is_loaded_bit_for_bit(drift: bool, residual: bool, pooled: bool, tmp_path: Path) -> None:
    before = some(drift=drift, residual=residual, pooled=pooled)
    folder(tmp_path).save("layers.3.expert_down.17", before)
    after = folder(tmp_path).load("layers.3.expert_down.17")
    assert after is not None
    for one, two in ((before.fitted, after.fitted), (before.held_out, after.held_out)):
        assert torch.equal(one.hessian, two.hessian)
        assert equal(one.drift, two.drift) and equal(one.residual, two.residual)
        assert one.tokens == two.tokens
    assert torch.equal(before.squares, after.squares)
    assert after.pooled is pooled


def test_what_is_not_there_is_none_until_all_should_be_there(tmp_path: Path) -> None:
    store = folder(tmp_path / "deep" / "er")
    assert not store.complete
    assert store.load("layers.0.q") is None
    store.save("layers.0.q", some())
    store.finish()
    store.finish()
    again = folder(tmp_path / "deep" / "er")
    assert again.complete
    assert again.load("layers.0.q") is not None
    with pytest.raises(IntegrityError, match=r"gone[\s\S]*layers\.0\.o"):
        again.load("layers.0.o")


@pytest.mark.parametrize("key", IDENTITY)
def test_statistics_of_another_run_are_refused_by_the_name_of_what_differs(key: str, tmp_path: Path) -> None:
    folder(tmp_path).save("layers.0.q", some())
    with pytest.raises(UsageError, match="another run") as caught:
        folder(tmp_path, **{key: "other"})
    assert caught.value.problems == (f"{key} differs",)
    assert folder(tmp_path).load("layers.0.q") is not None  # and are left as they are


def test_all_that_differs_is_named_at_once(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(UsageError) as caught:
        StatisticsFolder(tmp_path, {"text": "x", "more": 1}, "cpu")
    assert caught.value.problems == ("effort differs", "more differs", "tensors differs", "text differs")


@pytest.mark.parametrize("content", ["", "[", "[1]", "\x00"])
def test_a_manifest_that_cannot_be_read_is_an_integrity_error(content: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "statistics.json").write_text(content)
    with pytest.raises(IntegrityError):
        folder(tmp_path)


def test_a_file_that_is_cut_is_an_integrity_error(tmp_path: Path) -> None:
    store = folder(tmp_path)
    store.save("layers.0.q", some())
    path = tmp_path / "layers.0.q.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(IntegrityError):
        store.load("layers.0.q")


def test_a_file_without_a_sum_is_an_integrity_error(tmp_path: Path) -> None:
    from llmx.formats.safetensors import write_safetensors

    store = folder(tmp_path)
    write_safetensors(tmp_path / "layers.0.q.safetensors", [("squares", "F32", (2,), [b"\0" * 8])])
    with pytest.raises(IntegrityError, match="counts is missing"):
        store.load("layers.0.q")


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="statistics folder"):
            folder(path)


def test_the_manifest_says_what_the_statistics_are_of(tmp_path: Path) -> None:
    folder(tmp_path)
    told = json.loads((tmp_path / "statistics.json").read_text())
    assert told == {"version": 1, **IDENTITY, "complete": False}


def test_a_checkpoint_is_known_by_its_config_and_its_files(tmp_path: Path) -> None:
    import os
    import shutil

    copy = Path(shutil.copytree(EXAMPLE, tmp_path / "copy"))
    before = open_checkpoint(copy).identity()
    assert before == open_checkpoint(copy).identity()
    weights = copy / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    touched = open_checkpoint(copy).identity()
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"rope_theta"', '"rope_base"'))
    assert len({before, touched, open_checkpoint(copy).identity()}) == 3
