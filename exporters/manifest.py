"""The manifest: what an artifact is, down to each tensor's sha256, and all that is needed to make the same bytes again.

    NAME.manifest.json beside NAME.gguf, or beside the first of NAME-00001-of-00003.gguf
    model.manifest.json in the folder of model.onnx
    rank0.manifest.json in the folder of rank0.engine

It holds no time, no path and nothing else of the machine that does not shape bytes: the same export writes the same
manifest. schemas/manifest-1.json says what each key means.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmx.errors import IntegrityError

if TYPE_CHECKING:
    from llmx.exporters.quantization import Quantization
    from llmx.exporters.target import Exporter, WrittenTensor
    from llmx.models.checkpoint import Checkpoint

SCHEMA = "llmx.manifest/1"
SCHEMA_FILE = Path(__file__).with_name("schemas") / "manifest-1.json"
SUFFIX = ".manifest.json"
# The libraries whose arithmetic or writing reaches the bytes; a format may name others.
LIBRARIES = ("gguf", "jinja2", "numba", "numpy", "tokenizers", "torch")
# Every file of a checkpoint that an export may read besides its weights; each that is there is hashed.
SOURCE_NAMES = (
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
SOURCE_PATTERNS = ("additional_chat_templates/*.jinja",)
_CHUNK = 1 << 22


def manifest_path(artifact: Path) -> Path:
    """Where the manifest of an artifact stands; of a split set, and of a graph's data, any file leads to it."""
    from llmx.formats.gguf_split import SHARD_NAME
    from llmx.formats.onnx import DATA_SUFFIX

    named = SHARD_NAME.fullmatch(artifact.name)
    graph = artifact.name.removesuffix(DATA_SUFFIX)
    stem = graph.removesuffix(Path(graph).suffix) if named is None else named["prefix"]
    return artifact.with_name(stem + SUFFIX)


def file_of(artifact: Path) -> Path:
    """The file that a runtime loads: of a folder the engine, the graph or the configuration, else the path itself."""
    from llmx.formats.onnx import MODEL_NAME
    from llmx.formats.tensorrt import ENGINE_NAME
    from llmx.formats.trtllm import CONFIG_NAME

    if not artifact.is_dir():
        return artifact
    names = (ENGINE_NAME, MODEL_NAME, CONFIG_NAME)
    return artifact / next((name for name in names if (artifact / name).is_file()), MODEL_NAME)


def json_schema() -> dict[str, Any]:
    """The JSON Schema that every manifest keeps to."""
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


class SourceHashes:
    """The sha256 of a checkpoint's files, read in a thread of its own beside the pass that looks at every weight.

    Both passes then need the same pages, so a shard is read from the disk once. A context manager: left early, it
    stops within a chunk. known: what an earlier run found of files that are as they were, which are not read again.
    """

    def __init__(self, checkpoint: Checkpoint, known: Sequence[Mapping[str, Any]] = ()) -> None:
        folder = checkpoint.folder
        index = {"model.safetensors.index.json"} if len(checkpoint.files) > 1 else set()
        found = [folder / name for name in (*SOURCE_NAMES, *index) if (folder / name).is_file()]
        found += [path for pattern in SOURCE_PATTERNS for path in folder.glob(pattern)]
        paths = {path.relative_to(folder).as_posix(): path for path in found}
        self._paths = dict(sorted((paths | {path.name: path for path in checkpoint.files}).items()))
        self._known = {str(file["name"]): dict(file) for file in known}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "source-hashes")
        self._found: dict[str, Future[dict[str, Any]]] = {}

    def __enter__(self) -> Self:
        self._found = {name: self._pool.submit(self._hash, name, path) for name, path in self._paths.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of every file, sorted by name. Raises: IntegrityError when one cannot be read."""
        return [future.result() for future in self._found.values()]

    def _hash(self, name: str, path: Path) -> dict[str, Any]:
        if name in self._known:
            return self._known[name]
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb") as stream:
                while not self._stop.is_set() and (chunk := stream.read(_CHUNK)):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise IntegrityError(f"the checkpoint cannot be read: {error.strerror}", where=path) from error
        return {"name": name, "bytes": size, "sha256": digest.hexdigest()}


def library_versions(others: Sequence[str] = ()) -> dict[str, str]:
    """The version of each of LIBRARIES and of others."""
    return {name: metadata.version(name) for name in sorted({*LIBRARIES, *others})}


def describe(
    exporter: Exporter,
    quantization: Quantization,
    *,
    libraries: Sequence[str],
    source_files: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    written: Sequence[WrittenTensor],
    importance: Mapping[str, str] | None,
    budget: Mapping[str, float] | None,
    tensor_types: Sequence[str],
    runtime: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The manifest of a written export.

    libraries: that only this format uses. files, source_files: name, bytes, sha256 of each. importance: name and sha256
    of the matrix. budget: what --target-size or --target-bpw asked. runtime: name and build, None where nothing was
    rerun.
    """
    source = exporter.model.checkpoint.source
    return {
        "schema": SCHEMA,
        "tool": {"name": "llmx", "version": metadata.version("llmx")},
        "libraries": library_versions(libraries),
        "format": exporter.plan.format,
        "type": exporter.plan.type_name,
        "files": [dict(file) for file in files],
        "tensors": _tensors(written, [file["name"] for file in files]),
        "source": {"name": source.name, "revision": source.revision, "files": [dict(file) for file in source_files]},
        "recipe": quantization.recipe.to_json(),
        "calibration": _calibration(quantization),
        "importance": None if importance is None else dict(importance),
        "options": {
            "tensor_types": list(tensor_types),
            **exporter.manifest_options(),
            "budget": None if budget is None else dict(budget),
        },
        "runtime": None if runtime is None else dict(runtime),
    }


def as_text(told: Mapping[str, Any]) -> str:
    """The manifest as the file holds it: ASCII, one line a tensor."""
    tensors = ",\n  ".join(json.dumps(tensor) for tensor in told["tensors"])
    rest = json.dumps({key: value for key, value in told.items() if key != "tensors"}, indent=1)
    return f'{rest[:-2]},\n "tensors": [\n  {tensors}\n ]\n}}\n'


def _tensors(written: Sequence[WrittenTensor], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": tensor.type_name,
            "bytes": tensor.nbytes,
            "sha256": tensor.sha256,
            "file": None if tensor.file is None else names[tensor.file],
            "offset": tensor.offset,
        }
        for tensor in written
    ]


def _calibration(quantization: Quantization) -> dict[str, Any] | None:
    if quantization.text is None:
        return None
    return {
        "text": quantization.text.name,
        "sha256": quantization.text.sha256,
        "tokens": quantization.tokens,
        "length": quantization.length,
        "device": quantization.device,
    }
