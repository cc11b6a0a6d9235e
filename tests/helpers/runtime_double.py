"""A runtime without a program behind it: transformers' own logits, disturbed as a test asks, by the way of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from llmx.validate.oracle import Reference

Disturb = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]  # (f32[t, V], options) -> f32[t, V]


class Double:
    """Implements the Runtime protocol as far as logits go; the artifact is not read."""

    name = "double"

    def __init__(self, folder: Path, disturb: Disturb = lambda logits, options: logits) -> None:
        self._reference = Reference(folder, threads=1)
        self._disturb = disturb
        self.opened: list[dict[str, Any]] = []

    def unavailable(self) -> str | None:
        return None

    def open(self, artifact: Path, **options: Any) -> DoubleSession:
        self.opened.append(options)
        return DoubleSession(self._reference, self._disturb, options)


class DoubleSession:
    build = "double"

    def __init__(self, reference: Reference, disturb: Disturb, options: Mapping[str, Any]) -> None:
        self._reference, self._disturb, self._options = reference, disturb, options
        self.vocab = reference.vocab

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        assert len(tokens) <= self._options["context"]
        options = {**self._options, "decode": decode_from is not None}
        for block in self._reference.logits(tokens):
            yield self._disturb(block, options)


def noise(scale: float, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that adds the same noise of that size to logits every time."""

    def add(logits: np.ndarray) -> np.ndarray:
        drawn = np.random.default_rng(seed).standard_normal(logits.shape) * scale
        return (logits + drawn).astype(np.float32)

    return add
