"""What quantization cost, and how fast the artifact runs: teacher-forced against transformers float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import prod

from llmx.errors import ResourceError, UnsupportedError
from llmx.validate.case import Case, Limits, Settings, Subject, boundaries
from llmx.validate.checks_floor import resolvable
from llmx.validate.gate import JUDGED_POSITIONS, KL_CHECKS, ORIGIN, Bound, Limit, bound_of
from llmx.validate.metrics import Comparison, Divergence
from llmx.validate.oracle import Reference
from llmx.validate.report import Check, at_least, at_most, not_run, reported
from llmx.validate.runtimes import Session, Speed

NAMES = ("quality.kl", "quality.decode")
WHERE = {"window": "past the sliding window of", "context": "past the original context of"}
SPEED_PREFILL, SPEED_DECODE = 256, 32


def check_quality(case: Case) -> Iterator[Check]:
    """Yields quality.positions, .kl and what goes with it, .decode; .window and .context where there are such."""
    for check in _checks(case):
        judged = case.limits.judged(check)
        decided = judged.passed is not None and judged.name in KL_CHECKS
        yield resolvable(judged, case.noise.usual) if decided else judged


def _checks(case: Case) -> Iterator[Check]:
    weights = 4 * sum(prod(spec.shape) for spec in case.model.architecture.tensors)
    if (reason := case.no_memory_for(weights)) is not None:
        yield from (not_run(name, reason, code=ResourceError.exit_code) for name in NAMES)
        return
    sequence = next(case.sequences(1, 1), None)
    if sequence is None or not case.judged:
        yield from (not_run(name, case.too_short) for name in NAMES)
        return
    with closing(Reference(case.model.checkpoint.folder, case.threads)) as reference:
        with case.runtime.open(case.artifact, threads=case.threads, context=len(sequence)) as session:
            trial = _Trial(case, reference, session)
            prefill, decode = trial.prefill(), trial.decode(sequence)
        _note(case, prefill, decode)
        bound = bound_of(case.file)
        judging = Judging("quality", "transformers f32", bound, ORIGIN, case.limits, case.settings, case.chunk)
        yield from judging.figures(prefill.summary(), decode.summary())
        for name, boundary in boundaries(case.model.architecture).items():
            yield _past(case, reference, name, boundary)


@dataclass(frozen=True, slots=True)
class _Trial:
    """Compares the artifact in its session with the reference."""

    case: Case
    reference: Reference
    session: Session

    def prefill(self) -> Comparison:
        """The second half of every chunk, run at once."""
        found, case = Comparison(), self.case
        for tokens in case.sequences(case.settings.positions, len(case.judged)):
            found.add_streams(tokens, self.reference.logits(tokens), self.session.logits(tokens), case.judged)
        return found

    def decode(self, tokens: list[int]) -> Comparison:
        """The second half of one chunk, one token at a time through the key-value cache."""
        found, judged = Comparison(), self.case.judged
        found.add_streams(tokens, self.reference.logits(tokens), self.session.logits(tokens, judged.start), judged)
        return found


def _note(case: Case, prefill: Comparison, decode: Comparison) -> None:
    """Leaves the curves and the whole of both summaries for the report."""
    case.findings.note("kl_by_position", prefill.curve())
    case.findings.note("kl_quantiles", prefill.quantiles())
    case.findings.note("quality", {"prefill": asdict(prefill.summary()), "decode": asdict(decode.summary())})


@dataclass(frozen=True, slots=True)
class Judging:
    """How a comparison becomes checks. kind: their names' first part. bound, origin: the limits where none is asked.

    reference: what the artifact is compared with, in words.
    """

    kind: str
    reference: str
    bound: Bound
    origin: str
    limits: Limits
    settings: Settings
    chunk: int

    def figures(self, found: Divergence, cached: Divergence) -> Iterator[Check]:
        """Yields .positions, .kl and what goes with it of prompts run at once, and .decode of a cached sequence."""
        short = "" if found.positions >= self.settings.positions else "; the text is too short for more"
        where = f"{found.positions} positions, second halves of chunks of {self.chunk}{short}"
        least, kind, bound = self.settings.least_positions, self.kind, self.bound
        origin = "something must have been compared" if least == 1 else "asked for"
        yield at_least(f"{kind}.positions", found.positions, least, "positions", origin, detail=where)
        yield self._kl(f"{kind}.kl", found, f"mean KL({self.reference} ‖ artifact), {where}")
        yield reported(f"{kind}.kl_median", found.kl_median, "nats")
        yield reported(f"{kind}.kl_999", found.kl_999, "nats", "99.9 % quantile")
        top1, ratio = found.same_top1, found.perplexity_ratio
        told = (
            f"± {found.perplexity_ratio_error:.2g}; {found.perplexity_artifact:.5g} / {found.perplexity_reference:.5g}"
        )
        if found.positions >= JUDGED_POSITIONS:
            yield at_least(f"{kind}.same_top1", top1, bound.top1, "share", self.origin, detail=where)
            yield at_most(f"{kind}.ppl_ratio", ratio, bound.ppl_ratio, "ratio", self.origin, detail=told)
        else:
            yield reported(f"{kind}.same_top1", top1, "share", where)
            yield reported(f"{kind}.ppl_ratio", ratio, "ratio", told)
        yield reported(f"{kind}.rms_delta_p", found.rms_delta_p, "probability", "of the true next token")
        yield self._kl(f"{kind}.decode", cached, f"{cached.positions} positions fed one at a time through the KV cache")

    def _kl(self, name: str, found: Divergence, detail: str) -> Check:
        limit = self.limits.asked(name) or Limit(self.bound.kl, self.origin)
        return at_most(name, found.kl_mean, limit.value, "nats", limit.origin, detail=detail)


def _past(case: Case, reference: Reference, name: str, boundary: int) -> Check:
    """The positions past a boundary, of a sequence of its own."""
    sequence = case.past(boundary)
    if isinstance(sequence, str):
        return not_run(f"quality.{name}", sequence, required=False)
    found, judged = Comparison(), range(boundary, len(sequence))
    with case.runtime.open(case.artifact, threads=case.threads, context=len(sequence)) as session:
        found.add_streams(sequence, reference.logits(sequence), session.logits(sequence), judged)
    detail = f"mean KL, {found.positions} positions {WHERE[name]} {boundary}"
    limit = case.kl_limit(f"quality.{name}")
    return at_most(f"quality.{name}", found.summary().kl_mean, limit.value, "nats", limit.origin, detail=detail)


def check_speed(case: Case) -> Iterator[Check]:
    """Yields tokens a second, time to first token, load time and peak memory of the runtime's process, of one run."""
    yield from speed_of(case, case.context)


