"""Activations of a calibration pass kept in files, so that memory holds one batch of them at a time.

    FOLDER/12.f32    one batch's tensors behind each other: the float model's, the quantized one's where it is another

A file goes with the last who may ask for it. One that a killed run left belongs to nobody, and goes at the start.
"""

from __future__ import annotations

import itertools
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from llmx.system_errors import disk_error

Pair = tuple[torch.Tensor, torch.Tensor]


class DiskShelf:
    """A quant.inputs.Shelf in a folder of its own."""

    __slots__ = ("_folder", "_numbers")

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._numbers = folder, itertools.count()

    def put(self, value: Pair) -> Callable[[], Pair]:
        """As in the protocol. Raises: ResourceError for a full disk, IntegrityError for one that cannot be written."""
        tensors = value[:1] if value[1] is value[0] else value
        path = self._folder / f"{next(self._numbers)}.f32"
        try:
            with path.open("wb") as stream:
                for tensor in tensors:
                    stream.write(tensor.detach().cpu().contiguous().numpy().data)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise disk_error(error, path) from error
        return _Shelved(path, [tensor.shape for tensor in tensors], value[0].device)


class _Shelved:
    """One file's tensors, read again whenever somebody asks."""

    __slots__ = ("__weakref__", "_device", "_path", "_shapes")

    def __init__(self, path: Path, shapes: list[torch.Size], device: torch.device) -> None:
        self._path, self._shapes, self._device = path, shapes, device
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __call__(self) -> Pair:
        found, offset = [], 0
        for shape in self._shapes:
            values = np.fromfile(self._path, np.float32, shape.numel(), offset=offset)
            offset += values.nbytes
            found.append(torch.from_numpy(values).reshape(shape).to(self._device))
        return found[0], found[-1]
