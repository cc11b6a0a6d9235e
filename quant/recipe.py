r"""What each tensor gets. A recipe is data, in YAML or JSON:

    name: careful
    type: Q4_K_M                                  a file mix, or one grid for every matrix
    method: gptq                                  rtn, gptq, awq, auto; of sparse ones sparsegpt, wanda, magnitude
    effort: best                                  fast, balanced or best
    transform: smoothquant                        none, awq or smoothquant
    sparsity: 2:4                                 none, 2:4 or a share of zeros such as 50%
    calibration: {tokens: 65536, length: 512}
    rules:
    - {roles: [v, down], layers: first 4, type: Q6_K}
    - {layers: [0, -1], method: rtn}
    - {pattern: '\.expert_', type: IQ4_XS}

Rules are asked in order, field by field: of the rules that fit a tensor, the first that says a type gives the type, the
first that says a method the method. A field that no rule says is the recipe's own. Method awq is short for the
transform awq and rounding to the nearest. Sparse are the matrices of attention and MLP: there auto is sparsegpt, and
where nothing is pruned, a method of sparse matrices is that which rounds in the same spirit (DENSE).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import yaml

from llmx.models.architecture import Role
from llmx.quant.protocol import Effort
from llmx.quant.sparsity import NONE, PRUNED_ROLES

Method = Literal["rtn", "gptq", "awq", "auto", "sparsegpt", "wanda", "magnitude"]
Transform = Literal["awq", "smoothquant"]
Tensor = tuple[str, Role, int | None, int]  # canonical name, role, layer, layers of the model
Said = TypeVar("Said")

DENSE: Mapping[Method, Method] = {"sparsegpt": "auto", "wanda": "rtn", "magnitude": "rtn"}
"""Method of sparse matrices -> what it means for one that is not pruned."""


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers first to last, the last one included, in steps of `every`. Negative numbers count from the end."""

    first: int = 0
    last: int = -1
    every: int = 1

    def of(self, total: int) -> range:
        """The layers meant in a model of this many."""
        first = self.first if self.first >= 0 else max(self.first + total, 0)
        last = self.last if self.last >= 0 else self.last + total
        return range(first, min(last, total - 1) + 1, self.every)

    def __str__(self) -> str:
        step = "" if self.every == 1 else f" every {self.every}"
        if (self.first, self.last) == (0, -1) and step:
            return step.strip()
        if self.first == 0 and self.last >= 0:
            return f"first {self.last + 1}{step}"
        if self.first < 0 and self.last == -1:
            return f"last {-self.first}{step}"
        return f"{self.first}-{self.last}{step}"


@dataclass(frozen=True, slots=True)
class Rule:
    """Which tensors it fits, and what they get; None says nothing.

    layers: fits no tensor outside the layers. pattern: a regular expression found in the canonical name.
    transform, sparsity: "none" turns one off.
    """

    roles: tuple[Role, ...] | None = None
    layers: Layers | tuple[int, ...] | None = None
    pattern: str | None = None
    type: str | None = None
    method: Method | None = None
    transform: Transform | Literal["none"] | None = None
    sparsity: str | None = None

    def fits(self, tensor: Tensor) -> bool:
        name, role, layer, total = tensor
        if self.roles is not None and role not in self.roles:
            return False
        if self.layers is not None and (layer is None or layer not in self._layers(total)):
            return False
        return self.pattern is None or re.search(self.pattern, name) is not None

    def to_json(self) -> dict[str, Any]:
        """The rule as plain data."""
        layers = (
            list(self.layers) if isinstance(self.layers, tuple) else None if self.layers is None else f"{self.layers}"
        )
        said = {
            "roles": None if self.roles is None else list(self.roles),
            "layers": layers,
            "pattern": self.pattern,
            "type": self.type,
            "method": self.method,
            "transform": self.transform,
            "sparsity": self.sparsity,
        }
        return {key: value for key, value in said.items() if value is not None}

    def _layers(self, total: int) -> Sequence[int] | set[int]:
        assert self.layers is not None
        if isinstance(self.layers, Layers):
            return self.layers.of(total)
        return {layer if layer >= 0 else layer + total for layer in self.layers}


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How much text: tokens in all, in sequences of this length."""

    tokens: int
    length: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """type: a file mix ("Q4_K_M") or a grid ("int4-g128-sym"). calibration: None leaves it to the exporter."""

    name: str
    type: str
    method: Method = "auto"
    effort: Effort = "balanced"
    transform: Transform | None = None
    rules: tuple[Rule, ...] = ()
    calibration: CalibrationSettings | None = None
    sparsity: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data, which `recipe_reader.from_data` reads back."""
        plain: dict[str, Any] = {
            "name": self.name,
            "type": self.type,
            "method": self.method,
            "effort": self.effort,
        }
        if self.transform is not None:
            plain["transform"] = self.transform
        if self.sparsity is not None:
            plain["sparsity"] = self.sparsity
        if self.calibration is not None:
            plain["calibration"] = {"tokens": self.calibration.tokens, "length": self.calibration.length}
        if self.rules:
            plain["rules"] = [rule.to_json() for rule in self.rules]
        return plain

    def to_yaml(self) -> str:
        """The recipe as ASCII text, which `recipe_reader.parse_recipe` reads back."""
        return yaml.safe_dump(self.to_json(), sort_keys=False, default_flow_style=None, width=100)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What one tensor gets. type: None leaves it to the recipe's mix or grid. method: never "awq", and one of sparse
    matrices only where sparsity is not None.

    rules: numbers of the rules that gave something, in order.
    """

    name: str
    type: str | None
    method: Method
    transform: Transform | None
    rules: tuple[int, ...]
    sparsity: str | None = None


def resolve(recipe: Recipe, tensors: Iterable[Tensor]) -> tuple[Resolved, ...]:
    """What each tensor gets, in their order."""
    return tuple(_resolve(recipe, tensor) for tensor in tensors)


def idle_rules(recipe: Recipe, resolved: Iterable[Resolved]) -> tuple[int, ...]:
    """Numbers of the rules that gave no tensor anything: in a user's own recipe most likely a mistake."""
    used = {number for tensor in resolved for number in tensor.rules}
    return tuple(number for number in range(len(recipe.rules)) if number not in used)


