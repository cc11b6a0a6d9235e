"""The tensors of a TensorRT-LLM checkpoint, before a byte of them is read: what each is made of, and where it will lie.

canonical weights ── cut, stacked ── Matrix ── its parts ── Stored tensors of one file or another
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmx.exporters.encoding import FLOAT8_ENCODINGS, GROUP_ENCODINGS
from llmx.formats.safetensors import BITS
from llmx.formats.trtllm import INPUT_SCALE, PRE_SCALE, RANKS, SCALES, SUFFIXES, WEIGHT
from llmx.models.architecture import TensorSpec

SIGNED_PAIRS = {RANKS: "I8"}  # the dtype of two codes in a byte; U8 in the other layout


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start to stop of a canonical weight, whose experts lie under each other; of a vector, values."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def expert(self) -> int | None:
        """Which expert the rows are of."""
        return self.start // self.spec.shape[-2] if len(self.spec.shape) == 3 else None


@dataclass(frozen=True, slots=True)
class Matrix:
    """Pieces under each other, in one encoding or as floats.

    module: its name in the artifact. encoding: None for floats. columns: which inputs, all where None. experts: how
    many are stacked, 0 where the tensors have no such axis. pad: rows of zeros behind the last. offset: added to every
    value. transposed: floats are written [inputs, outputs]. stored_group: how many weights a stored scale is for.
    """

    module: str
    pieces: tuple[Piece, ...]
    encoding: str | None = None
    columns: tuple[int, int] | None = None
    experts: int = 0
    pad: int = 0
    offset: float = 0.0
    transposed: bool = False
    stored_group: int | None = None

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces) + self.pad

    @property
    def cols(self) -> int:
        start, stop = self.span
        return stop - start

    @property
    def span(self) -> tuple[int, int]:
        """The first input and the one after the last."""
        return self.columns or (0, self.pieces[0].spec.shape[-1])

    def shape(self, rows: int, *cols: int) -> tuple[int, ...]:
        """The shape of a part with so many rows, over all experts, and columns."""
        return (self.experts, rows // self.experts, *cols) if self.experts else (rows, *cols)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the artifact. file: its number among the weight files. part: WEIGHT or SCALES of the matrix.

    value: what it holds where the exporter makes it. A tensor has a matrix or a value.
    """

    file: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    matrix: Matrix | None = None
    part: str = WEIGHT
    value: np.ndarray | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Options:
    """What decides over tensors. types: canonical name -> encoding, of the quantized matrices. floats: of the others.

    group: how many weights a stored scale of 4 bits is for. scaled: whether quantized matrices have a pre-scale.
    inputs: canonical name -> the scale of its inputs. cache: "layers.0.k" -> the scale of cached keys, and of values.
    """

    types: Mapping[str, str]
    floats: str
    group: int | None = None
    scaled: bool = False
    inputs: Mapping[str, float] = field(default_factory=dict)
    cache: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contents:
    """The tensors of all weight files, in order, and the names of modules that are not quantized."""

    tensors: tuple[Stored, ...]
    excluded: tuple[str, ...]


def constant(file: int, name: str, dtype: str, value: np.ndarray) -> Stored:
    """A tensor that the exporter makes. value: as it is stored."""
    return Stored(file, name, dtype, value.shape, value=value)


def parts(matrix: Matrix, file: int, layout: str, options: Options, input_scale: float | None) -> list[Stored]:
    """The tensors of a matrix, in order. input_scale: of its inputs, where they are rounded."""
    suffixes, module = SUFFIXES[layout], matrix.module
    if matrix.encoding is not None:
        matrix = replace(matrix, stored_group=options.group)
    made = [_weight(matrix, file, layout, options.floats)]
    if matrix.encoding is None:
        return made
    made.append(_scales(matrix, file, layout, options.floats))
    if input_scale is not None:
        value = np.array(input_scale, "<f4").reshape((1,) if layout == RANKS else ())
        made.append(constant(file, f"{module}.{suffixes[INPUT_SCALE]}", "F32", value))
    if options.scaled:
        name = f"{module}.{suffixes[PRE_SCALE]}"
        made.append(constant(file, name, options.floats, ones(options.floats, matrix.cols)))
    return made


def vector(matrix: Matrix, file: int, name: str, dtype: str) -> Stored:
    """The tensor of a vector, whose pieces lie one after another."""
    return Stored(file, name, dtype, (sum(piece.stop - piece.start for piece in matrix.pieces),), matrix)


def ones(dtype: str, count: int) -> np.ndarray:
    """Bits of so many ones."""
    return np.full(count, {"F16": 0x3C00, "BF16": 0x3F80}[dtype], "<u2")


def _weight(matrix: Matrix, file: int, layout: str, floats: str) -> Stored:
    name, rows, cols = f"{matrix.module}.{SUFFIXES[layout][WEIGHT]}", matrix.rows, matrix.cols
    if matrix.encoding is None:
        shape = (cols, rows) if matrix.transposed else matrix.shape(rows, cols)
        return Stored(file, name, floats, shape, matrix)
    if matrix.encoding in FLOAT8_ENCODINGS:
        return Stored(file, name, "F8_E4M3", matrix.shape(rows, cols), matrix)
    if GROUP_ENCODINGS[matrix.encoding].layout.bits == 8:
        return Stored(file, name, "I8", matrix.shape(rows, cols), matrix)
    return Stored(file, name, SIGNED_PAIRS.get(layout, "U8"), matrix.shape(rows // 2, cols), matrix)


def _scales(matrix: Matrix, file: int, layout: str, floats: str) -> Stored:
    name = f"{matrix.module}.{SUFFIXES[layout][SCALES]}"
    if matrix.encoding in FLOAT8_ENCODINGS:
        alone = (1,) if layout == RANKS else ()
        return Stored(file, name, "F32", (matrix.experts, 1) if matrix.experts else alone, matrix, SCALES)
    if matrix.stored_group is None:
        return Stored(file, name, "F32", matrix.shape(matrix.rows), matrix, SCALES)
    groups = matrix.cols // matrix.stored_group
    kind = floats if layout == RANKS else "F32"
    return Stored(file, name, kind, matrix.shape(matrix.rows, groups), matrix, SCALES)


def whole(specs: Sequence[TensorSpec], expert: int | None = None) -> tuple[Piece, ...]:
    """All rows of these weights; of one expert, where a number is given."""
    return tuple(_whole(spec, expert) for spec in specs)


def _whole(spec: TensorSpec, expert: int | None) -> Piece:
    *experts, out = spec.shape[: max(1, len(spec.shape) - 1)]
    if expert is None:
        return Piece(spec, 0, math.prod(experts) * out)
    return Piece(spec, expert * out, (expert + 1) * out)
