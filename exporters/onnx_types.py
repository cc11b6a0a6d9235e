"""Which encoding each matrix of a named ONNX mix gets, as tables.

A mix ("INT4_M") is a base encoding and rules. A rule says: matrices of these roles, in these layers, get this encoding;
the first that fits wins, and without one it is the base. Norms, biases, routers and learned positions stay floats. The
matrices of one product (q, k and v; gate and up) get one encoding, or they would be several products again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmx.errors import UnsupportedError
from llmx.exporters.encoding import GROUP_ENCODINGS, fitting, group_names
from llmx.formats.onnx import FLOATS
from llmx.models.architecture import Architecture, Role, TensorSpec
from llmx.quant.activations import UNIT, InputScale

Where = Callable[[int, int], bool]  # (layer, layers)


@dataclass(frozen=True, slots=True)
class Rule:
    """roles: that it is for. where: in which layers, None in all and outside of them. encoding: what they get."""

    roles: tuple[Role, ...]
    encoding: str
    where: Where | None = None


@dataclass(frozen=True, slots=True)
class OnnxMix:
    """base: an encoding in groups or a float type. static: inputs in 8 bits have measured scales, where they may."""

    name: str
    base: str
    rules: tuple[Rule, ...] = ()
    static: bool = False

    @property
    def floats(self) -> str:
        """The float type of what is not quantized, and of what goes in and out of every operator."""
        return self.base if self.base in FLOATS else "F32"


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between, as llama.cpp's medium mixes have it."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


_INT2, _INT4, _INT8 = "int2-g32-zp-float32", "int4-g32-zp-float32", "int8-g32-sym-float32"
_CHANNELS = "int8-channel-pos-float32"  # scales of one sign, as runtimes with products of integers ask for them
# Larger groups are faster, and the head is 40 % of what a prompt costs where the vocabulary is large.
_INT4_ENDS = "int4-g128-zp-float32"
_ENDS: tuple[Role, ...] = ("embedding", "head")
_SENSITIVE: tuple[Role, ...] = ("q", "k", "v", "down", "expert_down")

MIXES: Mapping[str, OnnxMix] = {
    mix.name: mix
    for mix in (
        OnnxMix("F32", "F32"),
        OnnxMix("F16", "F16"),
        OnnxMix("INT8", _INT8),
        OnnxMix("W8A8_DYNAMIC", _CHANNELS),
        OnnxMix("W8A8_STATIC", _CHANNELS, static=True),
        OnnxMix("INT4", _INT4, (Rule(_ENDS, _INT4_ENDS),)),
        OnnxMix("INT4_M", _INT4, (Rule(_ENDS, _INT8), Rule(_SENSITIVE, _INT8, _more_bits))),
        OnnxMix("INT2", _INT2, (Rule(_ENDS, _INT4), Rule(_SENSITIVE, _INT4))),
    )
}
"""Keyed by name."""

BY_BITS: Mapping[int, str] = {2: "INT2", 4: "INT4", 8: "INT8", 16: "F16", 32: "F32"}

FLOAT_ROLES: frozenset[Role] = frozenset({"position_embedding", "router"})

# Whose inputs have static scales in a static mix. Not `down`, whose inputs have few huge values in few tokens: a third
# of the loss is left with `down` by row and the others static, of what it is with all static (KL 0.0005 and 0.0015 on a
# model of 42 M). Nor the head, where nothing is gained, nor experts, each of which sees few tokens.
STATIC_ROLES: frozenset[Role] = frozenset({"q", "k", "v", "o", "gate", "up"})


def find_mix(name: str) -> OnnxMix:
    """The mix of this name, in any case; an encoding in groups is a mix of itself.

    Raises: UnsupportedError naming the choices.
    """
    if name.upper() in MIXES:
        return MIXES[name.upper()]
    if name.lower() in GROUP_ENCODINGS:
        return OnnxMix(name.lower(), name.lower())
    raise UnsupportedError(
        f"{name} is no type of ONNX files", fix=f"for ONNX choose one of {', '.join(MIXES)}, {group_names()}"
    )


def is_matrix(spec: TensorSpec) -> bool:
    """Whether a tensor is quantized in a mix that quantizes."""
    return spec.part == "weight" and len(spec.shape) > 1 and spec.role not in FLOAT_ROLES


def wanted_types(
    architecture: Architecture, mix: OnnxMix, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Canonical name -> encoding or float type of every matrix, before any row's length is looked at.

    overrides: of single tensors, by canonical name.
    """
    chosen = overrides or {}
    return {
        spec.name: chosen.get(spec.name, _of_mix(mix, spec, architecture.layers))
        for spec in architecture.tensors
        if is_matrix(spec)
    }


def planned_types(
    architecture: Architecture, mix: OnnxMix, overrides: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The same as they are stored: a group that does not divide its rows is replaced by the largest smaller one that
    does. Where none does, the last group of each row is filled up."""
    cols = {spec.name: spec.shape[-1] for spec in architecture.tensors}
    return {
        name: fitting(wanted, cols[name]) if wanted in GROUP_ENCODINGS else wanted
        for name, wanted in wanted_types(architecture, mix, overrides).items()
    }


def _of_mix(mix: OnnxMix, spec: TensorSpec, layers: int) -> str:
    return next((rule.encoding for rule in mix.rules if _fits(rule, spec, layers)), mix.base)


def _fits(rule: Rule, spec: TensorSpec, layers: int) -> bool:
    if spec.role not in rule.roles:
        return False
    return rule.where is None or (spec.layer is not None and rule.where(spec.layer, layers))


def static_names(architecture: Architecture) -> tuple[str, ...]:
    """The matrices whose inputs get a static scale in a static mix: canonical names."""
    specs = architecture.tensors
    return tuple(spec.name for spec in specs if spec.role in STATIC_ROLES and spec.part == "weight")


def planned_scales(architecture: Architecture, mix: OnnxMix) -> dict[str, InputScale]:
    """Scales in the place of those to be measured: a plan's graph has the bytes that the real one will have."""
    return dict.fromkeys(static_names(architecture), UNIT) if mix.static else {}
