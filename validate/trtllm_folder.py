"""A TensorRT-LLM checkpoint folder, opened: its configuration and its safetensors files; no weight is read.

    hf      config.json (with quantization_config) · hf_quant_config.json · model.safetensors, or shards and their index
    ranks   config.json (architecture, mapping, quantization) · rank0.safetensors · rank1.safetensors · ...

Who wrote the folder chose the names in its index: each must be the plain name of a file in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, LlmxError
from llmx.exporters.manifest import SUFFIX
from llmx.formats.json_text import read_object
from llmx.formats.safetensors import SafetensorsFile, open_safetensors, shorten
from llmx.formats.trtllm import CONFIG_NAME as CONFIG
from llmx.formats.trtllm import HF, INDEX_NAME, MODEL_NAME, RANKS, rank_name
from llmx.formats.trtllm import QUANT_NAME as QUANTIZATION

INLINE = "quantization_config"
METHOD = "modelopt"
MOST_RANKS = 1 << 12
FORMAT = "trtllm"
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a folder says of its own numbers. algorithm, cache: as TensorRT-LLM names them, None for floats.

    group: weights that share a scale, where they are in groups. excluded: patterns of modules that are kept in floats.
    told: all of it, as it stands in the file.
    """

    algorithm: str | None
    cache: str | None
    group: int | None
    excluded: tuple[str, ...]
    told: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Folder:
    """layout: hf or ranks. files: of ranks, in their order; else in that of their names. beside: other JSON files."""

    path: Path
    layout: str
    config: Mapping[str, Any]
    quantization: Quantization
    files: tuple[SafetensorsFile, ...]
    beside: Mapping[str, Mapping[str, Any]]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The configuration, then the files with weights."""
        return (self.path / CONFIG, *(file.path for file in self.files))

    @property
    def metadata(self) -> dict[str, str]:
        """What the files' headers say beside their tensors; the first one's words count."""
        found: dict[str, str] = {}
        for file in reversed(self.files):
            found |= file.metadata
        return found

    @property
    def parallel(self) -> tuple[int, int]:
        """Parts that every matrix is cut into, and parts that the layers are: (1, 1) of a folder for all."""
        told = self.config.get("mapping")
        sizes = [told.get(key, 1) if isinstance(told, dict) else 1 for key in ("tp_size", "pp_size")]
        return sizes[0], sizes[1]


def is_folder(path: Path) -> bool:
    """Whether a path is such a folder, or the config.json of one."""
    folder = folder_of(path)
    if folder is None:
        return False
    if (folder / QUANTIZATION).is_file() or (folder / rank_name(0)).is_file():
        return True
    try:
        told = read_object(folder / CONFIG).get(INLINE)
        return (isinstance(told, dict) and told.get("quant_method") == METHOD) or _written_as(folder) == FORMAT
    except LlmxError:
        return False


def folder_of(path: Path) -> Path | None:
    """The folder of a config.json, or that has one; None for anything else."""
    folder = path.parent if path.name == CONFIG else path
    return folder if (folder / CONFIG).is_file() else None


def _written_as(folder: Path) -> object:
    """The format that the manifest in a folder names: floats alone are told from a checkpoint by nothing else."""
    manifest = folder / f"{Path(CONFIG).stem}{SUFFIX}"
    return read_object(manifest).get("format") if manifest.is_file() else None


def open_folder(path: Path) -> Folder:
    """The folder, or the one that a config.json lies in.

    Raises: IntegrityError for a file that is missing, cut, hostile, or not what the folder's own index says.
    """
    folder = folder_of(path)
    if folder is None:
        raise IntegrityError(f"there is no {CONFIG}", where=path)
    config = read_object(folder / CONFIG)
    ranks = (folder / rank_name(0)).is_file() or "mapping" in config
    beside = {name: read_object(folder / name) for name in (QUANTIZATION,) if (folder / name).is_file()}
    if ranks:
        return Folder(folder, RANKS, config, _of_ranks(config), _rank_files(folder, config), beside)
    return Folder(folder, HF, config, _of_hf(config, beside.get(QUANTIZATION)), _shards(folder), beside)


def _of_hf(config: Mapping[str, Any], apart: Mapping[str, Any] | None) -> Quantization:
    """hf_quant_config.json where it is there, as TensorRT-LLM reads it first; else what config.json has of it."""
    inline = config.get(INLINE)
    told = apart.get("quantization") if apart is not None else inline
    told = told if isinstance(told, dict) else {}
    return _quantization(told, told.get("exclude_modules") if apart is not None else told.get("ignore"))


def _of_ranks(config: Mapping[str, Any]) -> Quantization:
    told = config.get("quantization")
    told = told if isinstance(told, dict) else {}
    return _quantization(told, told.get("exclude_modules"))


def _quantization(told: Mapping[str, Any], excluded: object) -> Quantization:
    names = tuple(name for name in excluded if isinstance(name, str)) if isinstance(excluded, list) else ()
    return Quantization(_text(told.get("quant_algo")), _cache(told), _group(told), names, told)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _cache(told: Mapping[str, Any]) -> str | None:
    """FP8 or INT8; config.json's own way of saying it is a scheme of 8 bits."""
    scheme = told.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        return {"float": "FP8", "int": "INT8"}.get(str(scheme.get("type")))
    return _text(told.get("kv_cache_quant_algo")) or _text(scheme)


