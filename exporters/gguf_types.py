"""Which type each tensor of a named GGUF file gets: llama.cpp's own choices, as tables.

A file type ("Q4_K_M") is a base type and rules. A rule says: tensors of these kinds, in these layers, get this type.
The first rule that fits wins; no rule leaves the base type. Source of the facts: llama.cpp's quantizer, build b11549.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmx.errors import UnsupportedError, UsageError
from llmx.formats.ggml_blocks import BLOCKS


@dataclass(frozen=True, slots=True)
class Situation:
    """What a rule may look at. `layer` counts from 0; `queries_per_key` is heads // kv_heads."""

    layers: int
    layer: int
    queries_per_key: int
    experts: int
    importance: bool


Where = Callable[[Situation], bool]


def _more_bits(s: Situation) -> bool:
    eighth = s.layers // 8
    return s.layer < eighth or s.layer >= 7 * s.layers // 8 or (s.layer - eighth) % 3 == 2


def _always(_: Situation) -> bool:
    return True


def _first(count: int) -> Where:
    return lambda s: s.layer < count


def _first_share(divisor: int) -> Where:
    return lambda s: s.layer < s.layers // divisor


def _first_eighth_without_importance(s: Situation) -> bool:
    return not s.importance and s.layer < s.layers // 8


def _first_eighth_with_importance(s: Situation) -> bool:
    return s.importance and s.layer < s.layers // 8


def _grouped_by_four(s: Situation) -> bool:
    return s.queries_per_key >= 4


# kind of tensor, where, type. Kinds are the GGUF names without "blk.N.", "_exps" and ".weight"; a fused attn_qkv goes
# by the rules of attn_v.
Rule = tuple[str, Where, str]


@dataclass(frozen=True, slots=True)
class FileType:
    """A named mix. `id` is general.file_type, `bits` the class that `--bits` knows it by."""

    name: str
    id: int
    base: str
    rules: tuple[Rule, ...] = ()
    # The attention output gets Q5_K in a model of 8 experts.
    lift_output_of_eight_experts: bool = False


_MEDIUM: tuple[Rule, ...] = (("attn_v", _more_bits, "Q6_K"), ("ffn_down", _more_bits, "Q6_K"))
_UNEVEN: tuple[Rule, ...] = (
    ("attn_v", _grouped_by_four, "Q5_K"),
    ("ffn_down", _first_eighth_without_importance, "Q5_K"),
)
_FILE_TYPES = (
    FileType("F32", 0, "F32"),
    FileType("F16", 1, "F16"),
    FileType("BF16", 32, "BF16"),
    FileType("Q8_0", 7, "Q8_0"),
    FileType("Q4_0", 2, "Q4_0", (("ffn_down", _first_eighth_with_importance, "Q4_1"),)),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q5_0", 8, "Q5_0", (("ffn_down", _first_eighth_with_importance, "Q5_1"),)),
    FileType("Q5_1", 9, "Q5_1"),
    FileType(
        "Q2_K",
        10,
        "Q2_K",
        (
            ("attn_v", _grouped_by_four, "Q4_K"),
            ("attn_v", _always, "Q3_K"),
            ("ffn_down", _always, "Q3_K"),
            ("attn_output", _always, "Q3_K"),
        ),
        lift_output_of_eight_experts=True,
    ),
    FileType("Q3_K_S", 11, "Q3_K", lift_output_of_eight_experts=True),
    FileType(
        "Q3_K_M",
        12,
        "Q3_K",
        (
            ("attn_v", _first(2), "Q5_K"),
            ("attn_v", _always, "Q4_K"),
            ("ffn_down", _first_share(16), "Q5_K"),
            ("ffn_down", _always, "Q4_K"),
            ("attn_output", _always, "Q4_K"),
        ),
        lift_output_of_eight_experts=True,
    ),
    FileType(
        "Q3_K_L",
        13,
        "Q3_K",
        (
            ("attn_v", _always, "Q5_K"),
            ("ffn_down", _always, "Q5_K"),
            ("attn_output", _always, "Q5_K"),
        ),
    ),
    FileType(
        "Q4_K_S",
        14,
        "Q4_K",
        (
            ("attn_v", _first(4), "Q5_K"),
            ("ffn_down", _first_share(8), "Q5_K"),
        ),
        lift_output_of_eight_experts=True,
    ),
    FileType(
        "Q4_K_M",
        15,
        "Q4_K",
        _MEDIUM,
        lift_output_of_eight_experts=True,
    ),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType(
        "Q5_K_M",
        17,
        "Q5_K",
        _MEDIUM,
    ),
    FileType("Q6_K", 18, "Q6_K"),
    FileType(
        "IQ4_NL",
        25,
        "IQ4_NL",
        _UNEVEN,
        lift_output_of_eight_experts=True,
    ),
    FileType(
        "IQ4_XS",
        30,
        "IQ4_XS",
        _UNEVEN,
        lift_output_of_eight_experts=True,
    ),
)
FILE_TYPES: Mapping[str, FileType] = {file_type.name: file_type for file_type in _FILE_TYPES}

# The best-known mix of each size: the medium k-quant where there is one.
BY_BITS: Mapping[int, str] = {
    2: "Q2_K",
    3: "Q3_K_M",
    4: "Q4_K_M",
    5: "Q5_K_M",
    6: "Q6_K",
    8: "Q8_0",
    16: "F16",
    32: "F32",
}

