"""Scales measured by a walk: of the inputs of matrices, experts among them, and of what attention caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import CASES, save

from llmx.errors import IntegrityError
from llmx.exporters.onnx_activations import input_scales, kv_scales
from llmx.models.decoder import forward
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps
from llmx.quant.activations import InputScale, Kind, rounded
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import batches
from llmx.quant.workers import workers

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TOPS = {"int8": 127.0, "fp8": 448.0}
every_kind = pytest.mark.parametrize("kind", sorted(TOPS))
Caches = dict[str, torch.Tensor]


def some_tokens(model: Model, count: int = 6, length: int = 32) -> list[list[int]]:
    return np.random.default_rng(3).integers(3, model.architecture.vocab, (count, length)).tolist()


def text(model: Model) -> Calibration:
    return Calibration(batches(some_tokens(model), 0))


class WatchedOps(TorchOps):
    """The decoder's operations, which keep the inputs of matrices and what is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.caches: Caches = {}
        self.inputs: Caches = {}

    def attention(self, layer, q, k, v, **options):  # type: ignore[no-untyped-def]
        self.caches |= {f"layers.{layer}.k": k, f"layers.{layer}.v": v}
        return super().attention(layer, q, k, v, **options)

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        self.inputs[weight.spec.name] = x
        return super().linear(x, weight, bias)


def watched(model: Model) -> WatchedOps:
    ops, ids = WatchedOps(), torch.tensor(some_tokens(model))
    with torch.inference_mode():
        forward(model, ops, ids, torch.arange(ids.shape[1]))
    return ops


def measured(model: Model, kind: Kind, threads: int = 1) -> dict[str, float]:
    with workers(threads) as pool:
        return dict(kv_scales(model, text(model), pool, kind))


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "gemma3", "mixtral", "gpt2", "phi3"])
def test_a_cache_has_a_scale_for_its_keys_after_rope_and_one_for_its_values(
    name: str, kind: Kind, tmp_path: Path
) -> None:
    save(CASES[name], tmp_path)
    model = open_model(tmp_path)
    found, caches = measured(model, kind), watched(model).caches
    assert list(found) == [f"layers.{layer}.{part}" for layer in range(model.architecture.layers) for part in "kv"]
    for where, scale in found.items():
        states = caches[where].numpy()
        assert scale * TOPS[kind] == pytest.approx(np.abs(states).max(), rel=1e-5)  # nothing is clipped
        error = np.abs(rounded(states, InputScale(scale, 0, kind)) - states)
        step = scale if kind == "int8" else np.maximum(np.abs(states) / 8, scale * 2.0**-9)
        assert (error <= 0.501 * step).all()


@every_kind
def test_the_scales_of_a_cache_are_the_same_for_any_number_of_threads(kind: Kind) -> None:
    model = open_model(EXAMPLE)
    assert measured(model, kind) == measured(model, kind, threads=2)


def test_a_cache_whose_values_are_not_finite_is_refused_with_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(CASES["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"layers\.1\.v"):
        measured(open_model(tmp_path), "fp8")


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_inputs_are_measured_for_the_matrices_asked_for(kind: Kind) -> None:
    model = open_model(EXAMPLE)
    names = [f"layers.{layer}.{role}.weight" for layer in range(2) for role in ("q", "k", "v", "up", "down")]
    with workers(1) as pool:
        found = dict(input_scales(model, text(model), pool, kind, names))
    seen = watched(model).inputs
    assert set(found) == set(names)
    for name, scale in found.items():
        largest = float(seen[name].abs().max())
        assert scale.kind == kind and scale.zero_point == 0
        assert 0.09 * largest <= scale.scale * TOPS[kind] <= largest * 1.001
    assert found["layers.0.q.weight"] == found["layers.0.k.weight"] == found["layers.0.v.weight"]
    assert found["layers.0.up.weight"] != found["layers.0.down.weight"]


@every_kind
def test_the_experts_of_a_layer_share_a_scale_that_fits_all_of_them(kind: Kind, tmp_path: Path) -> None:
    save(CASES["mixtral"], tmp_path)
    model = open_model(tmp_path)
    names = [f"layers.{layer}.expert_{role}.weight" for layer in range(2) for role in ("gate", "up", "down")]
    with workers(1) as pool:
        found = dict(input_scales(model, text(model), pool, kind, names))
    assert set(found) == set(names)
    for layer in range(2):
        gate, up, down = (found[f"layers.{layer}.expert_{role}.weight"] for role in ("gate", "up", "down"))
        assert gate == up != down
