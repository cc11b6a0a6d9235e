"""Which encoding each matrix of a TensorRT-LLM checkpoint gets, as tables.

A type is one quant_algo of TensorRT-LLM: all matrices of the layers have it, and the embedding, the head, norms,
routers and learned positions stay floats. Matrices that cannot have it (rows that no group divides) stay floats, too,
and are named in exclude_modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from llmx.errors import UnsupportedError, UsageError
from llmx.exporters.encoding import ENCODINGS
from llmx.exporters.format_types import FormatTypes
from llmx.exporters.shared_scales import PRODUCTS
from llmx.formats.trtllm import GROUPS, KERNEL_GROUPS
from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.quant.recipe import Transform

Inputs = Literal["fp8", "int8"]
FLOAT_TYPES = ("F16", "BF16")
INT8, FP8 = "int8-channel-pos", "fp8-tensor-float32"  # scales are float16 where a name does not say their type


def _int4(group: int, floats: str = "F16") -> str:
    """The encoding in groups of this size, with scales in the type of the floats."""
    return f"int4-g{group}-pos" + ("-bfloat16" if floats == "BF16" else "")


@dataclass(frozen=True, slots=True)
class TrtllmMix:
    """name: what --type takes. base: the matrices' encoding, or a float type. algorithm: TensorRT-LLM's quant_algo.

    floats: the type of what is not quantized. inputs: how the inputs of quantized matrices are rounded, on static
    scales. transform: what `auto` scales channels by before it solves, where it calibrates.
    """

    name: str
    base: str
    algorithm: str | None = None
    floats: str = "F16"
    inputs: Inputs | None = None
    transform: Transform | None = None

    @property
    def grouped(self) -> bool:
        """Whether weights are in groups: the 4-bit ones."""
        return self.base == _int4(GROUPS[0], self.floats)


_HALVES = (
    TrtllmMix("W4A16_AWQ", _int4(128), "W4A16_AWQ", transform="awq"),
    # What GPTQ and rounding make of 4 bits is told as AWQ with scales of one: the loaders know groups by that name.
    TrtllmMix("W4A16", _int4(128), "W4A16_AWQ"),
    TrtllmMix("W8A16", INT8, "W8A16"),
    TrtllmMix("FP8", FP8, "FP8", inputs="fp8"),
    TrtllmMix("W8A8_SQ", INT8, "W8A8_SQ_PER_CHANNEL", inputs="int8", transform="smoothquant"),
    TrtllmMix("F16", "F16"),
)
_BASES: Mapping[str, str] = {
    _int4(128): _int4(128, "BF16")
}  # of the twin in bfloat16; other encodings are its own, too
_TWINS = ("W4A16_AWQ", "W4A16", "FP8", "W8A8_SQ")

MIXES: Mapping[str, TrtllmMix] = {
    mix.name: mix
    for mix in (
        *_HALVES,
        TrtllmMix("BF16", "BF16", floats="BF16"),
        *(
            replace(mix, name=f"{mix.name}_BF16", base=_BASES.get(mix.base, mix.base), floats="BF16")
            for mix in _HALVES
            if mix.name in _TWINS
        ),
    )
}
"""Keyed by name."""

BY_BITS: Mapping[int, str] = {4: "W4A16_AWQ", 8: "W8A16", 16: "F16"}

TYPES = FormatTypes(
    "TensorRT-LLM",
    (*FLOAT_TYPES, *(_int4(group, floats) for floats in FLOAT_TYPES for group in GROUPS), INT8, FP8),
    lambda name: ENCODINGS[name].bits(4096),
    quantizes_activations=True,
)

MATRIX_ROLES: frozenset[Role] = frozenset(
    {"q", "k", "v", "o", "gate", "up", "down", "expert_gate", "expert_up", "expert_down"}
)


@dataclass(frozen=True, slots=True)
class Types:
    """encodings: canonical name -> encoding of the quantized matrices. wanted: what others would have had.

    group: weights of a group of 4 bits; None for other encodings. Names of `wanted` without an encoding stay floats.
    """

    encodings: Mapping[str, str]
    wanted: Mapping[str, str]
    group: int | None


def find_mix(name: str) -> TrtllmMix:
    """The mix of this name, in any case. Raises: UnsupportedError naming the choices."""
    if name.upper() in MIXES:
        return MIXES[name.upper()]
    raise UnsupportedError(
        f"{name} is no type of TensorRT-LLM checkpoints", fix=f"for TensorRT-LLM choose one of {', '.join(MIXES)}"
    )


def is_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor is quantized in a mix that quantizes."""
    return spec.part == "weight" and spec.role in MATRIX_ROLES


