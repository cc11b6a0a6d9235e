"""Types by budget: every tensor's loss is measured on the model itself, and the bytes go where they save the most KL.

`--target-size` counts whole files, `--target-bpw` the tensors' bits over all weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from llmx.errors import UsageError
from llmx.exporters.gguf import GgufExport, prepare
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.gguf_types import FILE_TYPES, FileType, fitting
from llmx.exporters.importance import mean_squares
from llmx.formats.ggml_blocks import row_bytes
from llmx.models.calibration_text import CalibrationText, read_calibration, sequences
from llmx.models.model import Model
from llmx.progress import stages
from llmx.quant.allocate import Choice, allocate
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import batches
from llmx.quant.sensitivity import measure
from llmx.quant.workers import workers

if TYPE_CHECKING:
    from llmx.models.tokenizer import Tokenizer

# One type of each size that the exporter writes; short rows take their fall-backs.
TYPES: tuple[str, ...] = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
TOKENS, LENGTH = 2048, 256  # that losses are measured on: a model's every tensor costs a pass over them


@dataclass(frozen=True, slots=True)
class Budget:
    """nbytes of all files, or bits per weight of the tensors; one of the two."""

    nbytes: int | None = None
    bits: float | None = None


def within_budget(
    model: Model,
    tokenizer: Tokenizer,
    export: GgufExport,
    budget: Budget,
    text: CalibrationText | None,
    threads: int,
) -> GgufExport:
    """The export planned anew, with the types of least loss that fit.

    text: what losses are measured on, None for the built-in corpus. Tensors that an override names keep its type.
    Raises: UsageError naming the smallest size there is where the budget is below it, or where nothing is left to
    choose.
    """
    free = [entry for entry in export.entries if entry.quantizable and not _fixed(export, entry)]
    if not free:
        raise UsageError(
            "a size is asked for, and rules or --tensor-type name the type of every tensor", fix="leave out one of them"
        )
    found = sequences(
        text or read_calibration(None),
        model.checkpoint.folder,
        tokens=TOKENS,
        length=min(LENGTH, model.architecture.context_length),
        vocab=model.architecture.vocab,
    )
    with stages("choosing types") as stage, workers(threads) as pool:
        stage("mean squares of the inputs")
        importance = mean_squares(model, Calibration(batches(found, 0)), pool)
        stage("the loss of every tensor")
        types = {piece.spec.name: _types(entry) for entry in free for piece in entry.pieces}
        losses = measure(model, torch.tensor(found), types, pool, importance)
    choices = {entry.name: _choices(entry, losses) for entry in free}
    taken = sum(step.nbytes for step in export.plan.steps if step.name in choices)
    steps = sum(step.nbytes for step in export.plan.steps)
    if budget.bits is not None:
        chosen = allocate(choices, int(budget.bits * export.plan.parameters / 8), steps - taken)
    else:
        assert budget.nbytes is not None, "a budget is a size or bits per weight"
        chosen = allocate(choices, budget.nbytes, export.plan.nbytes - taken)
    given = {piece.spec.name: chosen[entry.name] for entry in free for piece in entry.pieces}
    options = replace(export.options, types={**export.options.types, **given}, file_type=_mix(export, chosen))
    return prepare(model, tokenizer, options)


def _fixed(export: GgufExport, entry: Entry) -> bool:
    named = any(override.pattern.search(entry.name) for override in export.options.overrides)
    return named or any(piece.spec.name in export.options.types for piece in entry.pieces)


def _types(entry: Entry) -> tuple[str, ...]:
    return tuple(dict.fromkeys(fitting(name, entry.columns) for name in TYPES))


def _choices(entry: Entry, losses: Mapping[str, Mapping[str, float]]) -> Sequence[Choice]:
    """One choice a type: what all pieces of the tensor take and lose together."""
    return [
        Choice(
            name,
            entry.rows * row_bytes(name, entry.columns),
            sum(losses[piece.spec.name][name] for piece in entry.pieces),
        )
        for name in _types(entry)
    ]


def _mix(export: GgufExport, chosen: Mapping[str, str]) -> FileType:
    """A mix named by its bits per weight; for programs that look at its number, the nearest mix that has one."""
    sizes = {entry.name: entry for entry in export.entries}
    bits = sum(
        8 * sizes[name].rows * row_bytes(type_name, sizes[name].columns) for name, type_name in chosen.items()
    ) / sum(sizes[name].rows * sizes[name].columns for name in chosen)
    known = {"Q2_K": 2.9, "Q3_K_M": 3.7, "Q4_K_M": 4.7, "Q5_K_M": 5.6, "Q6_K": 6.6, "Q8_0": 8.5}
    nearest = FILE_TYPES[min(known, key=lambda name: abs(known[name] - bits))]
    return replace(nearest, name=f"{bits:.2f}bpw")