def speed_of(subject: Subject, longest: int) -> Iterator[Check]:
    """Yields what check_speed does. longest: tokens that the model takes."""
    context = min(SPEED_PREFILL + SPEED_DECODE, longest)
    decode = min(SPEED_DECODE, context // 2)
    prefill, threads = context - decode, subject.settings.threads
    if decode < 1:
        yield not_run("speed.decode", f"a context of {context} has no room for a prompt and an answer")
        return
    with subject.runtime.open(subject.artifact, threads=threads, context=context) as session:
        try:
            speed = session.speed(prefill, decode)
        except UnsupportedError as error:  # an emulation has none; whoever limits the speed needs another runtime
            yield subject.limits.judged(not_run("speed.decode", error.what, required=False))
            return
    measured = {key: value for key, value in asdict(speed).items() if value not in (None, "")}
    told = {**measured, "threads": threads, "prefill_tokens": prefill, "decode_tokens": decode}
    subject.findings.note("speed", told)
    how = f"{threads} threads, {prefill} tokens in, {decode} out{'; ' * bool(speed.how)}{speed.how}"
    yield from (subject.limits.judged(replace(check, detail=how)) for check in _speeds(speed))


def _speeds(speed: Speed) -> Iterator[Check]:
    yield reported("speed.prefill", speed.prefill_tokens_per_second, "tokens/s")
    yield reported("speed.decode", speed.decode_tokens_per_second, "tokens/s")
    yield reported("speed.first_token", speed.time_to_first_token_seconds, "s")
    yield reported("speed.load", speed.load_seconds, "s")
    yield reported("speed.peak_rss", speed.peak_rss_bytes, "bytes")
    if speed.peak_device_bytes is not None:
        yield reported("speed.device_memory", speed.peak_device_bytes, "bytes")
