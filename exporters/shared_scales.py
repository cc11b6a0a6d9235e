"""One scale for the matrices of a product, where an encoding has one scale for a whole matrix.

Runtimes multiply matrices that read the same inputs as one: q, k and v; gate and up. Such a matrix has one scale, and
codes that were made on another would be rounded again as the checkpoint is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from llmx.exporters.encoding import Encoding, encoding
from llmx.models.architecture import Role, TensorSpec
from llmx.models.model import Model
from llmx.quant.protocol import Floats

# Matrices that read the same inputs.
PRODUCTS: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("gate", "up"), ("expert_gate", "expert_up"))


@dataclass(slots=True)
class SharedScales:
    """Encodings with the scale of a product fixed, made when they are first asked for. Safe from any thread.

    types: canonical name -> encoding. Memory: a product's weights in float32, of one expert.
    """

    model: Model
    types: Mapping[str, str]
    _found: dict[tuple[str, int | None], Encoding] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bound(self, spec: TensorSpec, expert: int | None) -> Encoding:
        """The encoding of a weight, or of an expert's part of it."""
        kept = encoding(self.types[spec.name])
        if not kept.shared:
            return kept
        names = [name for name in self._product(spec) if self.types.get(name) == kept.name]
        key = names[0], expert
        with self._lock:
            if key not in self._found:
                self._found[key] = kept.bound(np.concatenate([self._values(name, expert) for name in names]))
            return self._found[key]

    def _product(self, spec: TensorSpec) -> list[str]:
        roles = next((roles for roles in PRODUCTS if spec.role in roles), (spec.role,))
        names = [spec.name.replace(f".{spec.role}.", f".{role}.") for role in roles]
        return [name for name in names if self.model.has(name)]

    def _values(self, name: str, expert: int | None) -> Floats:
        weight = self.model.weight(name)
        count = weight.rows if expert is None else weight.spec.shape[-2]
        first = count * (expert or 0)
        values = weight.read(first, first + count)
        weight.release(first, first + count)
        return values
