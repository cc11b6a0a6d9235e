"""A GGUF file as a model: what a checkpoint's folder would say, made of its metadata; its weights, decoded by rows.

metadata ── config.json, tokenizer.json, … in a folder that is removed at the end
tensors  ── rows in the checkpoint's order ── Weight ── decoder, exporters
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.exporters.gguf_config import ROPE_TENSORS, config
from llmx.exporters.gguf_families import FAMILIES
from llmx.exporters.gguf_tensors import Entry, Piece, decoded_rows, entries, restore
from llmx.exporters.gguf_tokenizer import tokenizer_files
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.ggml_decode import decode
from llmx.formats.ggml_packers import LAYOUTS
from llmx.formats.gguf import GgufFile, read_gguf_set
from llmx.formats.safetensors import shorten, write_safetensors
from llmx.models.architecture import Architecture, TensorSpec
from llmx.models.checkpoint import SINGLE, Checkpoint, CheckpointSource, CheckpointTensor
from llmx.models.families import describe
from llmx.models.model import FLOATS, Model, Weight, open_model

SUFFIX = ".gguf"
Floats = npt.NDArray[np.float32]


class GgufCheckpoint(Checkpoint):
    """The folder and the tensors that a checkpoint with a file's numbers would have; all of them F32, decoded.

    The folder has no weights before `materialize` writes them: only transformers needs them there.
    """

    __slots__ = ("__weakref__", "_stamps_of", "entries", "file", "materialized")

    def __init__(self, file: GgufFile, folder: Path, source: CheckpointSource, settings: dict[str, Any]) -> None:
        self.folder, self.source, self.config, self.file = folder, source, settings, file
        self.generation_config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        self.tensors = {}
        self.entries: tuple[Entry, ...] = ()
        self.materialized = False
        self._stamps_of = _stamps(file)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(self.file.paths))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, decoded."""
        return sum(4 * int(np.prod(tensor.shape, dtype=np.int64)) for tensor in self.tensors.values())

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """u8[stop - start] of the decoded tensor's little-endian float32 bytes, made anew."""
        return _bytes_of(self._restored()[name]())[start:stop]

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing: what `bytes` returns is the caller's own."""

    def check_unchanged(self) -> None:
        """Raises: IntegrityError when a file was rewritten since it was opened."""
        if _stamps(self.file) != self._stamps_of:
            raise IntegrityError("the GGUF file was changed while it was being read", where=self.file.paths[0])

    def materialize(self) -> None:
        """Write the decoded weights into the folder, so that transformers loads it."""
        if self.materialized:
            return
        restored = self._restored()
        tensors = ((name, "F32", self.tensors[name].shape, _chunks(read)) for name, read in restored.items())
        write_safetensors(self.folder / SINGLE, tensors)
        self.materialized = True

    def _restored(self) -> dict[str, Any]:
        return restore(self.file, Model(describe(self.config), self), self.entries)


def _stamps(file: GgufFile) -> list[tuple[int, int]]:
    return [(status.st_size, status.st_mtime_ns) for status in (path.stat() for path in file.paths)]


def _bytes_of(values: Floats) -> np.ndarray:
    return np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8)


def _chunks(read: Any) -> Iterator[memoryview]:
    yield _bytes_of(read()).data


