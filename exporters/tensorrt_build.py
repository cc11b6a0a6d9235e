"""TensorRT's builders: which there are, what each can do, and one of them asked to build a graph's engine.

    what is installed ── look ── Installed ── find_builder ── Builder ── request ── [worker: parse, build] ── Built

TensorRT is never imported here: it runs in a process of its own (tensorrt_worker.py), under the Python that
LLMX_TENSORRT_PYTHON names.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmx.errors import IntegrityError, LlmxError, ResourceError, RuntimeMissing, UnsupportedError, UsageError
from llmx.formats.tensorrt import PACKAGES
from llmx.interpreter import TENSORRT_PYTHON, python_command, python_environment, tensorrt_python

WORKER = "llmx.exporters.tensorrt_worker"
LOOK_SECONDS = 120.0  # TensorRT 8 loads 1.3 GB of libraries
ERRORS: dict[str, type[LlmxError]] = {
    kind.__name__: kind for kind in (IntegrityError, ResourceError, RuntimeMissing, UnsupportedError, UsageError)
}
_KILLED = -signal.SIGKILL
_KEPT_LINES = 12
INSTALL = f"pip install 'llmx[tensorrt-rtx]' (builds without a GPU), or set {TENSORRT_PYTHON} to a Python that has it"

ALL_TYPES = ("F32", "F16", "BF16", "W4A16", "W8A16", "FP8", "W8A8", "W4A16_BF16", "W8A16_BF16", "FP8_BF16")
PLAIN_TYPES = ("F32", "F16", "W8A16", "W8A8")


@dataclass(frozen=True, slots=True)
class Builder:
    """What the versions from `since` and before `before` can do.

    dialect: of the graphs that its parser takes. types: the mixes. strong: the graph's types are kept to; else builder
    flags admit types and layers are held to float32. needs_gpu: nothing is built without one. compatibility: the
    hardware level of --portable; None where there is none. caches_timings: whether a timing cache is of use.
    compiles_late: its kernels are compiled where they run, for the sizes that they meet, so that one profile is enough:
    each has the source text of all its kernels.
    """

    package: str
    since: tuple[int, int]
    before: tuple[int, int]
    dialect: str
    types: tuple[str, ...]
    strong: bool = True
    needs_gpu: bool = True
    compatibility: str | None = "AMPERE_PLUS"
    caches_timings: bool = True
    compiles_late: bool = False
    network_flags: tuple[str, ...] = ("STRONGLY_TYPED",)
    tactic_sources: tuple[str, ...] | None = None

    def described(self) -> str:
        """Its package and versions in words."""
        return f"{self.package} {'.'.join(map(str, self.since))} to below {'.'.join(map(str, self.before))}"


# TensorRT 9 was for a few devices only. RotaryEmbedding and the cache's update came with 10.15; before, graphs are of
# plain operators. TensorRT 8 takes tactics of cuDNN and cuBLAS, which need not be installed, by default.
_OWN_TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
BUILDERS: tuple[Builder, ...] = (
    Builder(
        "tensorrt", (8, 5), (9, 0), "plain", PLAIN_TYPES,
        strong=False, network_flags=("EXPLICIT_BATCH",), tactic_sources=_OWN_TACTICS,
    ),
    Builder("tensorrt", (10, 0), (10, 15), "plain", PLAIN_TYPES),
    Builder("tensorrt", (10, 15), (12, 0), "trt", ALL_TYPES),
    Builder(
        "tensorrt_rtx", (1, 2), (2, 0), "trt", ALL_TYPES,
        needs_gpu=False, compatibility=None, caches_timings=False, compiles_late=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Installed:
    """What the worker's Python has. gpu: its name; capability: (major, minor) of its compute capability."""

    package: str
    version: str
    gpu: str | None
    capability: tuple[int, int] | None
    python: str

    @property
    def numbers(self) -> tuple[int, int]:
        """(major, minor) of the version."""
        major, minor, *_ = [*self.version.split("."), "0"]
        return int(major), int(minor)


@dataclass(frozen=True, slots=True)
class Request:
    """One build. shapes: of each profile, input name -> its least, best and most shapes.

    flags: names of builder flags. types: value -> "F16" or "F32", what a weakly typed network is held to.
    nodes: what each is called in messages, in order. timing_cache: read and written. level: of the builder's
    optimization, None for its own.
    """

    graph: Path
    engine: Path
    shapes: tuple[Mapping[str, Sequence[Sequence[int]]], ...]
    flags: tuple[str, ...] = ()
    types: Mapping[str, str] | None = None
    nodes: tuple[str, ...] = ()
    timing_cache: Path | None = None
    level: int | None = None
    portable: bool = False


