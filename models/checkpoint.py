"""A checkpoint in Hugging Face layout: config.json and lazily read safetensors shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import IntegrityError, LlmxError, ResourceError, UnsupportedError, UsageError
from llmx.formats.json_text import read_object
from llmx.formats.safetensors import SafetensorsFile, open_safetensors, shorten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")  # never pickles, never code

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """What the user named: a folder or a hub id, and the hub's revision (None for a folder).

    name: what the model is called after: the hub id, or the folder's own name.
    """

    id: str
    revision: str | None
    name: str


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """An open checkpoint. Nothing but headers is read before `bytes` is called."""

    __slots__ = ("_shards", "_stamps", "config", "folder", "generation_config", "source", "tensors")

    def __init__(self, folder: Path, source: CheckpointSource, shards: Mapping[str, SafetensorsFile]) -> None:
        """shards: tensor name -> the file that stores it."""
        self.folder = folder
        self.source = source
        self.config: Mapping[str, Any] = read_object(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config: Mapping[str, Any] = read_object(generation) if generation.is_file() else {}
        self._shards = shards
        self.tensors: Mapping[str, CheckpointTensor] = {
            name: CheckpointTensor(file.tensors[name].dtype, file.tensors[name].shape) for name, file in shards.items()
        }
        self._stamps = {path: _stamp(path) for path in self.files}

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted by name."""
        return tuple(sorted({file.path for file in self._shards.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.tensors[name].nbytes for name, file in self._shards.items())

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """u8[stop - start] of the tensor's stored bytes. Raises: IntegrityError where they are no longer there."""
        return self._shards[name].bytes(name, start, stop)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Hand back what a reader keeps of these bytes."""
        self._shards[name].release(name, start, stop)

    def materialize(self) -> None:
        """Have the weights in `folder` where transformers reads them. A checkpoint's are there."""

    def identity(self) -> str:
        """A sha256 over the config and every weight file's name, size and time of change."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for path in self.files:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises: IntegrityError naming every weight file that was rewritten since the checkpoint was opened."""
        changed = [path.name for path, stamp in self._stamps.items() if _stamp(path) != stamp]
        if changed:
            raise IntegrityError(
                "The checkpoint was changed while it was being read.",
                where=self.folder,
                problems=changed,
                fix="Run again when nothing writes to that folder.",
            )


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a local folder, or under a hub id at `revision`.

    A hub id is looked up in the local cache when the hub cannot be reached.
    Raises: UsageError when MODEL is neither a folder nor a hub id; UnsupportedError when it has no safetensors;
    IntegrityError when it has pickles instead, or shards are missing, cut or disagree with their index; ResourceError
    when a download fails.
    """
    path = Path(model)
    if str(model) and path.is_dir():
        if revision is not None:
            raise UsageError("--revision names a hub revision; MODEL is a local folder.", where=path)
        folder, source = path, CheckpointSource(str(model), None, path.resolve().name)
    elif path.is_file():
        raise UsageError("MODEL is a file; give the folder that holds config.json.", where=path)
    elif isinstance(model, str) and _HUB_ID.fullmatch(model):
        folder = _download(model, revision)
        source = CheckpointSource(model, folder.name, model)  # the snapshot is named by its commit
    else:
        raise UsageError("MODEL is neither a folder nor a hub id such as owner/name.", where=model)
    _refuse_other_kinds(folder)
    return Checkpoint(folder, source, _open_shards(folder))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Another file of the same size and time under the same name is another file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # With HF_HUB_OFFLINE set, or without a connection, this answers from the local cache.
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(DOWNLOADED)))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            "There is no such folder here and no such model on the hub (or it is private).",
            where=model,
            fix="Check the name; for a gated model run `hf auth login` first.",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"There is no such folder and no such model in the local cache; downloading failed: {_first_line(error)}",
            where=model if revision is None else f"{model} at {revision}",
            fix="Give a local folder, or connect and run again; HF_HUB_OFFLINE must not be set.",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refuse_other_kinds(folder: Path) -> None:
    def any_file(*patterns: str) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    safetensors = any_file("*.safetensors", INDEX)
    refusals: list[tuple[bool, Callable[..., LlmxError], str, str]] = [
        (
            any_file("adapter_config.json") and not (folder / "config.json").is_file(),
            UnsupportedError,
            "This folder holds an adapter (LoRA), not a whole model.",
            "Merge it into its base model first (peft: merge_and_unload, save_pretrained).",
        ),
        (
            not (folder / "config.json").is_file(),
            UsageError,
            "This folder has no config.json, so it is no checkpoint in Hugging Face layout.",
            "Give the folder that holds config.json and *.safetensors.",
        ),
        (
            not safetensors and any_file("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
            IntegrityError,
            "This checkpoint has pickle files only; opening one can run any code, so it is refused.",
            "Convert it to safetensors: load it with transformers where you trust it, then save_pretrained().",
        ),
        (
            not safetensors,
            UnsupportedError,
            "There are no *.safetensors weights (pickle files are not downloaded).",
            f"Give a folder with {SINGLE} or {INDEX} and its shards.",
        ),
    ]
    for applies, error, what, fix in refusals:
        if applies:
            raise error(what, where=folder, fix=fix)


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    # transformers looks for the single file first, so a stale index beside it does not count.
    if (folder / SINGLE).is_file():
        file = open_safetensors(folder / SINGLE)
        return dict.fromkeys(file.tensors, file)
    if not (folder / INDEX).is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        raise IntegrityError(
            f"The shards have no {INDEX} that says what belongs to the model.", where=folder, problems=names
        )
    return _open_indexed(folder, _read_index(folder / INDEX))


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError("The index has no weight_map.", where=path)
    bad = {
        str(shard)
        for shard in weight_map.values()
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard) or os.path.isabs(shard)  # noqa: PTH117
    }
    if bad:
        raise IntegrityError(
            "The index names files that are not plain names of shards in its own folder.",
            where=path,
            problems=shorten([repr(name) for name in sorted(bad)]),
        )
    return weight_map


def _open_indexed(folder: Path, weight_map: Mapping[str, str]) -> dict[str, SafetensorsFile]:
    problems: list[str] = []
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            problems.append(f"{shard} is missing")
            continue
        try:
            files[shard] = open_safetensors(folder / shard)
        except IntegrityError as error:
            problems += [f"{shard}: {line}" for line in (error.problems or (error.what,))]
    absent = [f"{name} is not in {s}" for name, s in weight_map.items() if s in files and name not in files[s].tensors]
    shards: dict[str, SafetensorsFile] = {}
    for shard, file in files.items():
        for name in file.tensors:
            if name in shards:
                problems.append(f"{name} is stored in {shards[name].path.name} and again in {shard}")
            shards[name] = file
    problems += absent
    if problems:
        raise IntegrityError(
            "The shards do not match their index.",
            where=folder / INDEX,
            problems=shorten(problems),
            fix="Download the shards named here again.",
        )
    return shards