def planned_types(architecture: Architecture, mix: TrtllmMix, ruled: Mapping[str, str]) -> Types:
    """What every matrix gets. ruled: types of single tensors that the recipe's rules say: the mix's own, or a float.

    Raises: UnsupportedError for other types, and for matrices of one product that would have several.
    """
    matrices = [spec for spec in architecture.tensors if is_matrix(spec)]
    _check_ruled(architecture, mix, ruled)
    if mix.algorithm is None:
        return Types({}, {}, None)
    kept = [spec for spec in matrices if ruled.get(spec.name) not in FLOAT_TYPES]
    if not mix.grouped:
        return Types({spec.name: mix.base for spec in kept}, {}, None)
    fitting = [spec for spec in kept if spec.shape[-1] % GROUPS[-1] == 0 and spec.shape[-2] % 2 == 0]
    if not fitting:
        raise UnsupportedError(
            f"no matrix of this model has rows that groups of {', '.join(map(str, GROUPS))} divide",
            fix="choose another --type",
        )
    group = next(size for size in GROUPS if all(spec.shape[-1] % size == 0 for spec in fitting))
    left = {spec.name: mix.base for spec in kept if spec not in fitting}
    smaller = {} if group == GROUPS[0] else {spec.name: mix.base for spec in fitting}
    return Types({spec.name: _int4(group, mix.floats) for spec in fitting}, {**smaller, **left}, group)


def group_notes(types: Types, stored: int | None) -> list[str]:
    """What a user should know of groups. stored: their size in the files."""
    if types.group is None or stored is None:
        return []
    notes = []
    if types.group not in KERNEL_GROUPS:
        notes.append(
            f"groups of {types.group} weights: {GROUPS[0]} and {GROUPS[1]} do not divide this model's rows, and they "
            "are all that TensorRT-LLM's kernels take"
        )
    if stored != types.group:
        notes.append(
            f"each scale is written {types.group // stored} times, for groups of {stored}, so that ranks get whole ones"
        )
    return notes


def _check_ruled(architecture: Architecture, mix: TrtllmMix, ruled: Mapping[str, str]) -> None:
    specs = {spec.name: spec for spec in architecture.tensors}
    own = {name for name in TYPES.types if mix.grouped and name.startswith("int4")} | {mix.base}
    problems = [
        f"{name}: {kind}"
        for name, kind in ruled.items()
        if kind not in FLOAT_TYPES and not (kind in own and is_matrix(specs[name]))
    ]
    if problems:
        raise UnsupportedError(
            f"a {mix.name} checkpoint has matrices of {mix.base} and floats alone",
            problems=problems,
            fix=f"rules may say {mix.base} or {mix.floats}",
        )
    for product in PRODUCTS:
        for layer in range(architecture.layers):
            names = [f"layers.{layer}.{role}.weight" for role in product]
            if len({ruled.get(name) in FLOAT_TYPES for name in names if name in specs}) > 1:
                problems.append(f"layer {layer}: {', '.join(product)}")
    if problems:
        raise UnsupportedError(
            "TensorRT-LLM multiplies these matrices as one: they have one type",
            problems=problems,
            fix="let the recipe's rules name all of their roles",
        )


def stored_group(types: Types, widths: Mapping[str, int]) -> int | None:
    """The size of groups in the files. widths: canonical name -> inputs of a rank's part of the matrix.

    Raises: UsageError where a rank would get part of the smallest group.
    """
    if types.group is None:
        return None
    for size in GROUPS:
        if types.group % size == 0 and all(widths[name] % size == 0 for name in types.encodings):
            return size
    bad = [f"{name}: {widths[name]} inputs a rank" for name in types.encodings if widths[name] % GROUPS[-1]]
    raise UsageError(
        f"--tp cuts matrices inside groups of {GROUPS[-1]} weights, the smallest there are",
        problems=bad,
        fix="a smaller --tp",
    )
