"""Static scales, measured on calibration text by one walk of the float model: of matrices' inputs, and of the cache.

    inputs    matrices that read the same inputs get the same scale, all experts of a layer one a role
    cache     one scale for a layer's keys, after rope as they are cached, and one for its values:
              value = scale · code,  code int8 or E4M3,  scale = largest magnitude / 127 or 448, as TensorRT-LLM has it

A cache is not clipped, as inputs are. Clipping changed the KL of an int8 cache by a tenth, up or down, on text like the
calibration's, and more than doubled it where another text reached farther (gemma3: 0.0008 clipped, 0.0003 whole).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from llmx.errors import IntegrityError
from llmx.exporters.onnx_types import static_names
from llmx.models.model import Model, Weight
from llmx.progress import Progress, track
from llmx.quant.activations import InputScale, Kind, Sample, best_scale, whole_range
from llmx.quant.calibrate import Calibration, walk
from llmx.quant.inputs import MatrixInputs
from llmx.quant.smooth import OTHERS, sample
from llmx.quant.statistics import Inputs
from llmx.quant.workers import Workers

FEWEST = 16  # rows of an expert's inputs that are looked at, beside those of the largest magnitudes


def input_scales(
    model: Model,
    calibration: Calibration,
    workers: Workers,
    kind: Kind = "uint8",
    names: Collection[str] | None = None,
) -> Mapping[str, InputScale]:
    """Canonical name -> the static scale of that matrix's inputs. Those that read the same inputs get the same scale.

    names: the matrices; without any, those that are static in an ONNX mix.
    Raises: IntegrityError where the model computes values that are not finite on this text.
    """
    wanted = static_names(model.architecture) if names is None else names
    with track(sum(model.weight(name).nbytes for name in wanted), "measuring activations") as progress:
        seen = _Scales(frozenset(wanted), kind, progress)
        walk(model, replace(calibration, store=None), seen, workers)
    return seen.found


def kv_scales(model: Model, calibration: Calibration, workers: Workers, kind: Kind = "fp8") -> Mapping[str, float]:
    """ "layers.3.k" and "layers.3.v" -> the scale of what is cached there: value = scale · code.

    kind: "fp8" or "int8", whose zero is in the middle, as a cache's is.
    Raises: IntegrityError where the model computes values that are not finite on this text.
    """
    assert kind != "uint8", "a cache has no zero points"
    found: dict[str, float] = {}

    def measure(layer: int, keys: Sequence[Inputs], values: Sequence[Inputs]) -> None:
        for part, states in (("k", keys), ("v", values)):
            name = f"layers.{layer}.{part}"
            some = _finite(sample(states, FEWEST), f"the cache {name}")
            found[name] = whole_range(some.low, some.high, kind).scale
        progress.advance(1)

    with track(model.architecture.layers, "measuring the cache") as progress:
        walk(model, replace(calibration, store=None), _Nothing(), workers, measure)
    return found


class _Nothing:
    """A Solver that solves nothing."""

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        return None

    def table(self, weight: Weight) -> torch.Tensor | None:
        return None


@dataclass(slots=True)
class _Scales(_Nothing):
    """A Solver that solves nothing and measures inputs."""

    names: Collection[str]
    kind: Kind
    progress: Progress
    found: dict[str, InputScale] = field(default_factory=dict)
    _newest: tuple[str, InputScale] | None = None  # of the newest inputs, which several matrices share
    _experts: dict[str, list[Sample]] = field(default_factory=dict)  # of a stacked matrix, until all have been seen

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        name = weight.spec.name
        if name in self.names:
            if expert is None:
                self._measure(name, inputs)
            else:
                self._measure_expert(name, weight.spec.shape[0], inputs)
            self.progress.advance(weight.nbytes // (1 if expert is None else weight.spec.shape[0]))
        return None

    def _measure(self, name: str, inputs: MatrixInputs) -> None:
        if self._newest is None or self._newest[0] != inputs.key:
            some = _finite(sample(inputs.batches()), f"the inputs of {name}")
            self._newest = inputs.key, best_scale(some, self.kind)
        self.found[name] = self._newest[1]

    def _measure_expert(self, name: str, experts: int, inputs: MatrixInputs) -> None:
        samples = self._experts.setdefault(name, [])
        some = sample(inputs.batches(), max(FEWEST, OTHERS // experts))
        samples.append(_finite(some, f"the inputs of {name}"))
        if len(samples) == experts:
            self.found[name] = best_scale(_joined(self._experts.pop(name)), self.kind)


def _joined(samples: Sequence[Sample]) -> Sample:
    return Sample(
        np.concatenate([one.rows for one in samples]),
        np.concatenate([one.counts for one in samples]),
        np.max([one.largest for one in samples], axis=0),
        min(one.low for one in samples),
        max(one.high for one in samples),
    )


def _finite(some: Sample, where: str) -> Sample:
    if not np.isfinite(some.largest).all():
        raise IntegrityError(
            "the model computes values that are not finite on the calibration text",
            where=where,
            fix="check that the model works on this text in float32, or let nothing be rounded on measured scales",
        )
    return some
