"""What two artifacts have differently: `llmx diff`. A checkpoint's folder counts as the float file made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from llmx.exporters.gguf_tensors import Entry
    from llmx.models.model import Model, Weight
    from llmx.validate.kinds import ArtifactKind

DIFFERENT = 1  # as diff(1) has it
BY_CANONICAL_NAMES = frozenset({"onnx", "trtllm"})  # formats whose tensors are named as the checkpoint's
TOKENIZER, MERGES, TEMPLATE = "tokenizer.", "tokenizer.ggml.merges", "tokenizer.chat_template"
# Follow from other things that are compared themselves: digests from tensors, the rest from how a file was cut.
DERIVED = ("llmx.tensor_digests", "split.no", "split.count", "split.tensors.count")
ADDED, REMOVED, CHANGED = "added", "removed", "changed"
FLOATS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_WEIGHTS = 1 << 20  # decoded at once
_SHOWN_ITEMS = 3
_SHOWN_TEXT = 60


@dataclass(frozen=True, slots=True)
class Change:
    """A key that one side lacks or has otherwise. detail: the values, arrays in short."""

    key: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} {self.key}: {self.detail}"

    def to_json(self) -> dict[str, str]:
        return {"key": self.key, "kind": self.kind, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor on both sides. types, shapes: None on a side that lacks it. same_bytes: None where types differ.

    rms: ||second - first|| / ||first|| of the decoded values, NaN where one of them is none; None where shapes differ
    or a type cannot be decoded.
    """

    name: str
    types: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    same_bytes: bool | None
    rms: float | None

    @property
    def differs(self) -> bool:
        return self.same_bytes is not True or self.shapes[0] != self.shapes[1]

    def __str__(self) -> str:
        if None in self.types:
            where = "second" if self.types[0] is None else "first"
            return f"{self.name}: only in the {where}"
        parts = []
        if self.shapes[0] != self.shapes[1]:
            parts.append(" -> ".join("x".join(map(str, shape or ())) for shape in self.shapes))
        if self.types[0] != self.types[1]:
            parts.append(f"{self.types[0]} -> {self.types[1]}")
        elif self.same_bytes is False:
            parts.append(f"{self.types[0]}, other bytes")
        if self.rms is not None:
            parts.append(f"relative RMS difference {self.rms:.3g}")
        return f"{self.name}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "types": list(self.types),
            "shapes": [None if shape is None else list(shape) for shape in self.shapes],
            "same_bytes": self.same_bytes,
            "relative_rms": None if self.rms is None or not math.isfinite(self.rms) else self.rms,
        }


@dataclass(frozen=True, slots=True)
class Differences:
    """Everything compared. tensors: all of them, in the first side's order, then those that only the second has."""

    first: str
    second: str
    metadata: tuple[Change, ...]
    tokenizer: tuple[Change, ...]
    tensors: tuple[TensorPair, ...]
    first_bytes: int
    second_bytes: int

    @property
    def exit_code(self) -> int:
        """0 where nothing differs, 1 otherwise, as diff(1) has it."""
        return DIFFERENT if self.metadata or self.tokenizer or any(tensor.differs for tensor in self.tensors) else 0

    def to_json(self) -> dict[str, Any]:
        """The object `llmx diff --json` prints."""
        return {
            "equal": self.exit_code == 0,
            "first": self.first,
            "second": self.second,
            "bytes": [self.first_bytes, self.second_bytes],
            "metadata": [change.to_json() for change in self.metadata],
            "tokenizer": [change.to_json() for change in self.tokenizer],
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


@dataclass(frozen=True, slots=True)
class _Tensor:
    """rows: (start, stop) -> f32[rows, columns]. raw: the same rows' bytes. release: hands the pages back."""

    type_name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    raw: Callable[[int, int], np.ndarray]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Side:
    name: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, _Tensor]
    nbytes: int


def diff(first: Path, second: Path) -> Differences:
    """Compare two artifacts of one format, or one with a checkpoint's folder, tensor by tensor, streamed.

    GGUF files, split sets (by any of their files), ONNX graphs or their folders.

    Raises: UsageError where one is not there, IntegrityError where one is broken, UnsupportedError for a checkpoint of
    an architecture that llmx does not know, and for a TensorRT engine.
    """
    a, b = _opened(first, second)
    changes = list(_changes(a.metadata, b.metadata))
    names = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    return Differences(
        a.name,
        b.name,
        tuple(change for change in changes if not change.key.startswith(TOKENIZER)),
        tuple(change for change in changes if change.key.startswith(TOKENIZER)),
        tuple(_pair(name, a.tensors.get(name), b.tensors.get(name)) for name in names),
        a.nbytes,
        b.nbytes,
    )


