"""Static scales of the inputs of matrices, measured on calibration text by one walk of the float model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from llmx.errors import IntegrityError
from llmx.exporters.onnx_types import static_names
from llmx.models.model import Model, Weight
from llmx.progress import Progress, track
from llmx.quant.activations import InputScale, best_scale
from llmx.quant.calibrate import Calibration, walk
from llmx.quant.inputs import MatrixInputs
from llmx.quant.smooth import sample
from llmx.quant.workers import Workers


def input_scales(model: Model, calibration: Calibration, workers: Workers) -> Mapping[str, InputScale]:
    """Canonical name -> the static scale of that matrix's inputs. Those that read the same inputs get the same scale.

    Raises: IntegrityError where the model computes values that are not finite on this text.
    """
    names = static_names(model.architecture)
    with track(sum(model.weight(name).nbytes for name in names), "measuring activations") as progress:
        seen = _Scales(frozenset(names), progress)
        walk(model, replace(calibration, store=None), seen, workers)
    return seen.found


@dataclass(slots=True)
class _Scales:
    """A Solver that solves nothing and measures inputs."""

    names: Collection[str]
    progress: Progress
    found: dict[str, InputScale] = field(default_factory=dict)
    _newest: tuple[str, InputScale] | None = None  # of the newest inputs, which several matrices share

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        name = weight.spec.name
        if name in self.names:
            if self._newest is None or self._newest[0] != inputs.key:
                self._newest = inputs.key, _measured(name, inputs)
            self.found[name] = self._newest[1]
            self.progress.advance(weight.nbytes)
        return None

    def table(self, weight: Weight) -> torch.Tensor | None:
        return None


def _measured(name: str, inputs: MatrixInputs) -> InputScale:
    some = sample(inputs.batches())
    if not np.isfinite(some.largest).all():
        raise IntegrityError(
            "the model computes values that are not finite on the calibration text",
            where=f"the inputs of {name}",
            fix="check that the model works on this text in float32, or let inputs be quantized as the graph runs",
        )
    return best_scale(some)
