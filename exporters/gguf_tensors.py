"""From canonical tensors to GGUF tensors and back: names, fused rows, llama.cpp's permutation, norm gains.

llama.cpp's rotation pairs neighbouring rows of a head where Hugging Face pairs row i with row i + d/2:

    Hugging Face   0  1  2 .. d/2-1 | d/2 d/2+1 .. d-1
    GGUF           0 d/2  1 d/2+1  2 d/2+2 ..  d/2-1 d-1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmx.errors import IntegrityError
from llmx.exporters.gguf_families import KEPT_FLOAT, OUTSIDE_LAYERS, GgufFamily, Transform
from llmx.exporters.gguf_metadata import rope_tensors
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.ggml_decode import decode
from llmx.models.architecture import Architecture, Role, TensorSpec

if TYPE_CHECKING:
    from llmx.formats.gguf import GgufFile
    from llmx.models.model import Model

# Weights decoded at a time: the decoder's integer arrays stay in the cache.
_DECODED_WEIGHTS = 1 << 19
Floats = npt.NDArray[np.float32]
RowReader = Callable[[int, int], np.ndarray]
Places = dict[tuple[int | None, Role, str], TensorSpec]  # by layer, role and part


@dataclass(frozen=True, slots=True)
class Piece:
    """A canonical tensor inside a GGUF tensor, and what is done to it."""

    spec: TensorSpec
    transform: Transform


@dataclass(frozen=True, slots=True)
class Entry:
    """One GGUF tensor: its pieces' rows one after the other, or a table of the exporter's own (`constant`)."""

    name: str
    role: Role | None
    layer: int | None
    shape: tuple[int, ...]
    quantizable: bool
    pieces: tuple[Piece, ...] = ()
    constant: Floats | None = None

    @property
    def rows(self) -> int:
        """Rows of the 2-D view; a vector is one row."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows_per_expert(self) -> int:
        """Rows that share an importance vector."""
        return self.shape[-2] if len(self.shape) > 1 else 1


def entries(a: Architecture, family: GgufFamily, vocabulary_rows: int) -> tuple[Entry, ...]:
    """The GGUF tensors of this architecture, in file order: embedding, rope tables, layers, output."""
    by_place: Places = {(t.layer, t.role, t.part): t for t in a.tensors}
    outside = {name: list(_of_place(None, name, roles, by_place, family)) for name, roles in OUTSIDE_LAYERS.items()}
    made = [Entry(name, None, None, value.shape, False, constant=value) for name, value in rope_tensors(a.rope).items()]
    layers = [
        entry
        for layer in range(a.layers)
        for name, roles in family.names.items()
        for entry in _of_place(layer, name, roles, by_place, family)
    ]
    tables = [_cut(entry, vocabulary_rows) for entry in outside["token_embd"]] + outside["position_embd"]
    head = [_cut(entry, vocabulary_rows) for entry in outside["output"]]
    return (*tables, *made, *layers, *outside["output_norm"], *head)


def _of_place(
    layer: int | None,
    name: str,
    roles: tuple[Role, ...],
    by_place: Places,
    family: GgufFamily,
) -> Iterator[Entry]:
    prefix = "" if layer is None else f"blk.{layer}."
    for part in ("weight", "bias"):
        specs = [spec for role in roles if (spec := by_place.get((layer, role, part))) is not None]
        if not specs:
            continue
        first = specs[0]
        axis = -2 if len(first.shape) > 1 else -1
        shape = list(first.shape)
        shape[axis] = sum(spec.shape[axis] for spec in specs)
        yield Entry(
            name=f"{prefix}{name}.{part}",
            role=first.role,
            layer=layer,
            shape=tuple(shape),
            quantizable=part == "weight" and len(shape) > 1 and first.role not in KEPT_FLOAT,
            pieces=tuple(Piece(spec, family.transforms.get(spec.role, "none")) for spec in specs),
        )


def _cut(entry: Entry, rows: int) -> Entry:
    """The entry without its rows past the vocabulary."""
    return Entry(
        entry.name, entry.role, entry.layer, (rows, entry.columns), entry.quantizable, entry.pieces, entry.constant
    )


