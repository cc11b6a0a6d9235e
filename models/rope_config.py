"""Reading rotary position parameters from config.json, in the older and the newer spelling.

older: rope_theta, rope_scaling {type | rope_type, …}, partial_rotary_factor, rope_local_base_freq (gemma3)
newer: rope_parameters {rope_type, rope_theta, partial_rotary_factor, …}, for gemma3 one such record a layer kind
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from llmx.models.architecture import Rope, RopeKind
from llmx.models.config import is_number, shown

# kind -> (needed, optional) keys beside the common ones; the defaults are transformers' own
KEYS: dict[RopeKind, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor"}), frozenset()),
    "yarn": (
        frozenset(),
        frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "longrope": (frozenset({"short_factor", "long_factor"}), frozenset({"factor", "attention_factor"})),
}
COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
IGNORED = {"finetuned": "it tells that the model was trained with the scaling; the scaling is the same"}


def _above(limit: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and value > limit


def _positives(value: Any) -> bool:
    return isinstance(value, list) and all(is_number(item) and item > 0 for item in value)


# What a value must be; every other key takes a number above 0. Logarithms of the first two divide.
VALID: dict[str, Callable[[Any], bool]] = {
    "rope_theta": _above(1),
    "original_max_position_embeddings": _above(1),
    "mscale": lambda value: is_number(value) and value >= 0,
    "mscale_all_dim": lambda value: is_number(value) and value >= 0,
    "short_factor": _positives,
    "long_factor": _positives,
    "truncate": lambda value: isinstance(value, bool),
}
CONFIG_KEYS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}


@dataclass(frozen=True, slots=True)
class RopeRule:
    """How a family reads its rotary parameters. local_theta: sliding layers have their own rope with this default."""

    theta: float = 10_000.0
    partial: bool = False  # whether partial_rotary_factor may differ from 1
    local_theta: float | None = None
    kinds: tuple[RopeKind, ...] = tuple(KEYS)
    aliases: Mapping[str, RopeKind] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        return CONFIG_KEYS | ({"rope_local_base_freq"} if self.local_theta is not None else set())


def read_ropes(
    config: Mapping[str, Any], rule: RopeRule, settings: Mapping[str, Any], problems: list[str]
) -> tuple[Rope | None, Rope | None]:
    """(the rope, the sliding layers' rope or None); what is wrong is appended to `problems` and gives None."""
    for key in sorted(CONFIG_KEYS & {"rope_scaling", "rope_parameters"}):
        if not isinstance(config.get(key), (dict, type(None))):
            problems.append(f"{key}: an object is expected, not {config[key]!r}")
            return None, None
    if rule.local_theta is None:
        raw = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        _fill(raw, "rope_theta", config.get("rope_theta"), rule.theta)
        _fill(raw, "partial_rotary_factor", config.get("partial_rotary_factor"))
        return _rope(raw, rule, settings, "rope_parameters", problems), None
    return _read_by_layer_kind(config, rule, settings, problems)


def _read_by_layer_kind(
    config: Mapping[str, Any], rule: RopeRule, settings: Mapping[str, Any], problems: list[str]
) -> tuple[Rope | None, Rope | None]:
    nested = dict(config.get("rope_parameters") or {})
    parts = {kind: nested.pop(kind, None) or {} for kind in ("full_attention", "sliding_attention")}
    problems += [f"rope_parameters.{key}: a key llmx does not know" for key in sorted(nested)]
    malformed = [kind for kind, part in parts.items() if not isinstance(part, dict)]
    if malformed:
        problems += [f"rope_parameters.{kind}: an object is expected" for kind in malformed]
        return None, None
    full = {**parts["full_attention"], **(config.get("rope_scaling") or {})}
    local = dict(parts["sliding_attention"])
    _fill(full, "rope_theta", config.get("rope_theta"), rule.theta)
    _fill(local, "rope_theta", config.get("rope_local_base_freq"), rule.local_theta)
    return (
        _rope(full, rule, settings, "rope_parameters.full_attention", problems),
        _rope(local, rule, settings, "rope_parameters.sliding_attention", problems),
    )


def _fill(raw: dict[str, Any], key: str, *values: Any) -> None:
    """Where the record has none, take the first of `values` that is not null."""
    raw[key] = next((value for value in (raw.get(key), *values) if value is not None), None)


def _rope(
    raw: Mapping[str, Any], rule: RopeRule, settings: Mapping[str, Any], where: str, problems: list[str]
) -> Rope | None:
    name = raw.get("rope_type") or raw.get("type") or "default"
    kind = rule.aliases.get(name, name) if isinstance(name, str) else name
    if kind not in rule.kinds:
        problems.append(f"{where}: rope type {name!r} is not supported (known: {', '.join(rule.kinds)})")
        return None
    kind = cast(RopeKind, kind)
    before = len(problems)
    problems += _key_problems(raw, kind, where)
    partial = raw.get("partial_rotary_factor")
    partial = 1.0 if partial is None else partial
    if len(problems) == before and partial != 1.0 and not (rule.partial and partial < 1.0):
        problems.append(f"{where}.partial_rotary_factor: {partial} is not supported for this family")
    if len(problems) > before:
        return None
    dim = int(settings["head_dim"] * partial)
    rope = _filled(raw, kind, dim, settings)
    problems += [f"{where}: {problem}" for problem in _value_problems(rope)]
    return rope if len(problems) == before else None


def _key_problems(raw: Mapping[str, Any], kind: RopeKind, where: str) -> list[str]:
    needed, optional = KEYS[kind]
    given = {key for key, value in raw.items() if value is not None}
    problems = [f"{where}.{key}: needed by rope type {kind}" for key in sorted(needed - given)]
    unknown = given - needed - optional - COMMON - set(IGNORED)
    problems += [f"{where}.{key}: a key llmx does not know for rope type {kind}" for key in sorted(unknown)]
    for key in sorted((given & (needed | optional | COMMON)) - {"type", "rope_type"}):
        if not VALID.get(key, _above(0))(raw[key]):
            problems.append(f"{where}.{key}: {shown(raw[key])} is no valid value")
    return problems


def _filled(raw: Mapping[str, Any], kind: RopeKind, dim: int, settings: Mapping[str, Any]) -> Rope:
    """The record with transformers' defaults: the original context, and the factor as the ratio of the contexts."""
    context = settings["context_length"]
    stated = settings.get("original_context") or raw.get("original_max_position_embeddings") or context
    original = {"dynamic": context, "llama3": stated, "yarn": stated, "longrope": stated}.get(kind)
    factor = raw.get("factor")  # a plain rope has none, see KEYS
    if factor is None:
        factor = 1.0 if original is None else context / original
    rope = Rope(
        dim=dim,
        theta=float(raw["rope_theta"]),
        kind=kind,
        factor=float(factor),
        original_context=None if original is None else int(original),
        **{key: _number(raw.get(key)) for key in ("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim")},
        beta_fast=float(raw.get("beta_fast") or 32) if kind == "yarn" else None,
        beta_slow=float(raw.get("beta_slow") or 1) if kind == "yarn" else None,
        truncate=raw.get("truncate") is not False,
        short_factor=_numbers(raw.get("short_factor")),
        long_factor=_numbers(raw.get("long_factor")),
    )
    return _with_attention_factor(rope, _number(raw.get("attention_factor")))


def _with_attention_factor(rope: Rope, given: float | None) -> Rope:
    """The record with the number that multiplies cos and sin: given, or as YaRN's and LongRoPE's papers have it."""
    formulas = {"yarn": _yarn_attention_factor, "longrope": _longrope_attention_factor}
    if rope.kind not in formulas:
        return rope
    return replace(rope, attention_factor=given if given is not None else formulas[rope.kind](rope))


def _yarn_attention_factor(rope: Rope) -> float:
    """YaRN, https://arxiv.org/abs/2309.00071, equation 22; mscale as DeepSeek-V2 has it."""

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _longrope_attention_factor(rope: Rope) -> float:
    """LongRoPE as Phi-3 has it, https://arxiv.org/abs/2404.14219."""
    assert rope.original_context is not None
    if rope.factor <= 1 or rope.original_context <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))


def _value_problems(rope: Rope) -> list[str]:
    problems = []
    if rope.dim < 2 or rope.dim % 2:
        problems.append(f"{rope.dim} rotated elements a head; an even number is needed")
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if factors is not None and len(factors) != rope.dim // 2:
            problems.append(f"{name} has {len(factors)} numbers, {rope.dim // 2} are needed")
    if rope.low_freq_factor and rope.high_freq_factor and rope.high_freq_factor <= rope.low_freq_factor:
        problems.append("high_freq_factor must be above low_freq_factor")
    if rope.kind == "dynamic" and rope.dim <= 2:
        problems.append("dynamic scaling needs more than two rotated elements a head")
    return problems


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
