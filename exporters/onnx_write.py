"""Writes a planned ONNX export: weights read, quantized and laid out a few rows at a time, then the graph.

checkpoint rows ── [workers: read, encode or take what was solved, lay out] ── [one writer: each part to its place]
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from llmx.exporters.encoding import Float8Encoding
from llmx.exporters.ledger import Ledger, Place, sha256_of
from llmx.exporters.onnx_graph import Piece, Quantized, Stored
from llmx.formats import float8_rows
from llmx.formats.onnx import CODES, FLOATS, SCALES, VALUES, ZERO_POINTS
from llmx.formats.onnx_groups import pack_bits, parts, unpack
from llmx.progress import Progress
from llmx.quant.protocol import Effort

Bytes = npt.NDArray[np.uint8]


class KeptRows(Protocol):
    """The rows of one weight in its encoding: an array, or what makes some of it when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Bytes:
        """u8[rows of the slice, row bytes]."""
        ...


Rows = Mapping[str, KeptRows]
# Weights read and converted at once: fixed, so that the bytes do not depend on the number of threads. Matrices that are
# laid out as columns are written in pieces of as many bytes as rows are read, so more are read.
CHUNK_WEIGHTS = 1 << 20
COLUMNS_CHUNK_WEIGHTS = 1 << 22
MEMORY_PER_WEIGHT = 16  # of a chunk, measured


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes for the file: lines u8[n, bytes], each `stride` bytes after the one before, the first at `offset`."""

    offset: int
    stride: int
    lines: Bytes


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored tensor and the offset of its first byte in the data file."""

    stored: Stored
    offset: int

    @property
    def place(self) -> Place:
        return Place(0, self.offset, self.stored.nbytes)


@dataclass(frozen=True, slots=True)
class Finished:
    """All blocks of these tensors were before."""

    placed: Sequence[Placed]


Task = Callable[[], list[Block] | Finished]
# (matrix, its parts by their names, kept rows u8[n, row bytes], the number of the first) -> their bytes in the file.
LayOut = Callable[[Quantized, Mapping[str, Placed], Bytes, int], list[Block]]


def write_data(
    stream: BinaryIO,
    placed: Sequence[Placed],
    rows: Rows,
    effort: Effort,
    threads: int,
    done: Progress,
    notes: Ledger,
) -> tuple[str, ...]:
    """Write every tensor that is not known to be there, and return the sha256 of each one's bytes.

    rows: solved before, canonical name -> u8[rows, row bytes]; the others are encoded here. notes: of the file.
    """
    found: dict[str, str] = {}  # name -> sha256
    for one in placed:
        known = notes.known(one.stored.name, one.place)
        if known is not None:
            found[one.stored.name] = known
            done.advance(one.stored.nbytes)
    with ThreadPoolExecutor(threads) as pool:
        for blocks in _ahead(pool, _tasks(placed, found, rows, effort), 2 * threads):
            if isinstance(blocks, Finished):
                for one in blocks.placed:  # blocks of a matrix come from all over it: its bytes are read back
                    found[one.stored.name] = sha256_of(stream, one.offset, one.stored.nbytes)
                    notes.done(one.stored.name, one.place, found[one.stored.name])
                continue
            for block in blocks:
                _put(stream, block)
                done.advance(block.lines.nbytes)
    return tuple(found[one.stored.name] for one in placed)


def chunk_weights(stored: Stored) -> int:
    """Weights of it that are in memory at once, for each worker."""
    if stored.quantized is None:
        return _chunk_rows(stored.shape[-1], CHUNK_WEIGHTS) * stored.shape[-1]
    matrix = stored.quantized
    return _chunk_rows(matrix.cols, COLUMNS_CHUNK_WEIGHTS if matrix.columns else CHUNK_WEIGHTS) * matrix.cols


def _put(stream: BinaryIO, block: Block) -> None:
    if block.stride == block.lines.shape[1]:
        stream.seek(block.offset)
        stream.write(np.ascontiguousarray(block.lines).data)
        return
    for number, line in enumerate(block.lines):
        stream.seek(block.offset + number * block.stride)
        stream.write(line.data)


