"""The TensorRT-LLM exporter: name and place every tensor, plan every byte, then write the weights in one pass.

architecture ── [layout: names, cuts] ── tensors ── [files, offsets] ── plan ; checkpoint rows ── [weight files]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmx.errors import IntegrityError, UsageError
from llmx.exporters.encoding import ENCODINGS
from llmx.exporters.gguf_metadata import SOLVER_KEY
from llmx.exporters.ledger import Place, ledger
from llmx.exporters.plan import Plan, PlannedFile, Step
from llmx.exporters.shared_scales import SharedScales
from llmx.exporters.sparsity import SPARSITY_KEY
from llmx.exporters.trtllm_config import hf_config, hf_quant_config, layout_notes, quantization, rank_config
from llmx.exporters.trtllm_hf import hf_contents
from llmx.exporters.trtllm_ranks import ALONE, Mesh, check_mesh, rank_contents, widths
from llmx.exporters.trtllm_tensors import Contents, Options, Stored
from llmx.exporters.trtllm_types import TrtllmMix, Types, group_notes, stored_group
from llmx.exporters.trtllm_write import CHUNK_WEIGHTS, MEMORY_PER_WEIGHT, Source, write_tensors
from llmx.formats.safetensors import Placement, place
from llmx.formats.trtllm import CONFIG_NAME, HF, INDEX_NAME, QUANT_NAME, WEIGHT, rank_name, shard_name
from llmx.models.model import Model, check_finite
from llmx.progress import track
from llmx.quant.grid import largest_weight
from llmx.quant.protocol import Effort

if TYPE_CHECKING:
    from llmx.exporters.journal import Journal
    from llmx.exporters.onnx_write import KeptRows

TYPE_KEY = "llmx.type"  # in the weight files' metadata, beside SOLVER_KEY
SPLIT_BYTES = 5 * 10**9  # of a weight file of the hf layout, as transformers has it
# Read by tokenizers and generation; copied as they are.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_BASE_MEMORY = 130 << 20  # the interpreter with numpy and numba


@dataclass(frozen=True, slots=True)
class TrtllmOptions:
    """What the user chose. types: of the matrices. cache: "FP8" or "INT8", what keys and values are; None: floats.

    inputs: canonical name -> scale of its inputs; cache_scales: "layers.0.k" -> scale: what is measured before writing.
    """

    mix: TrtllmMix
    types: Types
    layout: str = HF
    mesh: Mesh = ALONE
    cache: str | None = None
    split_max_bytes: int | None = None
    inputs: Mapping[str, float] = field(default_factory=dict)
    cache_scales: Mapping[str, float] = field(default_factory=dict)
    effort: Effort = "balanced"
    solver: str | None = None
    sparsity: str | None = None  # what stands under SPARSITY_KEY
    threads: int = 1


@dataclass(frozen=True, slots=True)
class TrtllmExport:
    """A planned export. placements: of the weight files, first_file: the number of the first one in the plan.

    texts: every other file, name -> bytes, in the plan's order.
    """

    plan: Plan
    model: Model
    options: TrtllmOptions
    contents: Contents
    placements: tuple[Placement, ...]
    first_file: int
    texts: Mapping[str, bytes]

    def offsets(self) -> list[int]:
        """Of every tensor in its file."""
        numbers = [0] * len(self.placements)
        found = []
        for one in self.contents.tensors:
            found.append(self.placements[one.file].offsets[numbers[one.file]])
            numbers[one.file] += 1
        return found

    def labels(self) -> list[str]:
        """A name of its own for every tensor: with its rank, where several have tensors of the same names."""
        several = self.options.layout != HF and self.options.mesh.ranks > 1
        return [f"rank{one.file}.{one.name}" if several else one.name for one in self.contents.tensors]


def prepare(model: Model, options: TrtllmOptions) -> TrtllmExport:
    """Plan the export without reading a weight.

    Raises: UsageError for ranks that the model cannot be dealt to; UnsupportedError for what a loader cannot read.
    """
    a, mix = model.architecture, options.mix
    check_mesh(a, options.mesh)
    group = stored_group(options.types, widths(a, options.mesh))
    scaled = group is not None or mix.inputs == "int8"
    chosen = Options(options.types.encodings, mix.floats, group, scaled, options.inputs, options.cache_scales)
    contents = hf_contents(a, chosen) if options.layout == HF else rank_contents(a, chosen, options.mesh)
    _check_pairs(contents)
    told = quantization(mix, options.cache, group, contents.excluded)
    if options.layout == HF:
        contents = _sharded(contents, options.split_max_bytes or SPLIT_BYTES)
        texts = {CONFIG_NAME: hf_config(model.checkpoint.config, a, told, mix.floats)}
        if mix.algorithm is not None or options.cache is not None:
            texts[QUANT_NAME] = hf_quant_config(told)
    else:
        texts = {CONFIG_NAME: rank_config(a, options.mesh, told, mix.floats)}
    first = len(texts)
    placements = _placed(contents, options)
    names = _names(len(placements), options.layout)
    if options.layout == HF and len(names) > 1:
        texts[INDEX_NAME] = _index(contents, names)
    folder = model.checkpoint.folder
    texts |= {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).is_file()}
    sizes = [PlannedFile(name, len(content)) for name, content in texts.items()]
    weights = [PlannedFile(name, one.nbytes) for name, one in zip(names, placements, strict=True)]
    notes = [*group_notes(options.types, group), *layout_notes(a, options.layout, options.cache)]
    plan = Plan(
        "trtllm", mix.name, (), (*sizes[:first], *weights, *sizes[first:]), tuple(notes), _memory(model, options)
    )
    made = TrtllmExport(plan, model, options, contents, placements, first, texts)
    return replace(made, plan=replace(plan, steps=_steps(made)))


def _check_pairs(contents: Contents) -> None:
    """Raises: UsageError where a rank would get half of two rows that share their bytes."""
    matrices = {id(one.matrix): one.matrix for one in contents.tensors if one.matrix is not None}
    odd = {
        matrix.module
        for matrix in matrices.values()
        if matrix.stored_group is not None and any(piece.rows % 2 for piece in matrix.pieces)
    }
    if odd:
        raise UsageError(
            "--tp leaves ranks odd numbers of outputs, and two outputs of 4 bits share a byte",
            problems=sorted(odd),
            fix="a smaller --tp, or another --type",
        )


def _sharded(contents: Contents, limit: int) -> Contents:
    """The tensors of several files, none of more than `limit` bytes of tensors unless one tensor alone has more."""
    file, size, made = 0, 0, []
    for one in contents.tensors:
        if size and size + one.nbytes > limit:
            file, size = file + 1, 0
        size += one.nbytes
        made.append(replace(one, file=file))
    return replace(contents, tensors=tuple(made))


def _placed(contents: Contents, options: TrtllmOptions) -> tuple[Placement, ...]:
    about = {"format": "pt", TYPE_KEY: options.mix.name}
    if options.solver is not None:
        about[SOLVER_KEY] = options.solver
    if options.sparsity is not None:
        about[SPARSITY_KEY] = options.sparsity
    files = max(one.file for one in contents.tensors) + 1
    of_file = [[one for one in contents.tensors if one.file == file] for file in range(files)]
    return tuple(place(((one.name, one.dtype, one.shape) for one in tensors), about) for tensors in of_file)


def _names(count: int, layout: str) -> list[str]:
    return [shard_name(number, count) if layout == HF else rank_name(number) for number in range(count)]


def _index(contents: Contents, names: Sequence[str]) -> bytes:
    told = {
        "metadata": {"total_size": sum(one.nbytes for one in contents.tensors)},
        "weight_map": {one.name: names[one.file] for one in contents.tensors},
    }
    return (json.dumps(told, indent=2) + "\n").encode()


def _memory(model: Model, options: TrtllmOptions) -> int:
    chunks = MEMORY_PER_WEIGHT * (2 * options.threads + 1) * CHUNK_WEIGHTS
    if options.mix.inputs != "fp8":
        return _BASE_MEMORY + chunks
    largest = max(spec.shape[-1] * spec.shape[-2] for spec in model.architecture.tensors if len(spec.shape) > 1)
    return _BASE_MEMORY + chunks + 8 * 3 * largest  # of a product, which is read whole to find its scale


def _steps(export: TrtllmExport) -> tuple[Step, ...]:
    steps: list[Step] = []
    seen: dict[int, str] = {}  # the matrix -> its first tensor
    copies: dict[object, str] = {}
    wanted = export.options.types.wanted
    for one, label in zip(export.contents.tensors, export.labels(), strict=True):
        if one.matrix is None:
            steps.append(Step(label, None, None, one.shape, one.dtype, one.nbytes))
            continue
        matrix, spec = one.matrix, one.matrix.pieces[0].spec
        if one.part != WEIGHT:
            steps.append(Step(label, spec.role, spec.layer, one.shape, one.dtype, one.nbytes, beside=seen[id(matrix)]))
            continue
        seen[id(matrix)] = label
        same = tuple((piece.spec.name, piece.start, piece.stop) for piece in matrix.pieces), matrix.columns
        first = copies.setdefault(same, label)  # a copy that another rank has, or a tied head, is no weight of its own
        shape = one.shape if matrix.encoding is None else matrix.shape(matrix.rows, matrix.cols)
        type_name = matrix.encoding or one.dtype
        fell = wanted.get(spec.name)
        fell = None if fell == type_name else fell
        beside = None if first == label else first
        steps.append(Step(label, spec.role, spec.layer, shape, type_name, one.nbytes, fell, beside))
    return tuple(steps)


def check_weights(export: TrtllmExport) -> None:
    """Look at every weight once, before anything is written.

    Raises: IntegrityError naming every tensor that holds NaN or infinity, or values that its type cannot hold.
    """
    problems: list[str] = []
    seen: dict[str, Stored] = {}
    for one in export.contents.tensors:
        for piece in () if one.matrix is None else one.matrix.pieces:
            seen[piece.spec.name] = one
    with track(export.model.checkpoint.nbytes, "checking weights") as progress:
        for name, one in seen.items():
            weight = export.model.weight(name)
            found = check_finite(weight)
            weight.release()
            progress.advance(weight.nbytes)
            type_name, limit = _limit(one, weight.cols)
            if found.first_bad is not None:
                problems.append(f"{name}: the value at {divmod(found.first_bad, weight.cols)} is NaN or infinite")
            elif found.largest > limit:
                problems.append(
                    f"{name}: the magnitude {found.largest:.6g} does not fit {type_name} (at most {limit:.6g})"
                )
    if problems:
        raise IntegrityError("the checkpoint holds weights that cannot be exported", problems=problems)


def _limit(one: Stored, cols: int) -> tuple[str, float]:
    """How a weight is kept, and the largest magnitude that can be."""
    kept = None if one.matrix is None else one.matrix.encoding
    return (one.dtype, largest_weight(one.dtype)) if kept is None else (kept, ENCODINGS[kept].limit(cols))


def write(
    export: TrtllmExport,
    targets: Sequence[Path],
    rows: Mapping[str, KeptRows] | None = None,
    journal: Journal | None = None,
) -> tuple[str, ...]:
    """Write all files, and return the sha256 of each tensor's bytes, in the order of the contents.

    targets: a path for each file of the plan. config.json goes last: without it there is no artifact.
    rows: solved before, canonical name -> u8[rows, row bytes]; what is missing there is rounded on the way.
    journal: notes tensors that are written, and knows those that an earlier run wrote to the same files.
    Raises: UsageError for rows of other shapes than the plan's.
    """
    solved = {} if rows is None else rows
    _check_rows(export, solved)
    paths = {target.name: target for target in targets}
    weights = [paths[name] for name in _names(len(export.placements), export.options.layout)]
    types = {name: kind for name, kind in export.options.types.encodings.items() if name not in solved}
    source = Source(export.model, solved, export.options.effort, SharedScales(export.model, types))
    total = sum(one.nbytes for one in export.contents.tensors)
    places = [
        Place(one.file, offset, one.nbytes)
        for one, offset in zip(export.contents.tensors, export.offsets(), strict=True)
    ]
    destination = [*zip(export.labels(), places, strict=True)]
    with (
        ledger(weights, [placed.nbytes for placed in export.placements], journal) as (notes, streams),
        track(total, "writing") as progress,
    ):
        for stream, placed in zip(streams, export.placements, strict=True):
            stream.write(placed.header)
        found = write_tensors(
            streams, export.contents.tensors, destination, source, export.options.threads, progress, notes
        )
    for name, content in reversed([*export.texts.items()]):
        paths[name].write_bytes(content)
    return found


def _check_rows(export: TrtllmExport, rows: Mapping[str, KeptRows]) -> None:
    problems = []
    for name, got in rows.items():
        weight, kind = export.model.weight(name), export.options.types.encodings.get(name)
        if kind is None:
            problems.append(f"{name}: it is not quantized in this plan")
        elif got.shape != (wanted := (weight.rows, ENCODINGS[kind].row_bytes(weight.cols))):
            problems.append(f"{name}: {list(got.shape)} bytes, {list(wanted)} of {kind} are planned")
    if problems:
        raise UsageError("the solved rows are not those of the plan", problems=problems)
