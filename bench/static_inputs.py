"""What does it cost to round the inputs of matrices to 8 bits on static scales, and whose inputs cost most?

    python bench/static_inputs.py MODEL … --calibration calib.txt --text eval.txt other-domain.txt \\
        [--positions 1024] [--smooth]

KL from the float32 model, computed by torch with the rounding that int8 and FP8 engines do: weights by channel, and the
inputs of some roles rounded on scales that one walk over the calibration text measures. Embedding, norms and head are
floats. The tables STATIC_ROLES of exporters/tensorrt_types.py and exporters/onnx_types.py were chosen by it.
Dense models only: the inputs of experts are not rounded here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from llmx.exporters.encoding import encoding
from llmx.exporters.onnx_activations import input_scales
from llmx.exporters.quantization import HELD_OUT_EVERY
from llmx.models.architecture import Role
from llmx.models.calibration_text import read_calibration, sequences
from llmx.models.decoder import forward
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps
from llmx.quant.activations import InputScale, Kind, Rounding, rounded, rounded_by_row
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import batches
from llmx.quant.smooth import SmoothOptions, search_smooth
from llmx.quant.workers import Workers, workers
from llmx.validate.metrics import Comparison, Divergence

LENGTH, TOKENS = 256, 8192
ENCODINGS: Mapping[Kind, str] = {"int8": "int8-channel-pos-float32", "fp8": "fp8-channel-float32"}
ROLES: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
EVEN = ROLES[:-1]
ALONE: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True, slots=True)
class Way:
    """label: as the table says it. kind: of weights and static inputs. static: whose inputs are rounded on them.

    others: how those of all others are. weights: whether these are rounded, too. smooth: with SmoothQuant.
    """

    label: str
    kind: Kind
    static: tuple[Role, ...]
    others: Rounding = "float"
    weights: bool = True
    smooth: bool = False


def ways(smooth: bool) -> Iterator[Way]:
    yield Way("int8, inputs float", "int8", ())
    yield Way("int8, static but down float", "int8", EVEN)
    yield Way("int8, static but down by row", "int8", EVEN, "by row")
    yield Way("int8, all by row", "int8", (), "by row")
    yield Way("int8, all static", "int8", ROLES)
    if smooth:
        yield Way("int8, static but down float, SmoothQuant", "int8", EVEN, smooth=True)
        yield Way("int8, all static, SmoothQuant", "int8", ROLES, smooth=True)
    for roles in ALONE:
        yield Way(f"int8 inputs of {', '.join(roles)} alone", "int8", roles, weights=False)
    yield Way("fp8, inputs float", "fp8", ())
    yield Way("fp8, static but down float", "fp8", EVEN)
    yield Way("fp8, all static", "fp8", ROLES)


class RoundedOps(TorchOps):
    """The decoder's operations with weights and inputs rounded as a Way says."""

    def __init__(self, way: Way, scales: Mapping[str, InputScale]) -> None:
        super().__init__()
        self._way, self._scales = way, scales

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        if weight.spec.role not in ROLES:
            return super().linear(x, weight, bias)
        scale = self._scales.get(weight.spec.name)
        if scale is not None:
            x = torch.from_numpy(rounded(x.numpy(), scale))
        elif self._way.others == "by row":
            x = torch.from_numpy(rounded_by_row(x.numpy()))
        return super().linear(x, weight, bias)

    def _load(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if weight.spec.role not in ROLES or weight.spec.part != "weight" or not self._way.weights:
            return super()._load(weight, start, stop)
        kept = encoding(ENCODINGS[self._way.kind])
        return torch.from_numpy(kept.decode(kept.encode(weight.read(start, stop)), weight.cols))


@dataclass(slots=True)
class Bench:
    """A model, what it is calibrated on, and the sequences that it is judged on with its own logits there."""

    model: Model
    calibration: Calibration
    judged: Mapping[str, Sequence[Sequence[int]]]
    pool: Workers
    _wanted: dict[str, np.ndarray] = field(default_factory=dict)

    def measure(self, way: Way) -> list[Divergence]:
        """One a text."""
        roles: dict[str, Role] = {
            spec.name: spec.role for spec in self.model.architecture.tensors if spec.part == "weight"
        }
        static = [name for name, role in roles.items() if role in way.static]
        model = self._smoothed(way, roles) if way.smooth else self.model
        scales = input_scales(model, self.calibration, self.pool, way.kind, static) if static else {}
        return [self._compared(name, logits(model, RoundedOps(way, scales), self.judged[name])) for name in self.judged]

    def _smoothed(self, way: Way, roles: Mapping[str, Role]) -> Model:
        told: dict[str, Rounding] = {
            name: "int8" if role in way.static else way.others for name, role in roles.items() if role in ROLES
        }
        grids = {name: encoding(ENCODINGS[way.kind]).grid(self.model.weight(name).cols) for name in told}
        found = search_smooth(self.model, self.calibration, grids, SmoothOptions(inputs=told), self.pool)
        return found.folds.applied(self.model)

    def _compared(self, name: str, found: np.ndarray) -> Divergence:
        if name not in self._wanted:
            self._wanted[name] = logits(self.model, TorchOps(), self.judged[name])
        comparison = Comparison()
        comparison.add(self._wanted[name], found)
        return comparison.summary()


def logits(model: Model, ops: TorchOps, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """f32[positions of all sequences, vocab]"""
    ids = torch.tensor(texts)
    with torch.inference_mode():
        return forward(model, ops, ids, torch.arange(ids.shape[1])).flatten(0, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--smooth", action="store_true", help="also with SmoothQuant, which takes minutes")
    options = parser.parse_args()
    for folder in options.models:
        model = open_model(folder)
        print(f"{folder.name}: KL from float32 and share of equal most likely tokens", flush=True)
        print(f"{'':42}" + "".join(f"{path.stem:>24}" for path in options.text), flush=True)

        def tokens(path: Path, count: int, model: Model = model) -> Sequence[Sequence[int]]:
            vocab = model.architecture.vocab
            return sequences(read_calibration(path), model.checkpoint.folder, tokens=count, length=LENGTH, vocab=vocab)

        calibration = Calibration(batches(tokens(options.calibration, TOKENS), HELD_OUT_EVERY))
        judged = {path.stem: tokens(path, options.positions) for path in options.text}
        with workers(1) as pool:
            bench = Bench(model, calibration, judged, pool)
            for way in ways(options.smooth):
                found = "".join(f"{one.kl_mean:14.2e} {one.same_top1:9.4f}" for one in bench.measure(way))
                print(f"{way.label:42}{found}", flush=True)


if __name__ == "__main__":
    main()
