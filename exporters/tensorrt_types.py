"""Which encoding each matrix of a named TensorRT mix gets, as tables.

A mix ("W4A16") is an encoding of the matrices and a float type of all else: embedding, norms, biases, routers and the
head stay floats. TensorRT's products in groups take 32, 64 or 128 weights a group, and no shorter one at a row's end:
where 128 does not divide a row, a smaller group that does is taken, and where none does, the matrix stays in floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmx.errors import UnsupportedError
from llmx.exporters.encoding import GROUP_ENCODINGS
from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.quant.activations import LEVELS, InputScale, Kind, Rounding

# In the order of preference.
GROUP_SIZES: tuple[int, ...] = (128, 64, 32)
FP8 = "fp8-channel-float32"


@dataclass(frozen=True, slots=True)
class TensorRtMix:
    """base: how matrices are kept. floats: what is not quantized, and what goes in and out of products.

    inputs: how the inputs of matrices are rounded on measured scales ("int8", "fp8"); None where they stay floats.
    """

    name: str
    base: str
    floats: str
    inputs: Kind | None = None


MIXES: Mapping[str, TensorRtMix] = {
    mix.name: mix
    for mix in (
        TensorRtMix("F32", "F32", "F32"),
        TensorRtMix("F16", "F16", "F16"),
        TensorRtMix("BF16", "BF16", "BF16"),
        TensorRtMix("W4A16", "int4-g128-pos", "F16"),
        TensorRtMix("W8A16", "int8-channel-pos-float32", "F16"),
        TensorRtMix("FP8", FP8, "F16", inputs="fp8"),
        TensorRtMix("W8A8", "int8-channel-pos-float32", "F16", inputs="int8"),
        # For models whose activations leave float16's range.
        TensorRtMix("W4A16_BF16", "int4-g128-pos-bfloat16", "BF16"),
        TensorRtMix("W8A16_BF16", "int8-channel-pos-float32", "BF16"),
        TensorRtMix("FP8_BF16", FP8, "BF16", inputs="fp8"),
    )
}
"""Keyed by name."""

BY_BITS: Mapping[int, str] = {4: "W4A16", 8: "W8A16", 16: "F16", 32: "F32"}

FLOAT_ROLES: frozenset[Role] = frozenset({"embedding", "position_embedding", "router", "head"})

_EVEN: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "expert_gate", "expert_up")

# Whose inputs are rounded. Those of `down` have few huge values in few tokens. On one int8 scale they cost more than
# all others do: KL 0.0016 with `down` on models of 42 M and 3 M, 0.0002 and 0.0004 without; 0.0009 and 0.0010 with it
# and SmoothQuant, which made it worse on another text than the calibration's (0.0081 after 0.0048); 0.0005 and 0.0006
# with a scale for each of its rows. FP8 keeps large and small values alike: 0.0018 and 0.0038 with `down`, 0.0016 and
# 0.0034 without. `python bench/static_inputs.py` measures it.
STATIC_ROLES: Mapping[Kind, frozenset[Role]] = {
    "int8": frozenset(_EVEN),
    "fp8": frozenset((*_EVEN, "down", "expert_down")),
}

# The types of the recipes that serving engines have names for -> the mix of it, alone and with SmoothQuant.
OF_RECIPES: Mapping[str, tuple[str, str]] = {
    "int4-g128-sym": ("W4A16", "W4A16"),
    "int8-channel-sym": ("W8A16", "W8A8"),
    "fp8-tensor-float32": ("FP8", "FP8"),
}


def find_mix(name: str, transform: str | None = None) -> TensorRtMix:
    """The mix of this name, in any case, or of a recipe's type. Raises: UnsupportedError naming the choices."""
    if name.upper() in MIXES:
        return MIXES[name.upper()]
    if name.lower() in OF_RECIPES:
        return MIXES[OF_RECIPES[name.lower()][transform == "smoothquant"]]
    raise UnsupportedError(
        f"{name} is no type of TensorRT engines", fix=f"for TensorRT choose one of {', '.join(MIXES)}"
    )


def is_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor is quantized in a mix that quantizes."""
    return spec.part == "weight" and len(spec.shape) > 1 and spec.role not in FLOAT_ROLES


def wanted_types(
    architecture: Architecture, mix: TensorRtMix, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Canonical name -> encoding or float type of every matrix, before any row's length is looked at.

    overrides: of single tensors, by canonical name.
    """
    chosen = overrides or {}
    mixed = {spec.name: mix.base for spec in architecture.tensors if is_matrix(spec)}
    return {**mixed, **chosen}


def planned_types(
    architecture: Architecture, mix: TensorRtMix, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The same as they are stored. Raises: UnsupportedError naming the overrides whose groups divide no row."""
    chosen = overrides or {}
    cols = {spec.name: spec.shape[-1] for spec in architecture.tensors}
    fitted = {name: fitting(wanted, cols[name]) for name, wanted in wanted_types(architecture, mix, overrides).items()}
    problems = [
        f"{name}: rows of {cols[name]} weights in groups of {GROUP_ENCODINGS[wanted].layout.group}"
        for name, wanted in sorted(chosen.items())
        if fitted[name] != wanted
    ]
    if problems:
        raise UnsupportedError(
            "rules of the recipe ask for groups that do not divide the rows",
            problems=problems,
            fix=f"groups of {', '.join(map(str, GROUP_SIZES))}, or another type for these",
        )
    return {name: found or mix.floats for name, found in fitted.items()}


def fitting(name: str, cols: int) -> str | None:
    """`name`, or the same in the largest smaller group that divides rows of so many weights; None where none does."""
    found = GROUP_ENCODINGS.get(name)
    if found is None or found.layout.group is None:
        return name
    stem, _, rest = name.split("-", 2)
    sizes = [size for size in GROUP_SIZES if size <= found.layout.group and cols % size == 0]
    return f"{stem}-g{sizes[0]}-{rest}" if sizes else None


def input_roundings(architecture: Architecture, mix: TensorRtMix, types: Mapping[str, str]) -> dict[str, Rounding]:
    """Canonical name -> how the inputs of a matrix of the mix's encoding are rounded; none in a mix of float inputs.

    types: as planned; a matrix that stays in floats takes its inputs as they are, one in groups of few bits too.
    """
    if mix.inputs is None:
        return {}
    roles = {spec.name: spec.role for spec in architecture.tensors}
    static = STATIC_ROLES[mix.inputs]
    return {name: mix.inputs if roles[name] in static else "float" for name, kind in types.items() if kind == mix.base}


def planned_scales(architecture: Architecture, mix: TensorRtMix, types: Mapping[str, str]) -> dict[str, InputScale]:
    """Scales in the place of those to be measured: a plan's graph has the bytes that the real one will have."""
    if mix.inputs is None:
        return {}
    roundings = input_roundings(architecture, mix, types)
    unit = InputScale(1 / LEVELS, 0, mix.inputs)
    return {name: unit for name, how in roundings.items() if how == mix.inputs}
