"""What a GPU works on instead of the grid's own arrays is the same, bit for bit; this needs no GPU."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from llmx.quant import columns
from llmx.quant.grid import GRIDS, grid
from llmx.quant.state import Rows

NAMES = (
    *GRIDS,
    "nvfp4",
    "fp8-channel-float32",
    "fp8-tensor-float32",
    "int4-g128-zp",
    "int4-g32-zp-bfloat16",
    "int8-channel-pos",
)


@pytest.mark.parametrize("name", NAMES)
def test_integers_expanded_by_their_meaning_are_what_the_grid_expands(name: str) -> None:
    weight = (np.random.default_rng(0).standard_normal((24, 512)) * 0.02).astype(np.float32)
    kind = grid(name, 512).bound(weight)
    rows = Rows(kind, kind.fit(weight), len(weight), torch.device("cpu"))
    moves = (rows.scales, *kind.neighbours(rows.scales))
    for wanted, got in zip(rows.subs(*moves), rows._sent(moves), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(wanted, got, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_user_is_told_and_sub_blocks_move_one_by_one() -> None:
    columns.triton_kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match="Triton cannot be used"):
        assert columns.moved_together(32, torch.device("cuda")) == 32