def _group(told: Mapping[str, Any]) -> int | None:
    found = told.get("group_size")
    if found is None and isinstance(groups := told.get("config_groups"), dict):
        kept = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        found = next((weights.get("group_size") for weights in kept if isinstance(weights, dict)), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def _shards(folder: Path) -> tuple[SafetensorsFile, ...]:
    """One file, or those that the index names, each with exactly the tensors that it says."""
    if not (folder / INDEX_NAME).is_file():
        if not (folder / MODEL_NAME).is_file():
            raise IntegrityError(f"there is no {MODEL_NAME} and no {INDEX_NAME}", where=folder)
        return (open_safetensors(folder / MODEL_NAME),)
    told = read_object(folder / INDEX_NAME).get("weight_map")
    places = told if isinstance(told, dict) else {}
    names = sorted({str(name) for name in places.values()})
    problems = [f"{name!r} is not the plain name of a file" for name in names if not _SHARD.fullmatch(name)]
    problems += [] if places else ["it names no tensor"]
    if problems:
        raise IntegrityError("the index is broken", where=folder / INDEX_NAME, problems=shorten(problems))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise IntegrityError("files of the index are missing", where=folder, problems=shorten(missing))
    files = tuple(open_safetensors(folder / name) for name in names)
    held = {tensor: file.path.name for file in files for tensor in file.tensors}
    problems = [f"{name} is said to lie in {place}" for name, place in places.items() if held.get(name) != place]
    problems += [f"{name} lies in {held[name]}, and the index does not say so" for name in held.keys() - places.keys()]
    count = sum(len(file.tensors) for file in files)
    problems += [f"{count - len(held)} tensors lie in two files"] if count > len(held) else []
    if problems:
        raise IntegrityError("the index is not of these files", where=folder / INDEX_NAME, problems=shorten(problems))
    return files


def _rank_files(folder: Path, config: Mapping[str, Any]) -> tuple[SafetensorsFile, ...]:
    """rank0.safetensors and so on, as many as the mapping says."""
    told = config.get("mapping")
    mapping = told if isinstance(told, dict) else {}
    sizes = [mapping.get(key, 1) for key in ("world_size", "tp_size", "pp_size")]
    if not all(type(size) is int and 0 < size <= MOST_RANKS for size in sizes) or sizes[0] != sizes[1] * sizes[2]:
        raise IntegrityError(f"the mapping {mapping} is no number of ranks", where=folder / CONFIG)
    wanted = [rank_name(rank) for rank in range(sizes[0])]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise IntegrityError(f"{len(missing)} of {sizes[0]} ranks are missing", where=folder, problems=shorten(missing))
    if (folder / rank_name(sizes[0])).exists():
        raise IntegrityError(f"there are more ranks than the {sizes[0]} of the mapping", where=folder)
    return tuple(open_safetensors(folder / name) for name in wanted)
