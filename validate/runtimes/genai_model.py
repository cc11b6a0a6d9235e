"""A folder loaded by onnxruntime-genai, inside the worker process: the tokens and logits of its own generator."""

from __future__ import annotations

import importlib
import itertools
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import IntegrityError, UsageError
from llmx.formats.json_text import read_object
from llmx.formats.onnx import LOGITS
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.genai_text import failed, refused
from llmx.validate.runtimes.memory import peak_rss_bytes

genai: Any = importlib.import_module("onnxruntime_genai")

BLOCK = 512  # positions run at once where nobody says otherwise
CONFIG = "genai_config.json"


class LoadedFolder:
    """One model, one sequence at a time, in one generator whose cache can be cut."""

    def __init__(self, folder: Path, *, threads: int, context: int, batch: int | None) -> None:
        started = time.monotonic()
        self.width = _width(folder / CONFIG)
        self._model = refused(lambda: _opened(folder, threads), folder)
        self._context, self._batch = context, min(batch or BLOCK, context)
        self.build = f"onnxruntime-genai {genai.__version__}, {self._model.device_type}, {platform.machine()}"
        self._generator: Any = self._begun()
        self._load_seconds = time.monotonic() - started

    def logits(self, tokens: Sequence[int], decode_from: int | None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks of a new sequence: whole batches up to decode_from, then one position at a time."""
        self._check_fits(len(tokens))
        self._generator = self._begun()
        first = len(tokens) if decode_from is None else decode_from
        cuts = [*range(0, first, self._batch), *range(first, len(tokens) + 1)]
        for start, stop in itertools.pairwise(cuts):
            yield self._append(tokens[start:stop])

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count ids of genai's own greedy search; one that ends generation is the last."""
        self._check_fits(len(tokens) + count)
        self._generator = self._begun(len(tokens) + count)
        for start in range(0, len(tokens), self._batch):
            self._append(tokens[start : start + self._batch])
        while not self._generator.is_done():
            failed(self._generator.generate_next_token)
        return [int(token) for token in self._generator.get_sequence(0)[len(tokens) :]]

    def extend(self, tokens: Sequence[int], keep: int) -> np.ndarray:
        """Return f32[1, V]: the logits after tokens behind the first keep positions of what was run last."""
        done = self._generator.token_count()
        if not tokens or not 0 <= keep <= done:
            raise UsageError(f"{len(tokens)} tokens cannot follow {keep} of {done} positions")
        self._check_fits(keep + len(tokens))
        if keep == 0:
            self._generator = self._begun()
        elif keep < done:
            failed(lambda: self._generator.rewind_to(keep))
        starts = range(0, len(tokens), self._batch)
        return [self._append(tokens[start : start + self._batch])[-1:] for start in starts][-1]

    def speed(self, prefill: int, decode: int) -> dict[str, Any]:
        """Return Speed's numbers for made-up tokens, after one run that warms the weights."""
        self._check_fits(prefill + decode)
        tokens = np.array([index % self.width for index in range(prefill)], np.int32)
        first = decoding = 0.0
        for _ in range(2):
            generator = self._begun(prefill + decode, never_ends=True)
            started = time.monotonic()
            failed(lambda: generator.append_tokens(tokens))  # noqa: B023 - called at once
            first = time.monotonic() - started
            while not generator.is_done():
                failed(generator.generate_next_token)
            decoding = time.monotonic() - started - first
        return asdict(Speed(prefill / first, decode / decoding, first, self._load_seconds, peak_rss_bytes()))

    def _begun(self, length: int | None = None, *, never_ends: bool = False) -> Any:
        """A generator of greedy search for so many positions. never_ends: what ends generation is not chosen."""
        length = length or self._context
        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(
            do_sample=False, num_beams=1, max_length=length, min_length=length if never_ends else 0
        )
        return failed(lambda: genai.Generator(self._model, parameters))

    def _append(self, tokens: Sequence[int]) -> np.ndarray:
        """Run new positions over the cache; f32[new, V]."""
        failed(lambda: self._generator.append_tokens(np.array(tokens, np.int32)))
        rows = failed(lambda: self._generator.get_output(LOGITS))[0]
        if rows.shape != (len(tokens), self.width):
            what = f"{len(tokens)} positions gave logits of shape {list(rows.shape)}"
            raise IntegrityError(what, fix=f"let vocab_size in {CONFIG} be the width of the graph's logits")
        return rows.astype(np.float32)

    def _check_fits(self, length: int) -> None:
        if length > self._context:
            raise UsageError(f"{length} tokens do not fit the context of {self._context} that was asked for")


def _opened(folder: Path, threads: int) -> Any:
    config = genai.Config(str(folder))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return genai.Model(config)


def _width(config: Path) -> int:
    width = read_object(config).get("model", {}).get("vocab_size")
    if not isinstance(width, int) or width < 1:
        raise IntegrityError(f"vocab_size is {width!r}", where=config)
    return width
