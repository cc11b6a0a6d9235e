"""Statistics of a calibration pass kept in a folder, one file an input, so that a later run goes on from them.

    FOLDER/statistics.json            what they were gathered from: model, text, tokens, what each tensor gets
    FOLDER/layers.3.down.safetensors  hessian, drift, residual of fitted and held-out tokens, squares

The statistics of a layer depend on how the layers before it were quantized, so a folder serves one recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmx.errors import IntegrityError, ResourceError, UsageError
from llmx.exporters.artifact import write_text
from llmx.formats.json_text import read_object
from llmx.formats.safetensors import open_safetensors, write_safetensors
from llmx.quant.statistics import Moments, Statistics

MANIFEST = "statistics.json"
VERSION = 1
SETS = ("fitted", "held_out")


class StatisticsFolder:
    """A StatisticsStore on disk."""

    __slots__ = ("_device", "_folder", "_identity", "complete")

    def __init__(self, folder: Path, identity: Mapping[str, Any], device: str) -> None:
        """identity: all that the statistics depend on.

        Raises: UsageError when the folder holds statistics of something else, ResourceError when it cannot be made.
        """
        self._folder, self._device = folder, device
        self._identity = {"version": VERSION, **json.loads(json.dumps(identity))}
        self.complete = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"the statistics folder cannot be made: {error.strerror}", where=folder) from error
        if (folder / MANIFEST).is_file():
            self._recognize()
        else:
            self._write(complete=False)

    def _recognize(self) -> None:
        told = read_object(self._folder / MANIFEST)
        kept = {key: value for key, value in told.items() if key != "complete"}
        if kept != self._identity:
            different = sorted(key for key in kept.keys() | self._identity if kept.get(key) != self._identity.get(key))
            raise UsageError(
                "the folder holds statistics of another run",
                where=self._folder,
                problems=[f"{key} differs" for key in different],
                fix="give another --statistics folder, or remove this one",
            )
        self.complete = told.get("complete") is True

    def _write(self, complete: bool) -> None:
        write_text(self._folder / MANIFEST, json.dumps({**self._identity, "complete": complete}, indent=1) + "\n")

    def finish(self) -> None:
        """Every matrix's statistics are kept: a later run needs no forward pass."""
        if not self.complete:
            self._write(complete=True)
            self.complete = True

    def load(self, key: str) -> Statistics | None:
        path = self._folder / f"{key}.safetensors"
        if not path.is_file():
            if self.complete:
                raise IntegrityError("the statistics of a matrix are gone", where=path, fix="remove the folder")
            return None
        return read_statistics(path, self._device)

    def save(self, key: str, found: Statistics) -> None:
        tensors: dict[str, torch.Tensor | None] = {"squares": found.squares}
        for name, moments in zip(SETS, (found.fitted, found.held_out), strict=True):
            tensors |= {
                f"{name}.hessian": moments.hessian,
                f"{name}.drift": moments.drift,
                f"{name}.residual": moments.residual,
            }
        counts = np.array([found.fitted.tokens, found.held_out.tokens, found.pooled], np.int32)
        arrays = {name: values.cpu().numpy() for name, values in tensors.items() if values is not None}
        arrays["counts"] = counts.view(np.float32)
        write_safetensors(
            self._folder / f"{key}.safetensors",
            [(name, "F32", values.shape, [np.ascontiguousarray(values).tobytes()]) for name, values in arrays.items()],
        )


def read_statistics(path: Path, device: str = "cpu") -> Statistics:
    """The statistics of one matrix.

    Raises: IntegrityError, naming what is missing or of another shape, for a file that `save` did not write.
    """
    file = open_safetensors(path)
    problems = [f"{name} is {found.dtype}, not F32" for name, found in file.tensors.items() if found.dtype != "F32"]
    shapes = {name: found.shape for name, found in file.tensors.items()}
    width = shapes.get("squares", (0,))[-1:]
    wanted = {"squares": width, "counts": (3,), **{f"{part}.hessian": width * 2 for part in SETS}}
    wanted |= {f"{part}.drift": width * 2 for part in SETS if f"{part}.drift" in shapes}
    problems += [f"{name} is missing" for name in wanted.keys() - shapes.keys()]
    other = [name for name, shape in wanted.items() if shapes.get(name, shape) != shape]
    problems += [f"{name} is {shapes[name]}, not {wanted[name]}" for name in other]
    residuals = [f"{part}.residual" for part in SETS if f"{part}.residual" in shapes]
    problems += [f"{name} is {shapes[name]}" for name in residuals if shapes[name][1:] != width]
    if problems:
        raise _broken(path, sorted(problems))

    def array(name: str) -> np.ndarray:
        return np.array(file.bytes(name)).view(np.float32).reshape(shapes[name])

    def tensor(name: str) -> torch.Tensor | None:
        if name not in shapes:
            return None
        values = array(name)
        if not np.isfinite(values).all():
            raise _broken(path, [f"{name} has values that are no numbers"])
        return torch.from_numpy(values).to(device)

    def moments(part: str, count: int) -> Moments:
        hessian = tensor(f"{part}.hessian")
        assert hessian is not None
        return Moments(hessian, tensor(f"{part}.drift"), tensor(f"{part}.residual"), count)

    fitted, held_out, pooled = map(int, array("counts").view(np.int32))
    squares = tensor("squares")
    assert squares is not None
    if min(fitted, held_out) < 0:
        raise _broken(path, [f"counts are {fitted} and {held_out}"])
    return Statistics(moments(SETS[0], fitted), moments(SETS[1], held_out), squares, bool(pooled))


def _broken(path: Path, problems: list[str]) -> IntegrityError:
    return IntegrityError("the kept statistics are broken", where=path, problems=problems, fix="remove the folder")
