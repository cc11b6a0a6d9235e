"""Rows in FP8: bytes known by heart, exact inverses, and the values that torch and ml_dtypes read in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import IntegrityError
from llmx.formats.float8_rows import decode, pack, parts, row_bytes, unpack
from llmx.formats.microfloats import E4M3, E4M3_CODES

CODES = 253  # that a grid uses: the second zero is none of them


def code_of(value: float) -> int:
    return int(np.argmin(np.abs(E4M3[:CODES] - np.float32(value))))


def test_bytes_known_by_heart() -> None:
    values = [0.0, 1.0, -1.0, 448.0, -448.0, 2.0**-9, -(2.0**-6), 1.5, 0.875 * 2.0**-6]
    codes = np.array([[code_of(value) for value in values]], np.uint8)
    data = pack(codes, np.array([0.5], np.float32))
    assert data.tobytes().hex(" ") == "00 38 b8 7e fe 01 88 3c 07 00 00 00 3f"
    assert decode(data, len(values)).tolist() == [[value / 2 for value in values]]


def test_every_byte_stands_for_what_torch_reads_in_it() -> None:
    stored = np.array([[byte for byte in range(256) if byte & 0x7F != 0x7F]], np.uint8)
    data = np.concatenate([stored, np.array([[1.0]], "<f4").view(np.uint8)], axis=1)
    wanted = torch.from_numpy(stored).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(decode(data, stored.shape[1]), wanted)


def test_every_byte_stands_for_what_ml_dtypes_reads_in_it() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    stored = np.array([[byte for byte in range(256) if byte & 0x7F != 0x7F]], np.uint8)
    data = np.concatenate([stored, np.array([[1.0]], "<f4").view(np.uint8)], axis=1)
    wanted = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(decode(data, stored.shape[1]), wanted)


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_unpacking_is_the_inverse_of_packing(rows: int, cols: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, CODES, (rows, cols)).astype(np.uint8)
    scales = np.exp(random.normal(0, 20, rows)).astype(np.float32)
    data = pack(codes, scales)
    assert data.shape == (rows, row_bytes(cols))
    found, kept = unpack(data, cols)
    assert np.array_equal(found, codes) and np.array_equal(kept, scales)
    assert np.array_equal(parts(data, cols).bits, data[:, :cols])
    wide = np.zeros((rows, row_bytes(cols) + 3), np.uint8)
    pack(codes, scales, wide[:, 1:-2])
    assert np.array_equal(wide[:, 1:-2], data) and not wide[:, [0, -1, -2]].any()


def test_a_row_of_other_bytes_is_refused() -> None:
    with pytest.raises(IntegrityError, match="takes 68 bytes, not 64"):
        decode(np.zeros((2, 64), np.uint8), 64)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_is_refused_with_its_place(byte: int) -> None:
    data = pack(np.full((3, 8), E4M3_CODES[0x38], np.uint8), np.ones(3, np.float32))
    data[2, 5] = byte
    with pytest.raises(IntegrityError, match="row 2, column 5"):
        decode(data, 8)
