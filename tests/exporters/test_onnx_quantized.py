"""Quantized ONNX graphs of every family, on onnxruntime, against the forward pass on the weights they stand for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")

import family_cases  # noqa: E402
from family_cases import CASES, kl, random_tokens, save  # noqa: E402

from llmx.errors import UnsupportedError, UsageError  # noqa: E402
from llmx.exporters.encoding import GROUP_ENCODINGS  # noqa: E402
from llmx.exporters.onnx import DIALECTS, OnnxExport, OnnxOptions, prepare, write  # noqa: E402
from llmx.exporters.onnx_types import BY_BITS, MIXES, find_mix, planned_types, wanted_types  # noqa: E402
from llmx.formats.onnx import TYPES_KEY, joined_name, split_name  # noqa: E402
from llmx.models.model import Model, Weight, open_model  # noqa: E402
from llmx.models.ops_torch import run  # noqa: E402
from llmx.validate.runtimes.onnxruntime import OnnxRuntime  # noqa: E402

REASON = OnnxRuntime().unavailable()
needs_runtime = pytest.mark.skipif(REASON is not None, reason=f"onnxruntime: {REASON}")
if REASON is None:  # within this process: a worker for each of a hundred graphs would take most of the time
    from llmx.validate.runtimes.onnxruntime_model import LoadedGraph
MAX_KL = 1e-9
MAX_DIFFERENCE = 2e-4  # of logits of size 10
DECODED = 6  # positions through the cache


class _Decoded:
    """A weight whose values are what its encoding made of them."""

    def __init__(self, weight: Weight, values: np.ndarray) -> None:
        self._weight, self._values = weight, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._values[start:stop].copy()


class _DecodedModel:
    def __init__(self, model: Model, types: Mapping[str, str]) -> None:
        self.architecture, self.checkpoint, self._model = model.architecture, model.checkpoint, model
        self._decoded = {}
        for name, type_name in types.items():
            weight, kept = model.weight(name), GROUP_ENCODINGS[type_name]
            self._decoded[name] = _Decoded(weight, kept.decode(kept.encode(weight.read()), weight.cols))

    def weight(self, name: str) -> Any:
        return self._decoded.get(name) or self._model.weight(name)

    def has(self, name: str) -> bool:
        return self._model.has(name)


def plan(model: Model, mix_name: str, dialect: str, **more: Any) -> OnnxExport:
    mix = find_mix(mix_name)
    types = planned_types(model.architecture, mix)
    wanted = wanted_types(model.architecture, mix)
    return prepare(model, OnnxOptions(mix.floats, dialect, types, wanted, mix.name, **more))


def export(folder: Path, target: Path, mix: str, dialect: str, **more: Any) -> tuple[OnnxExport, Path]:
    planned = plan(open_model(folder), mix, dialect, **more)
    target.mkdir()
    files = [target / file.name for file in planned.plan.files]
    write(planned, files)
    return planned, files[0]


def logits(graph: Path, tokens: list[int], begin: int | None) -> np.ndarray:
    loaded = LoadedGraph(graph, threads=1, context=len(tokens), exact=True, batch=None, level="all")
    return np.concatenate(list(loaded.logits(tokens, begin)))


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mix", ["INT4", "INT8"])
@pytest.mark.parametrize("name", CASES)
def test_a_quantized_graph_computes_what_its_weights_stand_for(
    name: str, mix: str, dialect: str, tmp_path: Path
) -> None:
    save(CASES[name], tmp_path / "model")
    planned, graph = export(tmp_path / "model", tmp_path / "onnx", mix, dialect)
    limit = CASES[name].length if "past its context" in name else planned.model.architecture.context_length
    tokens = random_tokens(min(CASES[name].length, limit))
    theirs = run(_DecodedModel(planned.model, planned.options.types), tokens)  # type: ignore[arg-type]
    # Through the cache, the frequencies of a dynamic rope are those of the shorter sequence: tested with floats.
    starts = [None] if "dynamic rope past" in name else [None, len(tokens) - DECODED]
    for begin in starts:
        ours = logits(graph, tokens, begin)
        assert kl(theirs, ours) < MAX_KL
        assert np.abs(ours - theirs).max() < MAX_DIFFERENCE


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "mix",
    ["INT2", "INT4_M", "int2-g16-sym-float32", "int4-g16-sym", "int4-g32-pos-bfloat16", "int8-g64-zp-float32"],
)
@pytest.mark.parametrize("name", ["llama, tied", "mixtral", "gpt2, untied, inner size given"])
def test_every_width_and_kind_of_group_runs(name: str, mix: str, dialect: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "model")
    planned, graph = export(tmp_path / "model", tmp_path / "onnx", mix, dialect)
    tokens = random_tokens(30)
    theirs = run(_DecodedModel(planned.model, planned.options.types), tokens)  # type: ignore[arg-type]
    assert kl(theirs, logits(graph, tokens, 24)) < MAX_KL


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mix", ["INT2", "INT4"])
def test_a_vocabulary_that_fills_no_whole_bytes_is_padded_and_cut_again(
    mix: str, dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(family_cases.SMALL, "vocab_size", 97)
    save(CASES["llama, tied"], tmp_path / "model")
    planned, graph = export(tmp_path / "model", tmp_path / "onnx", mix, dialect)
    tokens = random_tokens(30)
    ours = logits(graph, tokens, 24)
    assert ours.shape == (30, 97)
    assert kl(run(_DecodedModel(planned.model, planned.options.types), tokens), ours) < MAX_KL  # type: ignore[arg-type]


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
def test_activations_in_half_precision_lose_little(dialect: str, tmp_path: Path) -> None:
    save(CASES["qwen3"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    types = planned_types(model.architecture, find_mix("int8-g32-sym"))
    planned = prepare(model, OnnxOptions("F16", dialect, types))
    files = [tmp_path / file.name for file in planned.plan.files]
    write(planned, files)
    tokens = random_tokens(30)
    theirs = run(_DecodedModel(model, types), tokens)  # type: ignore[arg-type]
    assert 0 < kl(theirs, logits(files[0], tokens, 24)) < 1e-4


@needs_runtime
@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "gpt2", "mixtral"])
def test_onnxruntime_multiplies_by_the_packed_codes_of_the_standard_graph(name: str, tmp_path: Path) -> None:
    import onnxruntime

    save(CASES[name], tmp_path / "model")
    planned, graph = export(tmp_path / "model", tmp_path / "onnx", "INT4", "standard")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    products = [node for node in planned.graph.graph if node.op_type == "MatMul"]
    assert kinds.count("MatMulNBits") == len(products) > 0
    assert kinds.count("DequantizeLinear") == 1, "that of the embedding's rows"


@pytest.mark.parametrize("mix", ["INT2", "INT4", "INT8"])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2, untied, inner size given", "mixtral"])
def test_the_standard_graph_holds_no_vendor_domain_and_passes_the_checker(name: str, mix: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "model")
    _, graph = export(tmp_path / "model", tmp_path / "onnx", mix, "standard")
    onnx.checker.check_model(str(graph), full_check=True)
    loaded = onnx.load(graph, load_external_data=False)
    assert {node.domain for node in loaded.graph.node} == {""}
    assert [one.domain for one in loaded.opset_import] == [""]


def test_products_with_the_same_inputs_are_one_where_their_types_agree(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    planned = plan(open_model(tmp_path / "model"), "INT4", "ort")
    kinds = [node.op_type for node in planned.graph.graph]
    # Two layers of four products and the head; heads of 8 elements are turned outside of the attention.
    assert kinds.count("MatMulNBits") == 9
    types = {**planned.options.types, "layers.0.v.weight": "int8-g32-sym-float32"}
    apart = prepare(planned.model, OnnxOptions("F32", "ort", types))
    assert [node.op_type for node in apart.graph.graph].count("MatMulNBits") == 11


def test_packed_queries_keys_and_values_go_into_the_attention_undivided(tmp_path: Path) -> None:
    save(CASES["llama, yarn"], tmp_path / "model")
    graph = plan(open_model(tmp_path / "model"), "INT4", "ort").graph.graph
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention")
    assert attention.inputs[1] is None and attention.inputs[2] is None
    assert [node.op_type for node in graph].count("Split") == 2, "one of gate and up a layer"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tied_head_is_stored_once(dialect: str, tmp_path: Path) -> None:
    save(CASES["llama, tied"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    planned = plan(model, "INT4", dialect)
    table = model.weight("embedding.weight")
    row = GROUP_ENCODINGS["int4-g32-zp-float32"].row_bytes(table.cols)
    stored = [one for one in planned.stored if one.name.startswith("embedding.")]
    assert 0 < sum(one.nbytes for one in stored) <= table.rows * row
    places = {value.name: value.const_value.offset for value in planned.graph.graph.initializers.values()
              if str(value.name).startswith("embedding.weight.codes")}  # fmt: skip
    assert len(places) == 2 and len(set(places.values())) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_the_bytes_do_not_depend_on_threads_or_on_whether_rows_were_made_before(
    name: str, dialect: str, tmp_path: Path
) -> None:
    save(CASES[name], tmp_path / "model")
    planned, first = export(tmp_path / "model", tmp_path / "one", "INT4_M", dialect)
    _, second = export(tmp_path / "model", tmp_path / "two", "INT4_M", dialect, threads=3)
    rows = {
        weight: GROUP_ENCODINGS[kind].encode(planned.model.weight(weight).read())
        for weight, kind in planned.options.types.items()
    }
    (tmp_path / "three").mkdir()
    third = [tmp_path / "three" / file.name for file in planned.plan.files]
    digests = write(planned, third, rows)
    for file in planned.plan.files:
        data = first.with_name(file.name).read_bytes()
        assert len(data) == file.nbytes
        assert data == second.with_name(file.name).read_bytes() == third[0].with_name(file.name).read_bytes()
    data = third[1].read_bytes()
    for one, offset, digest in zip(planned.stored, planned.offsets, digests, strict=True):
        assert hashlib.sha256(data[offset : offset + one.nbytes]).hexdigest() == digest


def test_rows_of_another_plan_are_refused(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    planned = plan(open_model(tmp_path / "model"), "INT4", "ort")
    files = [tmp_path / file.name for file in planned.plan.files]
    with pytest.raises(UsageError, match=r"layers\.0\.q\.weight.*int4-g32-zp-float32"):
        write(planned, files, {"layers.0.q.weight": np.zeros((32, 7), np.uint8)})
    with pytest.raises(UsageError, match="not quantized"):
        write(planned, files, {"final_norm.weight": np.zeros((1, 7), np.uint8)})


def test_the_plan_shows_weights_once_and_the_groups_that_do_not_fit(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")  # rows of 32 and of 48
    planned = plan(open_model(tmp_path / "model"), "INT4", "ort")
    read = sum(one.rows * one.cols for one in planned.model.weights())
    assert planned.plan.parameters == read
    assert {(step.name, step.type_name, step.wanted) for step in planned.plan.fall_backs} == {
        *((f"layers.{n}.down.weight.codes", "int4-g16-zp-float32", "int4-g32-zp-float32") for n in (0, 1)),
        *((f"{name}.weight.codes", "int4-g32-zp-float32", "int4-g128-zp-float32") for name in ("embedding", "head")),
    }
    named = json.loads(planned.graph.metadata_props[TYPES_KEY])
    assert named == planned.options.types


def test_a_scale_for_a_whole_row_has_no_operator(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    with pytest.raises(UnsupportedError, match="one scale a row"):
        plan(open_model(tmp_path / "model"), "int4-channel-sym", "ort")


def test_mixes_have_names_and_bits_and_unknown_ones_name_the_choices() -> None:
    assert set(BY_BITS.values()) <= MIXES.keys()
    assert find_mix("int4_m").base == "int4-g32-zp-float32" and find_mix("INT8-G32-SYM").base == "int8-g32-sym"
    with pytest.raises(UnsupportedError, match="INT4_M"):
        find_mix("Q4_K_M")


def test_an_override_reaches_one_tensor(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    architecture = open_model(tmp_path / "model").architecture
    types = planned_types(architecture, MIXES["INT4"], {"head.weight": "F32"})
    assert types["head.weight"] == "F32" and types["embedding.weight"] == "int4-g32-zp-float32"
    assert "layers.0.attention_norm.weight" not in types


@pytest.mark.parametrize(
    "names",
    [
        [("embedding.weight", None)],
        [("layers.3.q.weight", None), ("layers.3.k.weight", None), ("layers.3.v.weight", None)],
        [("layers.0.expert_gate.weight", 12), ("layers.0.expert_up.weight", 12)],
    ],
)
def test_joined_names_are_taken_apart_again(names: list[tuple[str, int | None]]) -> None:
    assert split_name(joined_name(names)) == names
