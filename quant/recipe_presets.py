"""The recipes that have a name: every file mix, with or without a method, and those of the serving engines."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from llmx.errors import UsageError
from llmx.quant.recipe import Method, Recipe

FLOAT_MIXES: tuple[str, ...] = ("F32", "F16", "BF16")
MIXES: tuple[str, ...] = (
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
)
MIX_METHODS: tuple[Method, ...] = ("rtn", "gptq", "awq")

_GRIDS = (
    Recipe("w4a16-awq", "int4-g128-sym", method="awq"),
    Recipe("w4a16-gptq", "int4-g128-sym", method="gptq"),
    Recipe("w4a16-rtn", "int4-g128-sym", method="rtn"),
    Recipe("w8a16-rtn", "int8-channel-sym", method="rtn"),
    Recipe("w8a8-smoothquant", "int8-channel-sym", method="rtn", transform="smoothquant"),
    Recipe("mxfp4", "mxfp4"),
    Recipe("nvfp4", "nvfp4"),
    Recipe("fp8", "fp8-tensor-float32", method="rtn"),
)
PRESETS: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(Recipe(mix.lower(), mix, method="rtn") for mix in FLOAT_MIXES),
        *(Recipe(mix.lower(), mix) for mix in MIXES),
        *(Recipe(f"{mix.lower()}+{method}", mix, method=method) for mix in MIXES for method in MIX_METHODS),
        *_GRIDS,
    )
}
"""Keyed by lower-case name: "q4_k_m", "q4_k_m+gptq", "w4a16-awq"."""


def preset(name: str) -> Recipe:
    """The recipe of this name, in any case. Raises: UsageError naming those of similar names."""
    found = PRESETS.get(name.lower())
    if found is None:
        near = get_close_matches(name.lower(), PRESETS, 3, 0.5)
        kinds = f"a file mix such as q4_k_m, alone or with +rtn, +gptq or +awq; {', '.join(r.name for r in _GRIDS)}"
        told = f"did you mean {' or '.join(near)}? The recipes are {kinds}" if near else f"choose {kinds}"
        raise UsageError(f"there is no recipe {name!r}", fix=f"{told}; or the name of a .yaml file")
    return found
