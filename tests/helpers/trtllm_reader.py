"""Reads TensorRT-LLM checkpoints, written from the description of their layouts alone: nothing of ours is imported.

hf       names of transformers; W4A16_AWQ: two outputs a byte, the even one in the low bits, two's complement
ranks    names of TensorRT-LLM; every rank's part is put back in its place
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Tensors = dict[str, torch.Tensor]


def load(path: Path) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Outputs x inputs in float32, whatever the codes and their scales are; leading axes are kept."""
    scales = scales.float()
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float() * scales.reshape(*scales.shape[: codes.dim() - 2], 1, 1)
    if scales.dim() < codes.dim():
        return codes.float() * scales[..., None]
    pairs = codes.view(torch.uint8).to(torch.int16)
    low, high = pairs & 15, pairs >> 4
    nibbles = torch.stack([low, high], dim=-2).flatten(-3, -2)  # rows 2j and 2j + 1 of byte row j
    values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    *lead, rows, groups = scales.shape
    return (values.reshape(*lead, rows, groups, -1) * scales[..., None]).reshape(*lead, rows, -1)


def restored(tensors: Tensors, scale: str, pre_scale: str) -> Tensors:
    """Every tensor by its name, quantized ones as floats, with what their inputs are multiplied by in them."""
    made = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and f"{module}.{scale}" in tensors:
            made[name] = dequantized(tensor, tensors[f"{module}.{scale}"])
            if f"{module}.{pre_scale}" in tensors:
                made[name] = made[name] * tensors[f"{module}.{pre_scale}"].float()
        elif part in ("weight", "bias"):
            made[name] = tensor.float()
    return made


def read_hf(folder: Path) -> Tensors:
    """transformers' name -> float32 values, from all the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        tensors = {
            name: tensor for shard in sorted(set(places.values())) for name, tensor in load(folder / shard).items()
        }
        assert tensors.keys() == places.keys()
    else:
        tensors = load(folder / "model.safetensors")
    return restored(tensors, "weight_scale", "pre_quant_scale")


class Ranks:
    """A per-rank checkpoint: its configuration, and its tensors of every rank as floats."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        mesh = self.config["mapping"]
        self.tp, self.pp = mesh["tp_size"], mesh["pp_size"]
        assert mesh["world_size"] == self.tp * self.pp
        found = [load(folder / f"rank{rank}.safetensors") for rank in range(self.tp * self.pp)]
        self.ranks = [restored(one, "weights_scaling_factor", "prequant_scaling_factor") for one in found]
        self.raw = found

    def stage(self, number: int) -> list[Tensors]:
        return self.ranks[number * self.tp : (number + 1) * self.tp]

    def whole(self) -> Tensors:
        """Name of TensorRT-LLM, with layers counted through -> the tensor of the whole model."""
        made: Tensors = {}
        before = 0
        for number in range(self.pp):
            places = self.stage(number)
            names = sorted({name for place in places for name in place})
            layers = 0
            for name in names:
                parts = [place[name] for place in places]
                layer = re.match(r"transformer\.layers\.(\d+)\.", name)
                if layer is None:
                    made |= self._joined(name, parts)
                    continue
                layers = max(layers, int(layer[1]) + 1)
                counted = f"transformer.layers.{before + int(layer[1])}.{name[layer.end() :]}"
                made |= self._joined(counted, parts)
            before += layers
        assert before == self.config["num_hidden_layers"]
        return made

    def _joined(self, name: str, parts: list[torch.Tensor]) -> Tensors:
        if name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
            return self._heads(name, parts)
        if name.endswith(("attention.dense.weight", "mlp.proj.weight")):
            return {name: torch.cat(parts, dim=-1)}
        if name.endswith("mlp.fc.weight") and self._fused():
            halves = [part.chunk(2, dim=-2) for part in parts]  # up, then gate
            return {
                name.replace("fc", "fc_up"): torch.cat([up for up, _ in halves], dim=-2),
                name.replace("fc", "fc_gate"): torch.cat([gate for _, gate in halves], dim=-2),
            }
        if re.search(r"mlp\.(fc|gate)\.(weight|bias)$", name):
            return {name: torch.cat(parts, dim=-2 if name.endswith("weight") else -1)}
        return {name: self._table(name, parts)}

    def _table(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        if name == "lm_head.weight":
            whole = torch.cat(parts)
            assert not whole[self.config["vocab_size"] :].any()
            return whole[: self.config["vocab_size"]]
        if name == "transformer.vocab_embedding.weight" and self.config["use_parallel_embedding"]:
            return torch.cat(parts)
        assert all(torch.equal(part, parts[0]) for part in parts), f"{name} is not the same everywhere"
        return parts[0]

    def _fused(self) -> bool:
        return self.config["hidden_act"] == "swiglu"

    def _heads(self, name: str, parts: list[torch.Tensor]) -> Tensors:
        size, heads, shared = (self.config[key] for key in ("head_size", "num_attention_heads", "num_key_value_heads"))
        own = max(shared // self.tp, 1) * size
        cut = [part.split([heads // self.tp * size, own, own]) for part in parts]
        copies = max(self.tp // shared, 1)
        made = {}
        for number, letter in enumerate("qkv"):
            rows = [one[number] for one in cut]
            if letter != "q":
                for first in range(0, self.tp, copies):
                    assert all(torch.equal(rows[first], row) for row in rows[first : first + copies])
                rows = rows[::copies]
            made[name.replace("qkv", letter)] = torch.cat(rows)
        return made
