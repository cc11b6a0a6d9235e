"""The process that TensorRT runs in: `python -m llmx.validate.runtimes.tensorrt_worker`.

It imports nothing but the standard library, numpy and TensorRT, and is clean for CPython 3.10: TensorRT 8 has no
package for a newer one. TensorRT may abort it; whoever asked sees the pipe close and reads the last lines it wrote.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import RuntimeMissing, UsageError
from llmx.validate.runtimes.cuda_driver import Device
from llmx.validate.runtimes.tensorrt_engine import check_capability, library
from llmx.validate.runtimes.tensorrt_model import LoadedEngine
from llmx.validate.runtimes.worker_loop import Answer, answer_frames


class Worker:
    """The commands, each answering with plain JSON values and perhaps one block of floats."""

    def __init__(self, device: Callable[[], Any] = Device) -> None:
        """device: what opens the GPU."""
        self._device = device
        self._loaded: LoadedEngine | None = None
        self._blocks: Iterator[np.ndarray] = iter(())

    def commands(self) -> dict[str, Callable[..., Answer]]:
        """Return each command by its name."""
        return {
            "probe": self.probe,
            "open": self.open,
            "logits": self.logits,
            "next block": lambda: ({}, next(self._blocks, None)),
            "generate": lambda **asked: ({"ids": self._engine().generate(**asked)}, None),
            "extend": lambda **asked: ({}, self._engine().extend(**asked)),
            "speed": lambda **asked: (self._engine().speed(**asked), None),
        }

    def probe(self, packages: list[str]) -> Answer:
        """Say what is here without loading TensorRT: the packages with their versions, and the GPU or why none."""
        here = {name: _version(name) for name in packages if importlib.util.find_spec(name) is not None}
        try:
            device = self._device()
        except RuntimeMissing as error:
            return {"packages": here, "device": None, "reason": error.what}, None
        return {"packages": here, "device": device.name, "capability": list(device.capability)}, None

    def open(
        self, *, artifact: str, package: str, version: str, capability: list[int] | None, **options: Any
    ) -> Answer:
        """Load the engine and say what it is. package, version, capability: of what it was built by and for."""
        device = self._device()
        check_capability(capability, device.capability, device.name)
        self._loaded = LoadedEngine(library(package, version), device, Path(artifact), **options)
        return {"build": self._loaded.build, "vocab": self._loaded.width}, None

    def logits(self, tokens: list[int], decode_from: int | None) -> Answer:
        """Begin a sequence; its blocks are fetched one at a time."""
        self._blocks = self._engine().logits(tokens, decode_from)
        return {}, None

    def _engine(self) -> LoadedEngine:
        if self._loaded is None:
            raise UsageError("no engine is loaded")
        return self._loaded


def _version(package: str) -> str:
    """The installed version; the wheels of tensorrt_rtx are named after the CUDA that they are for."""
    names = importlib.metadata.packages_distributions()
    return next((importlib.metadata.version(name) for name in names.get(package, ())), "of an unknown version")


if __name__ == "__main__":
    answer_frames(Worker().commands())
