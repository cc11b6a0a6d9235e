"""onnxruntime-genai as a runtime: the folder as it is deployed, by its own tokenizer, template engine and search.

Its tokenizer alone, without a weight, also gives plain onnxruntime's sessions the text that these know nothing of.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmx.errors import IntegrityError, RuntimeMissing, UsageError
from llmx.formats.onnx import MODEL_NAME
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.worker_process import ANSWER_SECONDS, ArtifactWorker, check_sizes

WORKER = "llmx.validate.runtimes.genai_worker"
LABEL = "onnxruntime-genai"
CONFIG = "genai_config.json"
NOT_INSTALLED = "the package onnxruntime-genai is not installed"
NO_TEMPLATE = "the folder has no chat template"
# It would report its use to its makers.
ENVIRONMENT = {"ORT_DISABLE_TELEMETRY": "1"}


class Genai:
    """onnxruntime-genai on the processor."""

    name = "onnxruntime-genai"

    def __init__(self, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        """answer_seconds: the worker's time limit."""
        self._answer_seconds = answer_seconds

    def unavailable(self) -> str | None:
        """Return why onnxruntime-genai cannot run here, or None."""
        return None if importlib.util.find_spec("onnxruntime_genai") else NOT_INSTALLED

    def open(
        self, artifact: Path, *, threads: int, context: int, exact: bool = False, batch: int | None = None
    ) -> GenaiSession:
        """Load the folder of a graph and return the session.

        batch: positions run at once at most, 512 where it is None.
        Raises RuntimeMissing; UsageError, also for exact, which genai has no way to; IntegrityError with genai's own
        words, also where it dies.
        """
        if (reason := self.unavailable()) is not None:
            raise RuntimeMissing(f"onnxruntime-genai is not available: {reason}", fix="pip install 'llmx[onnx]'")
        if exact:
            what = "onnxruntime-genai runs a folder only as it is deployed"
            raise UsageError(what, fix="ask onnxruntime for an exact session")
        check_sizes(threads, context, batch)
        if (reason := text_unavailable(graph := graph_of(artifact))) is not None:
            raise UsageError(reason, where=artifact, fix=f"export with a tokenizer: {CONFIG} is written then")
        return GenaiSession(graph, self._answer_seconds, {"threads": threads, "context": context, "batch": batch})


class GenaiSession:
    """One loaded folder; see `Session`. Not to be shared between threads."""

    def __init__(self, artifact: Path, answer_seconds: float, options: Mapping[str, Any]) -> None:
        self._worker = _worker(artifact, answer_seconds, text_only=False, **options)
        self.build: str = self._worker.about["build"]
        self.vocab: int = self._worker.about["vocab"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of text. Raises UnsupportedError for names of tokens in a text that are not to be read."""
        return self._worker.tokenize(text, add_special, parse_special)

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id; a special token gives its name."""
        return self._worker.piece(token)

    def special(self) -> dict[str, Any]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        return self._worker.special()

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str | None:
        """Return the conversation rendered by genai's template engine, or None where `template_unavailable`."""
        return rendered(self._worker, messages, add_generation_prompt)

    def template_unavailable(self) -> str | None:
        """Return why `render` gives None, or None."""
        return None if self._worker.about["has_template"] else NO_TEMPLATE

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks that cover every position in order; one sequence at a time."""
        return self._worker.logits(tokens, decode_from)

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count ids of genai's greedy search; an end-of-generation id ends them and is the last."""
        return self._worker.generate(tokens, count)

    def extend(self, tokens: Sequence[int], keep: int = 0) -> np.ndarray:
        """Return f32[V], the logits after the first keep positions of the last sequence and tokens."""
        return self._worker.extend(tokens, keep)

    def speed(self, prefill: int, decode: int) -> Speed:
        """Return the speed of genai's own loop. peak_rss_bytes is the worker's since it started."""
        return self._worker.speed(prefill, decode)

    def close(self) -> None:
        """Stop the worker process. May be called twice."""
        self._worker.close()


def graph_of(artifact: Path) -> Path:
    """Return the graph's absolute path, where its folder was named. Raises UsageError when there is no such file."""
    path = Path(artifact).absolute()
    path = path / MODEL_NAME if path.is_dir() else path
    if not path.is_file():
        raise UsageError("there is no such file", where=path)
    return path


def text_unavailable(graph: Path) -> str | None:
    """Return why genai cannot read text for a graph, or None."""
    if not (graph.parent / CONFIG).is_file():
        return f"{CONFIG} does not stand beside the graph"
    return None if importlib.util.find_spec("onnxruntime_genai") else NOT_INSTALLED


def text_worker(graph: Path, answer_seconds: float) -> ArtifactWorker:
    """Start a worker that has the tokenizer of a graph's folder alone. Raises IntegrityError where genai refuses it."""
    return _worker(graph, answer_seconds, text_only=True)


def rendered(worker: ArtifactWorker, messages: Sequence[Mapping[str, Any]], prompt: bool) -> str | None:
    """Return the conversation as the worker's template engine writes it; None where there is no template."""
    if not worker.about["has_template"]:
        return None
    asked = {"messages": [dict(message) for message in messages], "add_generation_prompt": prompt}
    return worker.ask("render", **asked)["text"]


def _worker(graph: Path, answer_seconds: float, **options: Any) -> ArtifactWorker:
    return ArtifactWorker(
        WORKER, graph, label=LABEL, timeout=answer_seconds, environment=ENVIRONMENT, death=IntegrityError, **options
    )
