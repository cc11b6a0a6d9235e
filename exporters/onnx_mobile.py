"""A graph on a phone: its .ort file, and what the phone's accelerators would take of it.

Both are asked of onnxruntime's own tools. A graph runs in partitions: runs of nodes that an accelerator takes, between
others that stay with the processor; every border costs a copy.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import IntegrityError, ResourceError, RuntimeMissing, UnsupportedError
from llmx.formats.onnx import VENDOR_DOMAIN
from llmx.formats.onnx_reader import graph_path, read_onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

ORT_SUFFIX = ".ort"
# The operators of a file, for those who build a small onnxruntime of their own.
OPERATORS_SUFFIX = ".required_operators.config"
CONVERTER = "onnxruntime.tools.convert_onnx_models_to_ort"
CHECKER = "onnxruntime.tools.mobile_helpers.usability_checker"
# A phone's processor, and not the layout of matrices that only x86 has.
PLATFORM = "arm"
# An .ort file is one flatbuffer, weights and all: its offsets are signed numbers of 32 bits.
LARGEST_ORT = 2**31 - (1 << 20)
SECONDS = 1800.0
LAST_LINES = 6

# https://github.com/onnxruntime/onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md, "Supported ONNX
# operators", of version 2.7; without those that it takes only within fixed patterns of nodes.
_OF_ONNX = """
Abs Add And ArgMax ArgMin Asin Atan AveragePool BatchNormalization Cast Ceil Clip Concat Conv ConvTranspose Cos CumSum
DepthToSpace DequantizeLinear Div Einsum Elu Equal Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm
GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity
InstanceNormalization Inverse IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
LpNormalization MatMul Max MaxPool Mean Min Mod Mul Neg NonZero Not Or PRelu Pad Pow QuantizeLinear RandomNormalLike
RandomUniformLike Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Relu RMSNormalization Reshape
Resize RoiAlign Round RotaryEmbedding STFT ScatterElements ScatterND Sigmoid Sign Sin Slice Softmax Softplus
SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where
"""
_OF_VENDOR = """
DequantizeLinear FusedMatMul Gelu MatMulNBits QuantizeLinear QuickGelu RotaryEmbedding SimplifiedLayerNormalization
"""
QNN_OPERATORS: dict[str, frozenset[str]] = {
    "": frozenset(_OF_ONNX.split()),
    VENDOR_DOMAIN: frozenset(_OF_VENDOR.split()),
}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What takes nodes of a graph. listing: its operators, a file of onnxruntime's checker or None for QNN_OPERATORS.

    rank: the largest of its tensors. any_size: it takes sizes that are known only when the graph runs.
    """

    listing: str | None
    rank: int
    any_size: bool
    note: str


ACCELERATORS: dict[str, Accelerator] = {
    "NNAPI": Accelerator("nnapi_supported_ops.md", 999, any_size=False, note="Android's, deprecated since Android 15"),
    "CoreML": Accelerator(
        "coreml_supported_mlprogram_ops.md",
        5,
        any_size=True,
        note="Apple's; it refuses a tensor without elements, as the caches are before the first token",
    ),
    "QNN": Accelerator(None, 999, any_size=False, note="Qualcomm's"),
}


class _QnnOperators:
    """What onnxruntime's checker asks of a list of operators."""

    def is_op_supported(self, node: NodeProto) -> bool:
        return node.op_type in QNN_OPERATORS.get("" if node.domain == "ai.onnx" else node.domain, ())

    def get_caveats(self) -> list[str]:
        return []


def mobile_report(path: Path) -> dict[str, dict[str, Any]]:
    """What each accelerator would take of a graph, by its name.

    nodes: all there are. taken, partitions: with the sizes as they are, unknown ones included. taken_if_fixed,
    partitions_if_fixed: were every size a number. left: operator -> nodes that are not taken at any size.
    unchecked: conditions of operators that were taken on trust. note: in words.
    Raises: RuntimeMissing without onnxruntime; IntegrityError for a broken or hostile graph.
    """
    _require()
    checker = importlib.import_module(CHECKER)
    path = graph_path(Path(path))
    read_onnx(path)
    model = _with_sizes(path)
    return {name: _taken(checker, model, one) for name, one in ACCELERATORS.items()}


