"""TensorRT as a runtime: an engine on the GPU that it was built for. Every call crosses to a worker process.

The worker runs under the Python that LLMX_TENSORRT_PYTHON names, since TensorRT 8 has no package for ours, and imports
TensorRT or TensorRT-RTX, whichever built the engine. TensorRT knows no text: see huggingface_text.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmx.errors import IntegrityError, LlmxError, RuntimeMissing, UsageError
from llmx.formats.tensorrt import CONFIG_NAME, ENGINE_NAME, PACKAGES, EngineConfig, engine_folder, read_config
from llmx.interpreter import TENSORRT_PYTHON, tensorrt_python
from llmx.validate.folder_text import TOKENIZERS, has_tokenizer
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.huggingface_text import FolderText
from llmx.validate.runtimes.worker_process import (
    ANSWER_SECONDS,
    ArtifactWorker,
    WorkerProcess,
    check_sizes,
    plain_ids,
)

WORKER = "llmx.validate.runtimes.tensorrt_worker"
LABEL = "TensorRT"
PROBE_SECONDS = 120.0
EXACT_TYPE = "F32"
NO_TEXT = f"the engine's folder has no {' and no '.join(TOKENIZERS)}, so nothing in it reads text"


class TensorRt:
    """TensorRT or TensorRT-RTX on the first GPU."""

    name = "tensorrt"
    # An engine is compiled: threads of the processor and another arithmetic are nothing that it has.
    fixed = frozenset({"threads", "exact"})

    def __init__(self, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        """answer_seconds: the worker's time limit."""
        self._answer_seconds = answer_seconds

    def unavailable(self) -> str | None:
        """Return why TensorRT cannot run here, or None. A process looks once; no engine and no TensorRT is loaded."""
        return _unavailable(tensorrt_python())

    def open(
        self, artifact: Path, *, threads: int, context: int, exact: bool = False, batch: int | None = None
    ) -> TensorRtSession:
        """Load the engine of a folder and return the session. artifact: the folder, or its engine.

        exact: only an engine in float32 has such a run, and it has no other. batch: positions run at once at most; None
        takes as many as the engine does, up to 512. threads: there is no use of them.
        Raises RuntimeMissing, also for an engine of another version of TensorRT or another kind of GPU; UsageError,
        also for a context beyond what the engine was built for; IntegrityError for a broken folder or with TensorRT's
        own words, also where it dies.
        """
        check_sizes(threads, context, batch)
        folder, config = located(artifact), read_config(located(artifact))
        if exact and (reason := inexact(config)) is not None:
            raise UsageError(reason, where=folder, fix="ask for a session that is not exact")
        if context > config.max_length:
            what = f"the engine was built for sequences of up to {config.max_length} tokens; {context} were asked for"
            raise UsageError(what, where=folder, fix="ask for fewer, or build it with a larger --max-length")
        check_size(folder, config)
        if (reason := self.unavailable()) is not None:
            raise RuntimeMissing(f"TensorRT is not available: {reason}", fix=f"set {TENSORRT_PYTHON}, or use a GPU")
        options = {
            "package": config.builder,
            "version": config.builder_version,
            "capability": None if config.compute_capability is None else list(config.compute_capability),
            "cache": config.cache,
            "context": context,
            "batch": batch,
        }
        return TensorRtSession(folder, config, self._answer_seconds, options)


