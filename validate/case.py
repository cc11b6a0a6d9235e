"""What is being validated and how: the record that every check reads, and the text cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt, prod
from pathlib import Path
from typing import Protocol

import psutil

from llmx.exporters.gguf_tensors import Entry
from llmx.models.architecture import Architecture
from llmx.models.model import Model
from llmx.validate.findings import Findings
from llmx.validate.gate import ORIGIN, Limit, Limits, bound_of
from llmx.validate.kinds import Container, kind_of
from llmx.validate.oracle import Tokens
from llmx.validate.runtimes import Runtime

__all__ = ["Case", "Limits", "Noise", "Settings", "Subject", "boundaries", "chunks"]

SHORTEST_CHUNK = 8  # tokens
CHARACTERS_PER_TOKEN = 6  # a first guess of how much text is enough; where it is not, twice as much is read
PAST = 64  # positions that are judged past a boundary

PARALLEL_PARAMETERS = 100_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """positions: how many judged next-token distributions; a shorter text gives fewer, and the report says so.

    least_positions: a text that gives fewer is refused. chunk: tokens fed at once, each chunk afresh.
    twin_bytes: how large the float32 twin of the conversion check may be, on disk and again in memory.
    attention_bytes: how large a layer's attention scores may be in the reference, which limits the longest sequence.
    memory_bytes: what the whole validation may take, None for what the machine has.
    blame: look for the tensor at fault although no check failed.
    """

    positions: int = 512
    least_positions: int = 1
    chunk: int = 256
    threads: int = 1
    twin_bytes: int = 4 << 30
    attention_bytes: int = 512 << 20
    memory_bytes: int | None = None
    blame: bool = False


@dataclass(slots=True)
class Noise:
    """The largest mean KL, nats, between the runtime and itself on this artifact; None where it was not measured.

    usual: as people run it. exact: with the float32 twin and exact kernels.
    """

    usual: float | None = None
    exact: float | None = None


class Subject(Protocol):
    """What it takes to run an artifact, with its checkpoint at hand (Case) or without. All fields are as in Case."""

    @property
    def artifact(self) -> Path: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def scratch(self) -> Path: ...
    @property
    def findings(self) -> Findings: ...
    @property
    def noise(self) -> Noise: ...
    @property
    def threads(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Case:
    """One artifact against one reference on one runtime. scratch: an empty folder that is removed afterwards.

    findings: where a check leaves what the report draws. noise: what the checks of the floor leave for later ones.
    """

    artifact: Path
    file: Container
    model: Model
    tokens: Tokens
    runtime: Runtime
    text: str
    limits: Limits
    settings: Settings
    scratch: Path
    findings: Findings = field(default_factory=Findings)
    noise: Noise = field(default_factory=Noise)
    ids: list[int] = field(init=False)  # of the text, without BOS: as many as the checks can use

    def __post_init__(self) -> None:
        longest = max((at for at in boundaries(self.model.architecture).values() if at < self.longest), default=0)
        wanted = max(3 * self.settings.positions + 2 * self.settings.chunk, longest + PAST)
        characters = wanted * CHARACTERS_PER_TOKEN
        ids = self.tokens.encode(self.text[:characters], add_special=False)
        while len(ids) < wanted and characters < len(self.text):
            characters *= 2
            ids = self.tokens.encode(self.text[:characters], add_special=False)
        object.__setattr__(self, "ids", ids[:wanted])

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: never more than the model's context, or than a short text has."""
        have = len(self.leading) + len(self.ids)
        return min(self.settings.chunk, self.context, have)

    @property
    def context(self) -> int:
        """Tokens of a sequence that both the model and the artifact take, see `Container`."""
        told = self.model.architecture.context_length
        return min(told, getattr(self.file, "capacity", told))

    @property
    def judged(self) -> range:
        """The positions of a chunk whose quality is judged: its second half, as llama.cpp's perplexity does."""
        return range(self.chunk // 2, self.chunk - 1)

    def sequences(self, positions: int, judged: int) -> Iterator[list[int]]:
        """Yields chunks of the text, enough for so many positions where `judged` of each chunk count; or none."""
        if self.chunk < SHORTEST_CHUNK:
            return iter(())
        return chunks(self.ids, self.leading, self.chunk, -(-positions // judged))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence whose attention scores, f32[heads, T, T], stay in their budget."""
        return isqrt(self.settings.attention_bytes // (4 * self.model.architecture.heads))

    def past(self, boundary: int) -> list[int] | str:
        """Returns a sequence that goes PAST positions beyond a boundary, or why there is none."""
        length = min(boundary + PAST, self.context)
        if length <= boundary:
            return f"it takes more than {boundary} tokens; the artifact was built for {length}"
        if length > self.longest:
            return f"it takes {length} tokens; the reference runs at most {self.longest} at once"
        sequence = next(chunks(self.ids, self.leading, length, 1), None)
        have = len(self.leading) + len(self.ids)
        return f"it takes {length} tokens; the text has {have}" if sequence is None else sequence

    def kl_limit(self, check: str) -> Limit:
        """Returns the limit on the mean KL, nats, of a check of the quality: the user's, or that of the types."""
        asked = self.limits.asked(check)
        return Limit(bound_of(self.file).kl, ORIGIN) if asked is None else asked

    @property
    def threads(self) -> int:
        """Threads for comparing: one for a small model, whose threads would only wait for each other.

        On a busy machine, two threads that spin at every barrier took tiny models from 5 s to 100 s.
        """
        parameters = sum(prod(spec.shape) for spec in self.model.architecture.tensors)
        return self.settings.threads if parameters >= PARALLEL_PARAMETERS else 1

    @property
    def too_short(self) -> str:
        told = f"the text has {len(self.ids)} tokens and the context {self.context}"
        return f"{told}; a chunk of {self.chunk} is too short, it has at least {SHORTEST_CHUNK}"

    def no_memory_for(self, weight_bytes: int) -> str | None:
        """Why a float32 reference of that size cannot be loaded, or None."""
        available = psutil.virtual_memory().available
        if self.settings.memory_bytes is not None:
            available = min(available, self.settings.memory_bytes)
        if weight_bytes <= available:
            return None
        return f"the float32 reference takes {weight_bytes} bytes of memory; {available} are available"

    @property
    def leading(self) -> list[int]:
        """What stands before the first token of a sequence: [BOS] if the tokenizer adds it."""
        ids = self.tokens.encode("", add_special=True)
        return ids[:1] if ids[:1] == [self.tokens.bos] else []

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The tensors that the artifact must hold, in its format's layout."""
        return kind_of(self.file).entries(self.file, self.model, self.tokens.size)


def chunks(ids: Sequence[int], leading: Sequence[int], length: int, count: int) -> Iterator[list[int]]:
    """Yields up to `count` sequences of `length` tokens that do not overlap, each opened by `leading`."""
    body = length - len(leading)
    for number in range(min(count, len(ids) // body)):
        yield [*leading, *ids[number * body : (number + 1) * body]]


def boundaries(a: Architecture) -> dict[str, int]:
    """Returns what lies within the context and must be passed to be seen: name of the boundary -> its position.

    window: from it on, a sliding layer forgets. context: the original one, past which the rope's scaling was added.
    """
    windows = a.sliding_window if "sliding" in a.layer_kinds else None
    original = None if a.rope is None or a.rope.kind == "default" else a.rope.original_context
    found = {"window": windows, "context": original}
    return {name: at for name, at in found.items() if at is not None and at < a.context_length}
