"""Every ggml tensor type: its number in a file, how many weights one block holds and how many bytes that takes.

The layouts inside a block are drawn in `ggml_packers.py`; what the fields mean is computed in `ggml_decode.py`.
Source: `ggml.h` (the enum) and `ggml-common.h` (the block structures) of llama.cpp b11549.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmx.errors import UnsupportedError

SUPER_BLOCK = 256
"""Weights of one super-block of the k-quants and of most IQ types."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """One ggml tensor type. A row of `cols` weights is cols / weights blocks of `bytes` bytes, one after another."""

    name: str
    id: int  # ggml's enum, as it stands in a tensor info of a GGUF file
    weights: int  # elements a block
    bytes: int  # bytes a block

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.bytes / self.weights


def _table(*rows: tuple[str, int, int, int]) -> dict[str, BlockType]:
    return {name: BlockType(name, number, weights, size) for name, number, weights, size in rows}


BLOCKS: dict[str, BlockType] = _table(
    # name, id, weights, bytes
    ("F32", 0, 1, 4),
    ("F16", 1, 1, 2),
    ("Q4_0", 2, 32, 18),
    ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22),
    ("Q5_1", 7, 32, 24),
    ("Q8_0", 8, 32, 34),
    ("Q8_1", 9, 32, 40),  # as llama.cpp's type table has it; never stored, only an operand of dot products
    ("Q2_K", 10, 256, 84),
    ("Q3_K", 11, 256, 110),
    ("Q4_K", 12, 256, 144),
    ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210),
    ("Q8_K", 15, 256, 292),
    ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74),
    ("IQ3_XXS", 18, 256, 98),
    ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18),
    ("IQ3_S", 21, 256, 110),
    ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136),
    ("I8", 24, 1, 1),
    ("I16", 25, 1, 2),
    ("I32", 26, 1, 4),
    ("I64", 27, 1, 8),
    ("F64", 28, 1, 8),
    ("IQ1_M", 29, 256, 56),
    ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54),
    ("TQ2_0", 35, 256, 66),
    ("MXFP4", 39, 32, 17),
    ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18),
    ("Q2_0", 42, 64, 18),
)
"""Every type a GGUF file can hold, keyed by ggml's name without its prefix."""

BLOCKS_BY_ID: dict[int, BlockType] = {block.id: block for block in BLOCKS.values()}


def block_type(name: str) -> BlockType:
    """The type of that name (as in `BLOCKS`). Raises UnsupportedError, naming the choices."""
    if name not in BLOCKS:
        raise UnsupportedError(f"there is no ggml tensor type {name!r}", fix=f"one of {', '.join(BLOCKS)}")
    return BLOCKS[name]


def row_bytes(type_name: str, cols: int) -> int:
    """Bytes of one row of `cols` weights. Raises UnsupportedError where cols is not a whole number of blocks."""
    block = block_type(type_name)
    if cols % block.weights:
        raise UnsupportedError(
            f"a row of {cols} weights is not a whole number of {type_name} blocks of {block.weights}",
            fix="choose a type whose block divides the row (F16, BF16 and F32 always do)",
        )
    return cols // block.weights * block.bytes
