"""The names and byte layouts of TensorRT-LLM checkpoints. No numerics: packing and unpacking of given codes.

Two layouts hold the same weights:

    hf       config.json · hf_quant_config.json · model.safetensors (or shards and an index) · the tokenizer's files
             Hugging Face's names, as ModelOpt writes them: TensorRT-LLM on PyTorch and TensorRT Edge-LLM read it
    ranks    config.json · rank0.safetensors … rankN.safetensors
             TensorRT-LLM's own names, one file a GPU: what trtllm-build of TensorRT-LLM up to 1.2 reads

A quantized matrix of N outputs and K inputs is several tensors, named after its module:

    4 bits   weight           hf U8, ranks I8 [N/2, K]   two outputs a byte, see `pack_pairs`
             scales           hf F32, ranks as floats [N, K/group]
             pre-scale        [K], what inputs are multiplied by first: ones, such scales are folded into the weights
    8 bits   weight           I8 [N, K]                 value = scale · code
             scales           F32 [N]
             pre-scale        as above, where inputs are in 8 bits, too
    FP8      weight           F8_E4M3 [N, K]            value = scale · E4M3(byte)
             scale            F32, hf [], ranks [1]     one for the whole matrix
    inputs   input scale      F32, hf [], ranks [1]     value = scale · code, of inputs in 8 bits or FP8

                hf                      ranks
    weight      weight                  weight
    scales      weight_scale            weights_scaling_factor
    pre-scale   pre_quant_scale         prequant_scaling_factor
    inputs      input_scale             activation_scaling_factor
    the cache   k_proj.k_scale          attention.kv_cache_scaling_factor, the larger of both
                v_proj.v_scale

In ranks, matrices of one product are one tensor, and experts are stacked: their tensors have one more axis in front
(of FP8, scales are [experts, 1] then).

Sources: ModelOpt 0.47 (torch/export), TensorRT-LLM 1.0 (models/modeling_utils.py, layers, quantization/layers.py) and
main (_torch/modules/linear.py), TensorRT Edge-LLM 0.7 (checkpoint/loader.py, models/linear.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError

Bytes = NDArray[np.uint8]

HF, RANKS = "hf", "ranks"
LAYOUTS = (HF, RANKS)

CONFIG_NAME = "config.json"
QUANT_NAME = "hf_quant_config.json"
MODEL_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
RANK_NAME = re.compile(r"rank(\d+)\.safetensors")

WEIGHT, SCALES, PRE_SCALE, INPUT_SCALE = "weight", "scales", "pre_scale", "input_scale"
SUFFIXES: Mapping[str, Mapping[str, str]] = {
    HF: {WEIGHT: "weight", SCALES: "weight_scale", PRE_SCALE: "pre_quant_scale", INPUT_SCALE: "input_scale"},
    RANKS: {
        WEIGHT: "weight",
        SCALES: "weights_scaling_factor",
        PRE_SCALE: "prequant_scaling_factor",
        INPUT_SCALE: "activation_scaling_factor",
    },
}
"""Layout -> part of a quantized matrix -> what follows its module's name."""
CACHE_SCALE = "kv_cache_scaling_factor"  # of ranks
KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"  # of hf

# The group sizes that TensorRT-LLM's kernels take, and those that can be written.
KERNEL_GROUPS = (128, 64)
GROUPS = (*KERNEL_GROUPS, 32)
MIDDLE_4, MIDDLE_8 = 8, 0x80  # the codes that stand for zero, where codes count from 0


def shard_name(number: int, count: int) -> str:
    """The name of a file of the hf layout, which is one of `count`. number: from 0."""
    return MODEL_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def rank_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank{rank}.safetensors"


def pack_pairs(codes: Bytes) -> Bytes:
    """u8[N/2, K]: codes (u8[N, K], 0 … 15, zero is 8) of two neighbouring outputs in one byte, two's complement.

        byte [j, k]    high bits: code of output 2j + 1        low bits: code of output 2j

        code        0    1   …    7    8    9   …   15
        nibble      8    9   …   15    0    1   …    7
        stands for −8   −7   …   −1    0    1   …    7

    N is even.
    """
    signed = codes ^ np.uint8(MIDDLE_4)
    return signed[0::2] | (signed[1::2] << np.uint8(4))


def unpack_pairs(data: Bytes) -> Bytes:
    """u8[2n, K]: the exact inverse of `pack_pairs`, of u8[n, K]."""
    rows, cols = data.shape
    codes = np.empty((2 * rows, cols), np.uint8)
    codes[0::2] = (data & np.uint8(15)) ^ np.uint8(MIDDLE_4)
    codes[1::2] = (data >> np.uint8(4)) ^ np.uint8(MIDDLE_4)
    return codes


def turned(codes: Bytes) -> Bytes:
    """u8[…]: bytes that count from 0, with zero at 128, as signed bytes in two's complement; and the way back."""
    return codes ^ np.uint8(MIDDLE_8)


def narrowed(scales: NDArray[np.float32], group: int, stored: int) -> NDArray[np.float32]:
    """f32[rows, K / stored]: the scales of groups of `group` weights (f32[rows, K / group]) for groups of `stored`.

        group 128    |        s0         |        s1         |
        stored 64    |   s0    |   s0    |   s1    |   s1    |

    The values are the same. Raises: IntegrityError where `stored` does not divide `group`.
    """
    if group % stored:
        raise IntegrityError(f"groups of {group} weights cannot be told in groups of {stored}")
    return np.repeat(scales, group // stored, axis=1)
