"""What an artifact must keep to pass: limits by format and type, and the user's own over them.

A limit for a check is, the first that there is:

  1. an option of the command line     --max-kl 0.05
  2. the check's own name in the gate  conversion.kl: 1.0e-6
  3. a word of the gate                max_kl: 0.05
  4. the default of the check          by format and type for the quality, by arithmetic for the conversion

Every limit holds for the figure as it is printed: the error bar of the perplexity ratio is reported, and neither helps
an artifact over a limit nor keeps it below one, so that a shorter text never passes more easily.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from llmx.exporters.sparsity import SPARSITY_KEY
from llmx.validate.kinds import Container, Stored
from llmx.validate.report import Check, not_applicable

ASKED = "asked for"
KL_CHECKS = ("quality.kl", "quality.decode", "quality.window", "quality.context")
AGAINST_KL = ("against.kl", "against.decode")
WORDS: Mapping[str, tuple[str, ...]] = {
    # an option, or a key of the gate -> the checks it is for
    "max_kl": (*KL_CHECKS, *AGAINST_KL),
    "min_top1": ("quality.same_top1", "against.same_top1"),
    "max_ppl_ratio": ("quality.ppl_ratio", "against.ppl_ratio"),
    "min_tokens_per_second": ("speed.decode",),
}
AT_LEAST = frozenset(
    {
        "quality.same_top1",
        "quality.positions",
        "against.same_top1",
        "against.positions",
        "speed.prefill",
        "speed.decode",
    }
)
LIMITED = (
    # every check that takes a limit by its own name; all but those of AT_LEAST must not exceed it
    "bytes.steps",
    "bytes.gain",
    "bytes.error",
    "conversion.kl",
    "conversion.logits",
    "conversion.gelu_table",
    "conversion.decode",
    "conversion.window",
    "conversion.context",
    "floor.threads",
    "floor.batch",
    "floor.cache",
    "floor.decode",
    "floor.exact",
    *KL_CHECKS,
    "quality.kl_median",
    "quality.kl_999",
    "quality.same_top1",
    "quality.ppl_ratio",
    "quality.rms_delta_p",
    "quality.positions",
    *AGAINST_KL,
    "against.kl_median",
    "against.kl_999",
    "against.same_top1",
    "against.ppl_ratio",
    "against.rms_delta_p",
    "against.positions",
    "speed.prefill",
    "speed.decode",
    "speed.first_token",
    "speed.load",
    "speed.peak_rss",
    "speed.device_memory",
)


@dataclass(frozen=True, slots=True)
class Limit:
    """A number that a figure must not pass, and where it comes from. asked: by the user."""

    value: float
    origin: str
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user asks for; None takes the default of the check.

    gate: the numbers of a gate file, by a word of WORDS or the name of a check; gate_name: what the file is called.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    min_tokens_per_second: float | None = None
    gate: Mapping[str, float] = field(default_factory=dict)
    gate_name: str = ""

    def asked(self, check: str) -> Limit | None:
        """Returns the user's limit for the check of that name, or None."""
        word = next((word for word, checks in WORDS.items() if check in checks), None)
        option = None if word is None else getattr(self, word)
        if option is not None:
            return Limit(option, ASKED, asked=True)
        value = self.gate.get(check, self.gate.get(word) if word is not None else None)
        return None if value is None else Limit(value, f"{ASKED} in {self.gate_name}", asked=True)

    def judged(self, check: Check) -> Check:
        """Returns the check judged by the user's limit where there is one; doing it twice changes nothing.

        One that could not run, and for which the user has a limit, becomes a required one.
        """
        limit = self.asked(check.name)
        if limit is None:
            return check
        if check.passed is None:
            return replace(check, required=check.required or check.applicable)
        if not isinstance(check.value, int | float):
            return check
        held = check.value >= limit.value if check.name in AT_LEAST else check.value <= limit.value
        return replace(check, passed=bool(held), limit=limit.value, origin=limit.origin)

    def unused(self, done: Iterable[str]) -> Iterator[Check]:
        """Yields "not applicable" for every check that the gate names and that was not among those of the report."""
        there = set(done)
        for name in self.gate:
            if name in LIMITED and name not in there:
                yield not_applicable(name, f"{self.gate_name} limits it; this artifact has nothing to judge by it")


@dataclass(frozen=True, slots=True)
class Bound:
    """What a sound model may lose with all its matrices in one type.

    kl: mean, nats. top1: least share of equal most likely tokens. ppl_ratio: largest perplexity ratio.
    """

    kl: float
    top1: float
    ppl_ratio: float


