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
    """What a GGUF file, or a split set of which `path` is a part, holds: metadata, tensors, sizes.

    Raises: UsageError when there is no such file, IntegrityError when it is broken or hostile.
    """
    from llmx.formats.gguf import read_gguf_set

    if not path.is_file():
        raise UsageError("there is no such file", where=path)
    file = read_gguf_set(path)
    tensors, bits = file.tensors.values(), file.bits_per_weight
    return {
        "format": "gguf",
        "version": file.version,
        "files": [str(shard) for shard in file.paths],
        "bytes": file.nbytes,
        "parameters": file.weights,
        "bits_per_weight": None if bits is None else round(bits, 4),
        "metadata": {key: {"type": file.types[key], "value": value} for key, value in file.metadata.items()},
        "tensors": [{"name": t.name, "shape": list(t.shape), "type": t.type_name, "bytes": t.nbytes} for t in tensors],
    }


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
