"""Packing and unpacking: golden bytes, and exact inverses on anything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmx.errors import UnsupportedError
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_packers import LAYOUTS, BlockScales, pack, unpack


def counting(type_name: str) -> tuple[BlockScales, np.ndarray]:
    """One block whose every field counts up, so that a field in the wrong place shows."""
    form, block = LAYOUTS[type_name], BLOCKS[type_name]
    bits = sum(plane.bits for plane in form.codes)
    codes = (np.arange(block.weights) * 7 % (1 << bits)).astype(np.uint8)[None]
    half = {"MXFP4": np.array([0.25], np.float32), "NVFP4": np.ones(1, np.float32)}.get(
        type_name, np.array([1.5], np.float16)
    )
    widest = {"Q2_K": 15, "Q6_K": 127, "NVFP4": 127}.get(type_name, 63 if form.has_mins else 31)
    scales = (np.arange(form.subs) * 5 % (widest + 1)).astype(np.int8)[None] if form.scales else None
    mins = (np.arange(form.subs) * 11 % (widest + 1)).astype(np.int8)[None] if form.has_mins else None
    return BlockScales(half, None if form.offset is None else -half, scales, mins), codes


GOLDEN = {
    "Q4_0": "003e0077ee55cc33aa1188ff66dd44bb2299",
    "Q4_1": "003e00be0077ee55cc33aa1188ff66dd44bb2299",
    "Q5_0": "003e983367cc0077ee55cc33aa1188ff66dd44bb2299",
    "Q5_1": "003e00be983367cc0077ee55cc33aa1188ff66dd44bb2299",
    "Q8_0": "003e80878e959ca3aab1b8bfc6cdd4dbe2e9f0f7fe050c131a21282f363d444b5259",
    "IQ4_NL": "003e0077ee55cc33aa1188ff66dd44bb2299",
    "Q2_K": (
        "00b56a1fc4792ed3883de2974cf1a65b00ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa55"
        "00ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa55003e00be"
    ),
    "Q3_K": (
        "00ffffffff00000000ffffffff00000000ffffffff00000000ffffffff00000000ffaa5500ffaa5500ffaa5500ffaa5500ffaa55"
        "00ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5500ffaa5580d52a7fc4196eb3"
        "eeaebeba003e"
    ),
    "Q4_K": (
        "003e00be40454a8f80cb1621c4792ed30077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55"
        "cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa11"
        "88ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb2299"
    ),
    "Q5_K": (
        "003e00be40454a8f80cb1621c4792ed3000000ffff0000ffffff0000ffff0000ffffff0000ffff000000ffff0000ffff0077ee55"
        "cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa11"
        "88ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd"
        "44bb22990077ee55cc33aa1188ff66dd44bb2299"
    ),
    "Q6_K": (
        "0077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55"
        "cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa11"
        "88ff66dd44bb22990077ee55cc33aa1188ff66dd44bb2299888888dddd22227777778888dddd22227777778888dddd2222227777"
        "8888dddd888888dddd22227777778888dddd22227777778888dddd22222277778888dddd00050a0f14191e23282d32373c41464b"
        "003e"
    ),
    "IQ4_XS": (
        "003eaabf50fa943e0077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd"
        "44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb2299"
        "0077ee55cc33aa1188ff66dd44bb22990077ee55cc33aa1188ff66dd44bb2299"
    ),
    # Codes count levels upward, the nibbles are E2M1: code 0 (-6) is F, code 7 (0) is 0, code 15 (-0) is 8.
    "MXFP4": "7eff0077aa55cc33ee11889966bb44dd22",
    "NVFP4": "00050a0f1f80976ab54cd32e1f80976ab54cd32e1f80976ab54cd32e1f80976ab54cd32e",
}


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_a_block_has_exactly_the_golden_bytes(type_name: str) -> None:
    assert pack(type_name, *counting(type_name)).tobytes().hex() == GOLDEN[type_name]


@pytest.mark.parametrize("type_name", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_bytes_survive_unpack_and_pack(type_name: str, data) -> None:
    shape = (data.draw(st.integers(1, 3)), BLOCKS[type_name].bytes)
    blocks = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 255)))
    assert np.array_equal(pack(type_name, *unpack(type_name, blocks)), blocks)


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_any_fields_survive_pack_and_unpack(type_name: str) -> None:
    scales, codes = counting(type_name)
    again, same = unpack(type_name, pack(type_name, scales, codes))
    assert np.array_equal(same, codes)
    for field in ("d", "offset", "scales", "mins"):
        wanted, got = getattr(scales, field), getattr(again, field)
        assert (wanted is None) == (got is None)
        assert wanted is None or np.array_equal(wanted, got), field


def test_packing_writes_into_a_view_of_a_larger_array() -> None:
    scales, codes = counting("Q4_K")
    whole = np.zeros((3, BLOCKS["Q4_K"].bytes), np.uint8)
    pack("Q4_K", scales, codes, whole[1:2])
    assert not whole[0].any()
    assert np.array_equal(whole[1:2], pack("Q4_K", scales, codes))


def test_a_type_without_a_layout_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        unpack("IQ2_XXS", np.zeros((1, 66), np.uint8))
