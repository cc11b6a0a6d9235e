"""What llmx does, each job read top to bottom: export, calibrate, plan, validate, inspect, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmx.chatting import Chat, ChatRequest
from llmx.differing import diff
from llmx.errors import UsageError
from llmx.exporting import ExportResult, export
from llmx.measuring import CalibrateRequest, CalibrateResult, calibrate
from llmx.preparing import ExportRequest, plan
from llmx.validating import available_cores, exit_code, limits, validate
from llmx.verifying import sign, verify

__all__ = [
    "CalibrateRequest",
    "CalibrateResult",
    "Chat",
    "ChatRequest",
    "ExportRequest",
    "ExportResult",
    "available_cores",
    "calibrate",
    "diff",
    "doctor",
    "exit_code",
    "export",
    "inspect",
    "limits",
    "plan",
    "sign",
    "validate",
    "verify",
]

LIBRARIES = ("xllamacpp", "llama-cpp-python", "torch", "transformers", "tokenizers", "numba", "numpy", "gguf")


def inspect(path: Path) -> dict[str, Any]:
    """What a GGUF file, a split set of which `path` is a part, or an ONNX graph (or its folder) holds.

    Metadata, tensors, sizes; of a graph, its operators too.
    Raises: UsageError when there is no such file, IntegrityError when it is broken or hostile.
    """
    from llmx.validate.kinds import find_kind

    if not path.exists():
        raise UsageError("there is no such file", where=path)
    kind = find_kind(path)
    return kind.described(kind.open(path))


def doctor() -> dict[str, Any]:
    """Which runtimes and libraries are here, and why a runtime is not."""
    import platform
    from importlib import metadata

    import psutil

    from llmx.validate.runtimes import find_runtime, runtime_names

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    reasons = {name: find_runtime(name).unavailable() for name in runtime_names()}
    return {
        "llmx": version("llmx"),
        "python": platform.python_version(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "runtimes": [{"name": name, "available": reason is None, "reason": reason} for name, reason in reasons.items()],
        "libraries": {name: version(name) for name in LIBRARIES},
    }
