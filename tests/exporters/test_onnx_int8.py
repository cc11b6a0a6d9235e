"""Products in 8-bit integers: what onnxruntime makes of them, and what they lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'llmx[onnxruntime]'")

from family_cases import CASES, decoded_logits, kl, random_tokens, reference_logits, save  # noqa: E402

from llmx import api  # noqa: E402
from llmx.errors import IntegrityError, UsageError  # noqa: E402
from llmx.exporters.encoding import encoding  # noqa: E402
from llmx.exporters.onnx import DIALECTS, OnnxExport, OnnxOptions, prepare, write  # noqa: E402
from llmx.exporters.onnx_activations import input_scales  # noqa: E402
from llmx.exporters.onnx_int8 import EXACT_OPTION  # noqa: E402
from llmx.exporters.onnx_types import find_mix, planned_scales, planned_types, static_names  # noqa: E402
from llmx.models.decoder import forward  # noqa: E402
from llmx.models.model import Model, Weight, open_model  # noqa: E402
from llmx.models.ops_torch import TorchOps  # noqa: E402
from llmx.preparing import plan  # noqa: E402
from llmx.quant.activations import InputScale, rounded, rounded_by_row  # noqa: E402
from llmx.quant.calibrate import Calibration  # noqa: E402
from llmx.quant.inputs import batches  # noqa: E402
from llmx.quant.workers import workers  # noqa: E402
from llmx.validate.runtimes.onnxruntime_model import LoadedGraph  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
CHANNELS = "int8-channel-pos-float32"
FAMILIES = ("llama, tied", "qwen2", "gemma3", "mixtral", "gpt2")
LENGTH, DECODED = 40, 6
MAX_KL = 2e-5  # of the graph against the same rounding in torch: a code on the edge falls to either side
MAX_LOSS = 0.005  # of 8 bits against float, on random models


def text(model: Model, count: int = 6, length: int = 32) -> Calibration:
    tokens = np.random.default_rng(3).integers(3, model.architecture.vocab, (count, length))
    return Calibration(batches(tokens.tolist(), 0))


def measured(model: Model) -> dict[str, InputScale]:
    with workers(1) as pool:
        return dict(input_scales(model, text(model), pool))


def export(model: Model, target: Path, dialect: str, scales: dict[str, InputScale]) -> tuple[OnnxExport, Path]:
    types = planned_types(model.architecture, find_mix("W8A8_STATIC"))
    planned = prepare(model, OnnxOptions(dialect=dialect, types=types, scales=scales))
    target.mkdir()
    files = [target / file.name for file in planned.plan.files]
    write(planned, files)
    return planned, files[0]


class RoundedOps(TorchOps):
    """The decoder's operations with the rounding that the graph is meant to do."""

    def __init__(self, scales: dict[str, InputScale]) -> None:
        super().__init__()
        self._scales = scales

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if len(weight.spec.shape) < 2 or weight.spec.role in ("router", "position_embedding"):
            return super()._load(weight, start, stop)
        keep = encoding(CHANNELS)
        return torch.from_numpy(keep.decode(keep.encode(weight.read(start, stop)), weight.cols))

    def embed(self, indices: torch.Tensor, table: Weight) -> torch.Tensor:
        return self._load(table)[indices]

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        scale = self._scales.get(weight.spec.name)
        values = rounded_by_row(x.numpy()) if scale is None else rounded(x.numpy(), scale)
        return super().linear(torch.from_numpy(values), weight, bias)


def wanted_logits(model: Model, tokens: list[int], scales: dict[str, InputScale]) -> np.ndarray:
    ids, positions = torch.tensor([tokens]), torch.arange(len(tokens))
    with torch.inference_mode():
        return forward(model, RoundedOps(scales), ids, positions)[0].numpy()


def loaded(graph: Path, level: str = "all") -> LoadedGraph:
    return LoadedGraph(graph, threads=1, context=LENGTH, exact=False, batch=None, level=level)


def logits(graph: Path, tokens: list[int], decode_from: int | None = None, level: str = "all") -> np.ndarray:
    return np.concatenate(list(loaded(graph, level).logits(tokens, decode_from)))


