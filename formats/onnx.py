"""The names, versions and places that an ONNX package keeps to. No numerics, and no onnx is imported here.

    model.onnx        the graph: a protobuf without weights
    model.onnx.data   the weights, each at the place that the graph names ("external data")

    data | weight | padding | weight | padding | ... |

A weight of at least LARGE bytes begins at a multiple of PAGE, so that every system can map it into memory
(https://onnx.ai/onnx/repo-docs/ExternalData.html); a smaller one at a multiple of WORD.

A float weight is one tensor under its canonical name. One of few bits is two or three, NAME.codes, NAME.scales and
NAME.zero_points, laid out for the operator that reads them:

    rows       MatMulNBits         codes u8[N, groups, bytes]    scales float[N, groups]    zero points u8[N, bytes]
    columns    DequantizeLinear    codes intb[K, N]              scales float[groups, N]    zero points intb[groups, N]
    decoded    QuantizeLinear      values float[N, K]            scales float[N], for products of 8 bits
    signed     DequantizeLinear    codes int4[N, K]              scales float[N, groups]
    channels   DequantizeLinear    codes int8 or FP8 [K, N]      scales float[N]

N outputs, K inputs; intb is uintb with zero points and signed without. Signed rows are those of graphs for TensorRT;
decoded ones those for TensorRT 8, which finds the codes again by itself: there NAME.values is what codes stand for.
Columns of less than 8 bits are filled up with zeros to whole bytes. Matrices with the same inputs may be one, their
outputs under each other: layers.0.q+k+v.weight; experts are told apart by their number:
layers.0.expert_gate[3]+expert_up[3].weight.

A table whose rows are looked up is the same bytes under another name, so that it and a tied head are stored once:

    NAME.codes.table      u8[N, bytes]          rows, for GatherBlockQuantized
    NAME.PART.columns     as the part, but of less than 8 bits as u8[K or groups, bytes]     columns, for Gather
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MODEL_NAME = "model.onnx"
DATA_SUFFIX = ".data"  # appended to the graph's name

# RMSNormalization, RotaryEmbedding and Attention came with 23. onnxruntime 1.32 has no kernels of some later operators.
OPSET = 24
# What TensorRT 8.5 and 8.6 read.
OPSET_PLAIN, IR_VERSION_PLAIN = 17, 8
IR_VERSION = 10  # has 4-bit integers, the newest thing that is used; runtimes refuse a version newer than themselves
VENDOR_DOMAIN = "com.microsoft"
VENDOR_OPSET = 1

# The sets that first have 2-bit integers, for graphs that hold some.
OPSET_2_BITS, IR_VERSION_2_BITS = 25, 13

PAGE, LARGE, WORD = 1 << 16, 1 << 20, 64

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
START = "start"  # of graphs for TensorRT: how many positions each sequence's cache holds
PARTS = ("key", "value")
CODES, SCALES, ZERO_POINTS, VALUES = "codes", "scales", "zero_points", "values"
TABLE, COLUMNS = "table", "columns"  # the ends of other views of a part, for looking up rows
# Of the inputs of a matrix that are rounded to 8 bits on one scale: constants of the graph, named after the matrix.
INPUT_SCALE, INPUT_ZERO_POINT = ".input_scale", ".input_zero_point"
TYPES_KEY = "llmx.types"  # in the graph's metadata: JSON, canonical name -> encoding, of every quantized weight


@dataclass(frozen=True, slots=True)
class FloatType:
    """A type of weights: its name in onnx.TensorProto.DataType, that in numpy, and its bytes."""

    onnx: str
    numpy: str
    nbytes: int


FLOATS: dict[str, FloatType] = {
    "F32": FloatType("FLOAT", "float32", 4),
    "F16": FloatType("FLOAT16", "float16", 2),
    "BF16": FloatType("BFLOAT16", "bfloat16", 2),  # numpy knows it once ml_dtypes is imported, as onnx-ir does
}


FLOAT8 = "FLOAT8E4M3FN"  # of codes, in graphs for TensorRT only


def integer_type(bits: int, signed: bool) -> str:
    """The name in onnx.TensorProto.DataType of whole numbers of so many bits."""
    return f"{'INT' if signed else 'UINT'}{bits}"


def tensor_bytes(type_name: str, count: int) -> int:
    """Bytes of so many elements. type_name: of FLOATS, FLOAT8, or of integer_type, which fill their bytes."""
    if type_name == FLOAT8:
        return count
    if type_name in FLOATS:
        return count * FLOATS[type_name].nbytes
    return -(-count * int(type_name.lstrip("UINT")) // 8)


def joined_name(names: Sequence[tuple[str, int | None]]) -> str:
    """The name of matrices under each other, of (canonical name, expert's number) each: all of one layer."""
    stems = [name.rsplit(".", 2) for name, _ in names]
    roles = [f"{stem[-2]}{'' if n is None else f'[{n}]'}" for stem, (_, n) in zip(stems, names, strict=True)]
    return ".".join([*stems[0][:-2], "+".join(roles), stems[0][-1]])


def split_name(name: str) -> list[tuple[str, int | None]]:
    """The exact inverse of `joined_name`."""
    *layer, roles, part = name.rsplit(".", 2)
    found = []
    for role in roles.split("+"):
        plain, _, expert = role.rstrip("]").partition("[")
        found.append((".".join([*layer, plain, part]), int(expert) if expert else None))
    return found


def past(layer: int, part: str) -> str:
    """The name of a graph's input: a layer's cached keys or values, float[batch, kv heads, past, D]."""
    return f"past_key_values.{layer}.{part}"


def present(layer: int, part: str) -> str:
    """The name of a graph's output: the same with the new positions behind, float[batch, kv heads, total, D]."""
    return f"present.{layer}.{part}"


def places(sizes: Iterable[int]) -> tuple[list[int], int]:
    """(the offset of each weight, the size of the file) for weights of so many bytes, in this order."""
    offsets, end = [], 0
    for size in sizes:
        unit = PAGE if size >= LARGE else WORD
        offsets.append(-(-end // unit) * unit)
        end = offsets[-1] + size
    return offsets, end
