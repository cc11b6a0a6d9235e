"""Sparse exports: what is pruned, what an artifact says of it, and which types can hold it.

No format that llmx writes has a storage of its own for sparse matrices: their zeros are kept like any other weight, and
the artifact says under SPARSITY_KEY where they are:

    {"pattern": "2:4", "method": "sparsegpt", "others": {"layers.0.v.weight": "none"}}

pattern: of every matrix of attention and MLP that `others` does not name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.exporters.encoding import SOLVABLE, Encoding, encoding
from llmx.formats.json_text import parse_object
from llmx.models.architecture import Architecture, TensorSpec
from llmx.models.model import Model
from llmx.models.replaced import ReplacedModel
from llmx.quant.recipe import DENSE, Resolved
from llmx.quant.sparsity import NONE, PRUNED_ROLES, Pattern, by_magnitude, find_pattern

SPARSITY_KEY = "llmx.sparsity"
MAGNITUDE = "magnitude"
PROBED = 16  # rows on which a type shows whether it keeps zeros
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What an artifact says. pattern: of the matrices that others (canonical name -> pattern or none) leaves out."""

    pattern: str
    method: str
    others: Mapping[str, str] = field(default_factory=dict)

    def of(self, spec: TensorSpec) -> Pattern | None:
        """The pattern of a canonical tensor; None where it is dense."""
        name = self.others.get(spec.name, self.pattern) if prunable(spec) else NONE
        return None if name == NONE else find_pattern(name)

    def to_text(self) -> str:
        """As an artifact holds it."""
        return json.dumps({"pattern": self.pattern, "method": self.method, "others": dict(self.others)})


def read_sparsity(text: object) -> Sparsity:
    """What stands under SPARSITY_KEY. Raises: IntegrityError where it is nothing that llmx writes."""
    told = parse_object(text if isinstance(text, str) else "", SPARSITY_KEY)
    pattern, method, others = (told.get(key) for key in ("pattern", "method", "others"))
    if not isinstance(pattern, str) or not isinstance(method, str) or not isinstance(others, dict):
        raise IntegrityError(f"{SPARSITY_KEY} does not say a pattern, a method and others")
    try:
        for name in (pattern, *others.values()):
            if name != NONE:
                find_pattern(str(name))
    except UsageError as error:
        raise IntegrityError(f"{SPARSITY_KEY}: {error.what}") from error
    return Sparsity(pattern, method, others)


def prunable(spec: TensorSpec) -> bool:
    """Whether a canonical tensor is one of those that are made sparse."""
    return spec.part == "weight" and len(spec.shape) > 1 and spec.role in PRUNED_ROLES


def sparsity_of(resolved: Mapping[str, Resolved], architecture: Architecture) -> Sparsity | None:
    """What an artifact of these settings says; None where nothing is pruned."""
    names = [spec.name for spec in architecture.tensors if prunable(spec) and spec.name in resolved]
    counted = Counter(resolved[name].sparsity for name in names if resolved[name].sparsity is not None)
    if not counted:
        return None
    pattern = min(counted, key=lambda name: (-counted[name], str(name)))
    others = {name: resolved[name].sparsity or NONE for name in names if resolved[name].sparsity != pattern}
    methods = sorted({resolved[name].method for name in names if resolved[name].sparsity is not None})
    return Sparsity(str(pattern), " and ".join(methods), others)


def problems_of(resolved: Mapping[str, Resolved], asked: str | None, method: str) -> list[str]:
    """Why these settings contradict each other. asked, method: the recipe's own."""
    pruned = [got for got in resolved.values() if got.sparsity is not None]
    problems = []
    wrong = sorted({got.method for got in pruned if got.method not in DENSE})
    if wrong:
        problems.append(
            f"--sparsity goes with --method {', '.join(DENSE)}; {' and '.join(wrong)} makes no weight zero "
            "(sparsegpt rounds what is left with GPTQ)"
        )
    if not pruned and method in DENSE:
        problems.append(f"--method {method} needs --sparsity 2:4, or a share such as 50%")
    if not pruned and asked not in (None, NONE):
        problems.append(f"--sparsity {asked} fits no matrix: the rules turn it off everywhere")
    return problems


def check_sparse(resolved: Mapping[str, Resolved], types: Mapping[str, str], model: Model) -> None:
    """types: canonical name -> encoding of what is quantized.

    Raises: UnsupportedError for types without an exact zero, and for rows that are no whole number of groups.
    """
    without: dict[str, list[str]] = {}
    problems = []
    for name, got in resolved.items():
        if got.sparsity is None:
            continue
        cols, type_name = model.weight(name).cols, types.get(name)
        problem = find_pattern(got.sparsity).problem(cols)
        if problem is not None:
            problems.append(f"{name}: {problem}")
        if type_name in SOLVABLE and not keeps_zeros(encoding(type_name), cols):
            without.setdefault(type_name, []).append(name)
    for type_name, names in sorted(without.items()):
        shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
        problems.append(f"{type_name} has no exact zero ({shown})")
    if problems:
        raise UnsupportedError(
            "these matrices cannot be made sparse",
            problems=problems,
            fix="a type without minimums (F16, Q8_0, Q6_K, Q4_0; whole numbers in groups), or sparsity: none by a rule",
        )


def keeps_zeros(kept: Encoding, cols: int) -> bool:
    """Whether weights that are zero come back as zeros, whatever their neighbours are."""
    return _keeps_zeros(kept.name, cols)


@cache
def _keeps_zeros(type_name: str, cols: int) -> bool:
    kept, values = encoding(type_name), np.random.default_rng(0).standard_normal((PROBED, cols)).astype(np.float32)
    values[1::2] = 1 + np.abs(values[1::2])  # of one sign, away from zero
    values[:, ::2] = 0
    return not np.any(kept.decode(kept.encode(values, effort="fast"), cols)[values == 0])


def pruned_by_magnitude(model: Model, resolved: Mapping[str, Resolved]) -> Model:
    """The model with the smallest weights of its sparse matrices read as zeros."""

    def rows(name: str, pattern: Pattern, start: int, stop: int) -> np.ndarray:
        return by_magnitude(model.weight(name).read(start, stop), pattern)

    wanted = {name: got.sparsity for name, got in resolved.items() if got.sparsity is not None}
    return ReplacedModel(model, {name: partial(rows, name, find_pattern(pattern)) for name, pattern in wanted.items()})


def note_of(said: Sparsity, resolved: Mapping[str, Resolved], model: Model) -> str:
    """What a plan tells of it."""
    names = [name for name, got in resolved.items() if got.sparsity is not None]
    size = sum(model.weight(name).rows * model.weight(name).cols for name in names)
    share = size / sum(weight.rows * weight.cols for weight in model.weights())
    return (
        f"{said.pattern} sparse by {said.method}: {len(names)} matrices, {share:.0%} of the weights; their zeros are "
        "stored like other weights, so the file is no smaller"
    )
