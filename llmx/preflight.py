"""What an export takes, told by `llmx plan` and looked at before anything is written: memory, disk, time.

--max-memory ── activations on disk, fewer threads: what changes no byte is chosen ── the rest is the user's choice
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import ResourceError
from llmx.memory import EMULATED, REFERENCE_BYTES, as_option, free_bytes, in_words, validation_memory

if TYPE_CHECKING:
    from llmx.exporters.calibration_needs import CalibrationNeeds
    from llmx.exporters.quantization import Quantization
    from llmx.exporters.target import Exporter
    from llmx.models.model import Model
    from llmx.preparing import Prepared

TWIN_BYTES = 4 << 30  # validate.case.Settings, whose import takes seconds
ROUNDING_SECONDS = 2.3e-8  # a weight on one core, read, checked, encoded and written: 25 CPU seconds for 1.1 B, Q4_K_M
FEWEST_TOKENS = 256


def needs_of(model: Model, decided: Quantization) -> CalibrationNeeds:
    """What calibrating takes."""
    from llmx.exporters.calibration_needs import CalibrationNeeds

    return CalibrationNeeds(model.architecture, decided.tokens, decided.length, decided.recipe.effort)


def chosen(
    planned: Callable[[int], Exporter], model: Model, decided: Quantization, threads: int, limit: int | None
) -> tuple[Exporter, int, bool]:
    """(the planned export, its threads, whether activations are kept on disk), within the limit where that is possible.

    planned: plans the export for so many threads. limit: None takes what is free.
    """
    exporter, shelved = planned(threads), False
    have = free_bytes() if limit is None else limit
    while _peak(exporter, model, decided, threads, shelved=shelved) > have:
        if decided.calibrated and not shelved:
            shelved = True
        elif threads > 1:
            threads //= 2
            exporter = planned(threads)
        else:
            break
    return exporter, threads, shelved


def peak(prepared: Prepared) -> int:
    """Estimated bytes of making the artifact: what writing takes, or calibrating where that is more."""
    return _peak(prepared.exporter, prepared.model, prepared.quantization, prepared.threads, shelved=prepared.shelved)


def _peak(exporter: Exporter, model: Model, decided: Quantization, threads: int, *, shelved: bool) -> int:
    writing = exporter.plan.peak_memory_bytes
    if not decided.calibrated:
        return writing
    return max(writing, needs_of(model, decided).memory(threads, shelved=shelved))


def needs(prepared: Prepared) -> dict[str, Any]:
    """The estimates as plain data."""
    plan, decided = prepared.exporter.plan, prepared.quantization
    seconds = plan.parameters * ROUNDING_SECONDS / prepared.threads
    if decided.calibrated:
        seconds += needs_of(prepared.model, decided).seconds(prepared.threads)
    return {
        "memory_limit_bytes": prepared.limit,
        "memory_bytes": peak(prepared),
        "validation_memory_bytes": validation_memory(plan.format, plan.parameters, plan.nbytes),
        "disk_bytes": _written(prepared),
        "seconds": round(seconds, 1),
        "threads": prepared.threads,
        "activations_on_disk": prepared.shelved,
    }


def require(prepared: Prepared, place: Path) -> None:
    """Raises: ResourceError where the estimates do not fit into memory or on the disk, with what would.

    place: the first target, or the folder that all of them become.
    """
    problems, fixes = [], []
    for problem, fix in (*_memory_problems(prepared), *_disk_problems(prepared, place)):
        problems.append(problem)
        fixes += [one for one in fix if one not in fixes]
    if problems:
        raise ResourceError("this export does not fit here", problems=problems, fix=", or ".join(fixes))


def _memory_problems(prepared: Prepared) -> Iterator[tuple[str, list[str]]]:
    limit, plan = prepared.limit, prepared.exporter.plan
    have = free_bytes() if limit is None else limit
    whose = "are free" if limit is None else "are what --max-memory allows"
    if (needed := peak(prepared)) > have:
        yield f"memory: about {in_words(needed)} are needed, {in_words(have)} {whose}", _smaller(prepared, have)
    if prepared.request.validate:
        needed = validation_memory(plan.format, plan.parameters, plan.nbytes)
        if limit is None:  # what a runtime maps of the artifact, the system may let go again
            needed = REFERENCE_BYTES * plan.parameters
        if needed > have:
            what = (
                f"memory: validation holds a float32 reference: about {in_words(needed)}, and {in_words(have)} {whose}"
            )
            yield what, ["--no-validate, and `llmx validate` on a larger machine"]


def _smaller(prepared: Prepared, have: int) -> list[str]:
    """What would fit into so much memory."""
    decided, found = prepared.quantization, []
    more = ["a machine with more memory"]
    if not decided.calibrated:
        return more if prepared.limit is None else [f"--max-memory {as_option(peak(prepared))}"]
    architecture, length = prepared.model.architecture, decided.length
    from llmx.exporters.calibration_needs import CalibrationNeeds

    tokens = decided.tokens
    while tokens > FEWEST_TOKENS and CalibrationNeeds(architecture, tokens, length).memory(1, shelved=True) > have:
        tokens //= 2
    if tokens < decided.tokens and CalibrationNeeds(architecture, tokens, length).memory(1, shelved=True) <= have:
        found.append(f"--calibration-tokens {tokens}")
    least = needs_of(prepared.model, decided).memory(1, shelved=True)
    found += more if prepared.limit is None else [f"--max-memory {as_option(least)}"]
    return [*found, "--method rtn, which calibrates nothing"]


def _written(prepared: Prepared) -> int:
    """Bytes that are on the target's disk at once."""
    plan, decided = prepared.exporter.plan, prepared.quantization
    rows = plan.nbytes if decided.calibrated and not decided.inputs_only else 0
    return plan.nbytes + rows + (needs_of(prepared.model, decided).shelf_bytes() if prepared.shelved else 0)


