"""Runs a graph made for TensorRT on onnxruntime: prompts in chunks, tokens one by one, a cache that is handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
UNFUSED = {"session.disable_quant_qdq": "1"}  # the graph's own products, where inputs are of 8 bits


class CachedGraph:
    """capacity: of the cache, where the graph leaves it open. entries: of onnxruntime's session."""

    def __init__(
        self, graph: Path, capacity: int = 96, batch: int = 1, entries: Mapping[str, str] | None = None
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        for key, value in (entries or {}).items():
            options.add_session_config_entry(key, value)
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.cache: dict[str, Any] = {}
        for one in self._session.get_inputs():
            if one.name.startswith("past_key_values."):
                sizes = [batch, *(size if isinstance(size, int) else capacity for size in one.shape[1:])]
                self.cache[one.name] = np.zeros(sizes, FLOATS[one.type])

    def run(self, tokens: Sequence[Sequence[int]], start: Sequence[int]) -> np.ndarray:
        """f32[B, T, V]: logits of new tokens [B, T], of which sequence b has start[b] before them."""
        feeds = {"input_ids": np.asarray(tokens, np.int64), "start": np.asarray(start, np.int64), **self.cache}
        found = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return np.asarray(found["logits"])

    def logits(self, tokens: Sequence[int], cuts: Sequence[int] = ()) -> np.ndarray:
        """f32[T, V]: one sequence from its beginning, in runs that end at the cuts."""
        self.cache = {name: np.zeros_like(value) for name, value in self.cache.items()}
        ends = pairwise((0, *cuts, len(tokens)))
        return np.concatenate([self.run([tokens[start:stop]], [start])[0] for start, stop in ends])
