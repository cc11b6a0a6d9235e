"""What quantization cost, and how fast the artifact runs: teacher-forced against transformers float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from math import prod

from llmx.formats.gguf import GgufTensor
from llmx.validate.case import Case, chunks
from llmx.validate.metrics import Comparison, Divergence
from llmx.validate.oracle import Reference
from llmx.validate.report import Check, at_least, at_most, not_run, reported

KL_LIMITS: Mapping[str, float] = {
    # type -> mean KL, nats, that a sound model may lose with all its matrices in that type
    "F32": 1e-4,
    "F16": 5e-4,
    "BF16": 2e-3,
    "Q8_0": 0.01,
    "Q6_K": 0.02,
    "Q5_K": 0.05,
    "Q5_0": 0.07,
    "Q5_1": 0.07,
    "Q4_K": 0.15,
    "Q4_0": 0.2,
    "Q4_1": 0.2,
    "IQ4_NL": 0.2,
    "IQ4_XS": 0.2,
    "Q3_K": 0.5,
    "Q2_K": 1.5,
}
COARSEST = 1.5  # for a type that is not in the table
KL_ORIGIN = "each type's limit, weighted by the weights in it"
ASKED = "asked for"
NAMES = ("quality.kl", "quality.decode")
SPEED_PREFILL, SPEED_DECODE = 256, 32


def default_kl_limit(tensors: Iterable[GgufTensor]) -> float:
    """Returns the largest mean KL, nats, that a sound file of these tensors may have.

    The KL of small independent errors adds up, so each type counts by its share of the matrices' weights.
    """
    sizes = [(prod(tensor.shape), tensor.type_name) for tensor in tensors if len(tensor.shape) > 1]
    return sum(size * KL_LIMITS.get(name, COARSEST) for size, name in sizes) / sum(size for size, _ in sizes)


def check_quality(case: Case) -> Iterator[Check]:
    """Yields quality.kl and what goes with it, over the second half of each chunk (as llama.cpp's perplexity does)."""
    weights = 4 * sum(prod(spec.shape) for spec in case.model.architecture.tensors)
    if (reason := case.no_memory_for(weights)) is not None:
        yield from (not_run(name, reason) for name in NAMES)
        return
    length = case.chunk
    judged = length - 1 - length // 2
    sequences = list(chunks(case.ids, case.leading, length, -(-case.settings.positions // judged)))
    if not sequences:
        yield from (not_run(name, case.too_short) for name in NAMES)
        return
    prefill, decode = Comparison(), Comparison()
    with (
        closing(Reference(case.model.checkpoint.folder, case.threads)) as reference,
        case.runtime.open(case.artifact, threads=case.threads, context=length) as session,
    ):
        second_half = range(length // 2, length - 1)
        for tokens in sequences:
            prefill.add_streams(tokens, reference.logits(tokens), session.logits(tokens), second_half)
        tokens = sequences[0]
        decode.add_streams(tokens, reference.logits(tokens), session.logits(tokens, second_half.start), second_half)
    yield from _figures(case, prefill.summary(), decode.summary())


def _figures(case: Case, found: Divergence, cached: Divergence) -> Iterator[Check]:
    limits = case.limits
    kl_limit = default_kl_limit(case.file.tensors.values()) if limits.max_kl is None else limits.max_kl
    origin = KL_ORIGIN if limits.max_kl is None else ASKED
    short = "" if found.positions >= case.settings.positions else "; the text is too short for more"
    where = f"{found.positions} positions, second halves of chunks of {case.chunk}{short}"
    detail = f"mean KL(transformers f32 ‖ artifact), {where}"
    yield at_most("quality.kl", found.kl_mean, kl_limit, "nats", origin, detail=detail)
    yield reported("quality.kl_median", found.kl_median, "nats")
    yield reported("quality.kl_999", found.kl_999, "nats", "99.9 % quantile")
    yield _limited(reported("quality.same_top1", found.same_top1, "share", where), limits.min_top1, at_least)
    ratio = f"± {found.perplexity_ratio_error:.2g}; {found.perplexity_artifact:.5g} / {found.perplexity_reference:.5g}"
    figure = reported("quality.ppl_ratio", found.perplexity_ratio, "ratio", ratio)
    yield _limited(figure, limits.max_ppl_ratio, at_most)
    yield reported("quality.rms_delta_p", found.rms_delta_p, "probability", "of the true next token")
    detail = f"{cached.positions} positions fed one at a time through the KV cache"
    yield at_most("quality.decode", cached.kl_mean, kl_limit, "nats", origin, detail=detail)


def _limited(check: Check, limit: float | None, judge: Callable[..., Check]) -> Check:
    """The figure judged by what the user asked for, or as it is."""
    if limit is None:
        return check
    assert isinstance(check.value, float)
    return judge(check.name, check.value, limit, check.unit, ASKED, detail=check.detail)


def check_speed(case: Case) -> Iterator[Check]:
    """Yields tokens a second, time to first token, load time and peak memory of the runtime's process."""
    prefill = min(SPEED_PREFILL, case.model.architecture.context_length - SPEED_DECODE)
    context = prefill + SPEED_DECODE
    threads = case.settings.threads
    with case.runtime.open(case.artifact, threads=threads, context=context) as session:
        speed = session.speed(prefill, SPEED_DECODE)
    how = f"{threads} threads, {prefill} tokens in, {SPEED_DECODE} out"
    least = case.limits.min_tokens_per_second
    yield reported("speed.prefill", speed.prefill_tokens_per_second, "tokens/s", how)
    yield _limited(reported("speed.decode", speed.decode_tokens_per_second, "tokens/s", how), least, at_least)
    yield reported("speed.first_token", speed.time_to_first_token_seconds, "s", how)
    yield reported("speed.load", speed.load_seconds, "s")
    yield reported("speed.peak_rss", speed.peak_rss_bytes, "bytes")
