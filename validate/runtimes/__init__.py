"""Run an artifact where it will really run: one protocol, one entry a runtime.

A runtime that is not installed says why (`unavailable`); whoever asked records "not run", never "passed".
Nothing here imports a runtime: the registry holds import paths, resolved by `find_runtime`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmx.errors import UsageError
from llmx.registry import declared_names, found

if TYPE_CHECKING:
    from typing import Self  # newer than the Python that some workers run on

ENTRY_POINTS = "llmx.runtimes"

# name -> "module:callable without arguments that gives a Runtime". Third parties add to it by the entry points above.
RUNTIMES: dict[str, str] = {
    "llama.cpp": "llmx.validate.runtimes.llamacpp:LlamaCpp",
    "onnxruntime": "llmx.validate.runtimes.onnxruntime:OnnxRuntime",
    "onnxruntime-genai": "llmx.validate.runtimes.genai:Genai",
    "tensorrt": "llmx.validate.runtimes.tensorrt:TensorRt",
    "transformers": "llmx.validate.runtimes.transformers_cpu:TransformersCpu",
}


@dataclass(frozen=True, slots=True)
class Speed:
    """What one run measured: tokens a second, seconds, and the bytes of the runtime's own process.

    prefill_tokens_per_second: the prompt fed at once, logits of its last position only.
    decode_tokens_per_second: one token at a time through the key-value cache, greedy.
    time_to_first_token_seconds: from the prompt's ids to the first new id, weights already warm.
    load_seconds: from the file name to ready to run.
    peak_device_bytes: of a GPU's memory, what the session took; None where it runs on the processor.
    how: how it decoded, where there is more than one way.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    load_seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None = None
    how: str = ""


class Session(Protocol):
    """An artifact loaded in its runtime. A context manager; `close` frees everything and may be called twice."""

    build: str
    """The runtime's exact build, with the instruction sets it uses: numbers are comparable only within one."""
    vocab: int
    """V, the width of a row of logits."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of text. add_special: with BOS/EOS as the artifact asks; parse_special: `<s>` is one id."""
        ...

    def piece(self, token: int) -> bytes:
        """Return the bytes a token stands for (a special token: its name)."""
        ...

    def special(self) -> Mapping[str, object]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        ...

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str | None:
        """Return the conversation as the artifact's chat template writes it; None where `template_unavailable`."""
        ...

    def template_unavailable(self) -> str | None:
        """Return why `render` gives None here, or None where it works."""
        ...

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks, in order, that together hold the logits of every position of tokens.

        decode_from: positions from it on are fed one token at a time through the key-value cache.
        """
        ...

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count greedy ids after tokens; an end-of-generation id ends it and is then the last one."""
        ...

    def extend(self, tokens: Sequence[int], keep: int = 0) -> np.ndarray:
        """Return f32[V]: the logits after tokens, put behind the first keep positions of the last extended sequence.

        So a conversation goes on a token at a time. Raises CheckFailed where the runtime cannot go back to keep.
        """
        ...

    def speed(self, prefill: int, decode: int) -> Speed:
        """Return the speed of a prompt of prefill tokens and of decode more, with the runtime's usual settings.

        Raises: UnsupportedError where it would say nothing: of an emulation.
        """
        ...

    def close(self) -> None: ...


class Runtime(Protocol):
    """A program that runs artifacts.

    One may have `fixed`: a frozenset of the names of those options of `open` that change nothing there.
    """

    name: str

    def unavailable(self) -> str | None:
        """Return why it cannot run on this machine, or None. Cheap: nothing is loaded."""
        ...

    def open(
        self, artifact: Path, *, threads: int, context: int, exact: bool = False, batch: int | None = None
    ) -> Session:
        """Return a session for sequences of up to context tokens.

        exact: a float32 key-value cache and plain attention, so that a wrong conversion is not hidden in rounding.
        batch: how many positions are run at once at most; None takes what the runtime usually does.
        Raises RuntimeMissing, IntegrityError (the runtime refuses the file).
        """
        ...


def runtime_names() -> list[str]:
    """Return every known runtime's name, sorted: ours, then those that installed packages declare."""
    return sorted(RUNTIMES.keys() | declared_names(ENTRY_POINTS))


def find_runtime(name: str) -> Runtime:
    """Import and return the runtime of that name. Raises UsageError, with the names there are."""
    known = found(name, RUNTIMES, ENTRY_POINTS)
    if known is None:
        raise UsageError(f"no runtime is called {name!r}", fix=f"choose one of: {', '.join(runtime_names())}")
    return known
