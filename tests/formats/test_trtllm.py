"""The bytes of TensorRT-LLM checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmx.errors import IntegrityError
from llmx.formats.safetensors import open_safetensors, place
from llmx.formats.trtllm import RANK_NAME, narrowed, pack_pairs, rank_name, shard_name, turned, unpack_pairs

CODES = arrays(
    np.uint8, st.tuples(st.integers(1, 5).map(lambda n: 2 * n), st.integers(1, 9)), elements=st.integers(0, 15)
)


def test_two_outputs_share_a_byte_the_even_one_in_the_low_bits_in_twos_complement() -> None:
    #                   output 0: −8 −1  0  7       output 1: 1 −8  7 −1
    codes = np.array([[0, 7, 8, 15], [9, 0, 15, 7]], np.uint8)
    assert pack_pairs(codes).tolist() == [[0x18, 0x8F, 0x70, 0xF7]]


@given(CODES)
def test_unpacking_is_the_inverse_of_packing(codes: np.ndarray) -> None:
    assert np.array_equal(unpack_pairs(pack_pairs(codes)), codes)


def test_bytes_that_count_from_zero_become_signed_ones() -> None:
    assert turned(np.array([0, 127, 128, 255], np.uint8)).view(np.int8).tolist() == [-128, -1, 0, 127]


def test_a_scale_of_a_larger_group_is_told_for_each_of_its_parts() -> None:
    scales = np.array([[1, 2], [3, 4]], np.float32)
    assert narrowed(scales, 128, 64).tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert narrowed(scales, 128, 128).tolist() == scales.tolist()
    with pytest.raises(IntegrityError, match="groups of 64 weights cannot be told in groups of 128"):
        narrowed(scales, 64, 128)


def test_files_are_called_as_the_loaders_look_for_them() -> None:
    assert shard_name(0, 1) == "model.safetensors"
    assert shard_name(1, 12) == "model-00002-of-00012.safetensors"
    found = RANK_NAME.fullmatch(rank_name(13))
    assert found is not None and found[1] == "13"


def test_a_file_is_laid_out_before_its_tensors_are_known(tmp_path) -> None:
    tensors = [("a", "U8", (3, 5)), ("b", "F32", ()), ("c", "F8_E4M3", (7,))]
    placed = place(tensors, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(placed.header + bytes(placed.nbytes - len(placed.header)))
    found = open_safetensors(path)
    assert [(name, t.dtype, t.shape, t.offset) for name, t in found.tensors.items()] == [
        (*one, offset) for one, offset in zip(tensors, placed.offsets, strict=True)
    ]
    assert found.metadata == {"format": "pt"}
