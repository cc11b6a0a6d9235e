"""The ONNX exporter: graphs of both dialects, on onnxruntime, against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
ir = pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")

from family_cases import CASES, decoded_logits, kl, random_tokens, reference_logits, save  # noqa: E402

from llmx.errors import IntegrityError, UsageError  # noqa: E402
from llmx.exporters.onnx import DIALECTS, OnnxExport, OnnxOptions, check_weights, prepare, write  # noqa: E402
from llmx.formats.onnx import VENDOR_DOMAIN  # noqa: E402
from llmx.models.model import open_model  # noqa: E402
from llmx.validate.runtimes.onnxruntime import OnnxRuntime  # noqa: E402

REASON = OnnxRuntime().unavailable()
needs_runtime = pytest.mark.skipif(REASON is not None, reason=f"onnxruntime: {REASON}")
if REASON is None:  # within this process: a worker for each of a hundred graphs would take most of the time
    from llmx.validate.runtimes.onnxruntime_model import LoadedGraph
MAX_KL = 1e-6
MAX_DIFFERENCE = 2e-4  # of logits of size 10
FAMILIES = ("llama, tied", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3", "phi3", "gpt2")
DECODED = 6  # positions through the cache


def export(folder: Path, target: Path, **options: str) -> tuple[OnnxExport, Path]:
    planned = prepare(open_model(folder), OnnxOptions(**options))
    target.mkdir()
    files = [target / file.name for file in planned.plan.files]
    write(planned, files)
    return planned, files[0]


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers_at_once_and_through_the_cache(
    name: str, dialect: str, tmp_path: Path
) -> None:
    reference = save(CASES[name], tmp_path / "model")
    planned, graph = export(tmp_path / "model", tmp_path / "onnx", dialect=dialect)
    limit = CASES[name].length if "past its context" in name else planned.model.architecture.context_length
    tokens = random_tokens(min(CASES[name].length, limit))
    start = len(tokens) - DECODED
    loaded = LoadedGraph(graph, threads=1, context=len(tokens), exact=True, batch=None, level="all")
    # In this order: transformers keeps the longest length that a dynamic rope has seen.
    for begin, theirs in (
        (start, decoded_logits(reference, tokens, start)),
        (None, reference_logits(reference, tokens)),
    ):
        ours = np.concatenate(list(loaded.logits(tokens, begin)))
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        print(f"KL {name} | {dialect} | {begin} | {kl(theirs, ours):.1e} | {np.abs(ours - theirs).max():.1e}")
        assert kl(theirs, ours) < MAX_KL
        assert np.abs(ours - theirs).max() < MAX_DIFFERENCE


@pytest.mark.parametrize(
    "name", ["llama, tied", "qwen2", "gemma3", "gpt2", "mixtral", "phi3, longrope past its context"]
)
def test_the_standard_graph_holds_no_vendor_domain_and_passes_the_checker_by_path(name: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "model")
    _, graph = export(tmp_path / "model", tmp_path / "onnx", dialect="standard")
    onnx.checker.check_model(str(graph), full_check=True)
    loaded = onnx.load(graph, load_external_data=False)
    assert {node.domain for node in loaded.graph.node} == {""}
    assert [one.domain for one in loaded.opset_import] == [""]


def test_the_graph_of_onnxruntime_joins_sums_and_norms(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    planned, _ = export(tmp_path / "model", tmp_path / "onnx", dialect="ort")
    kinds = [node.op_type for node in planned.graph.graph if node.domain == VENDOR_DOMAIN]
    # Two layers: every sum but none before the first norm.
    assert kinds.count("SkipSimplifiedLayerNormalization") == 4 and kinds.count("GroupQueryAttention") == 2
    assert "Add" not in [node.op_type for node in planned.graph.graph]


def test_experts_run_through_one_operator_where_there_is_a_kernel(tmp_path: Path) -> None:
    save(CASES["mixtral"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    kinds = {
        (dialect, type_name): [
            node.op_type for node in prepare(model, OnnxOptions(type_name, dialect)).graph.graph
        ].count("MoE")
        for dialect in DIALECTS
        for type_name in ("F32", "F16")
    }
    assert kinds == {("standard", "F32"): 0, ("standard", "F16"): 0, ("ort", "F32"): 2, ("ort", "F16"): 0}
    assert "all 5 experts" in prepare(model, OnnxOptions("F16", "ort")).plan.notes[0]
    assert not prepare(model, OnnxOptions("F32", "ort")).plan.notes


@pytest.mark.parametrize("dialect", DIALECTS)
def test_files_are_as_large_as_planned_and_the_same_every_time(dialect: str, tmp_path: Path) -> None:
    save(CASES["qwen3"], tmp_path / "model")
    planned, first = export(tmp_path / "model", tmp_path / "one", dialect=dialect)
    _, second = export(tmp_path / "model", tmp_path / "two", dialect=dialect)
    for file in planned.plan.files:
        assert first.with_name(file.name).stat().st_size == file.nbytes
        assert first.with_name(file.name).read_bytes() == second.with_name(file.name).read_bytes()


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    save(CASES["llama, tied"], tmp_path / "model")
    planned, _ = export(tmp_path / "model", tmp_path / "onnx", dialect="standard")
    assert planned.plan.parameters == sum(w.rows * w.cols for w in planned.model.weights())
    table = planned.graph.graph.initializers["embedding.weight"]
    assert {use.node.op_type for use in table.uses()} == {"Gather", "Gemm"}


def test_float16_halves_the_weights(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    wide = prepare(open_model(tmp_path / "model"), OnnxOptions("F32", "standard"))
    half = prepare(open_model(tmp_path / "model"), OnnxOptions("F16", "standard"))
    assert 2 * sum(s.nbytes for s in half.plan.steps) == sum(s.nbytes for s in wide.plan.steps)


@needs_runtime
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "gpt2"])
def test_float16_graphs_run_and_lose_little(name: str, dialect: str, tmp_path: Path) -> None:
    reference = save(CASES[name], tmp_path / "model")
    _, graph = export(tmp_path / "model", tmp_path / "onnx", dialect=dialect, type_name="F16")
    tokens = random_tokens(40)
    loaded = LoadedGraph(graph, threads=1, context=len(tokens), exact=True, batch=None, level="all")
    ours = np.concatenate(list(loaded.logits(tokens, 30)))
    print(f"KL16 {name} | {dialect} | {kl(reference_logits(reference, tokens), ours):.1e}")
    assert ours.dtype == np.float32
    assert 0 < kl(reference_logits(reference, tokens), ours) < 1e-4


@needs_runtime
@pytest.mark.parametrize("name", ["llama", "mistral past its window"])
def test_padding_on_the_left_changes_nothing_in_the_standard_graph(name: str, tmp_path: Path) -> None:
    import onnxruntime

    save(CASES[name], tmp_path / "model")
    planned, graph = export(tmp_path / "model", tmp_path / "onnx", dialect="standard")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    tokens, padding = np.array(random_tokens(30)), 7
    a = planned.model.architecture
    empty = np.zeros((2, a.kv_heads, 0, a.head_dim), np.float32)
    feeds = {one.name: empty for one in session.get_inputs() if one.name.startswith("past_key_values.")}
    shifted = np.concatenate([np.full(padding, 5), tokens[:-padding]])
    feeds["input_ids"] = np.stack([tokens, shifted])
    feeds["attention_mask"] = np.ones((2, 30), np.int64)
    feeds["attention_mask"][1, :padding] = 0
    feeds["position_ids"] = np.stack([np.arange(30), np.maximum(np.arange(30) - padding, 0)])
    (logits,) = session.run(["logits"], feeds)
    assert np.isfinite(logits).all()
    assert np.abs(logits[1, padding:] - logits[0, :-padding]).max() < MAX_DIFFERENCE


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    reference = save(CASES["llama"], tmp_path / "model")
    with pytest.raises(UsageError, match="no dialect 'other'"):
        prepare(open_model(tmp_path / "model"), OnnxOptions(dialect="other"))
    with pytest.raises(UsageError, match="Q4_K"):
        prepare(open_model(tmp_path / "model"), OnnxOptions("Q4_K"))
    with torch.no_grad():
        reference.model.layers[0].mlp.up_proj.weight[1, 2] = 1e5
        reference.model.layers[1].mlp.up_proj.weight[1, 2] = float("nan")
    reference.save_pretrained(tmp_path / "broken")
    with pytest.raises(IntegrityError) as caught:
        check_weights(prepare(open_model(tmp_path / "broken"), OnnxOptions("F16")))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "layers.0.up.weight",
        "layers.1.up.weight",
    ]