def operators(graph: Path, folder: Path) -> list[str]:
    """What onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "gemma3", "gpt2"])
def test_logits_are_those_of_the_rounding_that_is_meant(name: str, static: bool, dialect: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "model")
    model = open_model(tmp_path / "model")
    scales = measured(model) if static else {}
    _, graph = export(model, tmp_path / "onnx", dialect, scales)
    tokens = random_tokens(LENGTH)
    wanted = wanted_logits(model, tokens, scales)
    for decode_from in (None, LENGTH - DECODED):
        assert kl(wanted, logits(graph, tokens, decode_from)) < MAX_KL


@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_8_bits_lose_little_at_once_and_through_the_cache(name: str, static: bool, tmp_path: Path) -> None:
    reference = save(CASES[name], tmp_path / "model")
    model = open_model(tmp_path / "model")
    _, graph = export(model, tmp_path / "onnx", "ort", measured(model) if static else {})
    tokens, start = random_tokens(LENGTH), LENGTH - DECODED
    for begin, theirs in (
        (start, decoded_logits(reference, tokens, start)),
        (None, reference_logits(reference, tokens)),
    ):
        loss = kl(theirs, logits(graph, tokens, begin))
        print(f"KL8 {name} | {'static' if static else 'by row'} | {begin} | {loss:.1e}")
        assert 0 < loss < MAX_LOSS


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
def test_onnxruntime_multiplies_integers_and_no_matrix_becomes_floats(
    name: str, static: bool, dialect: str, tmp_path: Path
) -> None:
    save(CASES[name], tmp_path / "model")
    model = open_model(tmp_path / "model")
    planned, graph = export(model, tmp_path / "onnx", dialect, measured(model) if static else {})
    recorded = [node.op_type for node in planned.graph.graph]
    products = recorded.count("MatMul")
    found = operators(graph, tmp_path)
    assert found.count("MatMulIntegerToFloat") + found.count("QGemm") == products > 5
    assert "DequantizeLinear" in recorded and "DequantizeLinear" not in found


@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
def test_the_standard_graph_holds_no_vendor_domain_and_means_the_same_unfused(static: bool, tmp_path: Path) -> None:
    save(CASES["qwen2"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    _, graph = export(model, tmp_path / "onnx", "standard", measured(model) if static else {})
    onnx.checker.check_model(str(graph), full_check=True)
    assert {node.domain for node in onnx.load(graph, load_external_data=False).graph.node} == {""}
    tokens = random_tokens(LENGTH)
    assert kl(logits(graph, tokens), logits(graph, tokens, level="none")) < MAX_KL


@pytest.mark.parametrize("static", [False, True], ids=["by row", "static"])
def test_the_option_for_processors_that_saturate_is_told_and_changes_nothing_elsewhere(
    static: bool, tmp_path: Path
) -> None:
    save(CASES["qwen2"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    planned, graph = export(model, tmp_path / "onnx", "standard", measured(model) if static else {})
    assert any(f"{EXACT_OPTION}=1" in note for note in planned.plan.notes)
    tokens = np.array([random_tokens(LENGTH)])
    found = []
    for entry in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(EXACT_OPTION, entry)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(LENGTH)[None]}
        given = {one.name: one for one in session.get_inputs()}
        past = {n: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for n, one in given.items() if "past" in n}
        found.append(session.run(["logits"], {name: feeds[name] for name in given.keys() & feeds.keys()} | past)[0])
    assert kl(found[1][0], found[0][0]) < MAX_KL


def product(tmp_path: Path, x: np.ndarray) -> np.ndarray:
    """What the example's first `o` gives rows x, by onnxruntime, recorded alone."""
    import onnx_ir as ir

    from llmx.exporters.onnx_graph import GraphRecorder, whole
    from llmx.exporters.onnx_int8 import Int8Products

    weight = open_model(EXAMPLE).weight("layers.0.o.weight")
    graph = GraphRecorder("F32")
    rows = graph.input("x", ir.DataType.FLOAT, ("rows", weight.cols))
    keep = encoding(CHANNELS)
    parts = graph.quantized([whole(weight)], keep, columns=False)  # type: ignore[arg-type]
    output = Int8Products({}).multiply(graph, rows, parts, None)
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(("rows", weight.rows))
    kept = keep.encode(weight.read())
    codes, scales = kept[:, : weight.cols] ^ np.uint8(128), kept[:, weight.cols :].copy().view(np.float32)
    parts.codes.const_value = ir.tensor(np.ascontiguousarray(codes.T).view(np.int8))
    parts.scales.const_value = ir.tensor(scales[:, 0])
    made = ir.Model(
        ir.Graph([rows], [output], nodes=graph.nodes, initializers=graph.initializers, opset_imports={"": 24}),
        ir_version=10,
    )
    ir.save(made, tmp_path / "one.onnx")
    return onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, {"x": x})[0]


def test_a_row_gives_the_same_alone_and_beside_rows_a_thousand_times_as_large(tmp_path: Path) -> None:
    cols = open_model(EXAMPLE).weight("layers.0.o.weight").cols
    x = np.random.default_rng(0).standard_normal((5, cols)).astype(np.float32)
    x[1] *= 1000
    together = product(tmp_path, x)
    for row in range(len(x)):
        assert np.array_equal(product(tmp_path, x[row : row + 1])[0], together[row])


