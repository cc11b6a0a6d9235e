"""An ONNX graph loaded by onnxruntime, inside the worker process: logits of positions, over a cache that it holds."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from llmx.errors import CheckFailed, IntegrityError, UsageError
from llmx.exporters.onnx_genai import CONFIG_NAME
from llmx.formats.json_text import read_object
from llmx.formats.onnx import LOGITS, MASK, PARTS, POSITIONS, TOKENS, past, present
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.memory import peak_rss_bytes
from llmx.validate.runtimes.onnxruntime_check import PROVIDER
from llmx.validate.runtimes.onnxruntime_opening import ERRORS, opened, session_options

BLOCK = 512  # positions run at once where nobody says otherwise
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(slots=True)
class Cache:
    """Keys and values of the positions so far, by the names of the graph's inputs, and the tokens they are of."""

    values: dict[str, Any]
    tokens: list[int] = field(default_factory=list)


class LoadedGraph:
    """One graph, one sequence at a time."""

    def __init__(
        self, artifact: Path, *, threads: int, context: int, exact: bool, batch: int | None, level: str
    ) -> None:
        started = time.monotonic()
        options = session_options(threads, exact, level)
        self._session = opened(artifact, options, exact=exact)
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._outputs = [one.name for one in self._session.get_outputs()]
        self._context, self._batch = context, min(batch or BLOCK, context)
        self._layers = sum(name.endswith(f".{PARTS[0]}") for name in self._inputs)
        self._check_names(artifact)
        self.width = int(self._session.get_outputs()[self._outputs.index(LOGITS)].shape[-1])
        self.build = f"onnxruntime {onnxruntime.__version__}, {PROVIDER}, {platform.machine()}, optimization {level}"
        self._artifact = artifact
        self._cache = self._empty()
        self._load_seconds = time.monotonic() - started

    def logits(self, tokens: Sequence[int], decode_from: int | None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks of a new sequence: whole batches up to decode_from, then one position at a time."""
        self._check_fits(len(tokens))
        self._cache = self._empty()
        first = len(tokens) if decode_from is None else decode_from
        cuts = [*range(0, first, self._batch), *range(first, len(tokens) + 1)]
        for start, stop in itertools.pairwise(cuts):
            yield self._step(tokens[start:stop])

    def generate(self, tokens: Sequence[int], count: int, ends: Sequence[int]) -> list[int]:
        """Return up to count greedy ids; one of ends is the last."""
        made: list[int] = []
        row = self.extend(tokens, 0)[0]
        while len(made) < count:
            made.append(int(row.argmax()))
            if made[-1] in ends or len(made) == count:
                break
            row = self._step(made[-1:])[-1]
        return made

    def extend(self, tokens: Sequence[int], keep: int) -> np.ndarray:
        """Return f32[1, V]: the logits after tokens behind the first keep positions of what was run last."""
        if not tokens or not 0 <= keep <= len(self._cache.tokens):
            raise UsageError(f"{len(tokens)} tokens cannot follow {keep} of {len(self._cache.tokens)} positions")
        self._check_fits(keep + len(tokens))
        self._cut(keep)
        starts = range(0, len(tokens), self._batch)
        return [self._step(tokens[start : start + self._batch])[-1:] for start in starts][-1]

    def speed(self, prefill: int, decode: int) -> dict[str, Any]:
        """Return Speed's numbers for made-up tokens, after one run that warms the weights."""
        tokens = [index % self.width for index in range(prefill)]
        self.extend(tokens, 0)
        started = time.monotonic()
        row = self.extend(tokens, 0)[-1]
        first = time.monotonic() - started
        for _ in range(decode):
            row = self._step([int(row.argmax())])[-1]
        decoding = time.monotonic() - started - first
        return asdict(Speed(prefill / first, decode / decoding, first, self._load_seconds, peak_rss_bytes()))

    def _step(self, tokens: Sequence[int]) -> np.ndarray:
        """Run new positions over the cache, which then holds them as well; f32[new, V]."""
        done, new = len(self._cache.tokens), len(tokens)
        ready = {
            TOKENS: np.array([tokens], np.int64),
            MASK: np.ones((1, done + new), np.int64),
            POSITIONS: np.arange(done, done + new, dtype=np.int64)[None],
        }
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in ready.items()}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs} | self._cache.values
        found = _failed(lambda: self._session.run_with_ort_values(self._outputs, feeds))
        results = dict(zip(self._outputs, found, strict=True))
        logits = results[LOGITS].numpy()[0]
        values = {past(*key): results[present(*key)] for key in self._keys()}
        self._cache = Cache(values, [*self._cache.tokens, *tokens])
        return logits.astype(np.float32, copy=False)

    def _cut(self, keep: int) -> None:
        if keep == len(self._cache.tokens):
            return
        kept = {name: np.ascontiguousarray(value.numpy()[:, :, :keep]) for name, value in self._cache.values.items()}
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in kept.items()}
        self._cache = Cache(values, self._cache.tokens[:keep])

    def _empty(self) -> Cache:
        values = {}
        for key in self._keys():
            one = self._inputs[past(*key)]
            heads, size = one.shape[1], one.shape[3]
            if isinstance(size, str):  # graphs of onnxruntime-genai's builder leave it open
                size = _stated_head_size(self._artifact, size)
            shape = (1, heads, 0, size)
            values[one.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY[one.type]))
        return Cache(values)

    def _keys(self) -> Iterator[tuple[int, str]]:
        return ((layer, part) for layer in range(self._layers) for part in PARTS)

    def _check_names(self, artifact: Path) -> None:
        wanted = {TOKENS, MASK, *(past(*key) for key in self._keys())}
        problems = [f"no input is called {name}" for name in sorted(wanted - self._inputs.keys())]
        problems += [f"an input is called {name}" for name in sorted(self._inputs.keys() - wanted - {POSITIONS})]
        results = {LOGITS, *(present(*key) for key in self._keys())}
        problems += [f"no output is called {name}" for name in sorted(results - set(self._outputs))]
        if problems:
            raise IntegrityError("this graph is no decoder with a cache", where=artifact, problems=problems)

    def _check_fits(self, length: int) -> None:
        if length > self._context:
            raise UsageError(f"{length} tokens do not fit the context of {self._context} that was asked for")


def _stated_head_size(artifact: Path, name: str) -> int:
    """Elements of a head, of a graph that gives them a name only.

    Raises: IntegrityError where the configuration beside it does not say.
    """
    path = artifact.with_name(CONFIG_NAME)
    told = read_object(path).get("model", {}) if path.is_file() else {}
    found = told.get("decoder", {}).get("head_size") if isinstance(told, dict) else None
    if not isinstance(found, int) or found < 1:
        raise IntegrityError(f"the cache's last axis is {name!r}, and no {CONFIG_NAME} says its size", where=artifact)
    return found


def _failed(run: Callable[[], Any]) -> Any:
    """What run returns. Raises: CheckFailed with onnxruntime's words where the graph does not run."""
    try:
        return run()
    except ERRORS as error:
        raise CheckFailed("onnxruntime cannot run this graph", problems=[str(error)]) from error
