"""The folder that onnxruntime-genai loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")

from llmx.exporters.onnx import DIALECTS, OnnxExport, OnnxOptions, prepare, write
from llmx.exporters.onnx_genai import LONGEST, TOKENIZER_CONFIG, configuration, tokenizer_config
from llmx.models.model import open_model
from llmx.models.tokenizer import open_tokenizer
from llmx.validate.runtimes.onnxruntime import OnnxRuntime

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
PROMPT = "Once upon a time there was a little girl who"


def package(folder: Path, dialect: str) -> OnnxExport:
    planned = prepare(open_model(EXAMPLE), OnnxOptions(dialect=dialect), open_tokenizer(EXAMPLE))
    write(planned, [folder / file.name for file in planned.plan.files])
    return planned


@pytest.mark.parametrize("dialect", DIALECTS)
def test_genai_generates_the_same_greedy_tokens_as_plain_onnxruntime(dialect: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="the package onnxruntime-genai is not installed")
    package(tmp_path, dialect)
    tokenizer = open_tokenizer(EXAMPLE)
    model = genai.Model(str(tmp_path))
    ids = tokenizer.encode(PROMPT, add_special=False)
    assert genai.Tokenizer(model).encode(PROMPT).tolist() in (ids, tokenizer.encode(PROMPT))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 24)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0)[len(ids) :].tolist()
    with OnnxRuntime().open(tmp_path / "model.onnx", threads=1, context=64) as session:
        assert made == session.generate(ids, 24, ends=tokenizer.end_ids)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_folder_is_as_planned_and_names_what_the_graph_has(dialect: str, tmp_path: Path) -> None:
    planned = package(tmp_path, dialect)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {
        file.name: file.nbytes for file in planned.plan.files
    }
    told = json.loads((tmp_path / "genai_config.json").read_text())
    values = {str(value.name) for value in (*planned.graph.graph.inputs, *planned.graph.graph.outputs)}
    decoder = told["model"]["decoder"]
    named = {name.replace("%d", "0") for group in ("inputs", "outputs") for name in decoder[group].values()}
    assert named == {name for name in values if ".0." in name or "." not in name}
    assert told["search"]["past_present_share_buffer"] is (dialect == "ort")
    assert (tmp_path / "tokenizer.json").read_bytes() == (EXAMPLE / "tokenizer.json").read_bytes()


def test_a_long_context_is_capped() -> None:
    architecture = replace(open_model(EXAMPLE).architecture, context_length=131072)
    told = configuration(architecture, open_tokenizer(EXAMPLE), ["input_ids"], shares_cache=True)
    assert told["search"]["max_length"] == LONGEST and told["model"]["context_length"] == 131072


TEMPLATE = "{{ bos_token }}[{{ messages[0].content }}]"
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools"}]
OTHERWISE: dict[str, dict[str, object]] = {
    "a class that genai does not know": {"tokenizer_class": "NewTokenizer", "chat_template": TEMPLATE},
    "no class": {"tokenizer_class": None, "chat_template": TEMPLATE},
    "a class that adds BOS by itself": {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE},
    "several templates": {"chat_template": NAMED},
    "a BOS that only the map of special tokens names": {"bos_token": ..., "chat_template": TEMPLATE},
    "no configuration at all": {},
}


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("case", OTHERWISE)
def test_genai_reads_text_and_templates_of_any_checkpoint(case: str, adds_bos: bool, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="the package onnxruntime-genai is not installed")
    folder = checkpoint(tmp_path / "checkpoint", OTHERWISE[case], adds_bos)
    tokenizer = open_tokenizer(folder)
    (tmp_path / "made").mkdir()
    planned = prepare(open_model(folder), OnnxOptions(), tokenizer)
    write(planned, [tmp_path / "made" / file.name for file in planned.plan.files])
    made = genai.Tokenizer(str(tmp_path / "made"))
    made.update_options(add_special_tokens="true")
    assert made.encode(PROMPT).tolist() == tokenizer.encode(PROMPT)
    assert (made.encode(PROMPT).tolist()[0] == 1) is adds_bos
    said = [{"role": "user", "content": "Hi"}]
    if tokenizer.chat_template is not None:
        assert made.apply_chat_template(json.dumps(said)) == tokenizer.render(said) == "<s>[Hi]"


def checkpoint(folder: Path, changes: dict[str, object], adds_bos: bool) -> Path:
    """The example with another tokenizer_config.json; `...` leaves a key out, and no changes the file."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).symlink_to(EXAMPLE / name)
    words = json.loads((EXAMPLE / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(words if adds_bos else {**words, "post_processor": None}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    told = json.loads((EXAMPLE / TOKENIZER_CONFIG).read_text()) | changes
    if changes:
        kept = {key: value for key, value in told.items() if value is not ...}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(kept))
    return folder


def test_a_configuration_that_says_all_is_copied_as_it_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "checkpoint", {"add_bos_token": True, "chat_template": TEMPLATE}, adds_bos=True)
    assert tokenizer_config(open_tokenizer(folder), folder) == (folder / TOKENIZER_CONFIG).read_bytes()


def test_a_checkpoint_without_tokenizer_json_is_said_to_be_for_onnxruntime_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(EXAMPLE / name)
    planned = prepare(open_model(tmp_path), OnnxOptions(), open_tokenizer(EXAMPLE))
    assert [file.name for file in planned.plan.files] == ["model.onnx", "model.onnx.data"]
    assert "onnxruntime alone" in planned.plan.notes[-1]