class TensorRtSession:
    """One loaded engine; see `Session`. Not to be shared between threads."""

    def __init__(self, folder: Path, config: EngineConfig, answer_seconds: float, options: Mapping[str, Any]) -> None:
        self._folder = folder
        self._worker = ArtifactWorker(
            WORKER,
            folder / ENGINE_NAME,
            label=LABEL,
            timeout=answer_seconds,
            python=tensorrt_python(),
            **options,
        )
        self.build: str = self._worker.about["build"]
        self.vocab: int = self._worker.about["vocab"]
        if self.vocab != config.vocab_size:
            self.close()
            what = f"the engine gives {self.vocab} logits, {CONFIG_NAME} says {config.vocab_size}"
            raise IntegrityError(what, where=folder, fix="copy the whole folder again, or build the engine again")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of text. Raises RuntimeMissing without a tokenizer, as do `piece` and `special`."""
        return self._text.tokenize(text, add_special, parse_special)

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id; a special token gives its name."""
        return self._text.piece(token)

    def special(self) -> Mapping[str, object]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        return self._text.special()

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str | None:
        """Return the conversation by the folder's template, or None where `template_unavailable`."""
        return None if self.template_unavailable() is not None else self._text.render(messages, add_generation_prompt)

    def template_unavailable(self) -> str | None:
        """Return why `render` gives None, or None."""
        return self._text.template_unavailable() if has_tokenizer(self._folder) else NO_TEXT

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks that cover every position in order; one sequence at a time.

        decode_from: positions from it on run one at a time through the cache. Asking for another sequence ends this
        one, and fetching from it then raises UsageError.
        """
        return self._worker.logits(tokens, decode_from)

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count greedy ids; an end-of-generation id ends them and is the last."""
        ends: Any = self.special()["end_of_generation"] if has_tokenizer(self._folder) else ()
        return self._worker.generate(tokens, count, ends=plain_ids(sorted(ends)))

    def extend(self, tokens: Sequence[int], keep: int = 0) -> np.ndarray:
        """Return f32[V], the logits after the first keep positions of the last sequence and tokens."""
        return self._worker.extend(tokens, keep)

    def speed(self, prefill: int, decode: int) -> Speed:
        """Return the speed by the device's clock, decoding in CUDA graphs where these can be made (`Speed.how`)."""
        return self._worker.speed(prefill, decode)

    def close(self) -> None:
        """Stop the worker process. May be called twice."""
        self._worker.close()

    @cached_property
    def _text(self) -> FolderText:
        if not has_tokenizer(self._folder):
            raise RuntimeMissing(NO_TEXT, where=self._folder)
        return FolderText(self._folder)


def inexact(config: EngineConfig) -> str | None:
    """Return why an engine does not compute in float32, or None: it has no other way than that it was built for."""
    others = sorted({kept for kept in (config.floats, *config.encodings.values()) if kept != EXACT_TYPE})
    return f"the engine was built to compute in {', '.join(others)}" if others else None


def located(artifact: Path) -> Path:
    """Return the absolute path of an engine's folder. Raises UsageError where there is none."""
    path = Path(artifact).absolute()
    folder = engine_folder(path) if path.exists() else None
    if folder is None:
        raise UsageError(f"there is no engine: {CONFIG_NAME} and {ENGINE_NAME} of llmx in one folder", where=path)
    return folder


def check_size(folder: Path, config: EngineConfig) -> None:
    """Raise IntegrityError for an engine that is cut short or too long: that is seen before a byte of it is read."""
    path, size = folder / ENGINE_NAME, (folder / ENGINE_NAME).stat().st_size
    if size != config.engine_bytes:
        word = "cut short" if size < config.engine_bytes else "too long"
        what = f"the engine is {word}: it has {size} bytes, {CONFIG_NAME} says {config.engine_bytes}"
        raise IntegrityError(what, where=path, fix="copy the whole folder again, or build the engine again")


@cache
def _unavailable(python: str | None) -> str | None:
    """Why nothing can run under this Python. Asked once: neither a GPU nor a package comes while we run."""
    try:
        process = WorkerProcess(WORKER, label=LABEL, timeout=PROBE_SECONDS, environment={}, python=python)
        try:
            found, _ = process.ask("probe", packages=list(PACKAGES))
        finally:
            process.close()
    except LlmxError as error:
        return error.one_line
    if not found["packages"]:
        where = "this Python" if python is None else python
        return f"neither {' nor '.join(PACKAGES)} is installed for {where}"
    return None if found["device"] is not None else str(found["reason"])
