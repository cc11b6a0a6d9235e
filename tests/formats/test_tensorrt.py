"""config.json of an engine's folder: written, read back, and refused where it is broken."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats import tensorrt
from llmx.formats.tensorrt import EngineConfig, Profile

ENGINE = b"ftrt, as if it were a plan"
PROFILES = (
    Profile("prefill", (1, 1, 2), (1, 8, 16), (1, 32, 64)),
    Profile("decode", (1, 1, 2), (1, 1, 1), (1, 32, 64)),
)
CONFIG = EngineConfig(
    architecture="qwen3",
    builder="tensorrt",
    builder_version="10.16.1",
    compute_capability=(9, 0),
    type_name="W4A16",
    floats="F16",
    encodings={"layers.0.q.weight": "int4-g128-pos-float16"},
    parameters=20_000,
    vocab_size=96,
    layers=2,
    kv_heads=2,
    head_dim=8,
    context_length=64,
    max_batch=2,
    max_input=16,
    max_length=64,
    profiles=PROFILES,
    cache=tensorrt.IN_PLACE,
    engine_bytes=len(ENGINE),
    sha256=hashlib.sha256(ENGINE).hexdigest(),
    dialect="trt",
    version="0.1.0",
    options={"optimization_level": 3},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / tensorrt.ENGINE_NAME).write_bytes(ENGINE)
    (tmp_path / tensorrt.CONFIG_NAME).write_bytes(tensorrt.config_bytes(CONFIG))
    return tmp_path


def told(folder: Path, **changed: Any) -> None:
    found = json.loads((folder / tensorrt.CONFIG_NAME).read_text())
    (folder / tensorrt.CONFIG_NAME).write_text(json.dumps({**found, **changed}))


def test_what_is_written_is_read_back(folder: Path) -> None:
    assert tensorrt.read_config(folder) == CONFIG
    tensorrt.check_engine(folder, CONFIG)
    portable = replace(CONFIG, compute_capability=None, builder="tensorrt_rtx", sparsity="2:4")
    (folder / tensorrt.CONFIG_NAME).write_bytes(tensorrt.config_bytes(portable))
    assert tensorrt.read_config(folder) == portable


@pytest.mark.parametrize("name", ["", tensorrt.ENGINE_NAME, tensorrt.CONFIG_NAME])
def test_an_engine_is_known_by_its_folder_and_by_its_files(name: str, folder: Path) -> None:
    assert tensorrt.engine_folder(folder / name) == folder


def test_other_folders_and_files_are_no_engines(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")
    assert tensorrt.engine_folder(folder / "model.onnx") is None
    told(folder, producer="somebody")
    assert tensorrt.engine_folder(folder) is None
    (folder / tensorrt.ENGINE_NAME).unlink()
    assert tensorrt.engine_folder(folder) is None


def test_an_engine_beside_a_broken_config_is_one_all_the_same(folder: Path) -> None:
    (folder / tensorrt.CONFIG_NAME).write_text("{")
    assert tensorrt.engine_folder(folder) == folder
    with pytest.raises(IntegrityError, match="not valid JSON"):
        tensorrt.read_config(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vocab_size", 0, "vocab_size: a positive whole number"),
        ("layers", True, "layers: a positive whole number"),
        ("sha256", "00", "64 hexadecimal digits"),
        ("builder", {"package": "pickle", "version": "1"}, "package .one of tensorrt, tensorrt_rtx. and version"),
        ("compute_capability", [9], "major, minor"),
        ("profiles", [], "a list of name, batch"),
        ("profiles", [{"name": "a", "batch": [2, 1, 1], "positions": [1, 1, 1], "capacity": [1, 1, 1]}], "least, best"),
        ("cache", "a third way", "one of in place, two buffers"),
        ("encodings", {"a": 1}, "canonical name -> encoding"),
        ("max_input", 65, "max_input is 65, and max_length only 64"),
        ("max_batch", 1, "profile prefill: batch reaches 2, the engine 1"),
    ],
)
def test_a_broken_config_is_refused_with_its_key(key: str, value: object, words: str, folder: Path) -> None:
    told(folder, **{key: value})
    with pytest.raises(IntegrityError, match=words):
        tensorrt.read_config(folder)


def test_a_key_that_may_be_null_must_be_there(folder: Path) -> None:
    path = folder / tensorrt.CONFIG_NAME
    told = json.loads(path.read_text())
    assert told.pop("sparsity") is None
    path.write_text(json.dumps(told))
    with pytest.raises(IntegrityError, match="sparsity: text, or null"):
        tensorrt.read_config(folder)


def test_a_later_layout_and_a_folder_without_config_are_told_apart(folder: Path) -> None:
    told(folder, layout=2)
    with pytest.raises(UnsupportedError, match="layout 2"):
        tensorrt.read_config(folder)
    (folder / tensorrt.CONFIG_NAME).unlink()
    with pytest.raises(UsageError, match=r"has a config\.json"):
        tensorrt.read_config(folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ENGINE[:-1], f"cut short: {len(ENGINE) - 1} bytes, {len(ENGINE)} are"),
        (ENGINE + b"!", "too long"),
        (b"F" + ENGINE[1:], "other bytes"),
    ],
)
def test_an_engine_that_is_not_the_one_described_is_refused(data: bytes, words: str, folder: Path) -> None:
    (folder / tensorrt.ENGINE_NAME).write_bytes(data)
    with pytest.raises(IntegrityError, match=words):
        tensorrt.check_engine(folder, CONFIG)
    (folder / tensorrt.ENGINE_NAME).unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        tensorrt.check_engine(folder, CONFIG)
