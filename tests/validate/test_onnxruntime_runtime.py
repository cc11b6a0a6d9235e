"""onnxruntime as a runtime, on the example's graph in both dialects."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx.errors import IntegrityError, RuntimeMissing, UsageError
from llmx.validate.runtimes import find_runtime, runtime_names
from llmx.validate.runtimes.onnxruntime import OnnxRuntime, OnnxRuntimeSession

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
REASON = OnnxRuntime().unavailable()
needs_runtime = pytest.mark.skipif(REASON is not None, reason=f"onnxruntime: {REASON}")
TOKENS = np.random.default_rng(2).integers(3, 500, 48).tolist()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
    from llmx.exporters.onnx import OnnxOptions, prepare, write
    from llmx.models.model import open_model

    folder = tmp_path_factory.mktemp("onnx")
    planned = prepare(open_model(EXAMPLE), OnnxOptions())
    write(planned, [folder / file.name for file in planned.plan.files])
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def session(artifact: Path) -> Iterator[OnnxRuntimeSession]:
    with OnnxRuntime().open(artifact, threads=1, context=64, batch=20) as opened:
        yield opened


def test_it_is_registered_and_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "onnxruntime" in runtime_names() and isinstance(find_runtime("onnxruntime"), OnnxRuntime)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert OnnxRuntime().unavailable() == "the package onnxruntime is not installed"
    with pytest.raises(RuntimeMissing, match="not installed"):
        OnnxRuntime().open(tmp_path / "model.onnx", threads=1, context=8)


@needs_runtime
def test_batches_and_single_positions_give_the_same_logits(session: OnnxRuntimeSession) -> None:
    blocks = list(session.logits(TOKENS))
    assert [len(block) for block in blocks] == [20, 20, 8]
    at_once, decoded = np.concatenate(blocks), np.concatenate(list(session.logits(TOKENS, 40)))
    assert at_once.shape == (48, session.vocab) and at_once.dtype == np.float32
    assert np.abs(at_once - decoded).max() < 1e-4


@needs_runtime
def test_extending_goes_back_to_what_is_kept(session: OnnxRuntimeSession) -> None:
    rows = np.concatenate(list(session.logits(TOKENS)))
    assert np.abs(session.extend(TOKENS[:30]) - rows[29]).max() < 1e-4
    session.extend([5, 6, 7], keep=30)
    assert np.abs(session.extend(TOKENS[25:], keep=25) - rows[-1]).max() < 1e-4
    with pytest.raises(UsageError, match="49 of 48"):
        session.extend([5], keep=49)


@needs_runtime
def test_greedy_ids_are_the_largest_logits_and_end_where_asked(session: OnnxRuntimeSession) -> None:
    made = session.generate(TOKENS[:20], 6)
    rows = np.concatenate(list(session.logits([*TOKENS[:20], *made])))
    assert made == rows[19:25].argmax(-1).tolist()
    assert session.generate(TOKENS[:20], 6, ends=[made[2]])[-1] == made[2]


@needs_runtime
def test_the_build_and_the_speed_are_told(session: OnnxRuntimeSession) -> None:
    import onnxruntime

    assert onnxruntime.__version__ in session.build and "optimization all" in session.build
    speed = session.speed(16, 4)
    assert min(speed.prefill_tokens_per_second, speed.decode_tokens_per_second, speed.peak_rss_bytes) > 0


@needs_runtime
def test_a_graph_alone_has_no_text(session: OnnxRuntimeSession) -> None:
    assert session.render([]) is None and "genai_config.json" in str(session.template_unavailable())
    for ask in (lambda: session.tokenize("a"), lambda: session.piece(1), session.special):
        with pytest.raises(RuntimeMissing, match=r"genai_config\.json does not stand beside"):
            ask()


@needs_runtime
def test_the_level_of_optimization_is_settable(artifact: Path) -> None:
    with OnnxRuntime(level="none").open(artifact, threads=1, context=8) as opened:
        assert "optimization none" in opened.build
    with pytest.raises(UsageError, match="choose one of: none, basic, extended, all"):
        OnnxRuntime(level="most")


@needs_runtime
def test_data_that_is_cut_or_lies_outside_the_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    data = artifact.with_name("model.onnx.data").read_bytes()
    (tmp_path / "model.onnx").write_bytes(artifact.read_bytes())
    (tmp_path / "model.onnx.data").write_bytes(data[:4096])
    with pytest.raises(IntegrityError, match="the file is cut"):
        OnnxRuntime().open(tmp_path / "model.onnx", threads=1, context=8)
    (tmp_path / "model.onnx.data").write_bytes(data)
    graph = onnx.load(artifact, load_external_data=False)
    for entry in (entry for one in graph.graph.initializer for entry in one.external_data if entry.key == "location"):
        entry.value = "../model.onnx.data"
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(IntegrityError, match="no plain name of a file"):
        OnnxRuntime().open(inner / "model.onnx", threads=1, context=8)


@needs_runtime
def test_broken_artifacts_and_wrong_questions_are_refused(artifact: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model.onnx"
    alone.write_bytes(artifact.read_bytes())
    with pytest.raises(IntegrityError, match=r"model\.onnx\.data"):
        OnnxRuntime().open(alone, threads=1, context=8)
    alone.write_bytes(b"no graph")
    with pytest.raises(IntegrityError, match="no ONNX graph"):
        OnnxRuntime().open(alone, threads=1, context=8)
    sizes: list[dict[str, Any]] = [{"threads": 0}, {"context": 0}, {"batch": 0}]
    for wrong in sizes:
        with pytest.raises(UsageError, match="at least 1"):
            OnnxRuntime().open(artifact, **{"threads": 1, "context": 8, **wrong})
    with pytest.raises(UsageError, match="no such file"):
        OnnxRuntime().open(tmp_path / "none.onnx", threads=1, context=8)
