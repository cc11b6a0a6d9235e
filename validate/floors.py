"""How near a runtime's float32 arithmetic comes to that of transformers, by format and activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Floor:
    """The largest mean KL (nats) and logit difference of a sound conversion, and why.

    gelu_table: the runtime looks GELU up in a table, which accounts for most of it.
    """

    kl: float
    logits: float
    origin: str
    gelu_table: bool = False


EXACT = Floor(1e-6, 1e-3, "float32 rounding; measured on llama.cpp: KL 2e-12 to 4e-12, logits 3e-5 to 8e-5")
GELU_TABLE = Floor(
    1e-5, 2e-2, "ggml looks GELU up in a float16 table; measured: KL 1e-8 to 6e-8, logits 3e-3", gelu_table=True
)
ONNX_HALF_TABLES = Floor(
    1e-6, 2e-2, "its rotary tables are in float16; measured on onnxruntime: KL 3e-8 to 4e-8, logits 2e-3 to 3e-3"
)
ONNX = Floor(1e-6, 1e-3, "float32 rounding; measured on onnxruntime: KL 3e-13 to 2e-12, logits 5e-6 to 4e-5")
SAME_LIBRARY = Floor(1e-6, 1e-3, "float32 rounding; transformers on both sides, positions cut otherwise")
TENSORRT = Floor(1e-6, 1e-2, "float32 rounding, sums in the order of the GPU's kernels; engines take no TF32")
GGUF_FLOORS: Mapping[str, Floor] = {"silu": EXACT, "gelu": GELU_TABLE, "gelu_tanh": GELU_TABLE}
