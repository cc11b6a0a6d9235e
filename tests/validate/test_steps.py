"""Errors in steps of the grid: small for rounding, large for a flipped bit."""

from __future__ import annotations

import numpy as np
import pytest

from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import LEVELS, decode_codes, expand
from llmx.formats.ggml_packers import LAYOUTS, BlockScales, pack, unpack
from llmx.validate.steps import decode_with_error, steps

RANDOM = np.random.default_rng(0)
# The steps of the FP4 types grow with the level, and their scales are floats of their own.
TYPES = sorted(name for name, form in LAYOUTS.items() if not form.e2m1)


def sound(type_name: str, blocks: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """A tensor whose weights lie at most half a step from the grid: (u8[blocks, bytes], f32[blocks, weights])."""
    form, weights = LAYOUTS[type_name], BLOCKS[type_name].weights
    d = (RANDOM.uniform(1, 2, blocks) * 0.01).astype(np.float16)
    offset = None if form.offset is None else (RANDOM.uniform(1, 2, blocks) * 0.01).astype(np.float16)
    subs = (blocks, form.subs)
    largest = 15 if type_name == "Q2_K" else 31
    scales = RANDOM.integers(largest // 2, largest + 1, subs).astype(np.int8) if form.scales else None
    mins = RANDOM.integers(0, 8, subs).astype(np.int8) if form.has_mins else None
    fields = BlockScales(d, offset, scales, mins)
    codes = RANDOM.integers(0, len(LEVELS[type_name]), (blocks, weights)).astype(np.uint8)
    source = decode_codes(type_name, fields, codes)
    step = np.abs(expand(type_name, fields)[0]) * np.diff(LEVELS[type_name]).min()
    noise = RANDOM.uniform(-0.5, 0.5, source.shape) * np.repeat(step, weights // step.shape[1], axis=1)
    return pack(type_name, fields, codes), (source + noise).astype(np.float32)


@pytest.mark.parametrize("type_name", TYPES)
def test_rounding_is_at_most_half_a_step(type_name):
    data, source = sound(type_name)
    decoded, error = decode_with_error(type_name, data, source)
    assert decoded.shape == source.shape
    assert error <= 0.501


@pytest.mark.parametrize("type_name", sorted(set(TYPES) - {"Q2_K", "Q3_K"}))
def test_a_flipped_high_bit_of_a_code_is_far_off_the_grid(type_name):
    data, source = sound(type_name)
    scales, codes = unpack(type_name, data)
    codes[3, 17] ^= np.uint8(len(LEVELS[type_name]) // 2)
    _, error = decode_with_error(type_name, pack(type_name, scales, codes), source)
    assert error > 5.5


@pytest.mark.parametrize("type_name", TYPES)
def test_a_nan_scale_is_infinitely_far(type_name):
    data, source = sound(type_name)
    at = LAYOUTS[type_name].d
    data[0, at : at + 2] = [0, 0x7E]
    _, error = decode_with_error(type_name, data, source)
    assert error == np.inf


@pytest.mark.parametrize("type_name", sorted(set(TYPES) - {"Q2_K", "Q3_K"}))
def test_a_scale_whose_exponent_is_damaged_is_far_off_the_grid(type_name):
    data, source = sound(type_name)
    data[2, LAYOUTS[type_name].d + 1] ^= 0x10
    _, error = decode_with_error(type_name, data, source)
    assert error > 5


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_float_types_round_to_half_their_last_place(type_name):
    source = (RANDOM.standard_normal((4, 64)) * 0.1).astype(np.float32)
    bits = source.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    stored = source.astype(np.float16) if type_name == "F16" else nearest
    data = stored.view(np.uint8).copy()
    decoded, error = decode_with_error(type_name, data, source)
    assert np.abs(decoded - source).max() < 2e-3
    assert 0.2 < error <= 0.5


def test_float32_is_exact_and_a_flipped_exponent_bit_shows():
    source = RANDOM.standard_normal((4, 64)).astype(np.float32)
    data = source.view(np.uint8).copy()
    assert decode_with_error("F32", data, source)[1] == 0.0
    data[1, 3] ^= 0x01
    assert decode_with_error("F32", data, source)[1] > 1e5


def test_a_sub_block_whose_scale_is_zero_is_measured_by_the_rounding_of_scales():
    fields = BlockScales(np.array([0.01], np.float16), scales=np.zeros((1, 16), np.int8))
    step, rounding = steps("Q6_K", fields)
    assert (step == rounding).all()
    assert step[0, 0] == pytest.approx(0.5 * 0.01 * 32, rel=1e-3)
