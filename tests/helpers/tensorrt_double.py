"""TensorRT and a GPU without either: the calls that the worker makes, answered by onnxruntime over numpy's memory.

It proves the plumbing: addresses, turns of the cache, profiles, captured graphs. What an engine computes, only a GPU
proves. A "plan" here is a text: `double`, the path of an ONNX graph, and its profiles as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from llmx.errors import CheckFailed
from llmx.validate.runtimes.tensorrt_engine import TOKENS

VERSION = "8.6.0"
MAGIC = "double "
KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Device:
    """Memory by address, one stream that runs at once what it is given, or keeps it while it is captured."""

    name, capability, driver, stream = "a stand-in for a GPU", (9, 0), "13.0", 7

    def __init__(self, *, captures: bool = True, kernels: bool = True) -> None:
        """captures, kernels: whether graphs can be captured, and whether kernels are translated."""
        self._captures, self._kernels = captures, kernels
        self._memory: dict[int, np.ndarray] = {}
        self._next = 1 << 20
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self.launched = 0

    def free_bytes(self) -> int:
        return (1 << 34) - sum(one.nbytes for one in self._memory.values())

    def allocate(self, nbytes: int) -> int:
        address, self._next = self._next, self._next + nbytes + 4096
        self._memory[address] = np.zeros(nbytes, np.uint8)
        return address

    def release(self, address: int) -> None:
        del self._memory[address]

    def upload(self, address: int, values: np.ndarray) -> None:
        assert self._recording is None, "a copy that waits cannot be captured"
        self.write(address, values)

    def download(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        return self.read(address, shape, dtype)

    def wait(self) -> None:
        assert self._recording is None, "waiting cannot be captured"

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        return 0.5

    def captured(self, work: Callable[[], object]) -> int:
        if not self._captures:
            raise CheckFailed("cuStreamBeginCapture_v2 failed: a test")
        self._recording = []
        work()
        number, recorded = len(self._graphs) + 1, self._recording
        self._graphs[number], self._recording = recorded, None
        return number

    def launch(self, graph: int) -> None:
        self.launched += 1
        for step in self._graphs[graph]:
            step()

    def discard(self, graph: int) -> None:
        del self._graphs[graph]

    def kernel(self, ptx: str, name: str) -> int:
        if not self._kernels:
            raise CheckFailed("cuModuleLoadData failed: a test")
        assert f".entry {name}(" in ptx
        return 1

    def run_kernel(self, kernel: int, threads: int, arguments: Sequence[Any]) -> None:
        logits, count, token, start, made = (argument.value for argument in arguments)
        assert isinstance(arguments[1], ctypes.c_uint32)
        self.submit(lambda: self._next_token(logits, count, token, start, made))

    def submit(self, step: Callable[[], None]) -> None:
        """Run a step, or keep it."""
        if self._recording is None:
            step()
        else:
            self._recording.append(step)

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        values = np.empty(tuple(shape), dtype)
        values.reshape(-1).view(np.uint8)[:] = self._bytes(address, values.nbytes)
        return values

    def write(self, address: int, values: np.ndarray) -> None:
        self._bytes(address, values.nbytes)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def _bytes(self, address: int, nbytes: int) -> np.ndarray:
        base = max(one for one in self._memory if one <= address)
        found = self._memory[base][address - base : address - base + nbytes]
        assert found.nbytes == nbytes, "beyond an allocation"
        return found

    def _next_token(self, logits: int, count: int, token: int, start: int, made: int) -> None:
        best = np.uint32(self.read(logits, (count,), np.float32).argmax())
        position = self.read(start, (1,), np.uint32)[0] + 1
        self.write(token, np.array([best], np.uint32))
        self.write(start, np.array([position], np.uint32))
        self.write(made + 4 * int(position), np.array([best], np.uint32))


class Mode(Enum):
    INPUT, OUTPUT = 0, 1


class Location(Enum):
    DEVICE, HOST = 0, 1


@dataclass(frozen=True)
class Kind:
    name: str


class Context:
    def __init__(self, engine: Engine, device: Device) -> None:
        self._engine, self._device = engine, device
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert stream == self._device.stream
        self._profile = number
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._device.stream
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        self._device.submit(lambda: self._engine.run(shapes, addresses, self._device))
        return True


@dataclass
class Engine:
    """Positions and capacity: (least, most) of each profile."""

    graph: Path
    profiles: list[dict[str, list[int]]]
    device: Device
    _session: Any = field(init=False)

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(self.graph), options)
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._all = {**self._inputs, **{one.name: one for one in self._session.get_outputs()}}

    @property
    def num_io_tensors(self) -> int:
        return len(self._all)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, number: int) -> str:
        return list(self._all)[number]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self._inputs else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Kind:
        return Kind(KINDS[self._all[name].type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self._all[name].shape)

    def get_tensor_location(self, name: str) -> Location:
        return Location.DEVICE

    def get_tensor_profile_shape(self, name: str, number: int) -> list[tuple[int, ...]]:
        profile, shape = self.profiles[number], self.get_tensor_shape(name)
        found = []
        for end in (0, 1, 1):
            open_sizes = [1, profile["positions"][end] if name == TOKENS else profile["capacity"][end]]
            found.append(tuple(open_sizes[min(at, 1)] if size == -1 else size for at, size in enumerate(shape)))
        return found

    def create_execution_context(self) -> Context:
        return Context(self, self.device)

    def run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], device: Device) -> None:
        feeds = {
            name: device.read(addresses[name], shapes[name], NUMPY[one.type]) for name, one in self._inputs.items()
        }
        names = [name for name in self._all if name not in self._inputs]
        for name, values in zip(names, self._session.run(names, feeds), strict=True):
            device.write(addresses[name], values)


def plan(graph: Path, profiles: list[dict[str, list[int]]]) -> bytes:
    """What stands in for a serialized engine."""
    return (MAGIC + json.dumps({"graph": str(graph), "profiles": profiles})).encode()


def module(device: Device, version: str = VERSION) -> types.ModuleType:
    """A module `tensorrt` whose engines run on the device."""
    made: Any = types.ModuleType("tensorrt")
    made.__spec__ = ModuleSpec("tensorrt", None)
    made.__version__, made.TensorIOMode, made.TensorLocation = version, Mode, Location

    class ILogger:
        class Severity(Enum):
            ERROR, WARNING, INFO, VERBOSE = 1, 2, 3, 4

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, data: Any) -> Engine | None:
            text = bytes(data).decode(errors="replace")
            if not text.startswith(MAGIC):
                self._log.log(ILogger.Severity.INFO, "Loaded engine size: 0 MiB")
                self._log.log(ILogger.Severity.ERROR, "Serialization assertion header.magicTag failed")
                return None
            told = json.loads(text.removeprefix(MAGIC))
            return Engine(Path(told["graph"]), told["profiles"], device)

    made.ILogger, made.Runtime = ILogger, Runtime
    return made


def main() -> None:
    """The worker process with both stand-ins."""
    from llmx.validate.runtimes.tensorrt_worker import Worker
    from llmx.validate.runtimes.worker_loop import answer_frames

    device = Device()
    sys.modules["tensorrt"] = module(device)
    answer_frames(Worker(lambda: device).commands())


if __name__ == "__main__":
    main()
