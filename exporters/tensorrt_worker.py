"""The process that TensorRT builds in: a program of its own, for it may run on another Python and may die.

    in     one JSON object on standard input: {"command": "look", …} or {"command": "build", …}
    out    JSON objects on standard output, a line each: {"step": …} on the way, then {"answer": …} or {"error": …}

It is told every flag by its name and decides nothing. CPython 3.10, the standard library and TensorRT are enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

# Package -> the modules that have its interface, the better one first.
MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
STEP_SECONDS = 0.2
KEPT = 40
DEVICE_LIBRARY = "libcuda.so.1"


class Refused(Exception):
    """What the parent raises in its own words. kind: a class of llmx.errors. problems: TensorRT's own lines."""

    def __init__(self, kind: str, what: str, problems: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.kind, self.what, self.problems = kind, what, list(problems)


def look(packages: Sequence[str]) -> dict[str, Any]:
    """What can build here: the first of packages that can be loaded, why others cannot, and the GPU.

    `package` and `version` are None where nothing can be loaded.
    """
    reasons: dict[str, str] = {}
    for package in packages:
        try:
            module = _module(package)
        except Refused as error:
            reasons[package] = error.what
            continue
        found = {"package": package, "version": str(module.__version__)}
        return {**found, "reasons": reasons, "gpu": gpu(), "python": platform.python_version()}
    return {"package": None, "version": None, "reasons": reasons, "gpu": gpu(), "python": platform.python_version()}


def gpu() -> dict[str, Any] | None:
    """{"name", "compute_capability": [major, minor]} of the first GPU, as the driver tells; None without one."""
    try:
        driver = ctypes.CDLL(DEVICE_LIBRARY)
    except OSError:
        return None
    device, number, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)) or number.value < 1:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, len(name), device):
        return None
    capability = []
    for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
        capability.append(number.value)
    return {"name": name.value.decode(errors="replace"), "compute_capability": capability}


def _module(package: str) -> Any:
    there = [name for name in MODULES[package] if importlib.util.find_spec(name) is not None]
    if not there:
        raise Refused("RuntimeMissing", f"the package {package} is not installed")
    try:
        return importlib.import_module(there[0])
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library that it needs, mostly
        raise Refused("RuntimeMissing", f"the package {package} cannot be loaded: {error}") from error


# ── what TensorRT says ───────────────────────────────────────────────────────────────────────────────────────────────


class Log:
    """TensorRT's own lines, each once: errors and warnings, the newest KEPT of either."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        kept = {"INTERNAL_ERROR": self.errors, "ERROR": self.errors, "WARNING": self.warnings}

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                lines = kept.get(severity.name)
                if lines is not None and message not in lines:
                    lines.append(message)
                    del lines[:-KEPT]

        self.logger = Logger()

    def last(self) -> list[str]:
        """What explains a failure: the errors, and the newest warnings, where reasons may stand."""
        return [*self.errors, *self.warnings[-5:]]


def _monitor(trt: Any, out: TextIO) -> Any:
    """An IProgressMonitor that tells of the outermost phase's steps; None before TensorRT 10."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phase, self.told = "", 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phase = phase_name

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self.told > STEP_SECONDS:
                self.told = time.monotonic()
                _tell(out, {"step": phase_name})
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(asked: Mapping[str, Any], out: TextIO) -> dict[str, Any]:
    """Build the plan of a graph into a file; what was seen on the way, as plain data.

    asked: package, graph, engine (paths), network_flags, flags, cleared (names), tactic_sources (names, None: the
    builder's own), hardware_compatibility (name or None), optimization_level (int or None), timing_cache (path or
    None), profiles (each input name -> [least, best, most] shapes), types (value -> "F16" or "F32": what weakly typed
    networks are held to, None where they are strongly typed), nodes (what each is called in messages).
    """
    trt = _module(asked["package"])
    log = Log(trt)
    started = time.monotonic()
    try:
        builder = trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:  # pybind's words for a null pointer
        raise Refused("RuntimeMissing", "TensorRT's builder cannot start here", [str(error), *log.last()]) from error
    network = builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, asked["network_flags"]))
    parser = trt.OnnxParser(network, log.logger)
    _tell(out, {"step": "Parsing the graph"})
    if not parser.parse_from_file(asked["graph"]):
        what = f"the parser of {_named(trt, asked)} refuses the graph"
        raise Refused("UnsupportedError", what, _refusals(parser, asked["nodes"], log))
    config = _configured(trt, builder, network, asked, log, out)
    held = _hold_types(trt, network, asked["types"])
    _admit_decomposition(trt, network)
    parsed = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(_kind_of(log.errors), f"{_named(trt, asked)} cannot build this graph", log.last())
    with Path(asked["engine"]).open("wb") as stream:
        stream.write(plan)
    finished = time.monotonic()
    cached = _keep_timing_cache(config, asked["timing_cache"])
    return {
        "version": str(trt.__version__),
        "python": platform.python_version(),
        "gpu": gpu(),
        "seconds_parsing": round(parsed - started, 3),
        "seconds_building": round(finished - parsed, 3),
        "network_layers": network.num_layers,
        "layers_held_to_float32": held,
        "engine_bytes": Path(asked["engine"]).stat().st_size,
        "engine": _inspected(trt, log, plan),
        "timing_cache_bytes": cached,
        "peak_rss_bytes": _peak_rss(),
        "warnings": list(log.warnings),
    }


def _named(trt: Any, asked: Mapping[str, Any]) -> str:
    return f"{asked['package']} {trt.__version__}"


