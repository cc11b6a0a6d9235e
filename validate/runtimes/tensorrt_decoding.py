"""Greedy decoding that never leaves the device: the engine, then the next token, replayed from CUDA graphs.

    graph 0    engine (past A, present B) | next_token        graph 1    engine (past B, present A) | next_token

A graph has its addresses built in, so there is one for each turn of the buffers. The token and its position are read
from the device's memory, where next_token writes them, so that one graph serves every step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from llmx.errors import CheckFailed
from llmx.validate.runtimes.cuda_kernels import NEXT_TOKEN, PTX, THREADS
from llmx.validate.runtimes.tensorrt_engine import LOGITS, START, TOKENS


class Steps(Protocol):
    """A loaded engine, as decoding sees it; `LoadedEngine` is one.

    turns: after so many steps everything lies at the same addresses again; turn: the next one of them.
    """

    context: int
    width: int
    device: Any
    turn: int

    @property
    def turns(self) -> int: ...

    def address(self, name: str) -> int:
        """Where an input or output lies that has one place."""
        ...

    def send(self, tokens: Sequence[int], start: int) -> None:
        """Put tokens and their first position where the engine reads them."""
        ...

    def execute(self, count: int) -> None:
        """Send a run over count positions to the stream, and go on to the next turn."""
        ...


class DeviceDecoder:
    """Decodes by the fastest way there is, and says in `how` which it was.

    "CUDA graphs": engine and next token, replayed; "one by one": the same, sent by the host; "the host chooses": there
    is no kernel, so that every token comes and goes.
    """

    def __init__(self, model: Steps) -> None:
        self._model, self._device = model, model.device
        self._made = self._device.allocate(4 * (model.context + 1))
        self._arguments = (
            ctypes.c_uint64(model.address(LOGITS)),
            ctypes.c_uint32(model.width),
            ctypes.c_uint64(model.address(TOKENS)),
            ctypes.c_uint64(model.address(START)),
            ctypes.c_uint64(self._made),
        )
        self._kernel, self.how = 0, ""
        self._graphs: list[int] = []
        self._steps: Callable[[int, int], None] = self._by_host

    def seconds(self, token: int, start: int, count: int) -> float:
        """Return how long the device takes for count tokens after token, which stands at position start."""
        if not self.how:
            self._prepare(token, start)
        self._model.send([token], start)
        return self._device.seconds(lambda: self._steps(start, count))

    def made(self, start: int, count: int) -> list[int]:
        """Return the ids of the last run: those of the count positions behind start."""
        read = self._device.download(self._made, (start + count + 1,), np.uint32)
        return [int(token) for token in read[start + 1 :]]

    def close(self) -> None:
        """Let go of the graphs and of the device's memory."""
        for graph in self._graphs:
            self._device.discard(graph)
        self._device.release(self._made)
        self._graphs = []

    def _prepare(self, token: int, start: int) -> None:
        """Warm every turn, because TensorRT sets itself up in a first run, and capture it.

        A warm step writes position start alone, which the timed run writes again.
        """
        model, first = self._model, self._model.turn
        try:
            self._kernel = self._device.kernel(PTX, NEXT_TOKEN)
        except CheckFailed as error:
            self.how = f"decode without graphs, the host chooses the token: {error.what}"
            return
        for _ in range(model.turns):
            model.send([token], start)
            self._step()
        self._device.wait()
        try:
            for turn in range(model.turns):
                model.turn = turn
                self._graphs.append(self._device.captured(self._step))
            self._steps, self.how = self._by_graph, f"decode in CUDA graphs, {len(self._graphs)} captured"
        except CheckFailed as error:
            self._steps, self.how = self._by_call, f"decode without graphs, one by one: {error.what}"
        model.turn = first

    def _step(self) -> None:
        self._model.execute(1)
        self._device.run_kernel(self._kernel, THREADS, self._arguments)

    def _by_graph(self, start: int, count: int) -> None:
        model = self._model
        for _ in range(count):
            self._device.launch(self._graphs[model.turn])
            model.turn = (model.turn + 1) % model.turns

    def _by_call(self, start: int, count: int) -> None:
        for _ in range(count):
            self._step()

    def _by_host(self, start: int, count: int) -> None:
        made = np.zeros(self._model.context + 1, np.uint32)
        for position in range(start + 1, start + count + 1):
            self._model.execute(1)
            row = self._device.download(self._model.address(LOGITS), (self._model.width,), np.float32)
            made[position] = row.argmax()
            self._model.send([int(made[position])], position)
        self._device.upload(self._made, made)
