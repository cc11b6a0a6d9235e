"""Writes the weight files of a TensorRT-LLM checkpoint: some rows of a matrix at a time, each part to its place.

checkpoint rows ── [workers: read, encode or take what was solved, lay out] ── [one writer: each part to its place]
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from llmx.errors import IntegrityError
from llmx.exporters.encoding import FLOAT8_ENCODINGS, GROUP_ENCODINGS
from llmx.exporters.ledger import Ledger, Place
from llmx.exporters.shared_scales import SharedScales
from llmx.exporters.trtllm_tensors import Matrix, Piece, Stored
from llmx.formats import float8_rows, onnx_groups
from llmx.formats.trtllm import SCALES, WEIGHT, narrowed, pack_pairs, turned
from llmx.quant.floats import FLOATS

if TYPE_CHECKING:
    from llmx.exporters.onnx_write import KeptRows
    from llmx.models.model import Model
    from llmx.progress import Progress
    from llmx.quant.protocol import Effort

Bytes = npt.NDArray[np.uint8]
# Weights read and converted at once: fixed, so that bytes do not depend on the number of threads.
CHUNK_WEIGHTS = 1 << 20
MEMORY_PER_WEIGHT = 16  # of a chunk
NUMPY_TYPES = {"F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes for the tensor of that number, which follow those before."""

    tensor: int
    data: Bytes


