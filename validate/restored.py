"""The artifact's decoded weights where a checkpoint's would be, so that everything that reads a model reads them too.

stored tensors ── decoded, rows and gains restored ── checkpoint's own names and layout ── Model ── decoder
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from llmx.exporters.gguf_tensors import Entry
from llmx.models.checkpoint import Checkpoint, CheckpointTensor
from llmx.models.model import Model
from llmx.validate.kinds import Container, kind_of

HELD = 2  # decoded tensors kept: a matrix is read in blocks, and its bias between them


class RestoredCheckpoint(Checkpoint):
    """A checkpoint whose every tensor is F32 and decoded when it is asked for; the last few are kept.

    Vocabulary rows that the artifact does not have are zeros. Not for several threads at once.
    """

    __slots__ = ("_file", "_held", "_restored", "_stored_as")

    def __init__(self, file: Container, model: Model, entries: Sequence[Entry]) -> None:
        """Raises: IntegrityError when the artifact lacks a tensor or has one of another shape."""
        source = model.checkpoint
        self.folder, self.source, self.config = source.folder, source.source, source.config
        self.generation_config = source.generation_config
        self._file = file
        self._restored = kind_of(file).restored(file, model, entries)
        self._stored_as = {
            name: entry.name for entry in entries for piece in entry.pieces for name in piece.spec.source.names
        }
        self.tensors = {name: CheckpointTensor("F32", source.tensors[name].shape) for name in self._restored}
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """u8[stop - start] of the decoded tensor's little-endian float32 bytes."""
        if name not in self._held:
            while len(self._held) >= HELD:
                self._held.popitem(last=False)
            values = np.ascontiguousarray(self._restored[name](), dtype="<f4")
            self._held[name] = values.reshape(-1).view(np.uint8)
            self._file.release(self._stored_as[name])
        return self._held[name][start:stop]

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing: what is kept is bounded anyway, and a tensor decoded for each of its blocks would take long."""


def restored_model(file: Container, model: Model, entries: Sequence[Entry]) -> Model:
    """The artifact's weights as a model of the same architecture.

    Raises: IntegrityError when the artifact lacks a tensor or has one of another shape.
    """
    return Model(model.architecture, RestoredCheckpoint(file, model, entries))
