"""The small floats against torch's and against their own definition."""

from __future__ import annotations

import numpy as np
import torch

from llmx.formats.microfloats import (
    E2M1_BITS,
    E2M1_CODES,
    E2M1_DOUBLED,
    E4M3,
    E4M3_BITS,
    E4M3_CODES,
    E8M0_HALVED,
    UE4M3,
    e8m0_bytes,
)


def test_e4m3_bytes_are_those_of_torch() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(every[E4M3_BITS], E4M3)
    assert np.array_equal(every[:127], UE4M3)
    assert sorted(E4M3_BITS) == [byte for byte in range(256) if not np.isnan(every[byte])]


def test_e2m1_nibbles_are_sign_exponent_and_mantissa() -> None:
    for nibble in range(16):
        sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
        value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert E2M1_DOUBLED[E2M1_CODES[nibble]] == 2 * value * (-1) ** sign


def test_e8m0_bytes_are_exponents() -> None:
    assert np.array_equal(e8m0_bytes(E8M0_HALVED), np.arange(256))
    spec = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(E8M0_HALVED[1:255].astype(np.float64) * 2, spec[1:].astype(np.float64))
    assert E8M0_HALVED[0] == np.float32(2.0**-128)


def test_codes_ascend_and_the_second_zero_comes_last() -> None:
    for levels, bits, codes in ((E2M1_DOUBLED, E2M1_BITS, E2M1_CODES), (E4M3, E4M3_BITS, E4M3_CODES)):
        assert (np.diff(levels[:-1]) > 0).all()
        assert levels[-1] == 0
        assert np.array_equal(codes[bits], np.arange(len(levels)))
        assert not (levels.flags.writeable or bits.flags.writeable or codes.flags.writeable)
