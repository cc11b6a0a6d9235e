"""Stored arrays of a TensorRT-LLM checkpoint, read lazily by rows: cut, stacked and put side by side without a copy.

A rank holds a part of every matrix, and one matrix may hold the rows of several: what the checks look at are whole
matrices, so they are put together of views, and only the rows that somebody reads are ever in memory.

    sliced    rows start to stop of one            q of a rank's qkv
    stacked   one under the other                  the ranks' parts of q
    beside    one beside the other                 the ranks' parts of o, which are cut along the inputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from llmx.errors import IntegrityError
from llmx.formats.safetensors import SafetensorsFile

NUMPY: Mapping[str, str] = {
    # dtype of safetensors -> the numpy type of its bits; floats of 16 and 8 bits are widened by `floats`
    **{"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1", "F8_E4M3": "u1"},
}
Reader = Callable[[int, int], np.ndarray]  # (start, stop) -> [stop - start, columns] of the numpy type
Place = tuple[SafetensorsFile, str]


@dataclass(frozen=True, slots=True)
class Array:
    """An array seen as a matrix: a vector is one row, a scalar one by one, stacked matrices lie under each other.

    read: rows of it, as stored. places: the tensors of files that it takes its bytes from.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Reader
    places: tuple[Place, ...]

    @property
    def count(self) -> int:
        """Rows."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(NUMPY[self.dtype]).itemsize

    def floats(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """f32[stop - start, columns] of rows in F32, F16 or BF16."""
        stored = self.read(start, self.count if stop is None else stop)
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def stored(file: SafetensorsFile, name: str) -> Array:
    """A tensor of a file. Raises: IntegrityError for a dtype that no such checkpoint has."""
    tensor = file.tensors[name]
    if tensor.dtype not in NUMPY:
        raise IntegrityError(f"{name} is stored as {tensor.dtype}", where=file.path, fix=f"one of {', '.join(NUMPY)}")
    kind = np.dtype(NUMPY[tensor.dtype])
    shape = tensor.shape or (1,)
    row = shape[-1] * kind.itemsize

    def read(start: int, stop: int) -> np.ndarray:
        data = file.bytes(name, start * row, stop * row)
        # Offsets in a file need not be multiples of the element's size.
        return np.frombuffer(data.tobytes() if data.ctypes.data % kind.itemsize else data, kind).reshape(
            stop - start, shape[-1]
        )

    return Array(tensor.dtype, shape, read, ((file, name),))


def sliced(whole: Array, start: int, stop: int) -> Array:
    """Rows start to stop; of a vector, its elements."""
    if len(whole.shape) == 1:
        return replace(whole, shape=(stop - start,), read=lambda low, high: whole.read(low, high)[:, start:stop])
    shape = (stop - start, whole.shape[-1])
    return replace(whole, shape=shape, read=lambda low, high: whole.read(start + low, start + high))


def stacked(parts: Sequence[Array]) -> Array:
    """One under the other; vectors are joined end to end."""
    if len(parts) == 1:
        return parts[0]
    if len(parts[0].shape) == 1:
        return beside(parts)
    counts = [part.count for part in parts]

    def read(start: int, stop: int) -> np.ndarray:
        held, place = [], 0
        for part, count in zip(parts, counts, strict=True):
            low, high = max(start - place, 0), min(stop - place, count)
            if low < high:
                held.append(part.read(low, high))
            place += count
        return held[0] if len(held) == 1 else np.concatenate(held)

    return Array(parts[0].dtype, (sum(counts), parts[0].shape[-1]), read, _places(parts))


def beside(parts: Sequence[Array]) -> Array:
    """One beside the other."""
    if len(parts) == 1:
        return parts[0]
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))

    def read(start: int, stop: int) -> np.ndarray:
        return np.concatenate([part.read(start, stop) for part in parts], axis=1)

    return Array(parts[0].dtype, shape, read, _places(parts))


def turned(whole: Array) -> Array:
    """The transpose of a matrix."""

    def read(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(whole.read(0, whole.count)[:, start:stop].T)

    return replace(whole, shape=(whole.shape[-1], whole.count), read=read)


def released(array: Array) -> None:
    """Hands its pages back to the system."""
    for file, name in array.places:
        file.release(name)


def _places(parts: Sequence[Array]) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(place for part in parts for place in part.places))
