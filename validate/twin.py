"""The float32 twin of an artifact, in both worlds: a GGUF file of F32 tensors, and a checkpoint folder of F32 weights.

Both hold exactly what the artifact's bytes decode to, so quantization is out of the comparison: whatever differs
between the runtime on the one and transformers on the other is the conversion's fault (a dropped rope scale, a
permutation, an epsilon, a window), however coarse the artifact's types are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.ggml_decode import decode
from llmx.formats.gguf import GgufFile, TensorInfo, Value, layout
from llmx.formats.safetensors import write_safetensors
from llmx.models.model import Model

CHUNK_BYTES = 8 << 20  # of decoded float32 rows at a time
GGUF_LAYER = re.compile(r"blk\.(\d+)\.")
CHECKPOINT_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer")
LAYER_NUMBER_KEYS = ("mlp_only_layers",)  # lists of layer numbers, not one item a layer


def stored_rows(file: GgufFile, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, u8[rows, row bytes]) pieces of a tensor in order; its pages are handed back at the end.

    The rows are those of its 2-D view: 1-D is one row, [experts, out, in] has experts * out rows. A piece decodes to
    at most CHUNK_BYTES (or one row).
    """
    tensor = file.tensors[name]
    cols = tensor.shape[-1]
    data = file.bytes(name).reshape(-1, row_bytes(tensor.type_name, cols))
    step = max(1, CHUNK_BYTES // (4 * cols))
    for start in range(0, len(data), step):
        yield start, data[start : start + step]
    file.release(name)


def twin_bytes(file: GgufFile, layers: int | None = None) -> int:
    """Returns the bytes of the float32 data of the first `layers` layers (all of them: None)."""
    return sum(4 * prod(file.tensors[name].shape) for name in _kept(file.tensors, GGUF_LAYER, layers))


def is_its_own_twin(file: GgufFile) -> bool:
    """Tells whether every tensor is F32 already."""
    return all(tensor.type_name == "F32" for tensor in file.tensors.values())


def write_gguf_twin(file: GgufFile, path: Path, layers: int | None = None) -> None:
    """Writes the artifact's metadata and its tensors decoded to F32, streaming; only the first `layers` layers."""
    infos = [TensorInfo(name, "F32", file.tensors[name].shape) for name in _kept(file.tensors, GGUF_LAYER, layers)]
    plan = layout(_metadata(file, layers), infos)
    with path.open("wb") as out:
        out.truncate(plan.size)
        out.write(plan.header)
        for info in infos:
            out.seek(plan.placements[info.name].offset)
            type_name = file.tensors[info.name].type_name
            for _, data in stored_rows(file, info.name):
                out.write(np.ascontiguousarray(decode(type_name, data), dtype="<f4").data)


def write_checkpoint_twin(restored: Mapping[str, Any], model: Model, folder: Path, layers: int | None = None) -> None:
    """Writes a checkpoint folder: the source's config and the artifact's weights in the source's layout, as F32.

    restored: checkpoint tensor name -> a function that returns its f32 values; one tensor is in memory at a time.
    """
    config = cut_config(model.checkpoint.config, layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = _kept(restored, CHECKPOINT_LAYER, layers)
    shapes = {name: model.checkpoint.tensors[name].shape for name in names}
    tensors = ((name, "F32", shapes[name], _as_bytes(restored[name])) for name in names)
    write_safetensors(folder / "model.safetensors", tensors)


def cut_config(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """Returns config.json of the same model with its first `layers` layers only."""
    if layers is None:
        return dict(config)
    count = next(int(config[key]) for key in LAYER_COUNT_KEYS if key in config)

    def cut(key: str, value: Any) -> Any:
        if key in LAYER_COUNT_KEYS:
            return layers
        if not isinstance(value, list):
            return value
        if key in LAYER_NUMBER_KEYS:
            return [number for number in value if number < layers]
        return value[:layers] if len(value) == count and key != "architectures" else value

    return {key: cut(key, value) for key, value in config.items()}


def _kept(names: Mapping[str, Any], pattern: re.Pattern[str], layers: int | None) -> list[str]:
    def keep(name: str) -> bool:
        match = pattern.search(name)
        return layers is None or match is None or int(match[1]) < layers

    return [name for name in names if keep(name)]


def _metadata(file: GgufFile, layers: int | None) -> dict[str, Value]:
    """The artifact's metadata, value types kept; per-layer arrays and the layer count cut to `layers`."""
    count_key = f"{file.metadata.get('general.architecture')}.block_count"
    count = file.metadata.get(count_key)
    kept: dict[str, Value] = {}
    for key, value in file.metadata.items():
        if key.startswith("split."):
            continue
        if layers is not None and key == count_key:
            value = layers  # noqa: PLW2901
        per_layer = isinstance(value, list) and len(value) == count and not key.startswith("tokenizer.")
        if isinstance(value, list):
            value = tuple(value[:layers] if per_layer else value)  # noqa: PLW2901
        kept[key] = Value(file.types[key], value)
    return kept


def _as_bytes(read: Any) -> Iterator[memoryview]:
    yield np.ascontiguousarray(read(), dtype="<f4").reshape(-1).view(np.uint8).data
