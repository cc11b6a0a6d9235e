"""onnxruntime-genai as a runtime, and its tokenizer as the text of plain onnxruntime's sessions."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmx.errors import CheckFailed, IntegrityError, RuntimeMissing, UnsupportedError, UsageError
from llmx.models.tokenizer import open_tokenizer
from llmx.validate.runtimes import find_runtime
from llmx.validate.runtimes.genai import Genai, GenaiSession
from llmx.validate.runtimes.onnxruntime import OnnxRuntime, OnnxRuntimeSession

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
REASON = Genai().unavailable()
needs_genai = pytest.mark.skipif(REASON is not None, reason=f"onnxruntime-genai: {REASON}")
TEXTS = (
    "Once upon a time there was a little girl who",
    "  two  spaces\n\n\ttab",
    "héllo wörld — “quotes” 漢字 🙂",
    "<s>a</s>",
    "",
)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)
SAID = [{"role": "user", "content": "Grüße, 世界"}, {"role": "assistant", "content": "a\n b"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
    from llmx.exporters.onnx import OnnxOptions, prepare, write
    from llmx.models.model import open_model

    folder = tmp_path_factory.mktemp("genai")
    planned = prepare(open_model(EXAMPLE), OnnxOptions(), open_tokenizer(EXAMPLE))
    write(planned, [folder / file.name for file in planned.plan.files])
    return folder


@pytest.fixture(scope="module")
def genai(folder: Path) -> Iterator[GenaiSession]:
    with Genai().open(folder, threads=1, context=64, batch=20) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[OnnxRuntimeSession]:
    with OnnxRuntime().open(folder, threads=1, context=64, batch=20) as opened:
        yield opened


def with_template(folder: Path, target: Path, template: str) -> Path:
    shutil.copytree(folder, target)
    told = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": template}))
    return target


def test_it_is_registered_and_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(find_runtime("onnxruntime-genai"), Genai)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeMissing, match="not installed"):
        Genai().open(tmp_path, threads=1, context=8)


@needs_genai
def test_its_greedy_tokens_are_those_of_plain_onnxruntime(genai: GenaiSession, plain: OnnxRuntimeSession) -> None:
    ids = genai.tokenize(TEXTS[0])
    ends = sorted(genai.special()["end_of_generation"])
    made = genai.generate(ids, 24)
    assert made == plain.generate(ids, 24, ends=ends) and len(made) == 24
    with pytest.raises(UsageError, match="do not fit"):
        genai.generate(ids, 64)


@needs_genai
def test_its_logits_are_those_of_plain_onnxruntime(genai: GenaiSession, plain: OnnxRuntimeSession) -> None:
    ids = genai.tokenize(TEXTS[0]) * 3
    blocks = list(genai.logits(ids, 30))
    assert [len(block) for block in blocks[:3]] == [20, 10, 1]
    rows = np.concatenate(blocks)
    assert rows.dtype == np.float32 and rows.shape == (len(ids), genai.vocab)
    assert np.abs(rows - np.concatenate(list(plain.logits(ids)))).max() < 1e-4
    genai.extend(ids[:30])
    genai.extend([5, 6, 7], keep=30)
    assert np.abs(genai.extend(ids[25:], keep=25) - rows[-1]).max() < 1e-4
    with pytest.raises(UsageError, match="cannot follow"):
        genai.extend([5], keep=63)


@needs_genai
def test_both_kinds_of_session_read_text_as_the_checkpoint_does(genai: GenaiSession, plain: OnnxRuntimeSession) -> None:
    tokenizer = open_tokenizer(EXAMPLE)
    for session in (genai, plain):
        for text in TEXTS:
            assert session.tokenize(text, add_special=False) == tokenizer.encode(text, False)
            assert session.tokenize(text) == tokenizer.encode(text)
        assert session.special() == {
            "bos": tokenizer.special["bos"],
            "eos": tokenizer.special["eos"],
            "add_bos": tokenizer.add_bos,
            "end_of_generation": frozenset(tokenizer.end_ids),
        }


@needs_genai
def test_pieces_are_bytes_also_of_parts_of_a_character_and_of_special_tokens(plain: OnnxRuntimeSession) -> None:
    text = "a é 漢🙂 b"
    ids = plain.tokenize(text, add_special=False)
    assert b"".join(plain.piece(token) for token in ids).decode() == " " + text
    assert plain.piece(1) == b"<s>" and plain.piece(2) == b"</s>"


@needs_genai
def test_the_name_of_a_token_in_a_text_is_always_that_token_to_genai(plain: OnnxRuntimeSession) -> None:
    assert plain.tokenize("a b", parse_special=False) == plain.tokenize("a b")
    with pytest.raises(UnsupportedError, match="'</s>'"):
        plain.tokenize("a</s>", parse_special=False)
    with pytest.raises(UsageError, match="UTF-8"):
        plain.tokenize("a\ud800")


@needs_genai
def test_a_template_is_rendered_by_genai(folder: Path, plain: OnnxRuntimeSession, tmp_path: Path) -> None:
    assert plain.render(SAID) is None and "no chat template" in str(plain.template_unavailable())
    target = with_template(folder, tmp_path / "said", TEMPLATE)
    for runtime in (Genai(), OnnxRuntime()):
        with runtime.open(target, threads=1, context=8) as session:
            assert session.template_unavailable() is None
            assert session.render(SAID) == "[user]Grüße, 世界[assistant]a\n b[me]"
            assert session.render(SAID[:1], add_generation_prompt=False) == "[user]Grüße, 世界"


@needs_genai
def test_a_template_that_genai_cannot_use_is_an_error_of_its_own(folder: Path, tmp_path: Path) -> None:
    target = with_template(folder, tmp_path / "raises", "{{ raise_exception('no such turn') }}")
    with OnnxRuntime().open(target, threads=1, context=8) as session, pytest.raises(CheckFailed, match="no such turn"):
        session.render(SAID)


@needs_genai
def test_the_build_and_the_speed_are_told(genai: GenaiSession) -> None:
    assert genai.build.startswith("onnxruntime-genai ")
    speed = genai.speed(16, 4)
    assert min(speed.prefill_tokens_per_second, speed.decode_tokens_per_second, speed.peak_rss_bytes) > 0


@needs_genai
def test_broken_folders_and_wrong_questions_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exact"):
        Genai().open(folder, threads=1, context=8, exact=True)
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    with pytest.raises(UsageError, match=r"genai_config\.json"):
        Genai().open(tmp_path, threads=1, context=8)
    shutil.copy(folder / "genai_config.json", tmp_path)
    with pytest.raises(IntegrityError, match="refuses this folder"):
        Genai().open(tmp_path, threads=1, context=8)
    (tmp_path / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(IntegrityError, match="vocab_size"):
        Genai().open(tmp_path, threads=1, context=8)


@needs_genai
def test_a_crash_of_the_native_code_is_the_folders_fault(folder: Path) -> None:
    with Genai().open(folder, threads=1, context=8) as session:
        os.kill(session._worker.process_id, signal.SIGABRT)
        with pytest.raises(IntegrityError, match="SIGABRT"):
            session.tokenize("a")


@needs_genai
def test_a_session_of_plain_onnxruntime_ends_both_its_workers(folder: Path) -> None:
    with OnnxRuntime().open(folder, threads=1, context=8) as session:
        session.tokenize("a")
        workers = [session._worker.process_id, session._text().process_id]
    for process_id in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