def installed(package: str | None = None) -> Installed:
    """What builds here: that package, or the first that can be loaded; with a GPU tensorrt before tensorrt_rtx.

    Raises: UsageError for an unknown package, RuntimeMissing with the reason of each that cannot be loaded.
    """
    if package is not None and package not in PACKAGES:
        raise UsageError(f"there is no builder {package!r}", fix=f"choose one of {', '.join(PACKAGES)}")
    wanted = (package,) if package is not None else PACKAGES
    told = _ask({"command": "look", "packages": list(wanted)}, None, LOOK_SECONDS)
    if package is None and told["package"] == "tensorrt" and told["gpu"] is None:
        other = _ask({"command": "look", "packages": ["tensorrt_rtx"]}, None, LOOK_SECONDS)
        told = other if other["package"] is not None else told
    if told["package"] is None:
        raise RuntimeMissing(
            "no builder of TensorRT engines is here",
            where=f"Python {told['python']}, {tensorrt_python() or sys.executable}",
            problems=list(told["reasons"].values()),
            fix=INSTALL,
        )
    gpu = told["gpu"]
    capability = None if gpu is None else (gpu["compute_capability"][0], gpu["compute_capability"][1])
    return Installed(told["package"], told["version"], gpu and gpu["name"], capability, told["python"])


def find_builder(found: Installed) -> Builder:
    """What is known of the installed version. Raises: UnsupportedError where nothing is."""
    for builder in BUILDERS:
        if builder.package == found.package and builder.since <= found.numbers < builder.before:
            return builder
    raise UnsupportedError(
        f"llmx knows no builder {found.package} {found.version}",
        fix=f"install one of {'; '.join(builder.described() for builder in BUILDERS)}",
    )


def build(builder: Builder, request: Request, step: Callable[[str], None]) -> dict[str, Any]:
    """Have the engine built, and return what the worker saw on the way, as plain data. step: told of each phase.

    Raises: UnsupportedError with the nodes that the parser refuses, or with the builder's own last words;
    IntegrityError for a timing cache that does not fit, or where TensorRT dies; ResourceError where memory runs out;
    RuntimeMissing where it cannot start.
    """
    asked = {
        "command": "build",
        "package": builder.package,
        "graph": str(request.graph),
        "engine": str(request.engine),
        "network_flags": list(builder.network_flags),
        "flags": list(request.flags),
        "cleared": ["TF32"],  # products of float32 are to be float32's
        "tactic_sources": builder.tactic_sources and list(builder.tactic_sources),
        "hardware_compatibility": builder.compatibility if request.portable else None,
        "optimization_level": request.level,
        "timing_cache": None if request.timing_cache is None else str(request.timing_cache),
        "profiles": list(request.shapes),
        "types": None if builder.strong else dict(request.types or {}),
        "nodes": list(request.nodes),
    }
    return _ask(asked, step, None)


def _ask(question: Mapping[str, Any], step: Callable[[str], None] | None, seconds: float | None) -> dict[str, Any]:
    python = tensorrt_python()
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    with _started(python) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        drain = threading.Thread(target=_drain, args=(process.stderr, lines), daemon=True)
        drain.start()
        timer = threading.Timer(seconds or threading.TIMEOUT_MAX, process.kill)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died before it read: its exit says more
                process.stdin.write(json.dumps(question).encode())
                process.stdin.close()
            answer = _answer(process.stdout, step)
            process.wait()
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
            drain.join(5)
    if answer is None:
        raise _death(process.returncode, lines)
    if (problem := answer.get("error")) is not None:
        raise ERRORS[problem["kind"]](problem["what"], problems=problem["problems"])
    return answer["answer"]


def _started(python: str | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            python_command(WORKER, python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=python_environment(python, {}),
        )
    except OSError as error:
        raise RuntimeMissing(
            f"the Python that {TENSORRT_PYTHON} names cannot be started: {error.strerror}",
            where=python,
            fix="name the interpreter that TensorRT is installed for",
        ) from error


def _answer(stream: IO[bytes], step: Callable[[str], None] | None) -> dict[str, Any] | None:
    for line in stream:
        if not line.endswith(b"\n"):  # it died within its answer
            return None
        message = json.loads(line)
        if "step" not in message:
            return message
        if step is not None:
            step(message["step"])
    return None


def _drain(stream: IO[bytes], lines: deque[str]) -> None:
    for line in stream:
        if text := line.decode(errors="replace").strip():
            lines.append(text)


def _death(code: int, lines: Sequence[str]) -> LlmxError:
    if code == _KILLED:
        return ResourceError(
            "TensorRT was killed while it worked: memory ran out, or it took too long",
            problems=list(lines),
            fix="free some memory, or choose a smaller --max-input, --max-batch or --max-length",
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return IntegrityError(f"TensorRT died while it worked ({how}); its last lines follow", problems=list(lines))
