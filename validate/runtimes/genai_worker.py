"""The process that onnxruntime-genai runs in: `python -m llmx.validate.runtimes.genai_worker`.

genai may abort it at any moment; whoever asked sees the pipe close and reads the last lines of standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import UsageError
from llmx.validate.runtimes.genai_model import LoadedFolder
from llmx.validate.runtimes.genai_text import FolderText
from llmx.validate.runtimes.worker_loop import Answer, answer_frames


class Worker:
    """The commands, each answering with plain JSON values and perhaps one block of floats."""

    def __init__(self) -> None:
        self._text: FolderText | None = None
        self._loaded: LoadedFolder | None = None
        self._blocks: Iterator[np.ndarray] = iter(())

    def commands(self) -> dict[str, Callable[..., Answer]]:
        """Return each command by its name."""
        return {
            "open": self.open,
            "tokenize": lambda **asked: ({"ids": self._tokenizer().tokenize(**asked)}, None),
            "piece": lambda token: ({"hex": self._tokenizer().piece(token).hex()}, None),
            "special": lambda: (self._tokenizer().special(), None),
            "render": lambda **asked: ({"text": self._tokenizer().render(**asked)}, None),
            "logits": self.logits,
            "next block": lambda: ({}, next(self._blocks, None)),
            "generate": lambda **asked: ({"ids": self._model().generate(**asked)}, None),
            "extend": lambda **asked: ({}, self._model().extend(**asked)),
            "speed": lambda **asked: (self._model().speed(**asked), None),
        }

    def open(self, *, artifact: str, text_only: bool, **options: Any) -> Answer:
        """Load the folder of the graph, or its tokenizer alone, and say what it is."""
        folder = Path(artifact).parent
        if text_only:
            self._text = FolderText(folder)
            return {"has_template": self._text.has_template}, None
        self._loaded = LoadedFolder(folder, **options)
        self._text = FolderText(folder)
        about = {"build": self._loaded.build, "vocab": self._loaded.width, "has_template": self._text.has_template}
        return about, None

    def logits(self, tokens: list[int], decode_from: int | None) -> Answer:
        """Begin a sequence; its blocks are fetched one at a time."""
        self._blocks = self._model().logits(tokens, decode_from)
        return {}, None

    def _tokenizer(self) -> FolderText:
        if self._text is None:
            raise UsageError("no folder is open")
        return self._text

    def _model(self) -> LoadedFolder:
        if self._loaded is None:
            raise UsageError("only the tokenizer of this folder is open")
        return self._loaded


if __name__ == "__main__":
    answer_frames(Worker().commands())
