"""An ONNX graph being recorded: nodes one after another, weights named but unread, small constants inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmx.exporters.encoding import Float8Encoding, GroupEncoding
from llmx.formats.onnx import (
    CODES,
    FLOAT8,
    FLOATS,
    SCALES,
    VALUES,
    ZERO_POINTS,
    integer_type,
    joined_name,
    tensor_bytes,
)
from llmx.formats.onnx_groups import GroupLayout
from llmx.models.model import Weight

Shape = Sequence[int | str]  # a name stands for a size that is known only when the graph runs


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one weight, from start up to stop."""

    weight: Weight
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def whole(weight: Weight) -> Piece:
    """All rows of a weight."""
    return Piece(weight, 0, weight.rows)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix of few bits. pieces: one under another. columns: laid out as [inputs, outputs], see formats/onnx.py.

    signed: rows of signed numbers. decoded: rows of floats that the codes stand for, of channels. pad: outputs added so
    that a line of columns is a whole number of bytes.
    """

    name: str
    pieces: tuple[Piece, ...]
    encoding: GroupEncoding | Float8Encoding
    columns: bool
    signed: bool = False
    decoded: bool = False

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in self.pieces)

    @property
    def cols(self) -> int:
        return self.pieces[0].weight.cols

    @property
    def layout(self) -> GroupLayout:
        """How rows of whole numbers are kept."""
        assert isinstance(self.encoding, GroupEncoding), "FP8 lies in no groups"
        return self.encoding.layout

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.layout.bits if isinstance(self.encoding, GroupEncoding) else 8

    @property
    def group(self) -> int | None:
        """Weights that share a scale; None where those of an output do."""
        return self.layout.group if isinstance(self.encoding, GroupEncoding) else None

    @property
    def groups(self) -> int:
        return 1 if self.group is None else self.layout.groups(self.cols)

    @property
    def pad(self) -> int:
        return -self.rows % (8 // self.bits) if self.columns else 0


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the artifact: how it is named, shaped and typed there, and what it is made of.

    pieces: of the checkpoint, under each other, the values of vectors one after another. alternate: the rows of two
    pieces alternate instead. table: made by the exporter (a rope table) instead of read; f32[shape]. offset: added to
    every value read. quantized: the matrix of which this is the part named by the end of its name.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    pieces: tuple[Piece, ...] = ()
    alternate: bool = False
    table: np.ndarray | None = None
    offset: float = 0.0
    quantized: Quantized | None = None

    @property
    def part(self) -> str:
        """CODES, SCALES, ZERO_POINTS or VALUES."""
        return self.name.rpartition(".")[2]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type_name, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Parts:
    """The values of a quantized matrix. zero_points: None where codes count from the middle."""

    matrix: Quantized
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


def by_channel(encoding: GroupEncoding | Float8Encoding) -> bool:
    """Whether its matrices are signed bytes or FP8 with one scale an output, as products of 8 bits take them."""
    if isinstance(encoding, Float8Encoding):
        return True
    layout = encoding.layout
    return layout.group is None and layout.bits == 8 and not layout.zero_points


def onnx_type(type_name: str) -> ir.DataType:
    """The type of a stored tensor as onnx numbers it."""
    return ir.DataType[FLOATS[type_name].onnx if type_name in FLOATS else type_name]


def named(piece: Piece) -> tuple[str, int | None]:
    """The weight's name, and which expert the rows are."""
    spec = piece.weight.spec
    return spec.name, piece.start // spec.shape[-2] if len(spec.shape) == 3 else None


