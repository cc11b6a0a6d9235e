"""onnxruntime as a runtime, on its CPU provider: every call crosses to a worker process.

It runs graphs and knows no text: what is about tokens and templates, onnxruntime-genai's tokenizer is asked, in a
second worker that reads no weights. One session of both, and not a second runtime for the text: every check is given
one session, and only plain onnxruntime can run a graph exactly or without its rewriting.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmx.errors import IntegrityError, RuntimeMissing, UsageError
from llmx.formats.onnx_reader import read_onnx
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.genai import (
    ENVIRONMENT,
    NO_TEMPLATE,
    graph_of,
    rendered,
    text_unavailable,
    text_worker,
)
from llmx.validate.runtimes.onnxruntime_check import uses_of
from llmx.validate.runtimes.worker_process import ANSWER_SECONDS, ArtifactWorker, check_sizes, plain_ids

WORKER = "llmx.validate.runtimes.onnxruntime_worker"
LABEL = "onnxruntime"
LEVELS = ("none", "basic", "extended", "all")
NO_TEXT = "plain onnxruntime has no tokenizer and no chat template"


class OnnxRuntime:
    """onnxruntime on the processor."""

    name = "onnxruntime"

    def __init__(self, *, level: str = "all", answer_seconds: float = ANSWER_SECONDS) -> None:
        """level: how far onnxruntime rewrites the graph, one of LEVELS. answer_seconds: the worker's time limit."""
        if level not in LEVELS:
            raise UsageError(f"no optimization level is called {level!r}", fix=f"choose one of: {', '.join(LEVELS)}")
        self._level, self._answer_seconds = level, answer_seconds

    def unavailable(self) -> str | None:
        """Return why onnxruntime cannot run here, or None."""
        return None if importlib.util.find_spec("onnxruntime") else "the package onnxruntime is not installed"

    def open(
        self, artifact: Path, *, threads: int, context: int, exact: bool = False, batch: int | None = None
    ) -> OnnxRuntimeSession:
        """Load a graph, its data file beside it, and return the session. artifact: the graph, or its folder.

        exact: matrices of few bits are multiplied in float32, where onnxruntime would round their inputs to 8 bits,
        whatever the graph asks for.
        batch: positions run at once at most, 512 where it is None.
        Raises RuntimeMissing; UsageError; UnsupportedError with every node that the installed onnxruntime cannot run;
        IntegrityError for a broken or hostile graph, or with onnxruntime's own words, also where it dies.
        """
        if (reason := self.unavailable()) is not None:
            raise RuntimeMissing(f"onnxruntime is not available: {reason}", fix="pip install 'llmx[onnx]'")
        artifact = graph_of(artifact)
        check_sizes(threads, context, batch)
        # Before onnxruntime opens it: whoever wrote the graph chose where its weights lie.
        graph = read_onnx(artifact)
        options = {"threads": threads, "context": context, "exact": exact, "batch": batch, "level": self._level}
        options["uses"] = uses_of(graph)
        return OnnxRuntimeSession(artifact, self._answer_seconds, options)


class OnnxRuntimeSession:
    """One loaded graph; see `Session`. Not to be shared between threads."""

    def __init__(self, artifact: Path, answer_seconds: float, options: Mapping[str, Any]) -> None:
        self._artifact, self._answer_seconds = artifact, answer_seconds
        self._speaker: ArtifactWorker | None = None
        self._worker = ArtifactWorker(
            WORKER,
            artifact,
            label=LABEL,
            timeout=answer_seconds,
            environment=ENVIRONMENT,
            death=IntegrityError,
            **options,
        )
        answer = self._worker.about
        self.build: str = answer["build"]
        self.vocab: int = answer["vocab"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks that cover every position in order; one sequence at a time.

        decode_from: positions from it on run one at a time through the cache. Asking for another sequence ends this
        one, and fetching from it then raises UsageError.
        """
        return self._worker.logits(tokens, decode_from)

    def generate(self, tokens: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
        """Return up to count greedy ids; one of ends, which a bare graph does not know, ends them and is the last."""
        return self._worker.generate(tokens, count, ends=plain_ids(ends))

    def extend(self, tokens: Sequence[int], keep: int = 0) -> np.ndarray:
        """Return f32[V], the logits after the first keep positions of the last sequence and tokens."""
        return self._worker.extend(tokens, keep)

    def speed(self, prefill: int, decode: int) -> Speed:
        """Return the speed. peak_rss_bytes is the worker's since it started."""
        return self._worker.speed(prefill, decode)

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of text. Raises RuntimeMissing where nothing reads text here, as do `piece` and `special`."""
        return self._text().tokenize(text, add_special, parse_special)

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id; a special token gives its name."""
        return self._text().piece(token)

    def special(self) -> Mapping[str, object]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        return self._text().special()

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str | None:
        """Return the conversation rendered by genai's template engine, or None where `template_unavailable`."""
        if self.template_unavailable() is not None:
            return None
        return rendered(self._text(), messages, add_generation_prompt)

    def template_unavailable(self) -> str | None:
        """Return why `render` gives None, or None."""
        if (reason := text_unavailable(self._artifact)) is not None:
            return f"{NO_TEXT}, and {reason}"
        return None if self._text().about["has_template"] else NO_TEMPLATE

    def close(self) -> None:
        """Stop the worker processes. May be called twice."""
        self._worker.close()
        if self._speaker is not None:
            self._speaker.close()

    def _text(self) -> ArtifactWorker:
        if self._speaker is None:
            if (reason := text_unavailable(self._artifact)) is not None:
                raise RuntimeMissing(f"{NO_TEXT}, and {reason}", where=self._artifact)
            self._speaker = text_worker(self._artifact, self._answer_seconds)
        return self._speaker
