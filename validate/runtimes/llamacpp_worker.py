"""The process that llama.cpp runs in: `python -m llmx.validate.runtimes.llamacpp_worker`.

llama.cpp may abort it at any moment; whoever asked sees the pipe close and reads the last lines of standard error.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llmx.errors import UsageError
from llmx.validate.runtimes.llamacpp_library import BACKENDS, Library, LogCallback
from llmx.validate.runtimes.llamacpp_model import BLOCK, LoadedModel
from llmx.validate.runtimes.worker_loop import Answer, answer_frames

# ggml's log levels: a warning, an error, and the rest of the line begun before.
WARNING, ERROR, CONTINUED = 3, 4, 5
KEPT_LINES = 100


class Worker:
    """The commands, each answering with plain JSON values and perhaps one block of floats."""

    def __init__(self) -> None:
        self._loaded: LoadedModel | None = None
        self._blocks: Iterator[np.ndarray] = iter(())
        # ctypes does not keep a callback alive.
        self._callback: object = None

    def commands(self) -> dict[str, Callable[..., Answer]]:
        """Return each command by its name."""
        return {
            "open": self.open,
            "tokenize": lambda **asked: ({"ids": self._model().tokenize(**asked)}, None),
            "piece": lambda token: ({"hex": self._model().piece(token).hex()}, None),
            "special": lambda: (self._model().special(), None),
            "logits": self.logits,
            "next block": lambda: ({}, next(self._blocks, None)),
            "generate": self.generate,
            "extend": self.extend,
            "speed": self.speed,
        }

    def open(
        self, *, backend: str, artifact: str, threads: int, context: int, exact: bool, batch: int | None
    ) -> Answer:
        """Load the model and say what it is."""
        library = BACKENDS[backend].load()
        log: deque[str] = deque(maxlen=KEPT_LINES)
        self._callback = _collect(library, log)
        library.api.llama_backend_init()
        sizes = {"threads": threads, "context": context, "batch": batch or BLOCK}
        model = LoadedModel(library, log, Path(artifact), exact=exact, **sizes)
        self._loaded = model
        return {"build": model.build, "vocab": model.width, "has_template": model.has_template}, None

    def logits(self, tokens: list[int], decode_from: int | None) -> Answer:
        """Begin a sequence; its blocks are fetched one at a time."""
        self._blocks = self._model().logits(tokens, decode_from)
        return {}, None

    def generate(self, tokens: list[int], count: int) -> Answer:
        """Continue a sequence; one that was being fetched is over."""
        self._blocks = iter(())
        return {"ids": self._model().generate(tokens, count)}, None

    def extend(self, tokens: list[int], keep: int) -> Answer:
        """Go on with a sequence by tokens; one that was being fetched is over."""
        self._blocks = iter(())
        return {}, self._model().extend(tokens, keep)

    def speed(self, prefill: int, decode: int) -> Answer:
        """Measure; a sequence that was being fetched is over."""
        self._blocks = iter(())
        return self._model().speed(prefill, decode), None

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            raise UsageError("no model is loaded")
        return self._loaded


def _collect(library: Library, log: deque[str]) -> object:
    """Send llama.cpp's warnings and errors to log and to standard error (which outlives an abort); drop the rest."""
    kept = False

    def receive(level: int, text: bytes | None, _: object) -> None:
        nonlocal kept
        begun = level != CONTINUED
        kept = level in {WARNING, ERROR} if begun else kept
        if not kept or not text:
            return
        os.write(2, text)
        for line in filter(None, text.decode(errors="replace").rstrip().split("\n")):
            log.append(line)

    callback = LogCallback(receive)
    library.api.llama_log_set(callback, None)
    return callback


if __name__ == "__main__":
    answer_frames(Worker().commands())
