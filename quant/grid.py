"""Every grid by its name, and `encode`: weights in, the bytes of a GGUF tensor out.

A grid fits scales to weights and rounds weights to codes; a packer (llmx.formats.ggml_packers) lays both out as bytes.
They are apart so that a solver can freeze the scales of a grid, choose the codes itself and pack the two:

    scales = GRIDS["Q4_K"].fit(weight, importance)
    codes = GRIDS["Q4_K"].round(weight, scales)            a solver puts its own codes here
    data = pack("Q4_K", scales, codes)

Every block is fitted alone and in a fixed order of float32 operations: the bytes do not depend on threads, on how rows
are cut into chunks, or on the machine's vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_packers import pack
from llmx.quant.floats import FLOATS
from llmx.quant.ggml_grids import GGML_GRIDS
from llmx.quant.groups import BITS, GROUPS, KINDS, integer_grid
from llmx.quant.microscaling import Fp8Grid, MxGrid, NvGrid
from llmx.quant.protocol import Effort, Floats, Grid, flat
from llmx.quant.rounding import largest_magnitude
from llmx.quant.stores import STORES

_CHUNK = 1 << 16  # weights fitted at a time: they, their codes and their bytes stay in the core's own cache

GRIDS: dict[str, Grid] = {row.name: row for row in (*GGML_GRIDS, MxGrid("MXFP4"))}
"""The ggml block types that llmx can write, keyed by type name. NVFP4 needs a tensor beside it: see `grid`."""

ENCODABLE: tuple[str, ...] = (*FLOATS, *GRIDS)
"""Every type that `encode` takes."""


def _fixed(row: Grid) -> Callable[[int], Grid]:
    return lambda cols: row


def _integer(bits: int, group: int | None, kind: str, store: str) -> Callable[[int], Grid]:
    return lambda cols: integer_grid(bits, group or cols, kind, store, channel=group is None)


def _integers() -> Iterator[tuple[str, Callable[[int], Grid]]]:
    for bits, group, kind, store in product(BITS, (*GROUPS, None), KINDS, STORES):
        make = _integer(bits, group, kind, store)
        yield make(GROUPS[0]).name, make


FACTORIES: dict[str, Callable[[int], Grid]] = {
    **{name: _fixed(row) for name, row in GRIDS.items()},
    "NVFP4": _fixed(NvGrid("NVFP4", weights=64)),
    "mxfp4": _fixed(MxGrid("mxfp4")),
    "nvfp4": _fixed(NvGrid("nvfp4")),
    "fp8-channel-float32": lambda cols: Fp8Grid("fp8-channel-float32", cols),
    "fp8-tensor-float32": lambda cols: Fp8Grid("fp8-tensor-float32", cols, shared=True),
    **dict(_integers()),
}
"""What makes each grid for rows of so many columns, keyed by name. In capitals: as ggml's blocks hold it.

    int4-g128-sym    4 bits, groups of 128, no zero point; `channel` in place of g128: one group a row
    int4-g32-zp      with integer zero points; `pos` in place of `sym`: only positive scales
    …-bfloat16       the scale stored as that; float16 where nothing is said