def read_rows(model: Model, entry: Entry, start: int, stop: int, *, raw: bool = False) -> np.ndarray:
    """Rows start to stop of a GGUF tensor from the checkpoint, in GGUF order.

    Returns f32[stop - start, columns], or the stored bits (uint16 or float32) with `raw`, which only an entry without
    arithmetic (`passes_through`) allows.
    """
    if entry.constant is not None:
        return entry.constant.reshape(1, -1)[start:stop]

    def reader(piece: Piece) -> RowReader:
        weight = model.weight(piece.spec.name)
        return weight.read_raw if raw else weight.read

    return _gathered(model, entry, start, stop, reader)


def arrange_rows(model: Model, entry: Entry, start: int, stop: int, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """The same from rows that were made already: canonical name -> [rows, anything], moved but not changed."""
    return _gathered(model, entry, start, stop, lambda piece: lambda low, high: rows[piece.spec.name][low:high])


def _gathered(model: Model, entry: Entry, start: int, stop: int, reader: Callable[[Piece], RowReader]) -> np.ndarray:
    parts = [
        _transformed(model, piece, low, high, reader(piece)) for piece, low, high in _spans(model, entry, start, stop)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1 if len(entry.shape) == 1 else 0)


def release_rows(model: Model, entry: Entry, start: int, stop: int) -> None:
    """Hand the pages of these rows back to the system."""
    for piece, low, high in _spans(model, entry, start, stop):
        first, last = _rows_needed(model, piece, low, high)
        model.weight(piece.spec.name).release(first, last)


def _spans(model: Model, entry: Entry, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
    """The pieces' own rows that make up rows start to stop. Vectors are one row each, side by side."""
    if len(entry.shape) == 1:
        yield from ((piece, 0, 1) for piece in entry.pieces)
        return
    first = 0
    for piece in entry.pieces:
        rows = model.weight(piece.spec.name).rows
        low, high = max(start - first, 0), min(stop - first, rows)
        if low < high:
            yield piece, low, high
        first += rows


def passes_through(model: Model, entry: Entry, type_name: str) -> bool:
    """Whether the stored bits of every piece are the artifact's bits, rows moved or not."""
    return entry.constant is None and all(
        piece.transform != "gain" and model.weight(piece.spec.name).dtype == type_name for piece in entry.pieces
    )


def _transformed(model: Model, piece: Piece, start: int, stop: int, read: RowReader) -> np.ndarray:
    if piece.transform == "gain":
        return read(start, stop) + np.float32(model.architecture.norm_offset)
    if piece.transform == "none":
        return read(start, stop)
    head = model.architecture.head_dim
    if len(piece.spec.shape) == 1:
        return _interleave(read(0, 1).reshape(-1, 1), head).reshape(1, -1)
    first, last = _rows_needed(model, piece, start, stop)
    return _interleave(read(first, last), head)[start - first : stop - first]


def _rows_needed(model: Model, piece: Piece, start: int, stop: int) -> tuple[int, int]:
    """The rows that have to be read for rows start to stop: whole heads where rows move within a head."""
    if not piece.transform.startswith("rope") or len(piece.spec.shape) == 1:
        return start, stop
    head = model.architecture.head_dim
    return start // head * head, -(-stop // head) * head


def _interleave(rows: np.ndarray, head: int) -> np.ndarray:
    """Hugging Face's row order to llama.cpp's, for whole heads."""
    return rows.reshape(-1, 2, head // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _deinterleave(rows: np.ndarray, head: int) -> np.ndarray:
    return rows.reshape(-1, head // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def decoded_rows(file: GgufFile, name: str, start: int, stop: int) -> Floats:
    """f32[stop - start, columns]: rows of a stored tensor, decoded."""
    tensor = file.tensors[name]
    columns = tensor.shape[-1]
    stored = file.bytes(name).reshape(-1, row_bytes(tensor.type_name, columns))
    decoded = np.empty((stop - start, columns), np.float32)
    step = max(1, _DECODED_WEIGHTS // columns)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        decoded[first - start : last - start] = decode(tensor.type_name, stored[first:last])
    return decoded


def restore(file: GgufFile, model: Model, layout: tuple[Entry, ...]) -> dict[str, Callable[[], Floats]]:
    """The artifact's weights in the checkpoint's own layout: checkpoint tensor name -> a thunk that decodes it.

    Vocabulary rows that the artifact does not have come back as zeros.
    Raises: IntegrityError when the artifact lacks a tensor or has one of another shape.
    """
    a = model.architecture
    places: dict[str, tuple[Entry, int]] = {}
    problems = []
    for entry in layout:
        stored = file.tensors.get(entry.name)
        if stored is None:
            problems.append(f"{entry.name} is missing")
        elif tuple(stored.shape) != entry.shape:
            problems.append(f"{entry.name} has shape {tuple(stored.shape)}, expected {entry.shape}")
        first = 0
        for piece in entry.pieces:
            places[piece.spec.name] = (entry, first)
            first += piece.spec.shape[-1] if len(entry.shape) == 1 else int(np.prod(piece.spec.shape[:-1]))
    if problems:
        raise IntegrityError("the artifact does not hold this checkpoint's tensors", problems=problems)

    def canonical(spec: TensorSpec, expert: int | None) -> Floats:
        entry, first = places[spec.name]
        return _restored_piece(file, entry, spec, first, expert, a)

    return assembled(model, canonical)


def assembled(model: Model, canonical: Callable[[TensorSpec, int | None], Floats]) -> dict[str, Callable[[], Floats]]:
    """Checkpoint tensor name -> a thunk that puts it together.

    canonical: the values of a canonical tensor, or of one expert of it.
    """
    users: dict[str, list[TensorSpec]] = {}
    for spec in model.architecture.tensors:
        for name in spec.source.names:
            users.setdefault(name, []).append(spec)

    def thunk(name: str) -> Callable[[], Floats]:
        return lambda: _assembled(name, users[name], canonical, model.checkpoint.tensors[name].shape)

    return {name: thunk(name) for name in users}


def _restored_piece(
    file: GgufFile, entry: Entry, spec: TensorSpec, first: int, expert: int | None, a: Architecture
) -> Floats:
    """A canonical tensor, or one expert of a stacked one."""
    transform = next(piece.transform for piece in entry.pieces if piece.spec.name == spec.name)
    shape = spec.shape if expert is None else spec.shape[1:]
    if len(entry.shape) == 1:
        values = decoded_rows(file, entry.name, 0, 1)[:, first : first + spec.shape[0]]
        restored = values.reshape(-1, 1) if transform.startswith("rope") else values
    else:
        rows = int(np.prod(shape[:-1]))
        start = first + rows * (expert or 0)
        restored = decoded_rows(file, entry.name, start, min(start + rows, entry.rows))
        if len(restored) < rows:
            restored = np.concatenate([restored, np.zeros((rows - len(restored), entry.columns), np.float32)])
    if transform == "gain":
        restored = restored - np.float32(a.norm_offset)
    elif transform != "none":
        restored = _deinterleave(restored, a.head_dim)
    return restored.reshape(shape)


def _assembled(
    name: str, specs: list[TensorSpec], canonical: Callable[[TensorSpec, int | None], Floats], shape: tuple[int, ...]
) -> Floats:
    """One checkpoint tensor from the canonical tensors that were cut out of it."""
    out: Floats | None = None
    for spec in specs:
        stacked = len(spec.source.names) > 1
        values = canonical(spec, spec.source.names.index(name) if stacked else None)
        if spec.source.rows is None:
            return (values.T if spec.source.transpose else values).reshape(shape)
        if out is None:
            out = np.empty(shape[::-1] if spec.source.transpose else shape, np.float32)
        (out if out.ndim == 1 else out.swapaxes(0, -2))[slice(*spec.source.rows)] = (
            values if out.ndim == 1 else values.swapaxes(0, -2)
        )
    assert out is not None, f"no canonical tensor uses {name}"
    return (out.T if specs[0].source.transpose else out).reshape(shape)
