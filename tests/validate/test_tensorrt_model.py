"""The runner of engines, over a stand-in for TensorRT and for the GPU: addresses, turns, profiles, graphs.

The numbers come from onnxruntime on the graph that an engine is built of, and are compared with transformers'.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx.errors import CheckFailed, IntegrityError, ResourceError, RuntimeMissing, UsageError
from llmx.validate.runtimes.tensorrt_engine import check_capability, library
from llmx.validate.runtimes.tensorrt_model import IN_PLACE, TWO_BUFFERS, LoadedEngine

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
double = pytest.importorskip("tensorrt_double", reason="onnxruntime is not installed: pip install 'llmx[onnx]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TOKENS = np.random.default_rng(2).integers(3, 500, 48).tolist()
PROFILES = [{"positions": [1, 20], "capacity": [16, 128]}, {"positions": [1, 1], "capacity": [16, 128]}]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llmx.exporters.onnx import OnnxOptions, prepare, write
    from llmx.models.model import open_model

    folder = tmp_path_factory.mktemp("plain")
    planned = prepare(open_model(EXAMPLE), OnnxOptions(dialect="plain"))
    write(planned, [folder / file.name for file in planned.plan.files])
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    from llmx.validate.oracle import Reference

    return np.concatenate(list(Reference(EXAMPLE, 1).logits(TOKENS)))


def loaded(graph: Path, folder: Path, *, device: Any = None, cache: str = TWO_BUFFERS, **options: Any) -> LoadedEngine:
    device = device or double.Device()
    path = folder / "rank0.engine"
    path.write_bytes(double.plan(graph, options.pop("profiles", PROFILES)))
    return LoadedEngine(double.module(device), device, path, cache=cache, **{"context": 64, "batch": None, **options})


@pytest.mark.parametrize("cache", [TWO_BUFFERS, IN_PLACE])
def test_blocks_and_single_positions_give_the_logits_of_transformers(
    graph: Path, expected: np.ndarray, tmp_path: Path, cache: str
) -> None:
    model = loaded(graph, tmp_path, cache=cache)
    blocks = list(model.logits(TOKENS, None))
    assert [len(block) for block in blocks] == [20, 20, 8]
    assert np.abs(np.concatenate(blocks) - expected).max() < 1e-4
    decoded = list(model.logits(TOKENS, 30))
    assert [len(block) for block in decoded[:4]] == [20, 10, 1, 1]
    assert np.abs(np.concatenate(decoded) - expected).max() < 1e-4


def test_extending_goes_back_to_what_is_kept(graph: Path, expected: np.ndarray, tmp_path: Path) -> None:
    model = loaded(graph, tmp_path, batch=7)
    assert np.abs(model.extend(TOKENS[:30], 0)[0] - expected[29]).max() < 1e-4
    model.extend([5, 6, 7], 30)
    assert np.abs(model.extend(TOKENS[25:], 25)[0] - expected[-1]).max() < 1e-4
    with pytest.raises(UsageError, match="cannot follow 49 of 48"):
        model.extend([5], 49)
    with pytest.raises(UsageError, match="do not fit the context of 64"):
        model.extend(TOKENS, 48)


def test_greedy_ids_are_the_largest_logits_and_end_where_asked(graph: Path, tmp_path: Path) -> None:
    model = loaded(graph, tmp_path)
    made = model.generate(TOKENS[:20], 6)
    rows = np.concatenate(list(model.logits([*TOKENS[:20], *made], None)))
    assert made == rows[19:25].argmax(-1).tolist()
    assert model.generate(TOKENS[:20], 6, [made[2]]) == made[: made.index(made[2]) + 1]


@pytest.mark.parametrize(
    ("device", "cache", "how", "launched"),
    [
        ({}, TWO_BUFFERS, "in CUDA graphs, 2 captured", 5 * 12),
        ({}, IN_PLACE, "in CUDA graphs, 1 captured", 5 * 12),
        ({"captures": False}, TWO_BUFFERS, "one by one: cuStreamBeginCapture_v2 failed", 0),
        ({"kernels": False}, TWO_BUFFERS, "the host chooses the token: cuModuleLoadData failed", 0),
    ],
)
def test_every_way_of_decoding_makes_the_ids_of_plain_steps_and_says_which_it_was(
    graph: Path, tmp_path: Path, device: dict[str, bool], cache: str, how: str, launched: int
) -> None:
    gpu = double.Device(**device)
    before = gpu.free_bytes()
    found = loaded(graph, tmp_path, device=gpu, cache=cache).speed(30, 12)
    assert how in found["how"] and found["how"].endswith("11 of 11 ids as in plain steps")
    assert gpu.launched == launched
    assert found["decode_tokens_per_second"] == 12 / 0.5 and found["prefill_tokens_per_second"] == 30 / 1.0
    assert 0 < found["peak_device_bytes"] <= before


def test_a_replay_that_goes_wrong_is_found(graph: Path, tmp_path: Path) -> None:
    gpu = double.Device()
    gpu._next_token = lambda logits, count, token, start, made: None
    with pytest.raises(CheckFailed, match="decoding on the device gave the id 0"):
        loaded(graph, tmp_path, device=gpu).speed(30, 4)


def test_a_step_takes_the_narrowest_profile(graph: Path, tmp_path: Path) -> None:
    model = loaded(graph, tmp_path)
    model.extend(TOKENS[:4], 0)
    model.extend(TOKENS[4:5], 4)
    assert sorted(model._lanes) == [0, 1]
    one = loaded(graph, tmp_path, profiles=PROFILES[:1])
    one.extend(TOKENS[:5], 0)
    one.extend(TOKENS[5:6], 5)
    assert sorted(one._lanes) == [0]


def test_the_capacity_is_what_the_profiles_take(graph: Path, tmp_path: Path) -> None:
    assert loaded(graph, tmp_path, context=8)._capacity == 16
    with pytest.raises(UsageError, match="built for sequences of up to 128 tokens; 200 were asked for"):
        loaded(graph, tmp_path, context=200)


def test_a_plan_that_is_none_is_refused_with_the_words_of_the_library(graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "rank0.engine"
    path.write_bytes(b"no plan at all")
    device = double.Device()
    with pytest.raises(IntegrityError, match="refuses this engine") as refused:
        LoadedEngine(double.module(device), device, path, cache=IN_PLACE, context=8, batch=None)
    assert refused.value.problems == ("ERROR: Serialization assertion header.magicTag failed",)


def test_an_engine_of_something_else_is_refused_with_every_reason(tmp_path: Path) -> None:
    from llmx.exporters.onnx import OnnxOptions, prepare, write
    from llmx.models.model import open_model

    planned = prepare(open_model(EXAMPLE), OnnxOptions(dialect="standard"))
    write(planned, [tmp_path / file.name for file in planned.plan.files])
    with pytest.raises(IntegrityError, match="no decoder with a cache") as refused:
        loaded(tmp_path / "model.onnx", tmp_path)
    assert {"no input is called start", "an input is called attention_mask"} <= set(refused.value.problems)


def test_an_engine_of_another_version_or_gpu_is_a_missing_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", double.module(double.Device(), "8.6.1.6"))
    assert library("tensorrt", "8.6.1").__version__ == "8.6.1.6"
    with pytest.raises(RuntimeMissing, match=r"built by tensorrt 10\.3\.0, and 8\.6\.1\.6 is installed"):
        library("tensorrt", "10.3.0")
    with pytest.raises(RuntimeMissing, match="cannot be loaded"):
        library("tensorrt_that_is_not_there", "1.0")
    check_capability(None, (9, 0), "a GPU")
    check_capability([9, 0], (9, 0), "a GPU")
    with pytest.raises(RuntimeMissing, match=r"compute capability 8\.0; a GPU has 9\.0"):
        check_capability([8, 0], (9, 0), "a GPU")


def test_a_gpu_without_room_for_what_lies_in_between_is_said_to_be_full(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(graph, tmp_path)
    monkeypatch.setattr(double.Engine, "create_execution_context", lambda engine: None)
    with pytest.raises(ResourceError, match="no room for what the engine computes"):
        model.extend(TOKENS[:4], 0)
