"""What tells one export from another, so that `--resume` goes on only with what makes the same bytes."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx import rebuilding

if TYPE_CHECKING:
    from llmx.preparing import Prepared

MAKING_BYTES = ("exporters", "formats", "models", "quant")  # the packages whose code reaches the bytes


def key_of(prepared: Prepared) -> dict[str, Any]:
    """Plain data: the checkpoint's state, the recipe, the calibration, the plan, the libraries and this code itself."""
    told = rebuilding.manifest_of(prepared, (), (), ())
    plan = json.dumps(prepared.exporter.plan.to_json(), sort_keys=True)
    return {
        "checkpoint": prepared.model.checkpoint.identity(),
        "code": code_digest(),
        "plan": hashlib.sha256(plan.encode()).hexdigest(),
        **{name: told[name] for name in ("libraries", "recipe", "calibration", "importance", "options")},
    }


def code_digest() -> str:
    """The sha256 over the source files of the packages that make bytes."""
    digest = hashlib.sha256()
    for package in MAKING_BYTES:
        for path in sorted(Path(import_module(f"llmx.{package}").__path__[0]).rglob("*.py")):
            digest.update(f"{package}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()
