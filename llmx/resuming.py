"""What tells one export from another, so that `--resume` goes on only with what makes the same bytes."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx import rebuilding
from llmx.errors import IntegrityError

if TYPE_CHECKING:
    from llmx.exporters.journal import Journal
    from llmx.exporters.target import Exporter
    from llmx.models.checkpoint import Checkpoint
    from llmx.preparing import Prepared

LOOKED_AT = "looked at the weights"
MAKING_BYTES = ("exporters", "formats", "models", "quant")  # the packages whose code reaches the bytes


def key_of(prepared: Prepared) -> dict[str, Any]:
    """Plain data: the checkpoint's state, the recipe, the calibration, the plan, the libraries and this code itself."""
    told = rebuilding.manifest_of(prepared, (), (), ())
    plan = json.dumps({**prepared.exporter.plan.to_json(), "peak_memory_bytes": None}, sort_keys=True)
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


def looked_at(exporter: Exporter, journal: Journal) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of the checkpoint's files, after a look at every weight.

    What a run that was stopped looked at is not read again, as long as the system says that nobody touched it.
    Raises: IntegrityError for weights that cannot be exported, or that are not those of that run.
    """
    from llmx.exporters.manifest import SourceHashes

    checkpoint = exporter.model.checkpoint
    stamps, facts = _stamps(checkpoint), journal.facts(LOOKED_AT)
    same = facts is not None and facts["stamps"] == stamps
    with SourceHashes(checkpoint, facts["files"] if facts is not None and same else ()) as source:
        if not same:
            exporter.check_weights()
        files = source.result()
    weights = [file for file in files if file["name"] in stamps]
    if facts is not None and facts["files"] != weights:
        raise IntegrityError(
            "the weights are not those that the export which was stopped has read",
            where=checkpoint.folder,
            fix="leave out --resume to start anew",
        )
    if facts is None:
        journal.note(LOOKED_AT, {"stamps": stamps, "files": weights})
    return files


def _stamps(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """What the system says of each weight file. The time of its last change cannot be set by who changes it."""
    found = {path.name: path.stat() for path in checkpoint.files}
    return {name: [one.st_size, one.st_ino, one.st_mtime_ns, one.st_ctime_ns] for name, one in found.items()}