DEFAULTS: Mapping[str, Mapping[str, Bound]] = {
    # format -> type, with its bits a weight -> what it may cost
    "gguf": {
        "F32": Bound(1e-4, 0.98, 1.005),  # 32
        "F16": Bound(5e-4, 0.96, 1.01),  # 16
        "BF16": Bound(2e-3, 0.94, 1.02),  # 16
        "Q8_0": Bound(0.01, 0.86, 1.05),  # 8.5
        "Q6_K": Bound(0.02, 0.8, 1.08),  # 6.6
        "Q5_1": Bound(0.1, 0.7, 1.2),  # 6
        "Q5_0": Bound(0.1, 0.7, 1.2),  # 5.5
        "Q5_K": Bound(0.05, 0.7, 1.2),  # 5.5
        "Q4_1": Bound(0.3, 0.5, 1.5),  # 5
        "Q4_0": Bound(0.3, 0.5, 1.5),  # 4.5
        "Q4_K": Bound(0.15, 0.55, 1.4),  # 4.5
        "IQ4_NL": Bound(0.3, 0.5, 1.5),  # 4.5
        "IQ4_XS": Bound(0.3, 0.5, 1.5),  # 4.25
        "MXFP4": Bound(0.4, 0.45, 1.7),  # 4.25
        "Q3_K": Bound(0.5, 0.3, 2.0),  # 3.4
        "Q2_K": Bound(1.5, 0.15, 4.0),  # 2.6
    },
    "onnx": {
        "F32": Bound(1e-4, 0.98, 1.005),  # 32
        "F16": Bound(2e-3, 0.94, 1.02),  # 16, activations as well: a router's close call may fall the other way
        "BF16": Bound(2e-3, 0.94, 1.02),  # 16
        "int8": Bound(0.02, 0.8, 1.08),  # 8.1 to 10, activations rounded to 8 bits as well
        "int4-g16": Bound(0.3, 0.5, 1.5),  # 5 to 6.5
        "int4-g32": Bound(0.3, 0.5, 1.5),  # 4.5 to 5.1
        "int4": Bound(0.6, 0.3, 2.0),  # 4.1 to 4.6, in larger groups
        "int2": Bound(1.5, 0.15, 4.0),  # 2.1 to 4.5
    },
    "tensorrt": {
        "F32": Bound(1e-4, 0.98, 1.005),  # its products are of float32, not TF32
        "F16": Bound(2e-3, 0.94, 1.02),
        "BF16": Bound(0.01, 0.86, 1.05),  # activations in 8 bits of mantissa
        "int8": Bound(0.05, 0.7, 1.2),  # W8A8: inputs on one static scale, as well
        "fp8": Bound(0.05, 0.7, 1.2),  # inputs in E4M3, as well
        "int4-g32": Bound(0.3, 0.5, 1.5),
        "int4": Bound(0.6, 0.3, 2.0),  # in groups of 64 and 128
    },
    "trtllm": {
        "F32": Bound(1e-4, 0.98, 1.005),  # 32
        "F16": Bound(5e-4, 0.96, 1.01),  # 16
        "BF16": Bound(2e-3, 0.94, 1.02),  # 16
        "int8": Bound(0.02, 0.8, 1.08),  # 8, inputs rounded to 8 bits as well
        "fp8": Bound(0.1, 0.7, 1.2),  # 8, inputs as well
        "int4": Bound(0.6, 0.3, 2.0),  # 4.1 to 5
    },
}
COARSEST = Bound(1.5, 0.15, 4.0)  # for a type that is not in the table, and for half of the weights set to zero
ORIGIN = "each type's limit, weighted by the weights in it"
JUDGED_POSITIONS = 100  # below it, a share or a ratio says too little to be judged without being asked


def default_bound(tensors: Iterable[Stored], format_: str = "gguf") -> Bound:
    """Returns the most that a sound file of these tensors may lose.

    The KL of small independent errors adds up, so each type counts by its share of the matrices' weights; where nobody
    says how large they are, the one that may lose most counts.
    """
    table, tensors = DEFAULTS[format_], list(tensors)
    sizes = [(prod(tensor.shape), tensor.type_name) for tensor in tensors if len(tensor.shape) > 1]
    whole = sum(size for size, _ in sizes)
    if not whole:
        return _coarsest_of(table, {tensor.type_name for tensor in tensors})

    def weighted(figure: str) -> float:
        return sum(size * getattr(_row(table, name), figure) for size, name in sizes) / whole

    return Bound(weighted("kl"), weighted("top1"), weighted("ppl_ratio"))


def _coarsest_of(table: Mapping[str, Bound], types: Iterable[str]) -> Bound:
    rows = [_row(table, name) for name in types] or [COARSEST]
    return Bound(max(r.kl for r in rows), min(r.top1 for r in rows), max(r.ppl_ratio for r in rows))


def _row(table: Mapping[str, Bound], name: str) -> Bound:
    """The row of a type; of whole numbers in groups, int4-g32-zp-float32, that of their bits and groups, or bits."""
    bits, _, rest = name.partition("-")
    keys = (name, f"{bits}-{rest.partition('-')[0]}", bits)
    return next((table[key] for key in keys if key in table), COARSEST)


def bound_of(file: Container) -> Bound:
    """Returns the same of an opened artifact."""
    bound = default_bound(file.tensors.values(), file.format)
    if SPARSITY_KEY not in file.metadata:
        return bound
    return Bound(max(bound.kl, COARSEST.kl), min(bound.top1, COARSEST.top1), max(bound.ppl_ratio, COARSEST.ppl_ratio))


def resolved(limits: Limits, checks: Iterable[Check]) -> dict[str, dict[str, object]]:
    """Returns check -> its limit and the origin of the limit: what this report was judged by."""
    found: dict[str, dict[str, object]] = {}
    for check in checks:
        asked = limits.asked(check.name)
        limit = check.limit if check.limit is not None else None if asked is None else asked.value
        if check.name in LIMITED and limit is not None:
            found[check.name] = {"limit": limit, "origin": check.origin or ("" if asked is None else asked.origin)}
    return found


def problem_with(key: str, value: object) -> str | None:
    """Returns why a value is no limit for a word of WORDS or a check, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return f"{key}: {value!r} is no limit; a number from 0 on was expected"
    if key in {"min_top1", *WORDS["min_top1"]} and value > 1:
        return f"{key}: {value!r} is no share; it lies between 0 and 1"
    return None
