"""Decoding against the gguf package and against llama.cpp's own dequantization, bit for bit, on random bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import LEVELS, decode

TYPES = (*LEVELS, "F16", "BF16")


def random_bytes(type_name: str, seed: int = 0) -> np.ndarray:
    """Anything a file may hold, float16 NaN and infinity in the scales included."""
    return np.random.default_rng(seed).integers(0, 256, (64, BLOCKS[type_name].bytes * 4), dtype=np.uint8)


def assert_same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    both_nan = np.isnan(got) & np.isnan(wanted)  # the payload of a NaN means nothing
    assert ((got.view(np.uint32) == wanted.view(np.uint32)) | both_nan).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_random_bytes_decode_as_the_gguf_package_decodes_them(type_name: str) -> None:
    data = random_bytes(type_name)
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
    assert_same_bits(decode(type_name, data), wanted.astype(np.float32).reshape(64, -1))


class _Traits(ctypes.Structure):
    """The head of ggml_type_traits, up to the function wanted here."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@pytest.fixture(scope="module")
def llama_cpp() -> Callable[[str, np.ndarray], np.ndarray]:
    """(type name, u8[rows, bytes]) -> f32[rows, cols] by the llama.cpp that runs our artifacts."""
    package = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    libraries = sorted(Path(package.__file__).parent.glob("*.so"), key=lambda path: -path.stat().st_size)
    library = next((lib for lib in map(ctypes.CDLL, map(str, libraries)) if hasattr(lib, "ggml_get_type_traits")), None)
    if library is None:
        pytest.skip("this xllamacpp does not export ggml_get_type_traits")
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)

    def dequantize(type_name: str, data: np.ndarray) -> np.ndarray:
        block = BLOCKS[type_name]
        traits = library.ggml_get_type_traits(ctypes.c_int(block.id)).contents
        assert (traits.blck_size, traits.type_size) == (block.weights, block.bytes)
        out = np.empty((len(data), data.shape[1] // block.bytes * block.weights), np.float32)
        traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
        return out

    return dequantize


@pytest.mark.parametrize("type_name", TYPES)
def test_random_bytes_decode_as_llama_cpp_decodes_them(type_name: str, llama_cpp) -> None:
    data = random_bytes(type_name, 1)
    assert_same_bits(decode(type_name, data), llama_cpp(type_name, data))


def test_float32_is_handed_through() -> None:
    weight = np.array([[1.5, -0.0, np.inf, 1e-45]], np.float32)
    assert_same_bits(decode("F32", weight.view(np.uint8)), weight)


def test_half_a_block_is_refused() -> None:
    with pytest.raises(IntegrityError, match="Q4_K"):
        decode("Q4_K", np.zeros((1, 100), np.uint8))


def test_a_type_without_a_decoder_is_refused_with_the_choices() -> None:
    with pytest.raises(UnsupportedError, match="Q4_K"):
        decode("IQ1_S", np.zeros((1, 50), np.uint8))
