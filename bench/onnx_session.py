"""Packages of any maker on onnxruntime and onnxruntime-genai, in this process, as fast as their users can have them.

Both runners take tokens and give times; the plain one gives logits as well. A package is a folder with model.onnx,
its data and genai_config.json, which says how wide a head is where the graph does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from llmx.formats.onnx import LOGITS, MASK, POSITIONS, TOKENS

PAST, PRESENT = "past_key_values", "present"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
CONFIG = "genai_config.json"
PROVIDERS = ("CPUExecutionProvider",)


@dataclass(slots=True)
class Times:
    """Seconds: of each prefill, and of each decoded position in each round, f64[rounds, positions]."""

    prefill: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)

    @property
    def best_prefill(self) -> float:
        return min(self.prefill)

    @property
    def best_decode(self) -> float:
        """Of all positions together, each in its best round: what other programs take of the machine falls out."""
        return float(np.min(np.asarray(self.decode), axis=0).sum())


class PlainSession:
    """onnxruntime alone: inputs and outputs bound to buffers that stay.

    Where the package's caches are shared (its configuration says so), keys and values are written in place into a
    buffer of `context` positions; otherwise each run's caches are the next one's inputs.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        decoder = config["model"]["decoder"]
        for key, value in decoder["session_options"].items():
            if "." in key:  # an entry of the session, which genai hands on as well
                options.add_session_config_entry(key, str(value))
        graph = folder / decoder["filename"]
        self._session = onnxruntime.InferenceSession(graph, options, providers=list(PROVIDERS))
        self._shared = bool(config["search"]["past_present_share_buffer"])
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._vocab = int(next(o for o in self._session.get_outputs() if o.name == LOGITS).shape[-1])
        self._room = context if self._shared else 0
        self._head = int(decoder["head_size"])
        self._caches: dict[str, Any] = {}
        self._logits: dict[int, Any] = {}

    def restart(self) -> None:
        """Forget all positions."""
        for name, one in self._inputs.items():
            if name.startswith(PAST) and (not self._shared or name not in self._caches):
                empty = np.zeros((1, one.shape[1], self._room, self._head), NUMPY[one.type])
                self._caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)

    def run(self, tokens: Sequence[int], done: int) -> np.ndarray:
        """f32[T, V] of tokens after `done` positions; the next run of as many tokens overwrites it."""
        count = len(tokens)
        ready = {
            TOKENS: np.array([tokens], np.int64),
            MASK: np.ones((1, done + count), np.int64),
            POSITIONS: np.arange(done, done + count, dtype=np.int64)[None],
        }
        binding = self._session.io_binding()
        for name, value in ready.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
            if self._shared:
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT), value)
            else:
                binding.bind_output(name.replace(PAST, PRESENT), "cpu")
        if count not in self._logits:
            kind = NUMPY[next(o for o in self._session.get_outputs() if o.name == LOGITS).type]
            self._logits[count] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, count, self._vocab), kind))
        binding.bind_ortvalue_output(LOGITS, self._logits[count])
        self._session.run_with_iobinding(binding)
        if not self._shared:
            found = binding.get_outputs()[: len(self._caches)]
            self._caches = dict(zip(self._caches, found, strict=True))
        return self._logits[count].numpy()[0]

    def round(self, prompt: Sequence[int], decode: int, times: Times) -> None:
        """Run a prompt and `decode` positions after it, and note the seconds."""
        self.restart()
        started = time.perf_counter()
        row = self.run(prompt, 0)[-1]
        times.prefill.append(time.perf_counter() - started)
        seconds = []
        for position in range(len(prompt), len(prompt) + decode):
            started = time.perf_counter()
            row = self.run([int(row.argmax())], position)[-1]
            seconds.append(time.perf_counter() - started)
        times.decode.append(seconds)


class GenaiSession:
    """onnxruntime-genai's own generator, greedy."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        config = self._genai.Config(str(folder))
        told = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(told))
        self._model, self._context = self._genai.Model(config), context

    def round(self, prompt: Sequence[int], decode: int, times: Times) -> None:
        """Run a prompt and `decode` positions after it, and note the seconds."""
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._context, min_length=self._context, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, np.int32))
        times.prefill.append(time.perf_counter() - started)
        generator.generate_next_token()  # of the prompt's logits: nothing is run
        seconds = []
        for _ in range(decode):
            started = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - started)
        times.decode.append(seconds)


RUNNERS: dict[str, Callable[[Path, int, int], PlainSession | GenaiSession]] = {
    runner.name: runner for runner in (PlainSession, GenaiSession)
}