class GgufWeight(Weight):
    """Rows of a canonical tensor, read from the GGUF tensor that holds them and put into the checkpoint's order."""

    __slots__ = ("_entry", "_file", "_first", "_head", "_offset", "_transform")

    def __init__(self, spec: TensorSpec, checkpoint: GgufCheckpoint, place: tuple[Entry, int], a: Architecture) -> None:
        """place: the tensor, and its first row (of a vector: element) that is this one's."""
        super().__init__(spec, checkpoint)
        self._file, (self._entry, self._first) = checkpoint.file, place
        piece: Piece = next(piece for piece in self._entry.pieces if piece.spec.name == spec.name)
        self._transform, self._head = piece.transform, a.head_dim
        self._offset = np.float32(a.norm_offset if piece.transform == "gain" else 0.0)

    @property
    def stored_type(self) -> str:
        """The ggml type of its rows."""
        return self._file.tensors[self._entry.name].type_name

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = self.rows if stop is None else stop
        if len(self.spec.shape) == 1:
            values = decoded_rows(self._file, self._entry.name, 0, 1)[:, self._first : self._first + self.cols]
            turned = values[:, self._order(0, self.cols)] if self._transform.startswith("rope") else values
            return (turned - self._offset if self._offset else turned)[start:stop]
        return decode(self.stored_type, self.read_stored(start, stop))

    def read_stored(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """u8[stop - start, row bytes]: the rows as the file has them, in the checkpoint's order. Matrices only."""
        assert len(self.spec.shape) > 1, "a vector's elements may lie in another order than their bytes"
        stop = self.rows if stop is None else stop
        stored = self._file.bytes(self._entry.name).reshape(-1, row_bytes(self.stored_type, self.cols))
        mine = stored[self._first : self._first + self.rows]
        return mine[self._order(start, stop)] if self._transform.startswith("rope") else mine[start:stop].copy()

    def _order(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Which row of the file row `start` to `stop` are: row i of a head is its row 2 i, the rest the odd ones."""
        head, inside = np.divmod(np.arange(start, stop), self._head)
        half = self._head // 2
        return head * self._head + np.where(inside < half, 2 * inside, 2 * (inside - half) + 1)

    def read_raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The same as `read`."""
        return self.read(start, stop)

    def views(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """One piece: the bits u32[stop - start, cols] of these rows, decoded."""
        yield 0, np.ascontiguousarray(self.read(start, stop)).view(np.uint32)

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Hand the pages of the whole tensor back to the system."""
        self._file.release(self._entry.name)


class GgufModel(Model):
    """The model of a GGUF file."""

    __slots__ = ("gguf",)

    def __init__(self, architecture: Architecture, checkpoint: GgufCheckpoint) -> None:
        super().__init__(architecture, checkpoint)
        self.gguf = checkpoint
        places = _places(checkpoint.entries)
        self._weights = {
            spec.name: GgufWeight(spec, checkpoint, places[spec.name], architecture) for spec in architecture.tensors
        }


def is_gguf(model: str | Path) -> bool:
    """Whether this names a GGUF file and no folder or hub id."""
    return Path(model).suffix.lower() == SUFFIX and Path(model).is_file()


def open_source(model: str | Path, revision: str | None = None) -> Model:
    """The model in a GGUF file, in a local folder or under a hub id.

    Raises: UsageError for a revision of a file; what open_gguf_model and open_model raise.
    """
    if not is_gguf(model):
        return open_model(model, revision)
    if revision is not None:
        raise UsageError("--revision names a hub revision; MODEL is a local file", where=model)
    return open_gguf_model(model)


def open_gguf_model(path: str | Path) -> GgufModel:
    """The model in a GGUF file (any file of a set); its checkpoint's folder has config.json and tokenizer files.

    Raises: what `read_gguf_set`, `config` and `tokenizer_files` raise; IntegrityError listing every missing, left-over
    and wrongly shaped tensor; UnsupportedError for tensors of a type that cannot be decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("there is no such file", where=path)
    file = read_gguf_set(path)
    settings, told = config(file), tokenizer_files(file)
    architecture = describe(settings)
    layout = entries(architecture, FAMILIES[architecture.family], architecture.vocab)
    _check(file, layout)
    name = file.metadata.get("general.name")
    called = name.strip().replace(" ", "-") if isinstance(name, str) and name.strip() else path.stem
    source = CheckpointSource(str(path), None, called)
    folder = Path(tempfile.mkdtemp(prefix="llmx-gguf-"))
    generation = told["generation_config.json"]
    settings |= {key: generation[key] for key in ("bos_token_id", "pad_token_id") if key in generation}
    for document, content in {"config.json": settings, **told}.items():
        (folder / document).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    checkpoint = GgufCheckpoint(file, folder, source, settings)
    checkpoint.entries = tuple(entry for entry in layout if entry.pieces)
    checkpoint.tensors = _tensors(architecture)
    return GgufModel(architecture, checkpoint)


def _places(layout: tuple[Entry, ...]) -> dict[str, tuple[Entry, int]]:
    """Canonical name -> the GGUF tensor that holds it, and where it begins there."""
    places: dict[str, tuple[Entry, int]] = {}
    for entry in layout:
        first = 0
        for piece in entry.pieces:
            places[piece.spec.name] = (entry, first)
            first += piece.spec.shape[-1] if len(entry.shape) == 1 else int(np.prod(piece.spec.shape[:-1]))
    return places


def _tensors(architecture: Architecture) -> dict[str, CheckpointTensor]:
    """The tensors of a checkpoint of this architecture in the usual spelling."""
    found: dict[str, CheckpointTensor] = {}
    for spec in architecture.tensors:
        source = spec.source
        shape = list(spec.shape[1:] if len(source.names) > 1 else spec.shape)
        if source.rows is not None:  # slices come in order: the last one tells the whole length
            shape[max(len(shape) - 2, 0)] = source.rows[1]
        made = CheckpointTensor("F32", tuple(shape[::-1] if source.transpose else shape))
        found |= dict.fromkeys(source.names, made)
    return found


def _check(file: GgufFile, layout: tuple[Entry, ...]) -> None:
    """Raises: IntegrityError, UnsupportedError as open_gguf_model."""
    wanted = {entry.name: entry.shape for entry in layout if entry.pieces}
    problems = [f"{name} is missing" for name in wanted if name not in file.tensors]
    problems += [
        f"{name} has shape {list(file.tensors[name].shape)}, {list(shape)} is expected"
        for name, shape in wanted.items()
        if name in file.tensors and file.tensors[name].shape != shape
    ]
    known = {*wanted, *ROPE_TENSORS}
    problems += [
        f"{name} is left over: the architecture has no such tensor" for name in file.tensors if name not in known
    ]
    if problems:
        what = "the tensors are not those of the file's metadata"
        raise IntegrityError(what, where=file.paths[0], problems=shorten(problems))
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        kinds.setdefault(file.tensors[name].type_name, []).append(name)
    unknown = kinds.keys() - LAYOUTS.keys() - FLOATS.keys()
    refused = [f"{kind}: {', '.join(kinds[kind][:3])} ({len(kinds[kind])} in all)" for kind in sorted(unknown)]
    if refused:
        raise UnsupportedError("llmx cannot decode these types", where=file.paths[0], problems=refused)
