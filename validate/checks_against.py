"""An artifact against another one: what the second says in place of the checkpoint, on the same tokens.

Neither the checkpoint nor its tokenizer is needed, so files of which only files are left can be judged, and a new
build against the one that is deployed. Token ids must be the same, which is looked at first: a distribution over other
tokens says nothing. Direction: KL(other ‖ artifact).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path

from llmx.errors import CheckFailed, IntegrityError, UsageError
from llmx.validate.case import PARALLEL_PARAMETERS, Limits, Noise, Settings
from llmx.validate.checks_floor import floor_of, resolvable
from llmx.validate.checks_quality import Judging, speed_of
from llmx.validate.corpus import CORPUS
from llmx.validate.findings import Findings
from llmx.validate.gate import AGAINST_KL, ORIGIN, Bound, Limit, bound_of
from llmx.validate.kinds import Container, kind_of
from llmx.validate.metrics import Comparison
from llmx.validate.record import Reading, read_text
from llmx.validate.report import Check, at_most, not_run
from llmx.validate.runtimes import Runtime, Session

ALIKE_NAMES = ("against.loads", "against.tokens")
NAMES = ("against.kl", "against.decode")
TEXT_CHARACTERS = 32_000
TOKEN_CONTEXT = 64
SHOWN = 3
UNLIKE = "the two artifacts do not read text as the same token ids, so their distributions cannot be compared"
BOTH = f"{ORIGIN}; those of both files together"


@dataclass(slots=True)
class Pair:
    """Two artifacts on a runtime. reading: the text as both read it, once check_alike has found that they do.

    alone: the other is the reference of the report; there is no checkpoint. other_runtime: where it is not the same.

    The other fields are as in Case.
    """

    artifact: Path
    file: Container
    other: Path
    other_file: Container
    runtime: Runtime
    text: str
    limits: Limits
    settings: Settings
    scratch: Path
    findings: Findings = field(default_factory=Findings)
    noise: Noise = field(default_factory=Noise)
    reading: Reading | None = None
    alone: bool = False
    other_runtime: Runtime | None = None

    @property
    def threads(self) -> int:
        """As Case.threads: one for a small model, whose threads would only wait for each other."""
        weights = sum(prod(tensor.shape) for tensor in self.file.tensors.values())
        return self.settings.threads if weights >= PARALLEL_PARAMETERS else 1

    @property
    def context_length(self) -> int:
        """Tokens that both models take."""
        return min(kind_of(file).context_length(file) for file in (self.file, self.other_file))

    @property
    def chunk(self) -> int:
        return self.settings.chunk if self.reading is None else self.reading.chunk

    @property
    def bound(self) -> Bound:
        """What two sound files of one model may lie apart: small independent errors add up."""
        a, b = (bound_of(file) for file in (self.file, self.other_file))
        return Bound(a.kl + b.kl, max(0.0, a.top1 + b.top1 - 1), a.ppl_ratio * b.ppl_ratio)

    def open(self, path: Path, context: int) -> Session:
        other = self.other_runtime is not None and path == self.other
        runtime = self.other_runtime if other and self.other_runtime is not None else self.runtime
        return runtime.open(path, threads=self.threads, context=context)


@dataclass(frozen=True, slots=True)
class _Encoder:
    """A session as read_text takes a tokenizer."""

    session: Session

    def encode(self, text: str, add_special: bool) -> list[int]:
        return self.session.tokenize(text, add_special=add_special)

    @property
    def bos(self) -> int | None:
        found = self.session.special()["bos"]
        return found if isinstance(found, int) else None


def check_alike(pair: Pair) -> Iterator[Check]:
    """Yields against.loads and against.tokens, and leaves the text as both read it.

    Raises: UsageError for a text that gives too few positions.
    """
    try:
        other = pair.open(pair.other, TOKEN_CONTEXT)
    except (CheckFailed, IntegrityError) as error:
        told = " ".join(str(error).split())
        yield Check("against.loads", False, origin="the runtime's own loader", detail=f"{pair.other.name}: {told}")
        yield not_run("against.tokens", f"the runtime refuses {pair.other.name}")
        return
    with other, pair.open(pair.artifact, TOKEN_CONTEXT) as session:
        detail = f"{pair.other.name}: {other.build}"
        yield Check("against.loads", True, origin="the runtime's own loader", detail=detail)
        check = _alike(pair, other, session)
        if check.passed:
            pair.reading = read_text(_Encoder(session), pair.text, pair.context_length, pair.settings)
        yield check


def check_against(pair: Pair) -> Iterator[Check]:
    """Yields against.positions, .kl and what goes with it, and .decode: as the quality against the checkpoint."""
    if (reading := pair.reading) is None:
        yield from _unread(NAMES)
        return
    with pair.open(pair.other, reading.chunk) as other, pair.open(pair.artifact, reading.chunk) as session:
        prefill, decode = _prefill(reading, other, session), _decode(reading, other, session)
    pair.findings.note("against", {"prefill": asdict(prefill.summary()), "decode": asdict(decode.summary())})
    if pair.alone:
        pair.findings.note("kl_by_position", prefill.curve())
        pair.findings.note("kl_quantiles", prefill.quantiles())
    judging = Judging("against", pair.other.name, pair.bound, BOTH, pair.limits, pair.settings, reading.chunk)
    for check in judging.figures(prefill.summary(), decode.summary()):
        judged = pair.limits.judged(check)
        yield resolvable(judged, pair.noise.usual) if judged.name in AGAINST_KL else judged


def check_pair_floor(pair: Pair) -> Iterator[Check]:
    """Yields the noise floor of the artifact, and whether the limits on the KL against the other lie above it."""
    names = ("floor.threads", "floor.batch", "floor.cache", "floor.decode")
    if pair.reading is None:
        yield from _unread(names)
        return
    limits = [pair.limits.asked(name) or Limit(pair.bound.kl, BOTH) for name in AGAINST_KL]
    yield from floor_of(pair, pair.reading.sequences[0], limits)


def check_pair_speed(pair: Pair) -> Iterator[Check]:
    """Yields the figures of check_speed, which need no checkpoint."""
    yield from speed_of(pair, pair.context_length)


def _unread(names: tuple[str, ...]) -> Iterator[Check]:
    yield from (not_run(name, "see against.loads and against.tokens", code=UsageError.exit_code) for name in names)


def _alike(pair: Pair, other: Session, session: Session) -> Check:
    """The tokens that both files name, and the ids of many texts; a wrong choice of files rather than a broken one."""
    texts = [*CORPUS, pair.text[:TEXT_CHARACTERS]]
    problems = [*_vocabulary(pair), *(told for text in texts if (told := _difference(text, other, session)))]
    shown = "; ".join(problems[:SHOWN]) + (f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
    detail = f"{UNLIKE}: {shown}; give an artifact of the same model" if problems else f"{len(texts)} texts"
    check = at_most("against.tokens", len(problems), 0, "problems", "ids must mean the same", detail=detail)
    return replace(check, code=UsageError.exit_code)


def _vocabulary(pair: Pair) -> Iterator[str]:
    """Where the lists of tokens part; what one of them has more is padding that the other leaves out."""
    ours, theirs = (kind_of(file).token_texts(file) for file in (pair.file, pair.other_file))
    for number, (a, b) in enumerate(zip(theirs, ours, strict=False)):
        if a != b:
            yield f"token {number} is {a!r} in {pair.other.name} and {b!r} in {pair.artifact.name}"
            return


def _difference(text: str, other: Session, session: Session) -> str | None:
    wanted, found = other.tokenize(text, add_special=True), session.tokenize(text, add_special=True)
    if wanted == found:
        return None
    pairs = enumerate(zip(wanted, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(found)))
    return f"{text[:40]!r} at id {at}: the other gives {wanted[at : at + 4]}, the artifact {found[at : at + 4]}"


def _prefill(reading: Reading, other: Session, session: Session) -> Comparison:
    found = Comparison()
    for tokens in reading.sequences:
        found.add_streams(tokens, other.logits(tokens), session.logits(tokens), reading.judged)
    return found


def _decode(reading: Reading, other: Session, session: Session) -> Comparison:
    """The second half of one chunk, one token at a time through both key-value caches."""
    found, tokens, start = Comparison(), reading.sequences[0], reading.judged.start
    found.add_streams(tokens, other.logits(tokens, start), session.logits(tokens, start), reading.judged)
    return found
