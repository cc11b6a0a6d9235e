"""ONNX packages of a given size: which groups their matrices may have, and the plan with those that lose least."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmx.errors import UsageError
from llmx.exporters.budget import Budget, Part, choices
from llmx.exporters.encoding import GROUP_ENCODINGS, fitting
from llmx.exporters.onnx import OnnxExport, prepare
from llmx.exporters.onnx_graph import Quantized
from llmx.formats.onnx import FLOATS
from llmx.quant.allocate import allocate

if TYPE_CHECKING:
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.tokenizer import Tokenizer

# One of each size that the kernels run fast; short rows take smaller groups.
TYPES: tuple[str, ...] = (
    "int2-g64-zp-float32",
    "int2-g32-zp-float32",
    "int4-g128-zp-float32",
    "int4-g64-zp-float32",
    "int4-g32-zp-float32",
    "int8-g128-sym-float32",
    "int8-g32-sym-float32",
)
_ROUNDS = 8  # of planning anew: places in the data file are whole pages, so a plan may come out a little larger


def within_budget(
    export: OnnxExport,
    tokenizer: Tokenizer | None,
    budget: Budget,
    text: CalibrationText | None,
    threads: int,
    *,
    fixed: Collection[str] = (),
) -> OnnxExport:
    """The export planned anew, with the groups of least loss that fit. Matrices of one product get the same.

    fixed: canonical names whose types were given. text: what losses are measured on, None for the built-in corpus.
    Raises: UsageError naming the smallest size there is where the budget is below it, or where nothing is left to
    choose.
    """
    free = _free(export, fixed)
    found = choices(export.model, free, text, threads)
    taken = sum(part.sizes[export.options.types[part.pieces[0]]] for part in free)
    if budget.bits is not None:
        whole, limit = sum(step.nbytes for step in export.plan.steps), int(budget.bits * export.plan.parameters / 8)
    else:
        assert budget.nbytes is not None, "a budget is a size or bits per weight"
        whole, limit = export.plan.nbytes, budget.nbytes
    room, size = limit, limit
    for _ in range(_ROUNDS):
        made = _planned(export, tokenizer, free, allocate(found, room, whole - taken))
        size = made.plan.nbytes if budget.bits is None else sum(step.nbytes for step in made.plan.steps)
        if size <= limit:
            return made
        room -= size - limit
    raise UsageError(f"no plan was found that takes at most {limit:,} bytes", fix=f"ask for {size:,} bytes")


def _planned(
    export: OnnxExport, tokenizer: Tokenizer | None, free: list[Part], chosen: Mapping[str, str]
) -> OnnxExport:
    given = {piece: chosen[part.name] for part in free for piece in part.pieces}
    wanted = {name: kind for name, kind in export.options.wanted.items() if name not in given}
    options = replace(export.options, types={**export.options.types, **given}, wanted=wanted)
    made = prepare(export.model, options, tokenizer)
    named = replace(options, mix=f"{made.plan.bits_per_weight:.2f}bpw")
    return prepare(export.model, named, tokenizer)


def _free(export: OnnxExport, fixed: Collection[str]) -> list[Part]:
    """The matrices whose types may be chosen, those of one product together."""
    products: list[tuple[set[str], list[Quantized]]] = []
    seen: set[str] = set()
    for one in export.stored:
        if one.quantized is None or one.quantized.name in seen:
            continue
        seen.add(one.quantized.name)
        names = {piece.weight.spec.name for piece in one.quantized.pieces}
        matrices = [one.quantized]
        for other in [product for product in products if product[0] & names]:  # experts have products of their own
            products.remove(other)
            names, matrices = names | other[0], [*other[1], *matrices]
        products.append((names, matrices))
    return [_part(export, matrices) for names, matrices in products if not names & set(fixed) and _chosen(matrices)]


def _chosen(matrices: list[Quantized]) -> bool:
    """Whether they are whole groups of a row's neighbours: what losses are measured for."""
    return all(one.layout.group is not None and one.encoding.solvable(one.cols) for one in matrices)


def _part(export: OnnxExport, matrices: list[Quantized]) -> Part:
    pieces = dict.fromkeys(piece.weight.spec.name for one in matrices for piece in one.pieces)
    own = (one.encoding.name for one in matrices)
    types = dict.fromkeys((*own, *(fitting(name, one.cols) for one in matrices for name in TYPES)))
    scale = FLOATS[export.options.type_name].nbytes
    return Part(matrices[0].name, tuple(pieces), {name: _nbytes(matrices, name, scale) for name in types})


def _nbytes(matrices: list[Quantized], type_name: str, scale: int) -> int:
    """What they take as stored: codes, scales in the graph's own float type, zero points."""
    return sum(_matrix_bytes(one, type_name, scale) for one in matrices)


def _matrix_bytes(one: Quantized, type_name: str, scale: int) -> int:
    layout = GROUP_ENCODINGS[type_name].layout
    groups = layout.groups(one.cols)
    zeros = -(-groups * layout.bits // 8) if layout.zero_points else 0
    return one.rows * (groups * (layout.group_bytes(one.cols) + scale) + zeros)
