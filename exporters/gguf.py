"""The GGUF exporter: plan every tensor and byte, check every weight, then write in one streaming pass.

checkpoint rows -> [worker threads: read, permute, encode] -> [one writer: digest, write in file order]
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmx.errors import IntegrityError, UsageError
from llmx.exporters.gguf_families import GgufFamily, gguf_family
from llmx.exporters.gguf_general import identify
from llmx.exporters.gguf_metadata import (
    DIGESTS_KEY,
    SOLVER_KEY,
    WRITTEN_TYPE_KEY,
    architecture_metadata,
    runtime_notes,
    short_digest,
)
from llmx.exporters.gguf_tensors import Entry, arrange_rows, entries, passes_through, read_rows, release_rows
from llmx.exporters.gguf_types import FileType, Situation, TensorTypeOverride, tensor_type
from llmx.exporters.gguf_vocab import limits, model_name, vocabulary, vocabulary_rows
from llmx.exporters.ledger import Place, ledger
from llmx.exporters.plan import Plan, PlannedFile, Step
from llmx.exporters.sparsity import SPARSITY_KEY
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.gguf import Layout, TensorInfo, Value, array, layout, shard_metadata, shard_name, split, text, u32
from llmx.models.architecture import Architecture
from llmx.models.model import check_finite
from llmx.progress import track
from llmx.quant.grid import encode, largest_weight
from llmx.quant.protocol import Effort

if TYPE_CHECKING:
    from llmx.exporters.journal import Journal
    from llmx.formats.imatrix import ImportanceMatrix
    from llmx.models.model import Model
    from llmx.models.tokenizer import Tokenizer

# Weights a worker reads and encodes at once. Fixed, so that the bytes do not depend on the number of threads.
CHUNK_WEIGHTS = 1 << 20
# Measured: the interpreter with numpy, numba and the compiled encoders; and a worker's arrays per weight of a chunk.
_BASE_MEMORY = 120 << 20
_MEMORY_PER_WEIGHT = 16


Rows = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """What the user chose."""

    file_type: FileType
    overrides: tuple[TensorTypeOverride, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)  # canonical name -> type, of a recipe or a budget
    importance: ImportanceMatrix | None = None
    solver: str | None = None  # SOLVED or SCALED, where weights are not just rounded
    sparsity: str | None = None  # what stands under SPARSITY_KEY
    split_max_bytes: int | None = None
    threads: int = 1
    effort: Effort = "balanced"


@dataclass(frozen=True, slots=True)
class GgufExport:
    """A planned export: `plan` for the user, the rest for `write`."""

    plan: Plan
    model: Model
    options: GgufOptions
    entries: tuple[Entry, ...]
    importance: dict[str, npt.NDArray[np.float32]]
    metadata: dict[str, Value]
    shards: tuple[tuple[TensorInfo, ...], ...]
    layouts: tuple[Layout, ...]  # of the shards, with digests of zero


def prepare(model: Model, tokenizer: Tokenizer, options: GgufOptions) -> GgufExport:
    """Plan the export without reading a weight.

    Raises: UnsupportedError for what llama.cpp cannot compute, IntegrityError for an importance matrix of another
    model, UsageError for a shard size below the largest tensor.
    """
    architecture = model.architecture
    family = gguf_family(architecture)
    rows = vocabulary_rows(tokenizer, architecture.vocab, family.cut_padding_rows)
    layout_entries = entries(architecture, family, rows)
    steps = tuple(planned_steps(architecture, family, layout_entries, options))
    importance = _importance(options.importance, layout_entries)
    identity = identify(model, options.file_type.id)
    metadata = architecture_metadata(architecture, family, rows) | identity.metadata | vocabulary(tokenizer, rows)
    metadata["general.name"] = text(model_name(tokenizer, identity.full.replace("-", " ")))
    metadata[WRITTEN_TYPE_KEY] = u32(options.file_type.id)
    if options.solver is not None:
        metadata[SOLVER_KEY] = text(options.solver)
    if options.sparsity is not None:
        metadata[SPARSITY_KEY] = text(options.sparsity)
    metadata[DIGESTS_KEY] = array("u64", [0] * len(steps))
    infos = [TensorInfo(step.name, step.type_name, step.shape) for step in steps]
    shards = [infos] if options.split_max_bytes is None else split(infos, options.split_max_bytes)
    layouts = tuple(_layouts(metadata, shards))
    stem = identity.file_stem(options.file_type.name)
    names = [f"{stem}.gguf"] if len(shards) == 1 else [shard_name(stem, i, len(shards)) for i in range(len(shards))]
    plan = Plan(
        format="gguf",
        type_name=options.file_type.name,
        steps=steps,
        files=tuple(PlannedFile(n, placed.size) for n, placed in zip(names, layouts, strict=True)),
        notes=(*runtime_notes(architecture, family), *limits(tokenizer, rows), *identity.notes),
        peak_memory_bytes=_BASE_MEMORY
        + _MEMORY_PER_WEIGHT * (2 * options.threads + 1) * _largest_chunk(layout_entries),
    )
    return GgufExport(plan, model, options, layout_entries, importance, metadata, tuple(map(tuple, shards)), layouts)


def _layouts(metadata: dict[str, Value], shards: Sequence[Sequence[TensorInfo]]) -> list[Layout]:
    if len(shards) == 1:
        return [layout(metadata, shards[0])]
    return [layout(shard_metadata(metadata, shards, i), shard) for i, shard in enumerate(shards)]


def planned_steps(
    a: Architecture, family: GgufFamily, planned: Sequence[Entry], options: GgufOptions
) -> Iterator[Step]:
    """Each tensor's type and size, in file order."""
    for entry in planned:
        type_name, wanted = "F32", None
        if entry.quantizable:
            situation = Situation(
                layers=a.layers,
                layer=entry.layer or 0,
                queries_per_key=a.heads // a.kv_heads,
                experts=a.experts,
                importance=options.importance is not None or options.solver is not None,
            )
            type_name, wanted = tensor_type(
                options.file_type,
                entry.name,
                entry.columns,
                situation,
                tied=a.tied,
                large_type=family.large_type,
                overrides=(*options.overrides, *_own_type(entry, options.types)),
            )
        nbytes = entry.rows * row_bytes(type_name, entry.columns)
        yield Step(entry.name, entry.role, entry.layer, entry.shape, type_name, nbytes, wanted)