def _disk_problems(prepared: Prepared, place: Path) -> Iterator[tuple[str, list[str]]]:
    """By disk: what is written beside the target, the statistics, and what validation makes in the scratch folder."""
    import tempfile

    from llmx.exporters.workplace import folder_of

    plan, decided, request = prepared.exporter.plan, prepared.quantization, prepared.request
    there = _bytes_in(folder_of(place)) if request.resume else 0
    wanted = [("the artifact and what it is made of", place.parent, _written(prepared) - there)]
    if decided.statistics is not None and not decided.inputs_only and decided.calibrated:
        kept = needs_of(prepared.model, decided).statistics_bytes() - _bytes_in(decided.statistics)
        wanted.append(("the statistics", decided.statistics, kept))
    if request.validate:
        floats = REFERENCE_BYTES * plan.parameters
        scratch = floats if plan.format == EMULATED else 2 * min(floats, TWIN_BYTES)
        wanted.append(("validation's float32 twins", Path(tempfile.gettempdir()), scratch))
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for what, path, nbytes in wanted:
        folder = _existing(path)
        disks.setdefault(folder.stat().st_dev, []).append((what, folder, max(0, nbytes)))
    for parts in disks.values():
        needed, free = sum(nbytes for _, _, nbytes in parts), shutil.disk_usage(parts[0][1]).free
        if needed > free:
            named = ", ".join(f"{in_words(nbytes)} for {what}" for what, _, nbytes in parts)
            fixes = ["free some room", "another -o", "a smaller type", *(["--no-validate"] * request.validate)]
            yield f"disk: {named} in {parts[0][1]}, and {in_words(free)} are free", fixes


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _bytes_in(folder: Path) -> int:
    """Bytes of disk that a folder's files take."""
    found = 0
    for path, _, names in os.walk(folder):
        found += sum(os.lstat(os.path.join(path, name)).st_blocks * 512 for name in names)  # noqa: PTH118
    return found