def explicit(recipe: Recipe, tensors: Iterable[Tensor], types: Mapping[str, str] | None = None) -> Recipe:
    """The recipe with rules that spell out what each of these tensors gets; it resolves to the same for them.

    types: canonical name -> type, over what the recipe says (an allocation, or what the exporter made of a mix).
    """
    tensors = tuple(tensors)
    parts = {name.rpartition(".")[2] for name, *_ in tensors}
    dense = None if recipe.sparsity is None else NONE
    places: dict[tuple[Any, ...], dict[Role, list[int | None]]] = {}
    for tensor, got in zip(tensors, resolve(recipe, tensors), strict=True):
        name, role, layer, _ = tensor
        part = name.rpartition(".")[2] if len(parts) > 1 else None
        setting = (
            part,
            (types or {}).get(name, got.type),
            got.method,
            got.transform,
            got.sparsity or dense,
            layer is None,
        )
        places.setdefault(setting, {}).setdefault(role, []).append(layer)
    return Recipe(
        recipe.name,
        recipe.type,
        recipe.method,
        recipe.effort,
        recipe.transform,
        tuple(rule for setting, roles in places.items() for rule in _spelt_out(setting, roles)),
        recipe.calibration,
        recipe.sparsity,
    )


def _resolve(recipe: Recipe, tensor: Tensor) -> Resolved:
    fitting = [(number, rule) for number, rule in enumerate(recipe.rules) if rule.fits(tensor)]

    def first(said: Iterable[tuple[int, Said | None]]) -> tuple[int | None, Said | None]:
        return next(((number, value) for number, value in said if value is not None), (None, None))

    type_at, type_name = first((number, rule.type) for number, rule in fitting)
    method_at, method = first((number, rule.method) for number, rule in fitting)
    transform_at, asked = first((number, rule.transform) for number, rule in fitting)
    sparsity_at, sparsity = first((number, rule.sparsity) for number, rule in fitting if tensor[1] in PRUNED_ROLES)
    sparsity = (sparsity or recipe.sparsity) if tensor[1] in PRUNED_ROLES else None
    sparsity = None if sparsity == NONE else sparsity
    method = method or recipe.method
    if sparsity is None:
        method = DENSE.get(method, method)
    elif method == "auto":
        method = "sparsegpt"
    transform = asked or ("awq" if method == "awq" else recipe.transform)
    used = {at for at in (type_at, method_at, transform_at, sparsity_at) if at is not None}
    return Resolved(
        tensor[0],
        type_name,
        "rtn" if method == "awq" else method,
        None if transform == "none" else transform,
        tuple(sorted(used)),
        sparsity,
    )


def _spelt_out(setting: tuple[Any, ...], roles: Mapping[Role, list[int | None]]) -> Iterable[Rule]:
    """One rule for all roles that have this setting in the same layers."""
    part, type_name, method, transform, sparsity, outside = setting
    together: dict[tuple[int, ...], list[Role]] = {}
    for role, layers in roles.items():
        together.setdefault(tuple(sorted(layer for layer in layers if layer is not None)), []).append(role)
    pattern = None if part is None else rf"\.{re.escape(part)}$"
    for numbers, names in together.items():
        run = not outside and numbers == tuple(range(numbers[0], numbers[-1] + 1))
        layers = None if outside else Layers(numbers[0], numbers[-1]) if run else numbers
        yield Rule(tuple(names), layers, pattern, type_name, method, transform or NONE, sparsity)
