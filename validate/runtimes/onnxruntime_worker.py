"""The process that onnxruntime runs in: `python -m llmx.validate.runtimes.onnxruntime_worker`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from llmx.errors import UnsupportedError, UsageError
from llmx.validate.runtimes.onnxruntime_check import lacks
from llmx.validate.runtimes.onnxruntime_model import LoadedGraph
from llmx.validate.runtimes.worker_loop import Answer, answer_frames


class Worker:
    """The commands, each answering with plain JSON values and perhaps one block of floats."""

    def __init__(self) -> None:
        self._loaded: LoadedGraph | None = None
        self._blocks: Iterator[np.ndarray] = iter(())

    def commands(self) -> dict[str, Callable[..., Answer]]:
        """Return each command by its name."""
        return {
            "open": self.open,
            "logits": self.logits,
            "next block": lambda: ({}, next(self._blocks, None)),
            "generate": lambda **asked: ({"ids": self._graph().generate(**asked)}, None),
            "extend": lambda **asked: ({}, self._graph().extend(**asked)),
            "speed": lambda **asked: (self._graph().speed(**asked), None),
        }

    def open(self, *, artifact: str, uses: list[dict[str, Any]], **options: Any) -> Answer:
        """Load the graph and say what it is. uses: its operators. Raises UnsupportedError for what cannot run here."""
        if problems := lacks(uses):
            what = f"onnxruntime {onnxruntime.__version__} cannot run this graph"
            raise UnsupportedError(what, problems=problems, fix="export it anew, or install a newer onnxruntime")
        self._loaded = LoadedGraph(Path(artifact), **options)
        return {"build": self._loaded.build, "vocab": self._loaded.width}, None

    def logits(self, tokens: list[int], decode_from: int | None) -> Answer:
        """Begin a sequence; its blocks are fetched one at a time."""
        self._blocks = self._graph().logits(tokens, decode_from)
        return {}, None

    def _graph(self) -> LoadedGraph:
        if self._loaded is None:
            raise UsageError("no graph is loaded")
        return self._loaded


if __name__ == "__main__":
    answer_frames(Worker().commands())
