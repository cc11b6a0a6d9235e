"""The table of block types against the gguf package."""

from __future__ import annotations

import pytest
from gguf.constants import GGML_QUANT_SIZES

from llmx.errors import UnsupportedError
from llmx.formats.ggml_blocks import BLOCKS, BLOCKS_BY_ID, row_bytes


@pytest.mark.parametrize("kind", GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type_of_the_gguf_package_has_its_number_and_size(kind) -> None:
    block = BLOCKS[kind.name]
    assert (block.id, block.weights, block.bytes) == (int(kind), *GGML_QUANT_SIZES[kind])
    assert BLOCKS_BY_ID[int(kind)] is block


def test_a_row_is_its_blocks_and_nothing_else() -> None:
    assert row_bytes("Q4_K", 512) == 288
    assert row_bytes("F32", 7) == 28


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="blocks of 256"):
        row_bytes("Q4_K", 288)


def test_an_unknown_type_is_refused_with_the_choices() -> None:
    with pytest.raises(UnsupportedError, match="Q6_K"):
        row_bytes("Q9_9", 256)
