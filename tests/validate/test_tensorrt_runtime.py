"""TensorRT as a runtime and as a kind of artifact: what is refused, what is not run, and all checks over a stand-in."""

from __future__ import annotations

import ast
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmx.differing import diff
from llmx.errors import CheckFailed, IntegrityError, RuntimeMissing, UnsupportedError, UsageError
from llmx.formats.tensorrt import ENGINE_NAME
from llmx.interpreter import TENSORRT_PYTHON
from llmx.models.model import open_model
from llmx.validate.case import Case, Limits, Settings
from llmx.validate.gate import default_bound
from llmx.validate.kinds import find_kind, kind_named
from llmx.validate.oracle import Tokens
from llmx.validate.report import Report
from llmx.validate.runtimes import find_runtime, runtime_names, tensorrt
from llmx.validate.runtimes.tensorrt import TensorRt, TensorRtSession
from llmx.validate.suite import check_text, validate

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
cases = pytest.importorskip("engine_cases", reason="onnxruntime is not installed: pip install 'llmx[onnx]'")

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
TOKENS = np.random.default_rng(2).integers(3, 500, 48).tolist()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.engine_folder(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The worker's process is the stand-in's."""
    monkeypatch.delenv(TENSORRT_PYTHON, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    monkeypatch.setattr(tensorrt, "WORKER", "tensorrt_double")
    tensorrt._unavailable.cache_clear()
    yield
    tensorrt._unavailable.cache_clear()


@pytest.fixture
def session(engine: Path, stand_in: None) -> Iterator[TensorRtSession]:
    with TensorRt().open(engine, threads=1, context=64) as opened:
        yield opened


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def test_it_is_registered_and_recognises_its_folders(engine: Path, tmp_path: Path) -> None:
    assert "tensorrt" in runtime_names() and isinstance(find_runtime("tensorrt"), TensorRt)
    for path in (engine, engine / ENGINE_NAME, engine / "config.json"):
        assert find_kind(path).name == "tensorrt"
        assert find_kind(path).located(path) == engine / ENGINE_NAME
    assert not kind_named("tensorrt").recognises(ROOT / "examples" / "tiny-qwen3")
    with pytest.raises(UsageError, match="there is no engine"):
        TensorRt().open(tmp_path, threads=1, context=8)


def test_every_check_that_an_engine_allows_passes_over_the_stand_in(engine: Path, stand_in: None) -> None:
    report = validate(engine, cases.EXAMPLE, settings=Settings(positions=64, chunk=64))
    found = statuses(report)
    assert report.passed, [(check.name, check.status, check.detail) for check in report.checks]
    assert {found[name] for name in ("bytes.tensors", "bytes.error", "conversion.kl", "floor.threads")} == {
        "not applicable"
    }
    for name in ("bytes.digests", "bytes.numbers", "runtime.loads", "tokens.ids", "tokens.ends", "floor.batch"):
        assert found[name] == "passed", name
    figures = {check.name: check for check in report.checks}
    assert float(figures["quality.kl"].value or 0) < 1e-5 and float(figures["quality.decode"].value or 0) < 1e-5
    assert "in CUDA graphs, 2 captured" in figures["speed.decode"].detail
    assert int(figures["speed.device_memory"].value or 0) > 0
    assert report.facts["artifact"]["name"] == ENGINE_NAME  # type: ignore[index]


def test_an_engine_in_float32_is_its_own_twin(stand_in: None, tmp_path: Path) -> None:
    engine = cases.engine_folder(tmp_path, "F32")
    report = validate(engine, cases.EXAMPLE, settings=Settings(positions=64, chunk=64))
    figures = {check.name: check for check in report.checks}
    assert report.passed and figures["bytes.tensors"].status == "not applicable"
    for name in ("conversion.kl", "conversion.logits", "conversion.decode", "floor.exact"):
        assert figures[name].status == "passed", name
    assert float(figures["conversion.kl"].value or 0) < 1e-9


def test_two_engines_are_judged_against_each_other_without_a_checkpoint(engine: Path, stand_in: None) -> None:
    report = validate(engine, None, against=engine, settings=Settings(positions=64, chunk=64))
    assert report.passed and statuses(report)["against.kl"] == "passed"


def test_without_a_gpu_nothing_passes_and_the_exit_code_is_that_of_a_missing_runtime(engine: Path) -> None:
    if TensorRt().unavailable() is None:
        pytest.skip("TensorRT and a GPU are here")
    report = validate(engine, cases.EXAMPLE, settings=Settings(positions=64, chunk=64))
    found = statuses(report)
    assert not report.passed and report.exit_code == RuntimeMissing.exit_code
    assert found["quality.kl"] == found["tokens.ids"] == found["speed.decode"] == "not run"
    assert found["bytes.digests"] == found["bytes.numbers"] == "passed"
    with pytest.raises(RuntimeMissing, match="TensorRT is not available"):
        TensorRt().open(engine, threads=1, context=8)


def test_a_python_without_tensorrt_or_none_at_all_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TENSORRT_PYTHON, str(tmp_path / "python3.10"))
    assert "cannot be started" in str(TensorRt().unavailable())


def test_a_session_reads_text_by_the_files_of_its_folder(session: TensorRtSession) -> None:
    ids = session.tokenize("Once upon a time</s>")
    assert session.special()["end_of_generation"] and ids[-1] in session.special()["end_of_generation"]  # type: ignore[operator]
    assert b"".join(session.piece(token) for token in ids).decode().endswith("upon a time</s>")
    assert session.render([]) is None and "no chat template" in str(session.template_unavailable())


def test_an_engine_alone_has_no_text_and_still_computes(engine: Path, stand_in: None, tmp_path: Path) -> None:
    alone = cases.changed(engine, tmp_path / "alone")
    (alone / "tokenizer.json").unlink()
    with TensorRt().open(alone, threads=1, context=64) as opened:
        assert len(opened.generate(TOKENS, 4)) == 4
        assert opened.extend(TOKENS).shape == (opened.vocab,)
        assert "nothing in it reads text" in str(opened.template_unavailable())
        with pytest.raises(RuntimeMissing, match="nothing in it reads text"):
            opened.tokenize("a")


def test_asking_for_another_sequence_ends_the_first(session: TensorRtSession) -> None:
    first = session.logits(TOKENS, 10)
    next(first)
    assert len(np.concatenate(list(session.logits(TOKENS)))) == 48
    with pytest.raises(UsageError, match="another"):
        next(first)


def test_what_no_engine_has_is_refused(engine: Path, stand_in: None) -> None:
    with pytest.raises(UsageError, match="built to compute in F16"):
        TensorRt().open(engine, threads=1, context=8, exact=True)
    with pytest.raises(UsageError, match="up to 512 tokens; 513 were asked for"):
        TensorRt().open(engine, threads=1, context=513)
    with pytest.raises(UsageError, match="at least 1"):
        TensorRt().open(engine, threads=1, context=0)


def test_a_plan_that_is_cut_short_is_seen_before_it_is_read(engine: Path, stand_in: None, tmp_path: Path) -> None:
    cut = cases.changed(engine, tmp_path / "cut")
    (cut / ENGINE_NAME).write_bytes((engine / ENGINE_NAME).read_bytes()[:-5])
    for use in (lambda: TensorRt().open(cut, threads=1, context=8), lambda: validate(cut, cases.EXAMPLE)):
        with pytest.raises(IntegrityError, match="cut short"):
            use()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"builder_version": "10.3.0"}, r"built by tensorrt 10\.3\.0, and 8\.6\.0 is installed"),
        ({"compute_capability": (8, 0)}, r"compute capability 8\.0; a stand-in for a GPU has 9\.0"),
    ],
)
def test_an_engine_for_another_machine_is_not_run(
    engine: Path, stand_in: None, tmp_path: Path, values: dict[str, object], words: str
) -> None:
    other = cases.changed(engine, tmp_path / "other", **values)
    with pytest.raises(RuntimeMissing, match=words):
        TensorRt().open(other, threads=1, context=8)
    report = validate(other, cases.EXAMPLE, settings=Settings(positions=64, chunk=64))
    assert report.exit_code == RuntimeMissing.exit_code and statuses(report)["quality.kl"] == "not run"


def test_a_plan_with_other_bytes_fails_its_digest(engine: Path, stand_in: None, tmp_path: Path) -> None:
    other = cases.changed(engine, tmp_path / "other")
    data = bytearray((engine / ENGINE_NAME).read_bytes())
    data[-3] ^= 1
    (other / ENGINE_NAME).write_bytes(data)
    kind = kind_named("tensorrt")
    assert kind.digest_check(kind.open(other)).status == "FAILED"


def test_every_number_that_is_not_the_checkpoints_is_named(engine: Path, tmp_path: Path) -> None:
    kind, model = kind_named("tensorrt"), open_model(cases.EXAMPLE)
    assert kind.differences(kind.open(engine), model) == []
    other = cases.changed(engine, tmp_path / "other", kv_heads=1, encodings={"embedding.weight": "F16", "x": "F16"})
    found = kind.differences(kind.open(other), model)
    assert "kv_heads is 1, expected 2" in found and "encodings: x is no tensor" in found
    assert "encodings: final_norm.weight is missing" in found


def test_a_config_of_another_engine_is_seen_when_it_is_loaded(engine: Path, stand_in: None, tmp_path: Path) -> None:
    other = cases.changed(engine, tmp_path / "other", vocab_size=500)
    with pytest.raises(IntegrityError, match=r"gives 512 logits, config\.json says 500"):
        TensorRt().open(other, threads=1, context=8)


def test_a_damaged_tokenizer_fails_the_checks_of_tokens(engine: Path, stand_in: None, tmp_path: Path) -> None:
    other = cases.changed(engine, tmp_path / "other")
    told = json.loads((other / "tokenizer.json").read_text())
    told["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(told))
    case = Case(
        artifact=other,
        file=kind_named("tensorrt").open(other),
        model=open_model(cases.EXAMPLE),
        tokens=Tokens(cases.EXAMPLE),
        runtime=TensorRt(),
        text="Once upon a time there was a little girl who lived in a House.",
        limits=Limits(),
        settings=Settings(),
        scratch=tmp_path,
    )
    found = {check.name: check.status for check in check_text(case)}
    assert found["runtime.loads"] == "passed" and found["tokens.ids"] == "FAILED"


def test_the_words_of_a_dying_worker_reach_the_user(session: TensorRtSession) -> None:
    os.kill(session._worker.process_id, signal.SIGABRT)
    with pytest.raises(CheckFailed, match=r"TensorRT died while it was asked to 'extend' .signal SIGABRT"):
        session.extend(TOKENS)


def test_the_tensors_of_engines_cannot_be_compared(engine: Path) -> None:
    for other in (engine, cases.EXAMPLE):
        with pytest.raises(UnsupportedError, match="cannot be read back"):
            diff(engine, other)


def test_limits_follow_the_types_that_config_names(engine: Path) -> None:
    kind = kind_named("tensorrt")
    file = kind.open(engine)
    assert default_bound(file.tensors.values(), "tensorrt").kl == 2e-3
    assert kind.described(file)["bits_per_weight"] > 0 and kind.described(file)["metadata"]["cache"]


def test_what_a_worker_imports_is_clean_for_python_3_10() -> None:
    newer = {"tomllib", "Self", "assert_never", "reveal_type", "LiteralString", "Never", "StrEnum", "ExceptionGroup"}
    names = ["errors", "registry", "interpreter"]
    files = [ROOT / "llmx" / f"{name}.py" for name in names]
    workers = ("__init__", "frames", "memory", "worker_loop", "cuda_driver", "cuda_kernels")
    files += [ROOT / "validate" / "runtimes" / f"{name}.py" for name in workers]
    parts = ("worker", "model", "engine", "decoding")
    files += [ROOT / "validate" / "runtimes" / f"tensorrt_{name}.py" for name in parts]
    for path in files:
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        hidden = {id(inner) for node in ast.walk(tree) if _is_typing_only(node) for inner in ast.walk(node)}
        used = [node for node in ast.walk(tree) if id(node) not in hidden]
        imported = {
            alias.name for node in used if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names
        }
        assert not imported & newer, path


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.gpu
def test_an_engine_that_is_built_here_computes_what_transformers_does(tmp_path: Path) -> None:
    from llmx import api

    if (reason := TensorRt().unavailable()) is not None:
        pytest.skip(f"TensorRT: {reason}")
    asked = api.ExportRequest(model=str(cases.EXAMPLE), format="tensorrt", type_name="F16", output=tmp_path / "engine")
    proof = api.export(asked).validation
    assert proof is not None and proof.passed
    figures = {check.name: check for check in proof.checks}
    for name in ("quality.kl", "quality.decode"):
        assert float(figures[name].value or 0) < 1e-4
    assert float(figures["quality.same_top1"].value or 0) >= 0.999
    assert "in CUDA graphs" in figures["speed.decode"].detail
