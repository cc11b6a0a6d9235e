"""The grids of ggml's block types, and `encode`: weights in, the bytes of a GGUF tensor out.

A grid fits scales to weights and rounds weights to codes; a packer (llmx.formats.ggml_packers) lays both out as bytes.
They are apart so that a solver can freeze the scales of a grid, choose the codes itself and pack the two:

    scales = GRIDS["Q4_K"].fit(weight, importance)
    codes = GRIDS["Q4_K"].round(weight, scales)            a solver puts its own codes here
    data = pack("Q4_K", scales, codes)

Every block is fitted alone and in a fixed order of float32 operations: the bytes do not depend on threads, on how rows
are cut into chunks, or on the machine's vector width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats.ggml_blocks import BLOCKS, SUPER_BLOCK, row_bytes
from llmx.formats.ggml_decode import LEVELS, decode_codes, expand
from llmx.formats.ggml_packers import BlockScales, pack
from llmx.quant import affine, ggml_moves, kquant, symmetric
from llmx.quant.floats import FLOATS
from llmx.quant.lanes import workspace
from llmx.quant.rounding import largest_magnitude, round_affine, round_linear, round_uneven

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
HALF_MAX = 65504.0
_CHUNK = 1 << 16  # weights fitted at a time: they, their codes and their bytes stay in the core's own cache
_IMPORTANCE_FLOOR = 1e-6  # of the mean: a column that saw nothing still has a scale to be rounded with
_NO_IMPORTANCE = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Search:
    """How thoroughly a grid looks for its scales.

    starts: the first scales tried (see affine.search, symmetric.search). lloyd: refits of the best. loops: rounds of
    ±1 moves of the integer scales. spread, spread_importance: how much a weight near zero counts beside a large one,
    without and with an importance matrix: w = importance · (spread + (x/σ)²). Their
    values are those of least KL on a trained model; between 1 and 10 the difference is mostly chance.
    """

    starts: tuple[Any, ...]
    lloyd: int = 3
    loops: int = 2
    spread: float = 1.0
    spread_importance: float = 1.0


class Grid(Protocol):
    """What a solver needs of a format. weight: f32[rows, cols], rows of whole blocks; n blocks in all."""

    @property
    def name(self) -> str:
        """The type's name, as in BLOCKS."""
        ...

    @property
    def levels(self) -> Floats:
        """f32[codes], read-only, ascending: what each code stands for before it is scaled."""
        ...

    @property
    def allowed(self) -> tuple[int, int]:
        """(lowest, highest) code that may be stored."""
        ...

    @property
    def size(self) -> int:
        """Weights of a sub-block, which share a scale."""
        ...

    @property
    def weights(self) -> int:
        """Weights of a block, which share the float super-scales; block weights // size = subs."""
        ...

    def fit(self, weight: Floats, importance: Floats | None = None) -> BlockScales:
        """The scales of least weighted error, as they will be stored. importance: f32[cols], mean squared inputs."""
        ...

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        """(scale, offset) of every sub-block, f32[n, subs]; value = scale · level + offset."""
        ...

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        """u8[n, block weights]: the code of the level nearest to each weight."""
        ...

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        """f32[n, block weights]: what scales and codes stand for."""
        ...

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        """The legal small moves of the sub-blocks' scales and minima: in each, every sub-block has moved alike."""
        ...

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        """scales, with the sub-blocks where mask (bool[n, subs]) holds taken from other."""
        ...

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        """scales with the float super-scales d and offset (f32[n]) in place of its own, rounded as they are stored."""
        ...

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        """(first, second), f32[n, block weights]: the weights are d · first + offset · second; None without offset."""
        ...

    def limit(self) -> float:
        """The largest |weight| that the stored scales can reach."""
        ...


def _half(values: Floats) -> NDArray[np.float16]:
    return values.astype(np.float16)  # exact: the fits hand out values that are float16 already


def _flat(weight: Floats) -> Floats:
    # Writable, because a kernel would be compiled once more for read-only arrays.
    return np.require(weight, np.float32, ["C", "W"]).reshape(-1)


