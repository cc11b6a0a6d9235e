"""The names, versions and places that an ONNX package keeps to. No numerics, and no onnx is imported here.

    model.onnx        the graph: a protobuf without weights
    model.onnx.data   the weights, each at the place that the graph names ("external data")

    data | weight | padding | weight | padding | ... |

A weight of at least LARGE bytes begins at a multiple of PAGE, so that every system can map it into memory
(https://onnx.ai/onnx/repo-docs/ExternalData.html); a smaller one at a multiple of WORD.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MODEL_NAME = "model.onnx"
DATA_SUFFIX = ".data"  # appended to the graph's name

# RMSNormalization, RotaryEmbedding and Attention came with 23. onnxruntime 1.32 has no kernels of some later operators.
OPSET = 24
IR_VERSION = 10  # has 4-bit integers, the newest thing that is used; runtimes refuse a version newer than themselves
VENDOR_DOMAIN = "com.microsoft"
VENDOR_OPSET = 1

PAGE, LARGE, WORD = 1 << 16, 1 << 20, 64

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PARTS = ("key", "value")


@dataclass(frozen=True, slots=True)
class FloatType:
    """A type of weights: its name in onnx.TensorProto.DataType, that in numpy, and its bytes."""

    onnx: str
    numpy: str
    nbytes: int


FLOATS: dict[str, FloatType] = {
    "F32": FloatType("FLOAT", "float32", 4),
    "F16": FloatType("FLOAT16", "float16", 2),
}


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