def _parts_of(matrix: Quantized, scale_type: str) -> dict[str, tuple[tuple[int, ...], str] | None]:
    """The shape and type of each part of a matrix as it is stored."""
    encoding, rows, groups = matrix.encoding, matrix.rows + matrix.pad, matrix.groups
    if by_channel(encoding):
        codes = FLOAT8 if isinstance(encoding, Float8Encoding) else integer_type(8, signed=True)
        return {CODES: ((matrix.cols, rows), codes), SCALES: ((rows,), scale_type), ZERO_POINTS: None}
    layout, columns = matrix.layout, matrix.columns
    if matrix.signed:
        codes = integer_type(layout.bits, signed=True)
        return {CODES: ((rows, matrix.cols), codes), SCALES: ((rows, groups), scale_type), ZERO_POINTS: None}
    kind = integer_type(layout.bits, not layout.zero_points) if columns else "UINT8"
    zeros = (groups, rows) if columns else (rows, -(-groups * layout.bits // 8))
    return {
        CODES: ((matrix.cols, rows) if columns else (rows, groups, layout.group_bytes(matrix.cols)), kind),
        SCALES: ((groups, rows) if columns else (rows, groups), scale_type),
        ZERO_POINTS: (zeros, kind) if layout.zero_points else None,
    }


class GraphRecorder:
    """Nodes, weights and constants in the order of their first use. type_name: "F32" or "F16", of all floats."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name
        self.float_type = onnx_type(type_name)
        self.nodes: list[ir.Node] = []
        self.stored: dict[str, Stored] = {}
        self.views: dict[str, str] = {}  # a view's name -> that of the stored tensor
        self.inputs: dict[str, ir.Value] = {}
        self._values: dict[str, ir.Value] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @property
    def initializers(self) -> list[ir.Value]:
        """The weights, then the constants."""
        return [*self._values.values(), *self._constants.values()]

    @property
    def values(self) -> Mapping[str, ir.Value]:
        """The weights' values by their names."""
        return self._values

    def input(self, name: str, kind: ir.DataType, shape: Shape) -> ir.Value:
        """The graph's input of that name; made where there is none yet."""
        if name not in self.inputs:
            self.inputs[name] = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        return self.inputs[name]

    def node(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The only output of a new node."""
        return self.outputs(1, kind, *inputs, domain=domain, **attributes)[0]

    def outputs(
        self, count: int, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        given = {name: value for name, value in attributes.items() if value is not None}
        number = len(self.nodes)
        node = ir.Node(
            domain, kind, inputs, ir.convenience.convert_attributes(given), num_outputs=count, name=f"{kind}_{number}"
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{kind}_{number}_{index}"
        self.nodes.append(node)
        return node.outputs

    def weight(self, weight: Weight, offset: float = 0.0, type_name: str | None = None) -> ir.Value:
        """A weight in its canonical shape, stored once however often it is used. type_name: where not the graph's."""
        shape = weight.spec.shape
        kind = type_name or self.type_name
        return self.keep(Stored(weight.spec.name, shape, kind, (whole(weight),), offset=offset))

    def table(self, name: str, values: np.ndarray) -> ir.Value:
        """A table that the exporter made, stored once under its name."""
        return self.keep(Stored(name, values.shape, self.type_name, table=values))

    def keep(self, stored: Stored) -> ir.Value:
        """The value of a stored weight."""
        if stored.name not in self._values:
            self.stored[stored.name] = stored
            kind = ir.TensorType(onnx_type(stored.type_name))
            self._values[stored.name] = ir.Value(name=stored.name, type=kind, shape=ir.Shape(stored.shape))
        return self._values[stored.name]

    def quantized(
        self,
        pieces: Sequence[Piece],
        encoding: GroupEncoding | Float8Encoding,
        *,
        columns: bool,
        signed: bool = False,
        scale_type: str | None = None,
    ) -> Parts:
        """The parts of a matrix of few bits, stored once however often it is used. columns, signed: see `Quantized`.

        By channel it is always columns. scale_type: if not the graph's.
        """
        name = joined_name([named(piece) for piece in pieces])
        channels = by_channel(encoding)
        matrix = Quantized(name, tuple(pieces), encoding, columns or channels, signed and not channels)
        codes, scales, zeros = (
            self.keep(Stored(f"{name}.{part}", *shape_and_type, quantized=matrix)) if shape_and_type else None
            for part, shape_and_type in _parts_of(matrix, scale_type or self.type_name).items()
        )
        assert codes is not None and scales is not None, "every layout has codes and scales"
        return Parts(matrix, codes, scales, zeros)

    def decoded(self, pieces: Sequence[Piece], encoding: GroupEncoding, type_name: str) -> tuple[ir.Value, Quantized]:
        """float[rows, cols] of that type: what the codes of a matrix stand for, and the matrix."""
        name = joined_name([named(piece) for piece in pieces])
        matrix = Quantized(name, tuple(pieces), encoding, columns=False, decoded=True)
        shape = (matrix.rows, matrix.cols)
        return self.keep(Stored(f"{name}.{VALUES}", shape, type_name, quantized=matrix)), matrix

    def channel_scales(self, matrix: Quantized) -> ir.Value:
        """f32[rows]: the scales of a decoded matrix."""
        return self.keep(Stored(f"{matrix.name}.{SCALES}", (matrix.rows,), "F32", quantized=matrix))

    def view(self, of: ir.Value, end: str, kind: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """The bytes of a stored tensor seen in another way: another tensor at the same place of the data file."""
        name = f"{of.name}.{end}"
        if name not in self._values:
            self.views[name] = str(of.name)
            self._values[name] = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
        return self._values[name]

    def constant(self, values: Any, dtype: str = "int64", name: str | None = None) -> ir.Value:
        """A small constant inside the graph; equal ones are one, unless they have names of their own."""
        array = np.asarray(values, dtype=dtype)
        key = (name or dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = name or f"constant_{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            self._constants[key] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        return self._constants[key]

    def number(self, value: float) -> ir.Value:
        """A scalar of the graph's float type."""
        return self.constant(value, FLOATS[self.type_name].numpy)

    def cast(self, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return self.node("Cast", value, to=int(kind))

    def floats(self, value: ir.Value) -> ir.Value:
        """A float32 value in the graph's float type."""
        return value if self.type_name == "F32" else self.cast(value, self.float_type)
