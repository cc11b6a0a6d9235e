"""F16 and BF16: IEEE rounding on every kind of float."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmx.errors import IntegrityError
from llmx.formats.ggml_decode import decode
from llmx.quant.compiled import compiled
from llmx.quant.grid import encode
from llmx.quant.lanes import half


def every_kind_of_float(below: float) -> np.ndarray:
    """Random bit patterns, every float16, the half-ways between two and their neighbours; magnitudes under `below`."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2
    near = [np.nextafter(between, np.float32(0)), between, np.nextafter(between, np.float32(np.inf))]
    values = np.concatenate([bits, halves, -halves, *near, *(-side for side in near)])
    return values[np.abs(values) < below][None]


def test_f16_rounds_to_nearest_even_subnormals_included() -> None:
    values = every_kind_of_float(65520)
    assert np.array_equal(encode("F16", values).view("<u2"), values.astype(np.float16).view(np.uint16))


def test_bf16_rounds_to_nearest_even() -> None:
    values = every_kind_of_float(3.38e38)
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(encode("BF16", values).view("<i2"), wanted)


def test_bf16_weights_pass_through_unchanged() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80, (2, 64), dtype=np.uint16)
    values = decode("BF16", bits.view(np.uint8))
    assert np.array_equal(encode("BF16", values).view("<u2"), bits)


@pytest.mark.parametrize(("type_name", "value"), [("F16", 65520.0), ("BF16", 3.4e38)])
def test_a_value_that_would_become_infinite_is_refused(type_name: str, value: float) -> None:
    with pytest.raises(IntegrityError, match="largest"):
        encode(type_name, np.full((1, 4), -value, np.float32))


def test_the_scales_of_blocks_round_as_float16_and_saturate() -> None:
    @compiled
    def halves(values, out):
        for i in range(values.size):
            out[i] = half(values[i])

    values = every_kind_of_float(np.inf)[0]
    got = np.empty_like(values)
    halves(values, got)
    assert np.array_equal(got, np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32))