def _bits(enumeration: Any, names: Sequence[str]) -> int:
    found = 0
    for name in names:
        if not hasattr(enumeration, name):
            raise Refused("UnsupportedError", f"this version has no {enumeration.__name__}.{name}")
        found |= 1 << int(getattr(enumeration, name))
    return found


def _refusals(parser: Any, nodes: Sequence[str], log: Log) -> list[str]:
    """A line for every node that the parser refuses, and why; then the log. nodes: what each is called in messages."""
    lines = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        known = 0 <= error.node() < len(nodes)
        words = f"{error.desc()} ({error.code().name})"
        lines.append(f"{nodes[error.node()]}: {words}" if known else words)
    return lines + log.errors


def _configured(trt: Any, builder: Any, network: Any, asked: Mapping[str, Any], log: Log, out: TextIO) -> Any:
    config = builder.create_builder_config()
    for name in asked["flags"]:
        _bits(trt.BuilderFlag, [name])
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in asked["cleared"]:
        if hasattr(trt.BuilderFlag, name):  # a flag that is not there is not set
            config.clear_flag(getattr(trt.BuilderFlag, name))
    if asked["tactic_sources"] is not None:
        config.set_tactic_sources(_bits(trt.TacticSource, asked["tactic_sources"]))
    if asked["hardware_compatibility"] is not None:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, asked["hardware_compatibility"])
    if asked["optimization_level"] is not None:
        config.builder_optimization_level = asked["optimization_level"]
    for shapes in asked["profiles"]:
        profile = builder.create_optimization_profile()
        inputs = {network.get_input(number).name for number in range(network.num_inputs)}
        for name in sorted(inputs):
            profile.set_shape(name, *(tuple(shape) for shape in shapes[name]))
        config.add_optimization_profile(profile)
    _take_timing_cache(config, asked["timing_cache"], log)
    if (monitor := _monitor(trt, out)) is not None:
        config.progress_monitor = monitor
    return config


def _hold_types(trt: Any, network: Any, types: Mapping[str, str] | None) -> int:
    """Keep the layers whose outputs are float32 in the graph from being computed in less; how many they are.

    Layers that only move or make values have no precision of their own.
    """
    if types is None:
        return 0
    moving = {"CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE", "CAST", "IDENTITY", "SHUFFLE", "SLICE", "CONCATENATION"}
    moving |= {"GATHER", "SCATTER", "FILL", "CONDITION", "ASSERTION"}
    held = 0
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        kinds = [types.get(layer.get_output(k).name) for k in range(layer.num_outputs)]
        if layer.type.name in moving or not kinds or any(kind != "F32" for kind in kinds):
            continue
        layer.precision = trt.float32
        for k in range(layer.num_outputs):
            layer.set_output_type(k, trt.float32)
        held += 1
    return held


def _admit_decomposition(trt: Any, network: Any) -> None:
    """Let attention be computed by several kernels where there is no single one for its type or its size of heads."""
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True


def _kind_of(errors: Sequence[str]) -> str:
    words = " ".join(errors).lower()
    return "ResourceError" if "out of memory" in words or "outofmemory" in words else "UnsupportedError"


def _take_timing_cache(config: Any, path: str | None, log: Log) -> None:
    if path is None:
        return
    before = len(log.warnings)
    data = Path(path).read_bytes() if Path(path).exists() else b""
    cache = config.create_timing_cache(data)
    told = log.warnings[before:]
    if data and (cache is None or any("timing cache" in line.lower() for line in told)):
        raise Refused("IntegrityError", "the timing cache cannot be read by this TensorRT", told)
    if not config.set_timing_cache(cache, False):
        raise Refused("IntegrityError", "the timing cache was made on another GPU or by another TensorRT", log.last())


def _keep_timing_cache(config: Any, path: str | None) -> list[int] | None:
    """Under its name whole or not at all, for another build may read it. [bytes before, bytes now], or None for none.

    A build that found all its kernels there leaves as many bytes as there were.
    """
    if path is None:
        return None
    target = Path(path)
    before = target.stat().st_size if target.exists() else 0
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as stream:
        stream.write(config.get_timing_cache().serialize())
    Path(stream.name).replace(target)
    return [before, target.stat().st_size]


def _inspected(trt: Any, log: Log, plan: Any) -> dict[str, Any] | None:
    """What the loaded engine says of itself; None where none can be loaded, for want of a GPU mostly."""
    if gpu() is None:
        return None
    before = len(log.errors)
    engine = trt.Runtime(log.logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {"reason": "; ".join(log.errors[before:]) or "it does not run on this GPU"}
    memory = getattr(engine, "device_memory_size_v2", None)
    return {
        "layers": engine.num_layers,
        "device_memory_bytes": engine.device_memory_size if memory is None else memory,
        "refittable": bool(engine.refittable),
    }


def _peak_rss() -> int | None:
    if sys.platform == "win32":
        return None
    resource = importlib.import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ── the pipe ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tell(out: TextIO, message: Mapping[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


@contextlib.contextmanager
def _answers() -> Iterator[TextIO]:
    """A stream for answers. Native code may print: file 1 becomes standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


def main() -> None:
    """Answer the one question."""
    with _answers() as out:
        asked = json.load(sys.stdin)
        try:
            if asked.pop("command") == "look":
                _tell(out, {"answer": look(**asked)})
            else:
                _tell(out, {"answer": build(asked, out)})
        except Refused as error:
            _tell(out, {"error": {"kind": error.kind, "what": error.what, "problems": error.problems}})


if __name__ == "__main__":
    main()
