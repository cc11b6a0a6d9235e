"""A TensorRT engine as its plan describes it, inside the worker process: opened, its tensors by name, its profiles.

What is used of TensorRT is what versions 8.5 to 11 and TensorRT-RTX have in common.
"""

from __future__ import annotations

import importlib
import mmap
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, RuntimeMissing

TOKENS, START, LOGITS = "input_ids", "start", "logits"
PARTS = ("key", "value")
CAPACITY_AXIS = 2
# What TensorRT calls its types -> numpy's name of what is as wide. A cache of 16-bit floats is only moved.
WIDTHS = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "uint16", "INT32": "int32", "INT64": "int64",
    "INT8": "int8", "FP8": "uint8", "UINT8": "uint8",
}  # fmt: skip
_KEPT_LINES = 12
_VERSION_PARTS = 3  # a plan is read by the library of the same major, minor and patch


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output of an engine. shape: -1 where it is open. dtype: numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_input: bool


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a profile of the engine takes, (least, most): new positions, and the capacity of the cache."""

    number: int
    positions: tuple[int, int]
    capacity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Engine:
    """An opened engine. trt: the module. log: what TensorRT said. library: name and version of the package."""

    trt: Any
    handle: Any
    log: Any
    library: str
    tensors: dict[str, Tensor]
    profiles: tuple[Bounds, ...]

    @property
    def layers(self) -> int:
        """Return how many layers have a cache."""
        return sum(t.is_input and t.name.endswith(f".{PARTS[0]}") for t in self.tensors.values())

    @property
    def vocabulary(self) -> int:
        """Return V, the width of a row of logits."""
        return self.tensors[LOGITS].shape[-1]


def past(layer: int, part: str) -> str:
    """Return the name of an input: a layer's cached keys or values."""
    return f"past_key_values.{layer}.{part}"


def present(layer: int, part: str) -> str:
    """Return the name of an output: the same with the new positions written."""
    return f"present.{layer}.{part}"


def library(package: str, version: str) -> Any:
    """Import the package that built an engine, and return it.

    Raises RuntimeMissing where it is not there, does not load, or is of another version than the engine.
    """
    try:
        trt = importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise RuntimeMissing(f"{package} cannot be loaded: {error}", where=sys.executable) from error
    here = str(trt.__version__)
    if here.split(".")[:_VERSION_PARTS] != version.split(".")[:_VERSION_PARTS]:
        raise RuntimeMissing(
            f"the engine was built by {package} {version}, and {here} is installed: a plan is read by its own version",
            where=sys.executable,
            fix=f"pip install {package}=={version}, or build the engine again with the installed one",
        )
    return trt


def check_capability(wanted: list[int] | None, here: tuple[int, int], name: str) -> None:
    """Raise RuntimeMissing where the engine was built for another kind of GPU. wanted: None for any."""
    if wanted is not None and tuple(wanted) != here:
        raise RuntimeMissing(
            f"the engine was built for compute capability {wanted[0]}.{wanted[1]}; {name} has {here[0]}.{here[1]}",
            fix="build the engine on the kind of GPU that runs it",
        )


def collector(trt: Any) -> Any:
    """Return a logger for TensorRT. It keeps the last warnings and errors, and writes each to standard error."""

    class Collector(trt.ILogger):
        """`lines`: what was said last."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (trt.ILogger.Severity.VERBOSE, trt.ILogger.Severity.INFO):
                return
            line = f"{severity.name}: {message}"
            self.lines = [*self.lines, line][-_KEPT_LINES:]
            sys.stderr.write(line + "\n")

    return Collector()


def opened(trt: Any, path: Path) -> Engine:
    """Return the engine of a plan. Raises IntegrityError, with TensorRT's own words, where it refuses it."""
    log = collector(trt)
    runtime = trt.Runtime(log)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        handle = runtime.deserialize_cuda_engine(plan)
    if handle is None:
        raise IntegrityError(f"{trt.__name__} refuses this engine", where=path, problems=log.lines)
    tensors = {one.name: one for one in (_tensor(trt, handle, number) for number in range(handle.num_io_tensors))}
    if problems := _problems(trt, handle, tensors):
        raise IntegrityError("this engine is no decoder with a cache", where=path, problems=problems)
    profiles = tuple(_bounds(handle, number) for number in range(handle.num_optimization_profiles))
    return Engine(trt, handle, log, f"{trt.__name__} {trt.__version__}", tensors, profiles)


def _tensor(trt: Any, handle: Any, number: int) -> Tensor:
    name = handle.get_tensor_name(number)
    kind = str(handle.get_tensor_dtype(name).name)
    is_input = handle.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    return Tensor(name, tuple(handle.get_tensor_shape(name)), WIDTHS.get(kind, kind), is_input)


def _problems(trt: Any, handle: Any, tensors: dict[str, Tensor]) -> list[str]:
    """What is not as a decoder's inputs and outputs are."""
    layers = sum(t.is_input and t.name.endswith(f".{PARTS[0]}") for t in tensors.values())
    keys = [(layer, part) for layer in range(layers) for part in PARTS]
    wanted = dict.fromkeys((TOKENS, START, *(past(*key) for key in keys)), True)
    wanted |= dict.fromkeys((LOGITS, *(present(*key) for key in keys)), False)
    words = {True: "input", False: "output"}
    found = {name: one.is_input for name, one in tensors.items()}
    problems = [f"no {words[kind]} is called {name}" for name, kind in wanted.items() if found.get(name) != kind]
    problems += [f"an {words[kind]} is called {name}" for name, kind in found.items() if wanted.get(name) != kind]
    problems += [f"{one.name} has the type {one.dtype}" for one in tensors.values() if one.dtype not in WIDTHS.values()]
    problems += [
        f"{name} is read on the host: sizes inside the engine follow from its values"
        for name in tensors
        if handle.get_tensor_location(name) != trt.TensorLocation.DEVICE
    ]
    logits = tensors.get(LOGITS)
    if logits is not None and (len(logits.shape) != 3 or logits.shape[-1] < 1 or logits.dtype != "float32"):
        told = f"{logits.dtype}{list(logits.shape)}"
        problems.append(f"logits are {told}; float32 of [sequences, positions, V] was expected")
    return problems


def _bounds(handle: Any, number: int) -> Bounds:
    least, _, most = (tuple(shape) for shape in handle.get_tensor_profile_shape(TOKENS, number))
    smallest, _, largest = (tuple(shape) for shape in handle.get_tensor_profile_shape(past(0, PARTS[0]), number))
    return Bounds(number, (least[1], most[1]), (smallest[CAPACITY_AXIS], largest[CAPACITY_AXIS]))