def test_rows_of_zeros_give_zeros_and_no_rows_give_none(tmp_path: Path) -> None:
    cols = open_model(EXAMPLE).weight("layers.0.o.weight").cols
    x = np.random.default_rng(0).standard_normal((3, cols)).astype(np.float32)
    x[1] = 0
    found = product(tmp_path, x)
    assert not found[1].any() and np.isfinite(found).all() and found[[0, 2]].any(axis=1).all()
    assert product(tmp_path, x[:0]).shape == (0, found.shape[1])


# ── static scales ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_matrices_with_one_input_have_one_scale_and_others_their_own() -> None:
    model = open_model(EXAMPLE)
    scales = measured(model)
    assert set(scales) == set(static_names(model.architecture))
    assert not any(".down." in name or name.startswith(("embedding", "head")) for name in scales)
    for layer in range(model.architecture.layers):
        q, k, v, o, gate, up = (scales[f"layers.{layer}.{role}.weight"] for role in ("q", "k", "v", "o", "gate", "up"))
        assert q == k == v and gate == up and len({q, o, gate}) == 3
        assert all(scale.scale > 0 and 0 <= scale.zero_point <= 255 for scale in (q, o, gate))


def test_scales_are_the_same_for_any_number_of_threads() -> None:
    model = open_model(EXAMPLE)
    with workers(2) as pool:
        assert dict(input_scales(model, text(model), pool)) == measured(model)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_plan_knows_every_byte_before_scales_are_measured(dialect: str) -> None:
    model = open_model(EXAMPLE)
    types = planned_types(model.architecture, find_mix("W8A8_STATIC"))
    plans = [
        prepare(model, OnnxOptions(dialect=dialect, types=types, scales=scales)).plan
        for scales in (planned_scales(model.architecture, find_mix("W8A8_STATIC")), measured(model))
    ]
    assert plans[0].files == plans[1].files and plans[0].steps == plans[1].steps


def test_a_model_that_computes_no_finite_values_is_refused_with_the_matrix_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(CASES["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"layers\.1\.q\.weight"):
        measured(open_model(tmp_path))


# ── from the command to the folder ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def some_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Once upon a time there was a small fox who lived near the river with her friends. " * 400)
    return path


def exported(target: Path, text: Path, **options: Any) -> api.ExportResult:
    request = api.ExportRequest(
        str(EXAMPLE),
        "onnx",
        output=target,
        calibration=text,
        calibration_tokens=2048,
        threads=1,
        validate=False,
        **options,
    )
    return api.export(request)


def test_a_static_export_measures_even_where_weights_are_just_rounded(some_text: Path, tmp_path: Path) -> None:
    result = exported(tmp_path / "out", some_text, type_name="W8A8_STATIC")
    planned = plan(api.ExportRequest(str(EXAMPLE), "onnx", type_name="W8A8_STATIC"))
    assert planned.quantization.calibrated and planned.quantization.recipe.method == "rtn"
    assert [file.nbytes for file in planned.exporter.plan.files][1] == result.files[1]["bytes"]
    graph = onnx.load(result.artifact, load_external_data=False).graph
    scales = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer if "input_scale" in one.name}
    layers = open_model(EXAMPLE).architecture.layers
    assert len(scales) == 3 * layers and len({float(scale) for scale in scales.values()}) > layers
    assert all(0 < scale < 1 for scale in scales.values())
    told = json.loads(result.report_path.read_text())["export"]
    assert told["solved"] == [] and told["quantization"]["calibration"]["text"] == some_text.name


def test_a_static_export_that_solves_nothing_has_no_statistics_to_keep(some_text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--statistics"):
        exported(tmp_path / "out", some_text, type_name="W8A8_STATIC", statistics=tmp_path / "kept")


def test_smoothquant_and_static_scales_meet_and_what_was_measured_passes_as_it_is(
    some_text: Path, tmp_path: Path
) -> None:
    from llmx.validate.onnx_artifact import open_onnx
    from llmx.validate.onnx_graph import differences

    recipe = tmp_path / "smooth.yaml"
    recipe.write_text("name: smooth\ntype: W8A8_STATIC\nmethod: rtn\ntransform: smoothquant\n")
    result = exported(tmp_path / "out", some_text, recipe=str(recipe))
    told = json.loads(result.report_path.read_text())["export"]
    assert len(told["scaling"]) == 4 * open_model(EXAMPLE).architecture.layers
    assert differences(open_onnx(result.artifact), open_model(EXAMPLE)) == []