def _own_type(entry: Entry, types: Mapping[str, str]) -> tuple[TensorTypeOverride, ...]:
    """The type that a recipe or a budget gives this tensor, as an override.

    Raises: UsageError where the matrices that the tensor is fused of are given different ones.
    """
    given = {types.get(piece.spec.name) for piece in entry.pieces}
    if len(given) > 1:
        parts = [f"{piece.spec.name}: {types.get(piece.spec.name) or 'as the mix has it'}" for piece in entry.pieces]
        raise UsageError(f"{entry.name} is one tensor of one type", problems=parts, fix="give all of them the same")
    return tuple(TensorTypeOverride(re.compile(re.escape(entry.name)), name) for name in given if name is not None)


def canonical_types(export: GgufExport) -> dict[str, str]:
    """Canonical name -> the planned type of the tensor that it is part of, for matrices that are quantized."""
    steps = zip(export.entries, export.plan.steps, strict=True)
    return {piece.spec.name: step.type_name for e, step in steps if e.quantizable for piece in e.pieces}


def _importance(matrix: ImportanceMatrix | None, planned: Sequence[Entry]) -> dict[str, npt.NDArray[np.float32]]:
    """The importance of each tensor that the matrix names: f32[experts, columns].

    Raises: IntegrityError listing every entry of another shape, or when no entry names a tensor of this model.
    """
    if matrix is None:
        return {}
    found, problems = {}, []
    for entry in planned:
        try:
            rows = matrix.rows(entry.name, entry.rows // entry.rows_per_expert, entry.columns)
        except IntegrityError as error:
            problems.append(error.what)
        else:
            if rows is not None:
                found[entry.name] = rows
    if problems or not found:
        raise IntegrityError(
            "the importance matrix is of another model",
            problems=problems or ["none of its entries names a tensor of this model"],
            fix="make one from this checkpoint",
        )
    return found


def _chunk_rows(entry: Entry) -> int:
    return min(max(1, CHUNK_WEIGHTS // entry.columns), entry.rows_per_expert)


def _largest_chunk(planned: Sequence[Entry]) -> int:
    return max(_chunk_rows(entry) * entry.columns for entry in planned)


def _chunks(entry: Entry) -> Iterator[tuple[int, int]]:
    """Row ranges that never cross from one expert to the next."""
    for first in range(0, entry.rows, entry.rows_per_expert):
        last = first + entry.rows_per_expert
        for start in range(first, last, _chunk_rows(entry)):
            yield start, min(start + _chunk_rows(entry), last)


def check_weights(export: GgufExport) -> None:
    """Look at every weight once, before anything is written.

    Raises: IntegrityError naming every tensor that holds NaN or infinity, or values that its type cannot hold.
    """
    model = export.model
    steps = {step.name: step for step in export.plan.steps}
    jobs = [(piece.spec.name, steps[entry.name].type_name) for entry in export.entries for piece in entry.pieces]
    with (
        track(model.checkpoint.nbytes, "checking weights") as progress,
        ThreadPoolExecutor(export.options.threads) as pool,
    ):

        def examine(job: tuple[str, str]) -> str | None:
            name, type_name = job
            weight = model.weight(name)
            found = check_finite(weight)
            weight.release()
            progress.advance(weight.nbytes)
            if found.first_bad is not None:
                return f"{name}: the value at {divmod(found.first_bad, weight.cols)} is NaN or infinite"
            if found.largest > largest_weight(type_name):
                limit = largest_weight(type_name)
                return f"{name}: the magnitude {found.largest:.6g} does not fit {type_name} (at most {limit:.6g})"
            return None

        problems = [problem for problem in pool.map(examine, jobs) if problem is not None]
    if problems:
        raise IntegrityError("the checkpoint holds weights that cannot be exported", problems=problems)


def write(
    export: GgufExport, targets: Sequence[Path], solved: Rows | None = None, journal: Journal | None = None
) -> tuple[str, ...]:
    """Write all files of the export and return the sha256 of each tensor's data, in file order.

    solved: rows that a solver made, canonical name -> u8[rows, row bytes]; other tensors are rounded here. journal:
    notes tensors that are written, and knows those that an earlier run wrote to the same files.
    The headers go in last, so that a file cut short by a crash is not a GGUF file at all.
    """
    places = _places(export)
    sizes = [shard.size for shard in export.layouts]
    total = sum(step.nbytes for step in export.plan.steps)
    with (
        ledger(targets, sizes, journal) as (notes, streams),
        track(total, "writing") as progress,
        ThreadPoolExecutor(export.options.threads) as pool,
    ):
        digests = [notes.known(entry.name, place) for entry, place in zip(export.entries, places, strict=True)]
        progress.advance(sum(place.nbytes for place, known in zip(places, digests, strict=True) if known))
        left = [index for index, known in enumerate(digests) if known is None]
        for index, chunks in groupby(_encoded(export, left, pool, solved or {}), key=itemgetter(0)):
            entry, place, digest = export.entries[index], places[index], hashlib.sha256()
            streams[place.file].seek(place.offset)
            for _, data in chunks:
                streams[place.file].write(data.data)
                digest.update(data.data)
                progress.advance(data.nbytes)
            # Threads that read side by side leave a page here and there: now the tensor's all go back.
            release_rows(export.model, entry, 0, entry.rows)
            digests[index] = digest.hexdigest()
            notes.done(entry.name, place, digest.hexdigest())
        found = tuple(digest for digest in digests if digest is not None)
        short = array("u64", [short_digest(bytes.fromhex(digest)) for digest in found])
        for stream, shard in zip(streams, _layouts(export.metadata | {DIGESTS_KEY: short}, export.shards), strict=True):
            stream.seek(0)
            stream.write(shard.header)
    return found


def _places(export: GgufExport) -> list[Place]:
    """Where each tensor's data are, in file order."""
    starts = {
        name: (number, placement.offset)
        for number, shard in enumerate(export.layouts)
        for name, placement in shard.placements.items()
    }
    return [Place(*starts[step.name], step.nbytes) for step in export.plan.steps]


def _encoded(
    export: GgufExport, left: Sequence[int], pool: Executor, solved: Rows
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The encoded chunks of these tensors with their index, in file order, a few chunks ahead of the writer."""
    waiting: deque[tuple[int, Future[npt.NDArray[np.uint8]]]] = deque()
    ahead = 2 * export.options.threads
    for index in left:
        entry, step = export.entries[index], export.plan.steps[index]
        for start, stop in _chunks(entry):
            waiting.append((index, pool.submit(_encode_rows, export, entry, step.type_name, start, stop, solved)))
            if len(waiting) > ahead:
                index_done, chunk = waiting.popleft()
                yield index_done, chunk.result()
    for index_done, chunk in waiting:
        yield index_done, chunk.result()


def _encode_rows(
    export: GgufExport, entry: Entry, type_name: str, start: int, stop: int, solved: Rows
) -> npt.NDArray[np.uint8]:
    """u8[stop - start, row bytes]: one chunk, as the file holds it. Its pages go back to the system at once."""
    if entry.pieces and all(piece.spec.name in solved for piece in entry.pieces):
        return np.ascontiguousarray(arrange_rows(export.model, entry, start, stop, solved))
    raw = passes_through(export.model, entry, type_name)
    rows = read_rows(export.model, entry, start, stop, raw=raw)
    release_rows(export.model, entry, start, stop)
    if raw:
        return np.ascontiguousarray(rows).view(np.uint8)
    importance = export.importance.get(entry.name)
    own = None if importance is None else importance[start // entry.rows_per_expert]
    return encode(type_name, rows, own, effort=export.options.effort)
