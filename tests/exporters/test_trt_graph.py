"""Graphs for TensorRT, on onnxruntime, against transformers in float32 and against the decoder on decoded weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'llmx[onnxruntime]'")

from cached_graph import UNFUSED, CachedGraph  # noqa: E402
from family_cases import CASES, decoded_logits, kl, random_tokens, reference_logits, save  # noqa: E402

from llmx.errors import UnsupportedError, UsageError  # noqa: E402
from llmx.exporters.encoding import encoding  # noqa: E402
from llmx.exporters.onnx import OnnxExport, OnnxOptions, prepare, write  # noqa: E402
from llmx.exporters.onnx_activations import input_scales  # noqa: E402
from llmx.exporters.tensorrt_types import find_mix, planned_types  # noqa: E402
from llmx.exporters.trt_graph import ENGINE_DIALECTS  # noqa: E402
from llmx.models.architecture import Activation  # noqa: E402
from llmx.models.decoder import forward  # noqa: E402
from llmx.models.model import Model, Weight, open_model  # noqa: E402
from llmx.models.ops_torch import TorchOps, gated  # noqa: E402
from llmx.quant.activations import InputScale, rounded  # noqa: E402
from llmx.quant.calibrate import Calibration  # noqa: E402
from llmx.quant.inputs import batches  # noqa: E402
from llmx.quant.workers import workers  # noqa: E402

CAPACITY = 96
ENTRIES = {"W8A16": {"session.qdq_matmulnbits_accuracy_level": "1"}}  # else onnxruntime rounds the inputs, too
MAX_KL = 1e-9
MAX_KL_F16 = 1e-5
MAX_KL_8_BITS = 2e-3  # in half precision: an input on the edge of two codes falls to either side
DECODED = 6  # positions one by one
FAMILIES = (
    "llama, tied",
    "mistral past its window",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma3",
    "phi3",
    "gpt2",
)


def export(
    model: Model, target: Path, dialect: str, type_name: str = "F32", **options: object
) -> tuple[OnnxExport, Path]:
    planned = prepare(model, OnnxOptions(type_name, dialect, capacity=CAPACITY, **options))  # type: ignore[arg-type]
    target.mkdir(exist_ok=True)
    files = [target / file.name for file in planned.plan.files]
    write(planned, files)
    assert [path.stat().st_size for path in files] == [file.nbytes for file in planned.plan.files]
    return planned, files[0]


# ── floats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dialect", ENGINE_DIALECTS)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers_at_once_in_chunks_and_one_by_one(
    name: str, dialect: str, tmp_path: Path
) -> None:
    reference = save(CASES[name], tmp_path / "model")
    model = open_model(tmp_path / "model")
    limit = CASES[name].length if "past its context" in name else model.architecture.context_length
    tokens = random_tokens(min(CASES[name].length, limit))
    start = len(tokens) - DECODED
    _, graph = export(model, tmp_path / "onnx", dialect)
    run = CachedGraph(graph, CAPACITY)
    # In this order: transformers keeps the longest length that a dynamic rope has seen.
    singly = decoded_logits(reference, tokens, start)
    assert kl(singly, run.logits(tokens, range(start, len(tokens)))) < MAX_KL
    at_once = reference_logits(reference, tokens)
    assert kl(at_once, run.logits(tokens)) < MAX_KL
    if "past its" not in name:  # a rope that depends on the length differs from chunk to chunk
        assert kl(at_once, run.logits(tokens, (3, start // 2))) < MAX_KL


@pytest.mark.parametrize("dialect", ENGINE_DIALECTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_loses_next_to_nothing(name: str, dialect: str, tmp_path: Path) -> None:
    reference = save(CASES[name], tmp_path / "model")
    planned, graph = export(open_model(tmp_path / "model"), tmp_path / "onnx", dialect, "F16")
    tokens = random_tokens(40)
    found = kl(reference_logits(reference, tokens), CachedGraph(graph, CAPACITY).logits(tokens, range(34, 40)))
    print(f"KL16 {name} | {dialect} | {found:.1e}")
    assert 0 < found < MAX_KL_F16
    wide = {one.name for one in planned.stored if one.type_name == "F32"}
    assert not any(name.endswith((".q.weight", ".q+k+v.weight", "embedding.weight")) for name in wide)


@pytest.mark.parametrize("dialect", ENGINE_DIALECTS)
def test_sequences_of_one_run_have_lengths_and_pads_of_their_own(dialect: str, tmp_path: Path) -> None:
    reference = save(CASES["mistral past its window"], tmp_path / "model")
    _, graph = export(open_model(tmp_path / "model"), tmp_path / "onnx", dialect)
    run, tokens, pads = CachedGraph(graph, CAPACITY, batch=2), random_tokens(40), 7
    theirs = [reference_logits(reference, tokens), reference_logits(reference, tokens[pads:])]
    prompts = run.run([tokens[:30], [*tokens[pads:30], *([5] * pads)]], [0, 0])
    assert kl(theirs[0][:30], prompts[0]) < MAX_KL and kl(theirs[1][: 30 - pads], prompts[1][: 30 - pads]) < MAX_KL
    for position in range(30, 40):  # what the pads wrote is written over before a query sees it
        logits = run.run([[tokens[position]]] * 2, [position, position - pads])
        assert kl(theirs[0][position][None], logits[0]) < MAX_KL
        assert kl(theirs[1][position - pads][None], logits[1]) < MAX_KL


def test_what_lies_behind_the_new_positions_in_the_cache_is_left_as_it_was(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    for dialect in ENGINE_DIALECTS:
        _, graph = export(open_model(tmp_path / "model"), tmp_path / dialect, dialect)
        run = CachedGraph(graph, CAPACITY)
        run.cache = {name: np.full_like(value, 0.25) for name, value in run.cache.items()}
        run.run([random_tokens(5)], [11])
        for value in run.cache.values():
            untouched = np.delete(value, range(11, 16), axis=2)
            assert (untouched == 0.25).all() and not (value[:, :, 11:16] == 0.25).all()


def test_old_operators_alone_stand_in_the_plain_graph_and_the_checker_passes_both(tmp_path: Path) -> None:
    new = {"RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Attention", "TensorScatter", "Gelu"}
    for name in ("llama, tied", "gpt2", "mixtral", "phi3, longrope past its context"):
        save(CASES[name], tmp_path / name)
        for dialect, opset in (("plain", 17), ("trt", 24)):
            _, graph = export(open_model(tmp_path / name), tmp_path / f"{name} {dialect}", dialect, "F16")
            onnx.checker.check_model(str(graph), full_check=True)
            loaded = onnx.load(graph, load_external_data=False)
            assert [(one.domain, one.version) for one in loaded.opset_import] == [("", opset)]
            kinds = {node.op_type for node in loaded.graph.node}
            assert not kinds & new if dialect == "plain" else kinds >= {"TensorScatter", "Attention"}


def test_a_cache_has_one_size_where_tensorrt_updates_it_in_place_and_is_open_elsewhere(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    for dialect, capacity, wanted in (("trt", 48, 48), ("trt", None, "capacity"), ("plain", 48, "capacity")):
        graph = prepare(model, OnnxOptions("F16", dialect, capacity=capacity)).graph.graph
        values = [*graph.inputs[2:], *graph.outputs[1:]]
        assert len(values) == 8
        for value in values:
            assert value.shape is not None
            assert str(value.shape[2]) == str(wanted)
        tables = [one for one in graph.initializers.values() if str(one.name).startswith("rope.")]
        assert tables and all(one.shape[0] == (capacity or model.architecture.context_length) for one in tables)


def test_a_tied_embedding_is_stored_once_and_heads_are_as_wide_as_asked(tmp_path: Path) -> None:
    save(CASES["llama, tied"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    for dialect, wide in (("trt", False), ("plain", True)):
        for asked in (None, False, True):
            planned = prepare(model, OnnxOptions("F16", dialect, wide_head=asked))
            assert [one.name for one in planned.stored].count("embedding.weight") == 1
            (table,) = (v for v in planned.graph.graph.initializers.values() if v.name == "embedding.weight")
            readers = {use.node.op_type: use.node for use in table.uses()}
            assert readers.keys() <= {"Gather", "Cast", "Gemm"} and "Gather" in readers
            heads = [table, *(readers["Cast"].outputs if "Cast" in readers else ())]
            (head,) = (
                node for node in planned.graph.graph
                if node.op_type == "Gemm" and node.inputs[1] in heads
            )  # fmt: skip
            hidden = head.inputs[0]
            assert hidden is not None
            # A narrow head is given what was rounded to half precision.
            before = hidden.producer()
            assert (before is not None and before.op_type == "Cast") != (wide if asked is None else asked)


def test_bfloat16_is_stored_as_such(tmp_path: Path) -> None:
    import onnx_ir as ir

    save(CASES["llama"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    planned, graph = export(model, tmp_path / "onnx", "trt", "BF16")
    loaded = ir.load(graph)
    found = loaded.graph.initializers["layers.0.o.weight"].const_value
    assert found is not None and found.dtype == ir.DataType.BFLOAT16
    wanted = torch.from_numpy(model.weight("layers.0.o.weight").read()).bfloat16().float().numpy()
    assert np.array_equal(found.numpy().astype(np.float32), wanted)
    assert planned.plan.type_name == "BF16"


# ── few bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class DecodedOps(TorchOps):
    """The decoder's operations on what encodings make of weights, and inputs rounded as the graph is meant to."""

    def __init__(self, types: Mapping[str, str], scales: Mapping[str, InputScale]) -> None:
        super().__init__()
        self._types, self._scales = types, scales

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        kept = self._types.get(weight.spec.name, "F32")
        if "-" not in kept:
            return super()._load(weight, start, stop)
        rows = encoding(kept).encode(weight.read(start, stop))
        return torch.from_numpy(encoding(kept).decode(rows, weight.cols))

    def _rounded(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        scale = self._scales.get(weight.spec.name)
        return x if scale is None else torch.from_numpy(rounded(x.numpy(), scale))

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        return super().linear(self._rounded(x, weight), weight, bias)

    def experts(
        self, x: torch.Tensor, router: Weight, matrices: tuple[Weight, Weight, Weight], *, used: int, normalize: bool,
        activation: Activation,
    ) -> torch.Tensor:  # fmt: skip
        rows, result = x.reshape(-1, x.shape[-1]), torch.zeros(x.shape[-2], x.shape[-1])
        weights, chosen = self.route(rows, router, used=used, normalize=normalize)
        for expert in range(matrices[0].spec.shape[0]):
            row, place = torch.where(chosen == expert)
            gate, up, down = (self.expert(matrix, expert) for matrix in matrices)
            states = self._rounded(gated(self._rounded(rows[row], matrices[0]), gate, up, activation), matrices[2])
            result.index_add_(0, row, torch.nn.functional.linear(states, down) * weights[row, place, None])
        return result.view(x.shape)


def decoded(model: Model, tokens: list[int], types: Mapping[str, str], scales: Mapping[str, InputScale]) -> np.ndarray:
    with torch.inference_mode():
        ops = DecodedOps(types, scales)
        return forward(model, ops, torch.tensor([tokens]), torch.arange(len(tokens)))[0].numpy()


def mixed(model: Model, mix_name: str) -> tuple[dict[str, str], dict[str, InputScale]]:
    """The types and the measured scales of a mix."""
    mix = find_mix(mix_name)
    types = planned_types(model.architecture, mix)
    if mix.inputs is None:
        return types, {}
    text = np.random.default_rng(3).integers(3, model.architecture.vocab, (6, 32)).tolist()
    names = [name for name, kind in types.items() if "-" in kind]
    with workers(1) as pool:
        return types, dict(input_scales(model, Calibration(batches(text, 0)), pool, mix.inputs, names))


@pytest.mark.parametrize("mix", ["W4A16", "W8A16", "FP8", "W8A8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_of_few_bits_computes_what_its_codes_stand_for(name: str, mix: str, tmp_path: Path) -> None:
    save(CASES[name], tmp_path / "model")
    model, tokens = open_model(tmp_path / "model"), random_tokens(40)
    types, scales = mixed(model, mix)
    theirs = decoded(model, tokens, types, scales)
    dialects = ["trt"] if mix in ("W4A16", "FP8") else list(ENGINE_DIALECTS)
    for dialect in dialects:
        for type_name, limit in (("F32", MAX_KL), ("F16", MAX_KL_8_BITS if scales else MAX_KL_F16)):
            _, graph = export(model, tmp_path / "onnx", dialect, type_name, types=types, scales=scales)
            ours = CachedGraph(graph, CAPACITY, entries=UNFUSED if scales else ENTRIES.get(mix)).logits(
                tokens, (20, 39)
            )
            print(f"KL {mix} {name} | {dialect} {type_name} | {kl(theirs, ours):.1e}")
            assert kl(theirs, ours) < limit


def test_codes_are_stored_signed_without_zero_points_and_their_scales_as_they_are_kept(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    kinds = {
        ("W4A16", "F16"): ("INT4", "F16"),
        ("W4A16", "F32"): ("INT4", "F32"),
        ("W4A16", "BF16"): ("INT4", "F16"),
        ("W8A16", "F16"): ("INT8", "F32"),
        ("FP8", "F16"): ("FLOAT8E4M3FN", "F32"),
    }
    for (mix, type_name), (codes, scales) in kinds.items():
        types = planned_types(model.architecture, find_mix(mix))
        stored = {one.name: one for one in prepare(model, OnnxOptions(type_name, "trt", types=types)).stored}
        name = "layers.0.q+k+v.weight"
        assert stored[f"{name}.codes"].type_name == codes and stored[f"{name}.scales"].type_name == scales
        assert stored[f"{name}.codes"].shape == ((64, 32) if codes == "INT4" else (32, 64))
        assert not any(one.endswith("zero_points") for one in stored)


def test_a_builder_of_old_is_given_what_8_bit_codes_stand_for_and_finds_them_again(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    types, scales = mixed(model, "W8A8")
    alone = [name for name, kind in types.items() if "-" in kind and name not in scales]
    planned, graph = export(model, tmp_path / "onnx", "plain", "F16", types=types, scales=scales)
    stored = {one.name: one.type_name for one in planned.stored}
    assert stored["layers.0.o.weight.values"] == "F32" and stored["layers.0.o.weight.scales"] == "F32"
    told = f"{len(alone)} matrices, whose inputs are floats"
    assert [told in note for note in planned.plan.notes] == [True] * bool(alone)
    loaded = onnx.load(graph)
    made_by = {name: node for node in loaded.graph.node for name in node.output}
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in loaded.graph.initializer}
    product = next(n for n in loaded.graph.node if n.op_type == "MatMul" and n.input[1] in made_by
                   and made_by[n.input[1]].op_type == "Transpose")  # fmt: skip
    dequantize = made_by[made_by[product.input[1]].input[0]]
    quantize, inputs = made_by[dequantize.input[0]], made_by[product.input[0]]
    assert (quantize.op_type, dequantize.op_type, inputs.op_type) == (
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear",
    )  # fmt: skip
    values, steps, zeros = (arrays[name] for name in quantize.input)
    assert zeros.dtype == np.int8 and not zeros.any() and zeros.shape == steps.shape
    codes = values / steps[:, None]
    assert np.abs(codes - np.rint(codes)).max() < 1e-4 and np.abs(np.rint(codes)).max() <= 128


@pytest.mark.parametrize(
    ("dialect", "kind", "told"),
    [
        ("plain", "int4-g32-pos", "8 bits by channel"),
        ("plain", "fp8-channel-float32", "8 bits by channel"),
        ("trt", "int4-g32-zp", "without zero points"),
        ("trt", "int8-g32-pos", "FP8 by channel"),
        ("trt", "int4-g64-pos", "groups of 32, 64, 128"),  # rows of 32
    ],
)
def test_what_an_engine_cannot_hold_is_refused_by_name(dialect: str, kind: str, told: str, tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    with pytest.raises(UnsupportedError) as caught:
        prepare(model, OnnxOptions("F16", dialect, types={"layers.0.q.weight": kind}))
    assert list(caught.value.problems) == [f"layers.0.q.weight: {kind}"]
    assert told in str(caught.value.fix)


def test_a_quantized_embedding_and_foreign_types_are_refused(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    model = open_model(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="looks up rows of floats"):
        prepare(model, OnnxOptions("F16", "trt", types={"embedding.weight": "int4-g32-pos"}))
    with pytest.raises(UsageError, match="fp8-tensor-float32"):
        prepare(model, OnnxOptions("F16", "trt", types={"layers.0.q.weight": "fp8-tensor-float32"}))
    with pytest.raises(UsageError, match="BF16"):
        prepare(model, OnnxOptions("BF16", "ort"))
    with pytest.raises(UsageError, match="fp8-channel-float32"):
        prepare(model, OnnxOptions("F16", "ort", types={"layers.0.q.weight": "fp8-channel-float32"}))


def test_experts_that_all_compute_are_told_in_the_plan(tmp_path: Path) -> None:
    save(CASES["mixtral"], tmp_path / "mixtral")
    save(CASES["llama"], tmp_path / "llama")
    for dialect in ENGINE_DIALECTS:
        assert "all 5 experts" in prepare(open_model(tmp_path / "mixtral"), OnnxOptions("F16", dialect)).plan.notes[0]
        assert not prepare(open_model(tmp_path / "llama"), OnnxOptions("F16", dialect)).plan.notes