def _ahead(pool: Executor, tasks: Iterable[Task], count: int) -> Iterator[list[Block] | Finished]:
    """The results in order, a few computed ahead."""
    waiting: deque[Future[list[Block] | Finished]] = deque()
    for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) >= count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tasks(placed: Sequence[Placed], there: Container[str], rows: Rows, effort: Effort) -> Iterator[Task]:
    """there: names of tensors that need not be written. The parts of a matrix are written together."""
    for matrix, group in groupby(placed, lambda one: one.stored.quantized):
        found = list(group)
        if matrix is None:
            for one in found:
                if one.stored.name not in there:
                    yield from _float_tasks(one)
                    yield partial(_finished, [one], one.stored.pieces)
        elif any(one.stored.name not in there for one in found):
            yield from _quantized_tasks(matrix, {one.stored.part: one for one in found}, rows, effort)
            yield partial(_finished, found, matrix.pieces)


def _finished(placed: Sequence[Placed], pieces: Sequence[Piece]) -> Finished:
    """Reading maps more pages than those of the rows asked for: what is left of the pieces goes back, too."""
    for piece in pieces:
        piece.weight.release(piece.start, piece.start + piece.rows)
    return Finished(placed)


# ── floats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _float_tasks(one: Placed) -> Iterator[Task]:
    stored = one.stored
    row = stored.shape[-1] * FLOATS[stored.type_name].nbytes
    if stored.table is not None or len(stored.shape) == 1:
        yield partial(_floats, one, [(piece, 0, piece.rows) for piece in stored.pieces], 0, stored.nbytes)
        return
    step = _chunk_rows(stored.shape[-1], CHUNK_WEIGHTS)
    if stored.alternate:
        for start, stop in _spans(stored.pieces[0].rows, step):
            read = [(piece, start, stop) for piece in stored.pieces]
            yield partial(_floats, one, read, start * row * len(stored.pieces), row)
        return
    first = 0
    for piece in stored.pieces:
        for start, stop in _spans(piece.rows, step):
            yield partial(_floats, one, [(piece, start, stop)], (first + start) * row, row)
        first += piece.rows


def _floats(one: Placed, read: Sequence[tuple[Piece, int, int]], offset: int, line: int) -> list[Block]:
    stored = one.stored
    kind = FLOATS[stored.type_name].numpy
    if stored.table is not None:
        values = stored.table
    else:
        found = [_read(piece, start, stop) for piece, start, stop in read]
        values = np.stack(found, axis=1) if stored.alternate else np.concatenate(found, axis=-1)
        if stored.offset:
            values += np.float32(stored.offset)
    data = np.ascontiguousarray(values, kind).view(np.uint8).reshape(-1, line)
    return [Block(one.offset + offset, line, data)]


def _read(piece: Piece, start: int, stop: int) -> npt.NDArray[np.float32]:
    """f32[stop - start, cols]: these rows of the piece; their pages go back to the system."""
    first = piece.start
    values = piece.weight.read(first + start, first + stop)
    piece.weight.release(first + start, first + stop)
    return values


# ── whole numbers in groups ──────────────────────────────────────────────────────────────────────────────────────────