def _opened(first: Path, second: Path) -> tuple[_Side, _Side]:
    """Both sides. A checkpoint is compared as the float file of the other's format; two of them, as GGUF files."""
    from llmx.validate.kinds import find_kind

    kinds = [None if _is_checkpoint(path) else find_kind(path) for path in (first, second)]
    names = {kind.name for kind in kinds if kind is not None}
    if "tensorrt" in names:
        what = "an engine's weights cannot be read back"
        raise UnsupportedError(what, fix="see what engines compute with `llmx compare`")
    if len(names) > 1:
        what = "artifacts of two formats name and lay out their tensors otherwise"
        raise UsageError(what, fix="see what both lost with `llmx compare`")
    if names & BY_CANONICAL_NAMES and None in kinds:
        return _beside_checkpoint(first, second, kinds)
    a, b = (
        _checkpoint(path) if kind is None else _artifact(path, kind)
        for path, kind in zip((first, second), kinds, strict=True)
    )
    return a, b


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is one; those of TensorRT have a config.json of their own."""
    from llmx.validate.kinds import kind_named

    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    return not any(kind_named(name).recognises(path) for name in ("tensorrt", "trtllm"))


def _beside_checkpoint(first: Path, second: Path, kinds: Sequence[ArtifactKind | None]) -> tuple[_Side, _Side]:
    """A graph and a checkpoint, both under the checkpoint's canonical names."""
    from llmx.models.model import open_model

    folder, artifact = (first, second) if kinds[0] is None else (second, first)
    kind = next(kind for kind in kinds if kind is not None)
    model = open_model(folder)
    plain, other = _canonical(folder, model, kind, artifact), _artifact(artifact, kind, model)
    return (plain, other) if kinds[0] is None else (other, plain)


def _canonical(folder: Path, model: Model, kind: ArtifactKind, artifact: Path) -> _Side:
    """A checkpoint's own tensors; norm gains as the artifact has them."""
    entries = _weight_entries(kind, artifact, model)

    def tensor(weight: Weight, entry: Entry) -> _Tensor:
        return _Tensor(
            weight.dtype,
            weight.spec.shape,
            lambda start, stop: kind.source_rows(model, entry, start, stop),
            weight.read_raw,
            weight.release,
        )

    found = {weight.spec.name: tensor(weight, entries[weight.spec.name]) for weight in model.weights()}
    return _Side(str(folder), {}, found, model.checkpoint.nbytes)


def _weight_entries(kind: ArtifactKind, artifact: Path, model: Model) -> dict[str, Entry]:
    """Canonical name -> what the tensor is in the artifact; without a graph's own tables, which take a recording."""
    from llmx.validate.onnx_kind import weight_entry

    if kind.name == "onnx":
        return {weight.spec.name: weight_entry(weight.spec, model) for weight in model.weights()}
    return {entry.name: entry for entry in kind.entries(kind.open(artifact), model, model.architecture.vocab)}


def _artifact(path: Path, kind: ArtifactKind, model: Model | None = None) -> _Side:
    """model: its tensors are named as those of this one, and the metadata, which a checkpoint has not, is left out."""
    file = kind.open(path)
    file = file if model is None else kind.mapped(file, model.architecture)

    def tensor(name: str) -> _Tensor:
        stored = file.tensors[name]
        return _Tensor(
            stored.type_name,
            stored.shape,
            lambda start, stop: kind.decoded(file, name, start, stop),
            lambda start, stop: kind.kept(file, name, start, stop),
            lambda: file.release(name),
        )

    metadata = file.metadata if model is None else {}
    return _Side(str(path), metadata, {name: tensor(name) for name in file.tensors}, file.nbytes)


def _checkpoint(folder: Path) -> _Side:
    """The folder as the file of its own float type that an export would write, without writing it."""
    import numpy as np

    from llmx.exporters import gguf
    from llmx.exporters.gguf_tensors import read_rows, release_rows
    from llmx.exporters.gguf_types import file_type
    from llmx.models.model import open_model
    from llmx.models.tokenizer import open_tokenizer
    from llmx.quant.grid import encode

    model = open_model(folder)
    dtypes = {weight.dtype for weight in model.weights() if len(weight.spec.shape) > 1}
    kind = next((FLOATS[name] for name in FLOATS if name in dtypes), "F32")
    export = gguf.prepare(model, open_tokenizer(folder), gguf.GgufOptions(file_type(kind)))

    def tensor(entry: Entry, type_name: str) -> _Tensor:
        def rows(start: int, stop: int) -> np.ndarray:
            return read_rows(model, entry, start, stop).reshape(stop - start, -1)

        return _Tensor(
            type_name,
            entry.shape,
            rows,
            lambda start, stop: np.ascontiguousarray(encode(type_name, rows(start, stop))).reshape(-1),
            lambda: release_rows(model, entry, 0, entry.rows),
        )

    steps = zip(export.entries, export.plan.steps, strict=True)
    metadata = {
        key: list(value.value) if isinstance(value.value, tuple) else value.value
        for key, value in export.metadata.items()
    }
    tensors = {entry.name: tensor(entry, step.type_name) for entry, step in steps}
    return _Side(str(folder), metadata, tensors, export.plan.nbytes)


