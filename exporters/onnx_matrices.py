"""Which matrices of a model are one product in a graph, and how each is kept: the same for every way to record one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmx.exporters.encoding import FLOAT8_ENCODINGS, GROUP_ENCODINGS, Float8Encoding, GroupEncoding
from llmx.models.architecture import Role
from llmx.models.model import Model, Weight

# Matrices with the same inputs, in the order of their outputs: one product in the place of several.
TOGETHER: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("gate", "up"))

MATRIX_ENCODINGS: Mapping[str, GroupEncoding | Float8Encoding] = {
    **GROUP_ENCODINGS,
    **{name: kept for name, kept in FLOAT8_ENCODINGS.items() if not kept.shared},
}
"""What a quantized matrix of a graph can be, keyed by name: whatever keeps each of its rows by itself."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """A model's matrices. types: canonical name -> encoding, of those that are quantized."""

    model: Model
    types: Mapping[str, str]

    def encoding(self, weight: Weight) -> GroupEncoding | Float8Encoding | None:
        """How the weight is quantized; None where it is kept in floats."""
        name = self.types.get(weight.spec.name)
        return None if name is None else MATRIX_ENCODINGS[name]

    def sharing(self, weight: Weight) -> Sequence[Weight]:
        """The weights that are one product with this one: all of one encoding, all or none with a bias."""
        spec = weight.spec
        roles = next((roles for roles in TOGETHER if spec.role in roles), ())
        names = [f"layers.{spec.layer}.{role}.weight" for role in roles]
        if not names or not all(self.model.has(name) for name in names):
            return [weight]
        found = [self.model.weight(name) for name in names]
        alike = len({(self.types.get(one.spec.name), self.bias(one) is None) for one in found}) == 1
        return found if alike else [weight]

    def bias(self, weight: Weight) -> Weight | None:
        """What is added to the weight's product, if anything."""
        name = weight.spec.name.removesuffix("weight") + "bias"
        return self.model.weight(name) if self.model.has(name) else None
