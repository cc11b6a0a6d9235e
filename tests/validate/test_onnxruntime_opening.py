"""What onnxruntime is not given to open, and what it computes exactly: graphs of one matrix, made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed: pip install 'llmx[onnx]'")

from onnx import NodeProto, TensorProto, helper, numpy_helper

from llmx.errors import IntegrityError, UnsupportedError
from llmx.validate.runtimes.onnxruntime import OnnxRuntime

COLUMNS, ROWS, VOCAB, BLOCK = 64, 48, 20, 32
VENDOR = "com.microsoft"
RANDOM = np.random.default_rng(0)
TABLE = RANDOM.standard_normal((VOCAB, COLUMNS)).astype(np.float32)
CODES = RANDOM.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
SCALES = RANDOM.random((ROWS, COLUMNS // BLOCK)).astype(np.float32)
WEIGHT = (CODES.astype(np.float32) - 8) * np.repeat(SCALES, BLOCK, 1)
TOKENS = list(range(VOCAB))


def matrix(**attributes: Any) -> NodeProto:
    told = {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": BLOCK, **attributes}
    return helper.make_node("MatMulNBits", ["rows", "codes", "scales"], ["logits"], "matrix", domain=VENDOR, **told)


def packed() -> dict[str, np.ndarray]:
    """Codes and scales as MatMulNBits takes them."""
    codes = (CODES[:, 0::2] | (CODES[:, 1::2] << 4)).reshape(ROWS, COLUMNS // BLOCK, BLOCK // 2)
    return {"codes": codes, "scales": SCALES}


def decoder(
    folder: Path,
    *last: NodeProto,
    weights: Mapping[str, np.ndarray],
    opset: int = 24,
    extra: TensorProto | None = None,
    kind: int = TensorProto.FLOAT,
) -> Path:
    """Write a decoder of a table, the nodes `last` from its rows to the logits, and a cache that holds the ids."""
    floats, ids = TensorProto.FLOAT, TensorProto.INT64
    cache = ["past_key_values.0.key", "past_key_values.0.value"]
    made = ["present.0.key", "present.0.value"]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], "embed"),
        helper.make_node("Cast", ["input_ids"], ["floats"], "cast", to=floats),
        helper.make_node("Reshape", ["floats", "heads"], ["news"], "split"),
        *(
            helper.make_node("Concat", [past, "news"], [new], new, axis=2)
            for past, new in zip(cache, made, strict=True)
        ),
        *last,
    ]
    inputs = [helper.make_tensor_value_info(name, ids, ["b", name]) for name in ("input_ids", "attention_mask")]
    inputs += [helper.make_tensor_value_info(name, floats, ["b", 1, "past", 1]) for name in cache]
    outputs = [helper.make_tensor_value_info("logits", floats, ["b", "t", ROWS])]
    outputs += [helper.make_tensor_value_info(name, floats, ["b", 1, "total", 1]) for name in made]
    stored = {"table": TABLE, "heads": np.array([1, 1, -1, 1]), **weights}
    initializers = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    for one in initializers[2:]:
        external(folder, one)
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(VENDOR, 1)]
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString())
    return path


def external(folder: Path, tensor: TensorProto) -> None:
    """Move a tensor's bytes to a file of its own."""
    raw = tensor.raw_data
    (folder / f"{tensor.name}.data").write_bytes(raw)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    told = {"location": f"{tensor.name}.data", "offset": "0", "length": str(len(raw))}
    for key, value in told.items():
        tensor.external_data.add(key=key, value=value)


def largest_error(path: Path, *, exact: bool, level: str = "all") -> float:
    with OnnxRuntime(level=level).open(path, threads=1, context=32, exact=exact) as session:
        rows = np.concatenate(list(session.logits(TOKENS)))
    wanted = TABLE @ WEIGHT.T
    return float(np.abs(rows - wanted).max() / np.abs(wanted).max())


def test_exact_is_float32_where_the_node_asks_for_8_bits(tmp_path: Path) -> None:
    path = decoder(tmp_path, matrix(accuracy_level=4), weights=packed())
    assert largest_error(path, exact=True) < 1e-6
    assert largest_error(path, exact=False) > 1e-3


def test_exact_leaves_a_node_that_asks_for_nothing_and_the_file_alone(tmp_path: Path) -> None:
    path = decoder(tmp_path, matrix(), weights=packed())
    before = path.read_bytes()
    assert largest_error(path, exact=True) < 1e-6 and largest_error(path, exact=False) < 1e-6
    assert path.read_bytes() == before


@pytest.mark.parametrize("level", ["none", "basic", "all"])
def test_exact_is_float32_for_weights_that_onnx_itself_dequantizes(tmp_path: Path, level: str) -> None:
    nodes = (
        helper.make_node("DequantizeLinear", ["columns", "sizes"], ["weight"], "dequantize", axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["rows", "weight"], ["logits"], "multiply"),
    )
    codes = helper.make_tensor("columns", TensorProto.INT4, [COLUMNS, ROWS], (CODES.T.astype(np.int8) - 8).ravel())
    path = decoder(tmp_path, *nodes, weights={"columns": numpy_helper.to_array(codes), "sizes": SCALES.T.copy()})
    assert largest_error(path, exact=True, level=level) < 1e-6
    if level == "all":
        assert largest_error(path, exact=False, level=level) > 1e-3


@pytest.mark.parametrize(
    ("node", "opset", "reason"),
    [
        (matrix(bits=3), 24, r"matrix: weights of 3 bits; the kernel runs 2, 4, 8"),
        (matrix(block_size=24), 24, r"matrix: blocks of 24 weights; with 4 bits .* powers of two from 16"),
        (matrix(block_size=8), 24, r"matrix: blocks of 8 weights"),
        (matrix(bits=2, block_size=512), 24, r"matrix: blocks of 512 .* at most 256"),
        (helper.make_node("Multiply", ["rows"], ["logits"], "mine", domain=VENDOR), 24, r"mine: .* no operator"),
        (helper.make_node("RandomUniformLike", ["rows"], ["logits"], "noise"), 24, r"noise: .* no kernel of Random"),
        (helper.make_node("Identity", ["rows"], ["logits"], "same"), 99, r"opset 99"),
    ],
)
def test_what_the_kernels_do_not_run_is_named_with_its_node(
    tmp_path: Path, node: NodeProto, opset: int, reason: str
) -> None:
    path = decoder(tmp_path, node, weights=packed(), opset=opset)
    with pytest.raises((UnsupportedError, IntegrityError), match=reason):
        OnnxRuntime().open(path, threads=1, context=8)


def test_operators_that_onnx_composes_of_others_are_run(tmp_path: Path) -> None:
    nodes = (
        helper.make_node("Swish", ["rows"], ["swished"], "swish"),
        helper.make_node("MatMul", ["swished", "weight"], ["logits"], "multiply"),
    )
    path = decoder(tmp_path, *nodes, weights={"weight": WEIGHT.T.copy()})
    with OnnxRuntime().open(path, threads=1, context=32) as session:
        rows = np.concatenate(list(session.logits(TOKENS)))
    wanted = (TABLE / (1 + np.exp(-TABLE))) @ WEIGHT.T
    assert np.abs(rows - wanted).max() < 1e-3


def test_a_data_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = decoder(tmp_path, matrix(), weights=packed())
    (tmp_path / "codes.data").rename(tmp_path / "elsewhere")
    (tmp_path / "codes.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="symbolic link"):
        OnnxRuntime().open(path, threads=1, context=8)