def _quantized_tasks(matrix: Quantized, found: Mapping[str, Placed], rows: Rows, effort: Effort) -> Iterator[Task]:
    step = _chunk_rows(matrix.cols, COLUMNS_CHUNK_WEIGHTS if matrix.columns else CHUNK_WEIGHTS)
    # Columns are cut where a byte begins, whichever weights the rows are of.
    step += -step % (8 // matrix.bits)
    lay_out = _lay_out(matrix)
    for start, stop in _spans(matrix.rows, step):
        yield partial(_laid_out, lay_out, matrix, found, rows, effort, start, stop)


def _lay_out(matrix: Quantized) -> LayOut:
    if matrix.decoded:
        return _decoded_rows
    if matrix.signed:
        return _signed_rows
    if isinstance(matrix.encoding, Float8Encoding):
        return _float8_columns
    return _columns if matrix.columns else _rows


def _laid_out(
    lay_out: LayOut,
    matrix: Quantized, found: Mapping[str, Placed], rows: Rows, effort: Effort, start: int, stop: int,
) -> list[Block]:  # fmt: skip
    kept, first = [], 0
    for piece in matrix.pieces:
        low, high = max(start - first, 0), min(stop - first, piece.rows)
        if low < high:
            kept.append(_kept(matrix, piece, low, high, rows, effort))
        first += piece.rows
    return lay_out(matrix, found, kept[0] if len(kept) == 1 else np.concatenate(kept), start)


def _kept(matrix: Quantized, piece: Piece, low: int, high: int, rows: Rows, effort: Effort) -> Bytes:
    """u8[high - low, row bytes]"""
    solved = rows.get(piece.weight.spec.name)
    if solved is not None:
        return np.array(solved[piece.start + low : piece.start + high])
    return matrix.encoding.encode(_read(piece, low, high), effort=effort)


def _rows(matrix: Quantized, found: Mapping[str, Placed], kept: Bytes, start: int) -> list[Block]:
    got = parts(matrix.layout, kept, matrix.cols)
    lines = {
        CODES: got.codes.reshape(len(kept), -1),
        SCALES: got.scales.astype(_scale_type(found)).view(np.uint8),
        ZERO_POINTS: got.zero_points,
    }
    return [
        Block(one.offset + start * lines[part].shape[1], lines[part].shape[1], lines[part])
        for part, one in found.items()
    ]


def _signed_rows(matrix: Quantized, found: Mapping[str, Placed], kept: Bytes, start: int) -> list[Block]:
    """Outputs under each other, their codes as signed numbers: counted from the middle, the highest bit turned."""
    got, bits = unpack(matrix.layout, kept, matrix.cols), matrix.layout.bits
    lines = {
        CODES: pack_bits(got.codes ^ np.uint8(1 << bits >> 1), bits),
        SCALES: np.ascontiguousarray(got.scales.astype(_scale_type(found))).view(np.uint8),
    }
    return [
        Block(one.offset + start * lines[part].shape[1], lines[part].shape[1], lines[part])
        for part, one in found.items()
    ]


def _decoded_rows(matrix: Quantized, found: Mapping[str, Placed], kept: Bytes, start: int) -> list[Block]:
    """Outputs under each other, as floats."""
    values = found[VALUES]
    kind = FLOATS[values.stored.type_name]
    line = matrix.cols * kind.nbytes
    data = np.ascontiguousarray(matrix.encoding.decode(kept, matrix.cols), kind.numpy).view(np.uint8)
    blocks = [Block(values.offset + start * line, line, data.reshape(-1, line))]
    if SCALES in found:
        scales = np.ascontiguousarray(unpack(matrix.layout, kept, matrix.cols).scales.T, "<f4").view(np.uint8)
        blocks.append(Block(found[SCALES].offset + start * 4, scales.shape[1], scales))
    return blocks


def _columns(matrix: Quantized, found: Mapping[str, Placed], kept: Bytes, start: int) -> list[Block]:
    """Outputs side by side. The last ones are followed by the pad: codes and scales of nothing."""
    got, bits = unpack(matrix.layout, kept, matrix.cols), matrix.layout.bits
    last = start + len(kept) == matrix.rows
    pad = ((0, 0), (0, matrix.pad if last else 0))
    # Without zero points codes are signed numbers: counted from the middle, their highest bit is the other way round.
    turned = np.uint8(0 if matrix.layout.zero_points else 1 << bits >> 1)
    scales = np.pad(got.scales.T, pad).astype(_scale_type(found))
    lines = {
        CODES: pack_bits(np.pad(got.codes.T ^ turned, pad), bits),
        SCALES: np.ascontiguousarray(scales).view(np.uint8),
        ZERO_POINTS: None if got.zero_points is None else pack_bits(np.pad(got.zero_points.T, pad), bits),
    }
    blocks = []
    for part, one in found.items():
        data, width = np.ascontiguousarray(lines[part]), one.stored.nbytes // one.stored.shape[0]
        before = start * (FLOATS[one.stored.type_name].nbytes if part == SCALES else bits / 8)
        blocks.append(Block(one.offset + int(before), width, data))
    return blocks


def _float8_columns(matrix: Quantized, found: Mapping[str, Placed], kept: Bytes, start: int) -> list[Block]:
    """Outputs side by side, as they are kept: FP8 has no sign to turn and fills its bytes."""
    got = float8_rows.parts(kept, matrix.cols)
    scales = np.ascontiguousarray(got.scales[None], "<f4").view(np.uint8)
    return [
        Block(found[CODES].offset + start, matrix.rows, np.ascontiguousarray(got.bits.T)),
        Block(found[SCALES].offset + start * float8_rows.SCALE_BYTES, scales.shape[1], scales),
    ]


def _scale_type(found: Mapping[str, Placed]) -> str:
    return FLOATS[found[SCALES].stored.type_name].numpy


def _chunk_rows(cols: int, weights: int) -> int:
    return max(1, weights // cols)


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, count)) for start in range(0, count, step))