def _pair(name: str, a: _Tensor | None, b: _Tensor | None) -> TensorPair:
    types = (None if a is None else a.type_name, None if b is None else b.type_name)
    shapes = (None if a is None else a.shape, None if b is None else b.shape)
    if a is None or b is None:
        return TensorPair(name, types, shapes, None, None)
    if a.shape != b.shape:
        return TensorPair(name, types, shapes, None if types[0] != types[1] else False, None)
    same = None if types[0] != types[1] else _same(a, b)
    rms = 0.0 if same else _rms(a, b)
    a.release()
    b.release()
    return TensorPair(name, types, shapes, same, rms)


def _spans(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    rows, step = math.prod(shape[:-1]), max(1, _WEIGHTS // shape[-1])
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _same(a: _Tensor, b: _Tensor) -> bool:
    import numpy as np

    def held(side: _Tensor, span: tuple[int, int]) -> np.ndarray:
        return np.ascontiguousarray(side.raw(*span)).reshape(-1).view(np.uint8)

    return all(np.array_equal(held(a, span), held(b, span)) for span in _spans(a.shape))


def _rms(a: _Tensor, b: _Tensor) -> float | None:
    """||b - a|| / ||a||, or None where a type has no decoder."""
    import numpy as np

    apart = size = 0.0
    try:
        for span in _spans(a.shape):
            x, y = a.rows(*span).astype(np.float64), b.rows(*span).astype(np.float64)
            apart += float(np.square(y - x).sum())
            size += float(np.square(x).sum())
    except UnsupportedError:
        return None
    return math.sqrt(apart / size) if size else math.sqrt(apart)


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Change]:
    for key in [*a, *(key for key in b if key not in a)]:
        if key in DERIVED:
            continue
        if key not in b:
            yield Change(key, REMOVED, _short(a[key]))
        elif key not in a:
            yield Change(key, ADDED, _short(b[key]))
        elif not _equal(a[key], b[key]):
            yield Change(key, CHANGED, _told(key, a[key], b[key]))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return _as_f32(a) == _as_f32(b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and a == b


def _as_f32(value: float) -> float:
    import numpy as np

    return float(np.float32(value))


def _told(key: str, a: Any, b: Any) -> str:
    if isinstance(a, list) and isinstance(b, list):
        return _lists(a, b)
    if key == TEMPLATE and isinstance(a, str) and isinstance(b, str):
        return _texts(a, b)
    return f"{_short(a)} -> {_short(b)}"


def _lists(a: list[Any], b: list[Any]) -> str:
    """How many items differ, and the first of them with their places."""
    places = [place for place, (x, y) in enumerate(zip(a, b, strict=False)) if not _equal(x, y)]
    shown = [f"[{place}] {_short(a[place])} -> {_short(b[place])}" for place in places[:_SHOWN_ITEMS]]
    length = f"{len(a)} items" if len(a) == len(b) else f"{len(a)} -> {len(b)} items"
    more = f" and {len(places) - _SHOWN_ITEMS} more" if len(places) > _SHOWN_ITEMS else ""
    return "; ".join([f"{length}, {len(places)} differ", *shown]) + more


def _texts(a: str, b: str) -> str:
    """The first line of two templates that differs; whitespace is shown, as it counts there."""
    pairs: Iterable[tuple[str, str]] = zip([*a.split("\n"), ""], [*b.split("\n"), ""], strict=False)
    for number, (x, y) in enumerate(pairs, 1):
        if x != y:
            return f"{len(a)} -> {len(b)} characters, first in line {number}: {_short(x)} -> {_short(y)}"
    return f"{len(a)} -> {len(b)} characters"


def _short(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(_short, value[:_SHOWN_ITEMS]))
        return f"[{shown}{', …' if len(value) > _SHOWN_ITEMS else ''}] ({len(value)})"
    written = repr(value) if isinstance(value, str) else str(value)
    return written if len(written) <= _SHOWN_TEXT else f"{written[:_SHOWN_TEXT]}…"
