"""GGUF files as ONNX folders: codes and scales taken over, and logits equal to those of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")

from commands import Done
from family_cases import CASES, kl, random_tokens, save
from gguf_cases import FAMILIES, gguf_of

from llmx.errors import UsageError
from llmx.exporters import gguf
from llmx.exporters.gguf_metadata import SOLVED
from llmx.exporters.gguf_model import GgufModel, GgufWeight, open_gguf_model
from llmx.exporters.gguf_types import file_type
from llmx.exporters.onnx import DIALECTS, OnnxOptions, prepare, write
from llmx.exporters.onnx_repack import (
    ROUNDED,
    TakenOver,
    exact_encoding,
    kept_types,
    repacked,
    source_notes,
    taking_over,
)
from llmx.formats import ggml_packers
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import decode
from llmx.models import decoder
from llmx.models.model import open_model
from llmx.models.tokenizer import open_tokenizer
from llmx.validate.runtimes.onnxruntime import OnnxRuntime

REASON = OnnxRuntime().unavailable()
needs_runtime = pytest.mark.skipif(REASON is not None, reason=f"onnxruntime: {REASON}")
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TYPES = ("Q4_0", "Q8_0")
MINIMUMS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
MAX_KL = 1e-9
DECODED = 6  # positions through the cache


def _random_rows(type_name: str, rows: int = 3, blocks: int = 4) -> np.ndarray:
    """u8[rows, row bytes] of every code and every integer scale there is, with scales of the usual size."""
    random, block = np.random.default_rng(5), BLOCKS[type_name]
    data = random.integers(0, 256, (rows * blocks, block.bytes), dtype=np.uint8)
    scales, codes = ggml_packers.unpack(type_name, data)
    if scales.d.dtype == np.float16:
        scales = replace(scales, d=random.normal(0, 0.02, scales.d.shape).astype(np.float16))
        data = ggml_packers.pack(type_name, scales, codes)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("type_name", sorted(set(ggml_packers.LAYOUTS) - {*MINIMUMS, "MXFP4", "NVFP4"}))
def test_a_type_without_minimums_decodes_to_the_same_weights_bit_for_bit(type_name: str) -> None:
    encoding = exact_encoding(type_name)
    assert encoding is not None
    rows = _random_rows(type_name)
    wanted = decode(type_name, rows)
    assert np.array_equal(encoding.decode(repacked(encoding, type_name, rows), wanted.shape[1]), wanted)


def test_four_bits_are_enough_for_the_levels_of_q4_0_and_q3_k() -> None:
    names = {kind: made.name for kind in ggml_packers.LAYOUTS if (made := exact_encoding(kind)) is not None}
    assert {kind for kind, name in names.items() if name.startswith("int4")} == {"Q4_0", "Q3_K"}
    assert names["Q4_0"] == "int4-g32-sym-float32" and names["Q8_0"] == "int8-g32-sym-float32"
    assert names["Q6_K"] == "int8-g16-sym-float32"


def test_types_with_minimums_are_not_taken_over() -> None:
    assert {kind for kind in ggml_packers.LAYOUTS if exact_encoding(kind) is None} == set(MINIMUMS)


def _exported(model: GgufModel, folder: Path, dialect: str) -> Path:
    planned = prepare(model, taking_over(model, OnnxOptions(dialect=dialect)))
    folder.mkdir()
    files = [folder / file.name for file in planned.plan.files]
    write(planned, files, TakenOver(model, planned.options.types))
    return files[0]


def _assert_same_logits(model: GgufModel, graph: Path, tokens: list[int], limit: float) -> None:
    from llmx.validate.runtimes.onnxruntime_model import LoadedGraph

    loaded = LoadedGraph(graph, threads=1, context=len(tokens), exact=True, batch=None, level="all")
    theirs = decoder.logits(model, tokens)
    for begin in (None, len(tokens) - DECODED):
        ours = np.concatenate(list(loaded.logits(tokens, begin)))
        assert ours.shape == theirs.shape
        assert kl(theirs, ours) < limit


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_computes_the_logits_of_the_file_at_once_and_through_the_cache(
    name: str, type_name: str, dialect: str, solvable: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_gguf_model(gguf_of(solvable(name), tmp_path / "a.gguf", type_name))
    graph = _exported(model, tmp_path / "onnx", dialect)
    _assert_same_logits(model, graph, random_tokens(40), MAX_KL)


@needs_runtime
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize(
    "name", ["llama, all biases", "llama, llama3 rope", "llama, yarn with every option", "qwen2", "qwen3_moe"]
)
def test_the_graph_computes_the_logits_of_a_file_with_float_and_quantized_rows(
    name: str, type_name: str, tmp_path: Path
) -> None:
    """Their rows are so short that some are no whole number of blocks, and stay floats in the file."""
    save(CASES[name], tmp_path / "model")
    model = open_gguf_model(gguf_of(tmp_path / "model", tmp_path / "a.gguf", type_name))
    graph = _exported(model, tmp_path / "onnx", "ort")
    _assert_same_logits(model, graph, random_tokens(40), MAX_KL)


def test_the_stored_codes_and_scales_are_those_of_the_file(tmp_path: Path) -> None:
    model = _example(tmp_path, "Q4_0")
    kinds = {weight.stored_type for weight in model.weights() if isinstance(weight, GgufWeight)}
    assert "Q4_0" in kinds
    types, rows = kept_types(model), TakenOver(model, kept_types(model))
    assert set(rows) == set(types)
    for name, made in rows.items():
        weight = model.weight(name)
        assert made.shape == (weight.rows, made.encoding.row_bytes(weight.cols)) and len(made) == weight.rows
        assert made.encoding.name == types[name]
        assert np.array_equal(made.encoding.decode(made[1:7], weight.cols), weight.read(1, 7))


def test_what_is_rounded_again_is_planned_and_told(tmp_path: Path) -> None:
    model = _example(tmp_path, "Q4_1")
    types = kept_types(model)
    assert ROUNDED in types.values()
    assert set(TakenOver(model, types)) < set(types)
    (told,) = source_notes(model, types, keeps=True)
    lost = sum(name not in TakenOver(model, types) for name in types)
    assert told.startswith(f"{lost} Q4_1 matrices") and ROUNDED in told and "minimums" in told
    exact = _example(tmp_path, "Q8_0")
    assert source_notes(exact, kept_types(exact), keeps=True) == ()


def test_a_second_rounding_is_told(tmp_path: Path) -> None:
    model = _example(tmp_path, "Q8_0")
    types = dict.fromkeys(kept_types(model), "int4-g32-zp-float32")
    (told,) = source_notes(model, types, keeps=False)
    assert "second time" in told and str(len(types)) in told
    assert source_notes(open_model(EXAMPLE), types, keeps=False) == ()


def test_beside_the_checkpoint_the_weights_count_as_moved(tmp_path: Path) -> None:
    """A Q6_K matrix is further from it than 8 bits usually are."""
    assert taking_over(_example(tmp_path, "Q4_0"), OnnxOptions()).solver == SOLVED


def test_a_checkpoint_has_nothing_to_take_over() -> None:
    with pytest.raises(UsageError, match="GGUF"):
        taking_over(open_model(EXAMPLE), OnnxOptions())


def _example(tmp_path: Path, type_name: str) -> GgufModel:
    options = gguf.GgufOptions(file_type=file_type(type_name))
    export = gguf.prepare(open_model(EXAMPLE), open_tokenizer(EXAMPLE), options)
    path = tmp_path / f"{type_name}.gguf"
    gguf.write(export, [path])
    return open_gguf_model(path)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_runtime
def test_an_exported_file_is_judged_against_its_own_weights_and_passes(
    here: Callable[..., Done], tmp_path: Path
) -> None:
    path = _example(tmp_path, "Q4_0").gguf.file.paths[0]
    done = here("export", path, "--format", "onnx", "-o", tmp_path / "out", "--positions", 64, "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["type"] == "Q4_0" and told["passed"] and told["fall_backs"] == []
    checks = {check["name"]: check for check in json.loads((tmp_path / "out" / "report.json").read_text())["checks"]}
    assert checks["conversion.kl"]["value"] < MAX_KL
    assert checks["tokens.ids"]["value"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "gguf"), "--format onnx"),
        (("--format", "onnx", "--method", "gptq"), "nothing to calibrate"),
        (("--format", "onnx", "--revision", "main"), "hub revision"),
    ],
)
def test_what_cannot_be_done_with_a_file_is_told_before_anything_is_written(
    arguments: tuple[str, ...], said: str, here: Callable[..., Done], tmp_path: Path
) -> None:
    path = _example(tmp_path, "Q8_0").gguf.file.paths[0]
    done = here("export", path, *arguments, "-o", tmp_path / "out")
    assert done.code == 2 and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_type_of_the_users_choice_rounds_the_decoded_weights(here: Callable[..., Done], tmp_path: Path) -> None:
    path = _example(tmp_path, "Q8_0").gguf.file.paths[0]
    done = here("plan", path, "--format", "onnx", "--type", "INT4", "--method", "rtn", "--json")
    assert done.code == 0, done.stderr
    assert any("second time" in note for note in json.loads(done.stdout)["notes"])
