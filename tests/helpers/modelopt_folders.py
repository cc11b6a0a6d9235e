"""Folders in ModelOpt's Hugging Face layout, made by torch from the layout's description alone: none of llmx's packing.

So what reads folders is not tested on what writes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
EXPERT = ("w1", "w2", "w3")
TEXT_FILES = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja", "vocab.json", "merges.txt")
FLOAT8_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Layout:
    """algorithm: quant_algo. group: of 4-bit weights. cache: kv_cache_quant_algo. step: of every static input."""

    algorithm: str | None
    group: int | None = None
    cache: str | None = None
    step: float | None = None
    factors: bool = False


def make(checkpoint: Path, folder: Path, layout: Layout) -> Path:
    """Rounds a checkpoint to the nearest in that layout; returns the folder."""
    folder.mkdir(parents=True)
    for pattern in TEXT_FILES:
        for path in checkpoint.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(path)
    made: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        made |= _stored(name, weight, layout)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    if layout.algorithm is not None or layout.cache is not None:
        told = _quantization(layout)
        (folder / "hf_quant_config.json").write_text(json.dumps(told))
        config["quantization_config"] = _inline(told["quantization"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_linear(name: str) -> bool:
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name.endswith(".weight") and module in (*LINEAR, *EXPERT)


def _stored(name: str, weight: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    module = name.removesuffix(".weight")
    if layout.algorithm is None or not is_linear(name):
        found = {name: weight.to(torch.float16).contiguous()}
    else:
        found = ALGORITHMS[layout.algorithm](module, weight.float(), layout)
        if layout.step is not None:
            found[f"{module}.input_scale"] = torch.tensor(layout.step)
        if layout.factors:
            found[f"{module}.pre_quant_scale"] = torch.ones(weight.shape[1], dtype=torch.float16)
    if layout.cache is not None and name.endswith(("k_proj.weight", "v_proj.weight")):
        part = module.rpartition(".")[2][0]
        found[f"{module}.{part}_scale"] = torch.tensor(0.05)
    return found


def _int4(module: str, weight: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    assert layout.group is not None
    rows, cols = weight.shape
    grouped = weight.reshape(rows, -1, layout.group)
    scale = (grouped.abs().amax(-1) / 7).half().float().clamp_min(1e-4)
    codes = (grouped / scale[..., None]).round().clamp(-8, 7).reshape(rows, cols).to(torch.int16) & 15
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8)
    return {f"{module}.weight": packed, f"{module}.weight_scale": scale.contiguous()}


def _int8(module: str, weight: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {f"{module}.weight": codes, f"{module}.weight_scale": scale}


def _float8(module: str, weight: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    scale = weight.abs().max() / FLOAT8_LARGEST
    return {f"{module}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale}


ALGORITHMS = {"W4A16_AWQ": _int4, "W8A16": _int8, "W8A8_SQ_PER_CHANNEL": _int8, "FP8": _float8}


def _quantization(layout: Layout) -> dict[str, Any]:
    told: dict[str, Any] = {"quant_algo": layout.algorithm, "kv_cache_quant_algo": layout.cache}
    if layout.group is not None:
        told |= {"group_size": layout.group, "has_zero_point": False, "pre_quant_scale": layout.factors}
    told["exclude_modules"] = ["lm_head", "*gate"]
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": told}


def _inline(told: Mapping[str, Any]) -> dict[str, Any]:
    found = {"quant_method": "modelopt", "quant_algo": told["quant_algo"], "ignore": told["exclude_modules"]}
    if told.get("group_size") is not None:
        weights = {"dynamic": False, "num_bits": 4, "type": "int", "group_size": told["group_size"]}
        found["config_groups"] = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    if told["kv_cache_quant_algo"] is not None:
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return found