# What a type becomes when a row does not divide into its blocks; after that, only F16 is left.
FALL_BACKS: Mapping[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
# What the encoders can write; `--tensor-type` may name any of them.
WRITABLE_TYPES: tuple[str, ...] = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
    "Q2_K",
)

# 80-layer models with grouped keys share one value matrix among many heads: llama.cpp gives it Q5_K.
_LARGE_MODEL_LAYERS = 80


@dataclass(frozen=True, slots=True)
class TensorTypeOverride:
    """`--tensor-type 'REGEX=TYPE'`: the first override whose expression is found in a tensor's name wins."""

    pattern: re.Pattern[str]
    type_name: str


def parse_overrides(options: Sequence[str]) -> tuple[TensorTypeOverride, ...]:
    """The overrides of the command line, all mistakes reported at once.

    Raises: UsageError when an option is not 'REGEX=TYPE', the expression is malformed or the type unknown.
    """
    overrides, problems = [], []
    for option in options:
        expression, separator, type_name = option.rpartition("=")
        if not separator or not expression:
            problems.append(f"{option!r} is not REGEX=TYPE")
            continue
        if type_name.upper() not in WRITABLE_TYPES:
            problems.append(f"{option!r}: no type {type_name!r}; the types are {', '.join(WRITABLE_TYPES)}")
            continue
        try:
            overrides.append(TensorTypeOverride(re.compile(expression), type_name.upper()))
        except re.error as error:
            problems.append(f"{option!r}: {error}")
    if problems:
        raise UsageError("--tensor-type cannot be read", problems=problems, fix="for example 'attn_v=Q6_K'")
    return tuple(overrides)


def file_type(name: str) -> FileType:
    """The mix of this name, in any case. Raises: UsageError naming the choices."""
    found = FILE_TYPES.get(name.upper())
    if found is None:
        raise UsageError(f"there is no GGUF type {name!r}", fix=f"choose one of {', '.join(FILE_TYPES)}")
    return found


def recipe_type(name: str) -> FileType:
    """The mix of a recipe that says this type, in any case. A single block type is a mix of itself.

    Raises: UnsupportedError for a grid that GGUF files do not have.
    """
    upper = name.upper()
    if upper in FILE_TYPES:
        return FILE_TYPES[upper]
    if upper in WRITABLE_TYPES:
        return FileType(upper, FILE_TYPES.get(f"{upper}_S", FILE_TYPES["Q4_K_S"]).id, upper)
    raise UnsupportedError(f"{name} is no type of GGUF files", fix=f"for GGUF choose one of {', '.join(FILE_TYPES)}")


def file_type_of_bits(bits: int) -> FileType:
    """The best-known mix of this many bits. Raises: UsageError naming the choices."""
    if bits not in BY_BITS:
        raise UsageError(f"no GGUF type has {bits} bits", fix=f"choose one of {', '.join(map(str, BY_BITS))}")
    return FILE_TYPES[BY_BITS[bits]]


def _wanted(mix: FileType, kind: str, s: Situation, head: bool, grouped_large: bool) -> str:
    if head:
        # A head whose row does not divide gets Q8_0; otherwise 6 bits, unless the file has more anyway.
        return mix.base if mix.base == "Q8_0" else "Q6_K"
    if kind in ("attn_v", "attn_k", "attn_qkv") and s.experts == 8:
        return "Q8_0"
    if kind == "attn_output" and s.experts == 8:
        return "Q5_K" if mix.lift_output_of_eight_experts else mix.base
    plain = "attn_v" if kind == "attn_qkv" else kind.removesuffix("_exps")
    chosen = next((type_name for rule, where, type_name in mix.rules if rule == plain and where(s)), mix.base)
    if grouped_large and plain == "attn_v" and chosen in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return chosen


def fitting(type_name: str, columns: int) -> str:
    """`type_name`, or what llama.cpp falls back to when a row of `columns` does not divide into its blocks."""
    if columns % BLOCKS[type_name].weights == 0:
        return type_name
    smaller = FALL_BACKS.get(type_name, type_name)
    return smaller if columns % BLOCKS[smaller].weights == 0 else "F16"


def tensor_type(
    mix: FileType,
    name: str,
    columns: int,
    situation: Situation,
    *,
    tied: bool,
    large_type: bool = False,
    overrides: Sequence[TensorTypeOverride] = (),
) -> tuple[str, str | None]:
    """The type of one quantizable tensor, and the type it would have had if it fell back for its row length.

    name: the GGUF name. tied: the embedding is the head too. large_type: llama.cpp classes this architecture's
    80-layer models as "70B".
    """
    override = next((o.type_name for o in overrides if o.pattern.search(name)), None)
    if override is not None:
        wanted = override
    elif mix.base in FLOAT_TYPES:
        wanted = mix.base
    else:
        kind = re.sub(r"^blk\.\d+\.|\.weight$", "", name)
        head = kind == "output" or (tied and kind == "token_embd")
        if head and columns % BLOCKS[mix.base].weights != 0:
            wanted = "Q8_0"
        else:
            grouped_large = large_type and situation.layers == _LARGE_MODEL_LAYERS and situation.queries_per_key > 1
            wanted = _wanted(mix, kind, situation, head, grouped_large)
    chosen = fitting(wanted, columns)
    return chosen, (wanted if chosen != wanted else None)
