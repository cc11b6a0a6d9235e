"""What is being validated and how: the record that every check reads, and the text cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import psutil

from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_tensors import Entry, entries
from llmx.formats.gguf import GgufFile
from llmx.models.model import Model
from llmx.validate.findings import Findings
from llmx.validate.oracle import Tokens
from llmx.validate.runtimes import Runtime

SHORTEST_CHUNK = 8  # tokens
CHARACTERS_PER_TOKEN = 40  # more than any tokenizer reaches over a page of text

PARALLEL_PARAMETERS = 20_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user asks for; None takes the default of the check."""

    max_kl: float | None = None
    min_top1: float | None = None
    max_ppl_ratio: float | None = None
    min_tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """positions: how many judged next-token distributions at least. chunk: tokens fed at once, each chunk afresh.

    twin_bytes: how large the float32 twin of the conversion check may be, on disk and again in memory.
    window_tokens: how long the longest sequence may be that is run to pass a sliding window.
    blame: look for the tensor at fault although no check failed.
    """

    positions: int = 512
    chunk: int = 256
    threads: int = 1
    twin_bytes: int = 4 << 30
    window_tokens: int = 1024 + 64
    blame: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One artifact against one reference on one runtime. scratch: an empty folder that is removed afterwards.

    findings: where a check leaves what the report draws.
    """

    artifact: Path
    file: GgufFile
    model: Model
    tokens: Tokens
    runtime: Runtime
    text: str
    limits: Limits
    settings: Settings
    scratch: Path
    findings: Findings = field(default_factory=Findings)
    ids: list[int] = field(init=False)  # of the text, without BOS: as many as the checks can use

    def __post_init__(self) -> None:
        wanted = 3 * self.settings.positions + self.settings.window_tokens
        ids = self.tokens.encode(self.text[: wanted * CHARACTERS_PER_TOKEN], add_special=False)
        object.__setattr__(self, "ids", ids)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: never more than the model's context, or than a short text has."""
        have = len(self.leading) + len(self.ids)
        return max(SHORTEST_CHUNK, min(self.settings.chunk, self.model.architecture.context_length, have))

    @property
    def threads(self) -> int:
        """Threads for comparing: one for a small model, whose threads would only wait for each other.

        On a busy machine, two threads that spin at every barrier took tiny models from 5 s to 100 s.
        """
        parameters = sum(prod(spec.shape) for spec in self.model.architecture.tensors)
        return self.settings.threads if parameters >= PARALLEL_PARAMETERS else 1

    @property
    def too_short(self) -> str:
        return f"the text has {len(self.ids)} tokens; a chunk has at least {SHORTEST_CHUNK}"

    def no_memory_for(self, weight_bytes: int) -> str | None:
        """Why a float32 reference of that size cannot be loaded, or None."""
        available = psutil.virtual_memory().available
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
        """The tensors that the artifact must hold, in GGUF's layout."""
        a = self.model.architecture
        family = gguf_family(a)
        return entries(a, family, min(a.vocab, self.tokens.size) if family.cut_padding_rows else a.vocab)

    @property
    def bits_per_weight(self) -> float:
        tensors = self.file.tensors.values()
        return 8 * sum(tensor.nbytes for tensor in tensors) / sum(prod(tensor.shape) for tensor in tensors)


def chunks(ids: Sequence[int], leading: Sequence[int], length: int, count: int) -> Iterator[list[int]]:
    """Yields up to `count` sequences of `length` tokens that do not overlap, each opened by `leading`."""
    body = length - len(leading)
    for number in range(min(count, len(ids) // body)):
        yield [*leading, *ids[number * body : (number + 1) * body]]