def _importance(importance: Floats | None, search: Search) -> tuple[Floats, float]:
    """The importance scaled to a mean of 1, and the spread that goes with it."""
    if importance is None:
        return _NO_IMPORTANCE, search.spread
    mean = np.mean(importance, dtype=np.float64)
    relative = np.maximum(importance / mean, _IMPORTANCE_FLOOR)
    return relative.astype(np.float32), search.spread_importance


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """value = scale · code − minimum, codes 0 … top; in super-blocks with integer scales up to `integers`, if any."""

    name: str
    size: int  # weights of a sub-block
    top: int
    search: Search
    integers: int = 0

    @property
    def levels(self) -> Floats:
        return LEVELS[self.name]

    @property
    def weights(self) -> int:
        return BLOCKS[self.name].weights

    @property
    def allowed(self) -> tuple[int, int]:
        return 0, self.top

    def fit(self, weight: Floats, importance: Floats | None = None) -> BlockScales:
        values = _flat(weight)
        relative, spread = _importance(importance, self.search)
        work, starts = workspace(self.size), np.array(self.search.starts, np.float32)
        n = values.size // BLOCKS[self.name].weights
        d, offset = np.empty(n, np.float32), np.empty(n, np.float32)
        if not self.integers:
            affine.fit_blocks(values, relative, work, self.top, spread, starts, self.search.lloyd, d, offset)
            return BlockScales(_half(d), _half(offset))
        scales = np.empty((n, SUPER_BLOCK // self.size), np.int8)
        mins = np.empty_like(scales)
        kquant.fit_super(
            values, relative, work, self.top, self.integers, spread, starts, self.search.lloyd, self.search.loops,
            d, offset, scales, mins,
        )  # fmt: skip
        return BlockScales(_half(d), _half(offset), scales, mins)

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return expand(self.name, scales)

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        scale, offset = self.expand(scales)
        assert offset is not None
        values = _flat(weight).reshape(-1, self.size)
        codes = np.empty(values.shape, np.uint8)
        round_affine(values, scale.reshape(-1), offset.reshape(-1), self.top, codes)
        return codes.reshape(len(scales.d), -1)

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return decode_codes(self.name, scales, codes)

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return ggml_moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        return ggml_moves.with_super(scales, d, offset)

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        return ggml_moves.basis(scales, self.levels[codes])

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        return ggml_moves.move_pairs(scales, self.integers) if self.integers else ggml_moves.move_floats(scales)

    def limit(self) -> float:
        return HALF_MAX * max(self.integers, 1)


@dataclass(frozen=True, slots=True)
class SymmetricGrid:
    """value = scale · level; levels low … high, or IQ4's uneven ones where both are 0; scales in `integers`."""

    name: str
    size: int  # weights of a sub-block
    low: int
    high: int
    search: Search
    integers: tuple[int, int] | None = None

    @property
    def levels(self) -> Floats:
        return LEVELS[self.name]

    @property
    def weights(self) -> int:
        return BLOCKS[self.name].weights

    @property
    def allowed(self) -> tuple[int, int]:
        if self.low == self.high:
            return 0, len(self.levels) - 1
        return self.low - int(self.levels[0]), self.high - int(self.levels[0])

    def fit(self, weight: Floats, importance: Floats | None = None) -> BlockScales:
        values = _flat(weight)
        relative, spread = _importance(importance, self.search)
        work, starts = workspace(self.size), np.array(self.search.starts, np.float32)
        n = values.size // BLOCKS[self.name].weights
        d = np.empty(n, np.float32)
        if self.integers is None:
            symmetric.fit_blocks(values, relative, work, self.low, self.high, spread, starts, self.search.lloyd, d)
            return BlockScales(_half(d))
        scales = np.empty((n, SUPER_BLOCK // self.size), np.int8)
        symmetric.fit_super(
            values, relative, work, self.low, self.high, self.integers, spread, starts, self.search.lloyd,
            self.search.loops, d, scales,
        )  # fmt: skip
        return BlockScales(_half(d), None, scales)

    def expand(self, scales: BlockScales) -> tuple[Floats, Floats | None]:
        return expand(self.name, scales)

    def round(self, weight: Floats, scales: BlockScales) -> Codes:
        scale = self.expand(scales)[0].reshape(-1)
        values = _flat(weight).reshape(-1, self.size)
        codes = np.empty(values.shape, np.uint8)
        if self.low == self.high:
            round_uneven(values, scale, codes)
        else:
            round_linear(values, scale, self.low, self.high, -LEVELS[self.name][0], codes)
        return codes.reshape(len(scales.d), -1)

    def decode(self, scales: BlockScales, codes: Codes) -> Floats:
        return decode_codes(self.name, scales, codes)

    def merge(self, scales: BlockScales, other: BlockScales, mask: NDArray[np.bool_]) -> BlockScales:
        return ggml_moves.merge(scales, other, mask)

    def with_super(self, scales: BlockScales, d: Floats, offset: Floats | None = None) -> BlockScales:
        return ggml_moves.with_super(scales, d, offset)

    def basis(self, scales: BlockScales, codes: Codes) -> tuple[Floats, Floats | None]:
        return ggml_moves.basis(scales, self.levels[codes])

    def neighbours(self, scales: BlockScales) -> tuple[BlockScales, ...]:
        return ggml_moves.move_integers(scales, self.integers) if self.integers else ggml_moves.move_floats(scales)

    def limit(self) -> float:
        # The side with the fewer levels decides: the largest weight may have either sign.
        reach = min(-self.low, self.high) or int(LEVELS[self.name][-1])
        return HALF_MAX * reach * (min(-self.integers[0], self.integers[1]) if self.integers else 1)


def _mirrored(*levels: float) -> tuple[float, ...]:
    return tuple(sign * level for level in levels for sign in (-1.0, 1.0))


def _crossed(ranges: tuple[float, ...], minima: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    return tuple((extra, part) for extra in ranges for part in minima)


_AFFINE = _crossed((-0.8, -0.4, 0.0, 0.4, 0.8, 1.2), (1.0, 0.95, 0.9, 0.85))
_AFFINE_2 = _crossed((-0.6, -0.2, 0.2, 0.6), (1.0, 0.9, 0.8, 0.7))
_EIGHT = _mirrored(2.4, 2.6, 2.8, 3.0, 3.2, 3.4, 3.6, 3.8, 4.0, 4.2)
_SIXTEEN = _mirrored(4.8, 5.1, 5.4, 5.7, 6.0, 6.4, 6.8, 7.2, 7.5, 7.8, 8.1, 8.4)
_THIRTY_TWO = _mirrored(11, 12, 13, 13.6, 14.2, 14.8, 15.4, 16, 16.6)
_SIXTY_FOUR = _mirrored(27, 28, 29, 30, 31, 31.7, 32.4)
_UNEVEN = _mirrored(88, 96, 104, 112, 120, 127, 134)

_ROWS: tuple[Grid, ...] = (
    AffineGrid("Q2_K", 16, 3, Search(_AFFINE_2, spread=3, spread_importance=1), integers=15),
    AffineGrid("Q4_K", 32, 15, Search(_AFFINE, spread=10, spread_importance=10), integers=63),
    AffineGrid("Q5_K", 32, 31, Search(_AFFINE, spread=3, spread_importance=3), integers=63),
    AffineGrid("Q4_1", 32, 15, Search(_AFFINE, spread=10, spread_importance=10)),
    AffineGrid("Q5_1", 32, 31, Search(_AFFINE, spread=3, spread_importance=3)),
    SymmetricGrid("Q3_K", 16, -4, 3, Search(_EIGHT, spread=1, spread_importance=3), (-32, 31)),
    SymmetricGrid("Q6_K", 16, -32, 31, Search(_SIXTY_FOUR, spread=0.3, spread_importance=0.3), (-128, 127)),
    SymmetricGrid("Q4_0", 32, -8, 7, Search(_SIXTEEN, spread=3, spread_importance=0.3)),
    SymmetricGrid("Q5_0", 32, -16, 15, Search(_THIRTY_TWO, spread=3, spread_importance=0.3)),
    # -128 is left out: runtimes multiply by the sign of a code, and 8 bits do not hold +128.
    SymmetricGrid("Q8_0", 32, -127, 127, Search((127.0, 126.5, 126.0), lloyd=1, spread=10, spread_importance=10)),
    SymmetricGrid("IQ4_NL", 32, 0, 0, Search(_UNEVEN, lloyd=2, spread=1, spread_importance=3)),
    SymmetricGrid("IQ4_XS", 32, 0, 0, Search(_UNEVEN, lloyd=2, spread=1, spread_importance=3), (-32, 31)),
)
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _ROWS}
"""The block types that llmx can write, keyed by type name."""

ENCODABLE: tuple[str, ...] = (*FLOATS, *GRIDS)
"""Every type that `encode` takes."""


def largest_weight(type_name: str) -> float:
    """The largest magnitude that this type can store. Raises UnsupportedError for a type that llmx cannot write."""
    if type_name not in ENCODABLE:
        raise UnsupportedError(f"llmx cannot write {type_name}", fix=f"one of {', '.join(ENCODABLE)}")
    return FLOATS[type_name].limit if type_name in FLOATS else GRIDS[type_name].limit()


def overflow(type_name: str, weight: Floats) -> str | None:
    """Why weight (f32[rows, cols]) cannot be stored in that type — NaN, infinity, too large — or None if it can."""
    bits = int(largest_magnitude(_flat(weight)))
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
    type_name: str, weight: Floats, importance: Floats | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """u8[rows, row bytes]: weight (f32[rows, cols]) in that type, rounded to the nearest on the best scales found.

    importance: f32[cols], the mean square of each input (an importance matrix), or None. `out`, if given, is written
    and returned. Runs without the GIL, so threads over row chunks scale; the bytes do not depend on the cut.

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
            _encode_blocks(GRIDS[type_name], chunk, importance, data[start : start + step])
    return data


def _encode_blocks(grid: Grid, chunk: Floats, importance: Floats | None, out: NDArray[np.uint8]) -> None:
    scales = grid.fit(chunk, importance)
    codes = grid.round(chunk, scales)
    blocks = out.reshape(-1, BLOCKS[grid.name].bytes)
    packed = pack(grid.name, scales, codes, blocks if np.shares_memory(blocks, out) else None)
    if not np.shares_memory(blocks, out):
        out[:] = packed.reshape(out.shape)