Task = Callable[[], list[Block]]


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from. solved: canonical name -> u8[rows, row bytes]; what is not there is rounded."""

    model: Model
    solved: Mapping[str, KeptRows]
    effort: Effort
    shared: SharedScales


def write_tensors(
    streams: Sequence[BinaryIO],
    tensors: Sequence[Stored],
    destination: Sequence[tuple[str, Place]],
    source: Source,
    threads: int,
    done: Progress,
    notes: Ledger,
) -> tuple[str, ...]:
    """Write every tensor that is not known to be there to its place, and return the sha256 of each one's bytes.

    destination: of each tensor, its name in the artifact and where it goes. notes: of these files.
    """
    found = {n: known for n, (name, place) in enumerate(destination) if (known := notes.known(name, place))}
    done.advance(sum(tensors[number].nbytes for number in found))
    hashes = [hashlib.sha256() for _ in tensors]
    written = [0] * len(tensors)
    with ThreadPoolExecutor(threads) as pool:
        for blocks in _ahead(pool, _tasks(tensors, found.keys(), source), 2 * threads):
            for block in blocks:
                name, place = destination[block.tensor]
                data = np.ascontiguousarray(block.data).reshape(-1).view(np.uint8)
                stream = streams[place.file]
                stream.seek(place.offset + written[block.tensor])
                stream.write(data.data)
                hashes[block.tensor].update(data.data)
                written[block.tensor] += data.nbytes
                done.advance(data.nbytes)
                if written[block.tensor] == place.nbytes:
                    found[block.tensor] = hashes[block.tensor].hexdigest()
                    notes.done(name, place, found[block.tensor])
    short = [one.name for number, one in enumerate(tensors) if number not in found]
    assert not short, f"not all bytes were made of {short}"
    return tuple(found[number] for number in range(len(tensors)))


def _ahead(pool: Executor, tasks: Iterable[Task], count: int) -> Iterator[list[Block]]:
    """The results in order, a few computed ahead."""
    waiting: deque[Future[list[Block]]] = deque()
    for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) >= count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tasks(tensors: Sequence[Stored], there: Container[int], source: Source) -> Iterator[Task]:
    """In the order of the tensors; the parts of a quantized matrix, which follow each other, at once.

    there: numbers of tensors that need not be written.
    """
    numbers: dict[int, dict[str, int]] = {}
    for number, one in enumerate(tensors):
        if one.matrix is not None and one.matrix.encoding is not None:
            numbers.setdefault(id(one.matrix), {})[one.part] = number
    for number, one in enumerate(tensors):
        if one.matrix is not None and one.matrix.encoding is not None and one.value is None:
            parts = numbers[id(one.matrix)]
            if one.part != SCALES and any(part not in there for part in parts.values()):
                yield from _quantized(one.matrix, parts, tensors, source)
        elif one.value is not None:  # not read from the files in any case
            yield partial(_made, number, one.value)
        elif number in there:
            continue
        elif one.matrix is not None and one.part != SCALES:
            yield from _floats(one, number, source)


def _made(number: int, value: np.ndarray) -> list[Block]:
    return [Block(number, np.frombuffer(value.tobytes(), np.uint8))]


# ── floats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _floats(one: Stored, number: int, source: Source) -> Iterator[Task]:
    matrix = one.matrix
    assert matrix is not None, "a tensor without a value has a matrix"
    if len(matrix.pieces[0].spec.shape) == 1 or matrix.transposed:
        yield partial(_float_rows, one, number, source, matrix.pieces)
        return
    step = max(1, CHUNK_WEIGHTS // matrix.pieces[0].spec.shape[-1])
    for piece in matrix.pieces:
        for start in range(piece.start, piece.stop, step):
            part = Piece(piece.spec, start, min(start + step, piece.stop))
            yield partial(_float_rows, one, number, source, (part,))
    if matrix.pad:
        yield partial(_padding, one, number)


def _float_rows(one: Stored, number: int, source: Source, pieces: Sequence[Piece]) -> list[Block]:
    matrix = one.matrix
    assert matrix is not None, "a tensor without a value has a matrix"
    low, high = matrix.span
    rows = [_read(source.model, piece) for piece in pieces]
    values = np.concatenate(rows, axis=-1) if len(pieces[0].spec.shape) == 1 else np.concatenate(rows)[:, low:high]
    if matrix.offset:
        values = values + np.float32(matrix.offset)
    return [Block(number, stored_floats(values.T if matrix.transposed else values, one.dtype))]


def _padding(one: Stored, number: int) -> list[Block]:
    assert one.matrix is not None, "a tensor that is filled up has a matrix"
    values = np.zeros((one.matrix.pad, one.matrix.cols), np.float32)
    return [Block(number, stored_floats(values, one.dtype))]


def stored_floats(values: npt.NDArray[np.float32], dtype: str) -> Bytes:
    """The bytes of these values, row by row, rounded to the nearest."""
    if dtype in NUMPY_TYPES:
        return np.ascontiguousarray(values, NUMPY_TYPES[dtype]).view(np.uint8)
    out = np.empty((*values.shape[:-1], 2 * values.shape[-1]), np.uint8)
    FLOATS[dtype].encode(np.ascontiguousarray(values), out)
    return out


def _read(model: Model, piece: Piece) -> npt.NDArray[np.float32]:
    """f32[rows, inputs] of a matrix, f32[values] of a vector; their pages go back to the system."""
    weight = model.weight(piece.spec.name)
    if len(piece.spec.shape) == 1:
        return weight.read()[0, piece.start : piece.stop]
    values = weight.read(piece.start, piece.stop)
    weight.release(piece.start, piece.stop)
    return values


# ── few bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _quantized(matrix: Matrix, numbers: Mapping[str, int], tensors: Sequence[Stored], source: Source) -> Iterator[Task]:
    step = max(2, CHUNK_WEIGHTS // matrix.pieces[0].spec.shape[-1] // 2 * 2)  # even: two rows share a byte
    for piece in matrix.pieces:
        for start in range(piece.start, piece.stop, step):
            part = Piece(piece.spec, start, min(start + step, piece.stop))
            yield partial(_laid_out, matrix, part, numbers, tensors, source)


def _laid_out(
    matrix: Matrix, part: Piece, numbers: Mapping[str, int], tensors: Sequence[Stored], source: Source
) -> list[Block]:
    assert matrix.encoding is not None, "a matrix of few bits has an encoding"
    kept, cols = _kept(matrix, part, source), part.spec.shape[-1]
    low, high = matrix.span
    if matrix.encoding in FLOAT8_ENCODINGS:
        return _float8_blocks(matrix, part, kept, numbers)
    layout = GROUP_ENCODINGS[matrix.encoding].layout
    found = onnx_groups.unpack(layout, kept, cols)
    codes, scales = found.codes[:, low:high], found.scales
    if matrix.stored_group is not None:
        assert layout.group is not None, "scales of groups are stored for matrices in groups"
        own = slice(low // matrix.stored_group, high // matrix.stored_group)
        scales = narrowed(scales, layout.group, matrix.stored_group)[:, own]
    data = turned(codes) if layout.bits == 8 else pack_pairs(codes)
    dtype = tensors[numbers[SCALES]].dtype
    return [Block(numbers[WEIGHT], data), Block(numbers[SCALES], stored_floats(scales, dtype))]


def _float8_blocks(matrix: Matrix, part: Piece, kept: Bytes, numbers: Mapping[str, int]) -> list[Block]:
    """The codes; and with the first rows of the matrix, or of an expert, their scale."""
    low, high = matrix.span
    found = float8_rows.parts(kept, part.spec.shape[-1])
    blocks = [Block(numbers[WEIGHT], found.bits[:, low:high])]
    if np.ptp(found.scales):
        raise IntegrityError("the rows of an FP8 matrix have several scales", where=part.spec.name)
    first = matrix.pieces[0] if part.expert is None else next(p for p in matrix.pieces if p.expert == part.expert)
    if (part.spec.name, part.start) == (first.spec.name, first.start):
        blocks.append(Block(numbers[SCALES], stored_floats(found.scales[:1], "F32")))
    return blocks


def _kept(matrix: Matrix, part: Piece, source: Source) -> Bytes:
    """u8[rows, row bytes] of these rows in their encoding."""
    solved = source.solved.get(part.spec.name)
    if solved is not None:
        return np.array(solved[part.start : part.stop])
    kept = source.shared.bound(part.spec, part.expert)
    return kept.encode(_read(source.model, part), effort=source.effort)