"""


def grid(name: str, cols: int) -> Grid:
    """The grid of that name for rows of `cols` weights. What a whole tensor shares, `bound` adds.

    Raises UnsupportedError where there is no such grid, or a row is no whole number of its blocks.
    """
    if name not in FACTORIES:
        whole = [choice for choice in FACTORIES if not choice.startswith("int")]
        groups = "|".join((*(f"g{size}" for size in GROUPS), "channel"))
        integers = f"int{{{'|'.join(map(str, BITS))}}}-{{{groups}}}-{{{'|'.join(KINDS)}}}[-bfloat16|-float32]"
        raise UnsupportedError(f"there is no grid {name!r}", fix=f"one of {', '.join(whole)}, {integers}")
    found = FACTORIES[name](cols)
    if cols % found.weights:
        raise UnsupportedError(
            f"a row of {cols} weights is not a whole number of {name} blocks of {found.weights}",
            fix="choose a grid whose block divides the row (those of a whole row always do)",
        )
    return found


def largest_weight(type_name: str) -> float:
    """The largest magnitude that this type can store. Raises UnsupportedError for a type that llmx cannot write."""
    if type_name not in ENCODABLE:
        raise UnsupportedError(f"llmx cannot write {type_name}", fix=f"one of {', '.join(ENCODABLE)}")
    return FLOATS[type_name].limit if type_name in FLOATS else GRIDS[type_name].limit()


def overflow(type_name: str, weight: Floats) -> str | None:
    """Why weight (f32[rows, cols]) cannot be stored in that type — NaN, infinity, too large — or None if it can."""
    bits = int(largest_magnitude(flat(weight)))
    if bits >= 0x7F800000:
        return "holds NaN" if bits > 0x7F800000 else "holds infinity"
    largest = float(np.array([bits], np.uint32).view(np.float32)[0])
    limit = largest_weight(type_name)
    return (
        None if largest <= limit else f"holds {largest:.6g}, and the largest that {type_name} can store is {limit:.6g}"
    )


def check_importance(importance: Floats, cols: int) -> None:
    """Raise IntegrityError where importance is not cols finite numbers, none negative, not all zero."""
    if importance.shape != (cols,):
        raise IntegrityError(f"the importance has shape {importance.shape}, the weight has {cols} columns")
    if not np.isfinite(importance).all() or (importance < 0).any() or not (importance > 0).any():
        raise IntegrityError("the importance is negative, infinite, NaN, or all zero", fix="make the matrix again")


def encode(
    type_name: str,
    weight: Floats,
    importance: Floats | None = None,
    out: NDArray[np.uint8] | None = None,
    effort: Effort = "balanced",
) -> NDArray[np.uint8]:
    """u8[rows, row bytes]: weight (f32[rows, cols]) in that type, rounded to the nearest on the best scales found.

    importance: f32[cols], the mean square of each input (an importance matrix), or None. effort: how hard the scales
    are looked for. `out`, if given, is written and returned. Runs without the GIL, so threads over row chunks scale;
    the bytes do not depend on the cut.

    Raises UnsupportedError (type, or a row that is no whole number of blocks), UsageError (shapes), IntegrityError
    (NaN, infinity or a weight too large for the type; a broken importance).
    """
    limit_problem = overflow(type_name, weight)
    if limit_problem is not None:
        raise IntegrityError(f"the weight {limit_problem}", fix="store the tensor as F32, or repair the checkpoint")
    rows, cols = weight.shape
    size = row_bytes(type_name, cols)
    data = np.empty((rows, size), np.uint8) if out is None else out
    if data.shape != (rows, size) or data.dtype != np.uint8:
        raise UsageError(f"out is {data.dtype}{list(data.shape)}, the bytes are uint8{[rows, size]}")
    if importance is not None:
        check_importance(importance, cols)
    step = max(1, _CHUNK // max(cols, 1))
    for start in range(0, rows, step):
        chunk = np.ascontiguousarray(weight[start : start + step], np.float32)
        if type_name in FLOATS:
            FLOATS[type_name].encode(chunk, data[start : start + step])
        else:
            _encode_blocks(GRIDS[type_name], chunk, importance, effort, data[start : start + step])
    return data


def _encode_blocks(
    kind: Grid, chunk: Floats, importance: Floats | None, effort: Effort, out: NDArray[np.uint8]
) -> None:
    scales = kind.fit(chunk, importance, effort)
    codes = kind.round(chunk, scales)
    blocks = out.reshape(-1, BLOCKS[kind.name].bytes)
    packed = pack(kind.name, scales, codes, blocks if np.shares_memory(blocks, out) else None)
    if not np.shares_memory(blocks, out):
        out[:] = packed.reshape(out.shape)
