"""Types by budget: every tensor's loss is measured on the model itself, and the bytes go where they save the most KL.

Nothing here knows a format: formats say which matrices get one type together, which types those may be, and what each
takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmx.errors import UsageError
from llmx.exporters.importance import mean_squares
from llmx.models.calibration_text import CalibrationText, read_calibration, sequences
from llmx.models.model import Model
from llmx.progress import stages
from llmx.quant.allocate import Choice
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import batches
from llmx.quant.sensitivity import measure
from llmx.quant.workers import workers

TOKENS, LENGTH = 2048, 256  # that losses are measured on: a model's every tensor costs a pass over them


@dataclass(frozen=True, slots=True)
class Budget:
    """nbytes of all files (--target-size), or bits per weight of the tensors (--target-bpw); one of the two."""

    nbytes: int | None = None
    bits: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What gets one type. pieces: canonical names. sizes: what they take together in each type, in bytes."""

    name: str
    pieces: tuple[str, ...]
    sizes: Mapping[str, int]


def choices(
    model: Model, parts: Sequence[Part], text: CalibrationText | None, threads: int
) -> dict[str, tuple[Choice, ...]]:
    """{part: a choice for each of its types}: what all its pieces take and lose together.

    text: what losses are measured on, None for the built-in corpus. Raises: UsageError where nothing is left to choose.
    """
    if not parts:
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
        types = {piece: tuple(part.sizes) for part in parts for piece in part.pieces}
        losses = measure(model, torch.tensor(found), types, pool, importance)
    return {
        part.name: tuple(
            Choice(name, nbytes, sum(losses[piece][name] for piece in part.pieces))
            for name, nbytes in part.sizes.items()
        )
        for part in parts
    }