def _taken(checker: Any, model: ModelProto, accelerator: Accelerator) -> dict[str, Any]:
    listed: Any = _QnnOperators()
    if accelerator.listing is not None:
        listed = checker._SupportedOpsChecker(Path(checker.__file__).with_name(accelerator.listing))
    found = {fixed: checker.check_partitioning(model.graph, listed, fixed, accelerator.rank) for fixed in (True, False)}
    now, then = found[not accelerator.any_size], found[False]
    left = Counter(_named(node) for node in model.graph.node if not listed.is_op_supported(node))
    return {
        "nodes": now.num_nodes,
        "taken": now.num_supported_nodes,
        "partitions": now.num_partitions,
        "taken_if_fixed": then.num_supported_nodes,
        "partitions_if_fixed": then.num_partitions,
        "left": dict(left.most_common()),
        "unchecked": sorted(" ".join(caveat.replace("<br/>", " ").split()) for caveat in listed.get_caveats()),
        "note": accelerator.note,
    }


def mobile_lines(report: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The report in a line for each accelerator."""
    return [f"{name} ({one['note']}): {_told(one)}" for name, one in report.items()]


def _told(one: Mapping[str, Any]) -> str:
    text = f"takes {one['taken']} of {one['nodes']} nodes in {one['partitions']} partitions"
    if one["taken_if_fixed"] != one["taken"]:
        text += f"; {one['taken_if_fixed']} in {one['partitions_if_fixed']} if every size were fixed"
    left = ", ".join(f"{name} ({count})" for name, count in one["left"].items())
    return f"{text}; it has no {left}" if left else text


def report_or_reason(path: Path) -> dict[str, Any]:
    """{"accelerators": mobile_report(path), "lines": it in words}; without onnxruntime only why there is none."""
    try:
        report = mobile_report(path)
    except RuntimeMissing as error:
        return {"accelerators": None, "lines": [f"not known: {error.what}"]}
    return {"accelerators": report, "lines": mobile_lines(report)}


def derived(path: Path) -> list[Path]:
    """Where `convert` writes."""
    return [path.with_suffix(suffix) for suffix in (OPERATORS_SUFFIX, ORT_SUFFIX)]  # the file itself last


def check_convertible(nbytes: int, where: Path | None = None) -> None:
    """Raise UnsupportedError where a graph of so many bytes fits no .ort file, RuntimeMissing without onnxruntime."""
    _require()
    if nbytes > LARGEST_ORT:
        what = f"a graph of {nbytes} bytes does not fit an .ort file, which holds at most {LARGEST_ORT}"
        raise UnsupportedError(what, where=where, fix="use model.onnx with its data file, or fewer bits")


def convert(path: Path) -> Path:
    """Write the .ort file of a graph beside it, and the list of operators that it takes; return the file's path.

    An .ort file holds its weights, so that a phone loads one file, and a minimal build of onnxruntime reads it.
    Raises: UnsupportedError for weights of 2 GiB and more; RuntimeMissing; IntegrityError with onnxruntime's words.
    """
    _require()
    path = graph_path(Path(path)).absolute()
    check_convertible(read_onnx(path).nbytes, path)
    with tempfile.TemporaryDirectory(prefix=".ort-", dir=path.parent) as folder:
        _run(path, Path(folder))
        for target in derived(path):
            _published(Path(folder) / target.name, target)
    return derived(path)[-1]


def _run(path: Path, folder: Path) -> None:
    """In a process of its own: the tool prints, and onnxruntime may abort on a graph."""
    settings = ["--optimization_style", "Fixed", "--target_platform", PLATFORM, "--output_dir", str(folder)]
    command = [sys.executable, "-P", "-m", CONVERTER, *settings, str(path)]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"there was no .ort file after {SECONDS:g} s", where=path) from error
    if done.returncode != 0 or not (folder / path.with_suffix(ORT_SUFFIX).name).is_file():
        lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise IntegrityError("onnxruntime makes no .ort file of this graph", where=path, problems=lines)


def _published(made: Path, target: Path) -> None:
    with made.open("rb") as stream:
        os.fsync(stream.fileno())
    made.replace(target)


def _with_sizes(path: Path) -> ModelProto:
    """The graph without its weights, each value with what is known of its size."""
    import onnx

    return onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))


def _named(node: NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _require() -> None:
    missing = [package for package in ("onnxruntime", "onnx") if importlib.util.find_spec(package) is None]
    if missing:
        raise RuntimeMissing(f"this takes the package {missing[0]}", fix="pip install 'llmx[onnx]'")
