"""GGUF files of a given size: which types their tensors may have, and the plan with those that lose least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmx.exporters.budget import Budget, Part, choices
from llmx.exporters.gguf import GgufExport, prepare
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.gguf_types import FILE_TYPES, FileType, fitting
from llmx.formats.ggml_blocks import row_bytes
from llmx.quant.allocate import allocate

if TYPE_CHECKING:
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.tokenizer import Tokenizer

# One type of each size that the exporter writes; short rows take their fall-backs.
TYPES: tuple[str, ...] = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def within_budget(
    export: GgufExport, tokenizer: Tokenizer, budget: Budget, text: CalibrationText | None, threads: int
) -> GgufExport:
    """The export planned anew, with the types of least loss that fit.

    text: what losses are measured on, None for the built-in corpus. Tensors that an override names keep its type.
    Raises: UsageError naming the smallest size there is where the budget is below it, or where nothing is left to
    choose.
    """
    free = [entry for entry in export.entries if entry.quantizable and not _fixed(export, entry)]
    found = choices(export.model, [_part(entry) for entry in free], text, threads)
    taken = sum(step.nbytes for step in export.plan.steps if step.name in found)
    if budget.bits is not None:
        steps = sum(step.nbytes for step in export.plan.steps)
        chosen = allocate(found, int(budget.bits * export.plan.parameters / 8), steps - taken)
    else:
        assert budget.nbytes is not None, "a budget is a size or bits per weight"
        chosen = allocate(found, budget.nbytes, export.plan.nbytes - taken)
    given = {piece.spec.name: chosen[entry.name] for entry in free for piece in entry.pieces}
    options = replace(export.options, types={**export.options.types, **given}, file_type=_mix(export, chosen))
    return prepare(export.model, tokenizer, options)


def _fixed(export: GgufExport, entry: Entry) -> bool:
    named = any(override.pattern.search(entry.name) for override in export.options.overrides)
    return named or any(piece.spec.name in export.options.types for piece in entry.pieces)


def _part(entry: Entry) -> Part:
    types = dict.fromkeys(fitting(name, entry.columns) for name in TYPES)
    pieces = tuple(piece.spec.name for piece in entry.pieces)
    return Part(entry.name, pieces, {name: entry.rows * row_bytes(name, entry.columns) for name in types})


def _mix(export: GgufExport, chosen: Mapping[str, str]) -> FileType:
    """A mix named by its bits per weight; for programs that look at its number, the nearest mix that has one."""
    sizes = {entry.name: entry for entry in export.entries}
    bits = sum(
        8 * sizes[name].rows * row_bytes(type_name, sizes[name].columns) for name, type_name in chosen.items()
    ) / sum(sizes[name].rows * sizes[name].columns for name in chosen)
    known = {"Q2_K": 2.9, "Q3_K_M": 3.7, "Q4_K_M": 4.7, "Q5_K_M": 5.6, "Q6_K": 6.6, "Q8_0": 8.5}
    nearest = FILE_TYPES[min(known, key=lambda name: abs(known[name] - bits))]
    return replace(nearest, name=f"{bits:.2f}bpw")
