"""An ONNX graph being recorded: nodes one after another, weights named but unread, small constants inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from llmx.formats.onnx import FLOATS
from llmx.models.model import Weight

Shape = Sequence[int | str]  # a name stands for a size that is known only when the graph runs


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight of the artifact: how it is named, shaped and typed there, and what it is read from.

    table: made by the exporter (a rope table) instead of read; f32[shape]. offset: added to every value read.
    between: its rows alternate with those of weight, which come first.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    weight: Weight | None = None
    between: Weight | None = None
    table: np.ndarray | None = None
    offset: float = 0.0

    @property
    def read(self) -> tuple[Weight, ...]:
        """What the checkpoint gives."""
        return tuple(weight for weight in (self.weight, self.between) if weight is not None)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOATS[self.type_name].nbytes


class GraphRecorder:
    """Nodes, weights and constants in the order of their first use. type_name: "F32" or "F16", of all floats."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name
        self.float_type = ir.DataType[FLOATS[type_name].onnx]
        self.nodes: list[ir.Node] = []
        self.stored: dict[str, Stored] = {}
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

    def weight(self, weight: Weight, offset: float = 0.0) -> ir.Value:
        """A weight in its canonical shape, stored once however often it is used."""
        shape = weight.spec.shape
        return self.keep(Stored(weight.spec.name, shape, self.type_name, weight=weight, offset=offset))

    def table(self, name: str, values: np.ndarray) -> ir.Value:
        """A table that the exporter made, stored once under its name."""
        return self.keep(Stored(name, values.shape, self.type_name, table=values))

    def keep(self, stored: Stored) -> ir.Value:
        """The value of a stored weight."""
        if stored.name not in self._values:
            self.stored[stored.name] = stored
            kind = ir.TensorType(self.float_type)
            self._values[stored.name] = ir.Value(name=stored.name, type=kind, shape=ir.Shape(stored.shape))
        return self._values[stored.name]

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
