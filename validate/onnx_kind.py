"""ONNX, as the checks see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.encoding import encoding
from llmx.exporters.gguf_tensors import Entry, Piece, read_rows
from llmx.exporters.manifest_reader import HashedTensor
from llmx.exporters.onnx_genai import CONFIG_NAME
from llmx.exporters.onnx_mobile import report_or_reason
from llmx.formats.onnx import MODEL_NAME
from llmx.formats.onnx_reader import graph_path
from llmx.models.architecture import Architecture, TensorSpec
from llmx.models.folded import NORM_ROLES
from llmx.models.model import Model
from llmx.validate import canonical, onnx_graph
from llmx.validate.case import Case
from llmx.validate.floors import ONNX, ONNX_HALF_TABLES, Floor
from llmx.validate.kinds import sizes
from llmx.validate.onnx_artifact import TOKENIZER, OnnxArtifact, mapped, open_onnx
from llmx.validate.onnx_twin import has_halves, write_widened
from llmx.validate.onnx_weights import pieces
from llmx.validate.report import Check, at_most

CHUNK_BYTES = 8 << 20  # of decoded float32 rows at a time
HASH_BYTES = 1 << 20
OURS = 0.5  # of the checkpoint's tensors, by name: then all others are missing
ROUNDED = ("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "QLinearMatMul")


class OnnxKind:
    """See ArtifactKind."""

    name = "onnx"
    runtime = "onnxruntime"

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".onnx" or (path.is_dir() and (path / MODEL_NAME).is_file())

    def located(self, path: Path) -> Path:
        return graph_path(path)

    def open(self, path: Path) -> OnnxArtifact:
        return open_onnx(path)

    def described(self, file: OnnxArtifact) -> dict[str, Any]:
        graph = file.file
        return {
            **sizes(file),
            "producer": " ".join(graph.producer),
            "opsets": {domain or "ai.onnx": version for domain, version in graph.opsets.items()},
            "operators": graph.operators,
            "phones": report_or_reason(file.paths[0]),
            "metadata": {key: {"type": "str", "value": value} for key, value in file.metadata.items()},
        }

    def mapped(self, file: OnnxArtifact, architecture: Architecture) -> OnnxArtifact:
        return mapped(file, architecture)

    def unmapped(self, file: OnnxArtifact, architecture: Architecture) -> str | None:
        wanted = {spec.name for spec in architecture.tensors}
        if len(wanted & file.tensors.keys()) >= OURS * len(wanted):
            return None
        maker = file.file.producer[0] or "an unknown program"
        return f"{maker} names the weights of its graphs otherwise; quality and speed judge what they compute"

    def entries(self, file: OnnxArtifact, model: Model, vocabulary: int) -> tuple[Entry, ...]:
        return (*(weight_entry(spec, model) for spec in model.architecture.tensors), *_tables(file, model))

    def source_rows(self, model: Model, entry: Entry, start: int, stop: int) -> np.ndarray:
        if entry.constant is not None:
            return entry.constant.reshape(entry.rows, entry.columns)[start:stop]
        return read_rows(model, entry, start, stop)

    def rows(self, file: OnnxArtifact, name: str) -> Iterator[tuple[int, np.ndarray]]:
        yield from pieces(file.tensors[name], CHUNK_BYTES)
        file.release(name)

    def decoded(self, file: OnnxArtifact, name: str, start: int, stop: int) -> np.ndarray:
        kept = file.tensors[name]
        return encoding(kept.type_name).decode(kept.rows(start, stop), kept.shape[-1])

    def kept(self, file: OnnxArtifact, name: str, start: int, stop: int) -> np.ndarray:
        return file.tensors[name].rows(start, stop)

    def restored(
        self, file: OnnxArtifact, model: Model, entries: Sequence[Entry]
    ) -> dict[str, Callable[[], np.ndarray]]:
        return canonical.restored(file.tensors, model, entries, partial(self.decoded, file))

    def changed(self, file: OnnxArtifact) -> list[str] | str:
        return canonical.changed(file.paths[0], lambda tensor: _holds(file, tensor))

    def digest_check(self, file: OnnxArtifact) -> Check:
        return canonical.digest_check(self.changed(file))

    def differences(self, file: OnnxArtifact, model: Model) -> list[str] | str:
        return onnx_graph.differences(file, model)

    def more_checks(self, case: Case) -> Iterator[Check]:
        yield _padding(case.file)  # type: ignore[arg-type]

    def twin_sizes(self, file: OnnxArtifact, layers: int) -> dict[int | None, int]:
        return {None: 4 * file.weights}

    def is_its_own_twin(self, file: OnnxArtifact) -> bool:
        return all(kept.type_name == "F32" for kept in file.tensors.values())

    def write_twin(self, file: OnnxArtifact, folder: Path, layers: int | None) -> Path:
        # What is not of float16, the runtime computes in float32 as it is, see `Runtime.open`.
        return write_widened(file.file, folder) if has_halves(file.file) else file.paths[0]

    def no_exact_run(self, file: OnnxArtifact) -> str | None:
        found = [name for name in file.file.operators if name.rpartition(".")[2] in ROUNDED]
        return f"the graph itself rounds activations ({', '.join(found)})" if found else None

    def floor(self, file: OnnxArtifact, architecture: Architecture) -> Floor:
        tables = (kept for kept in file.tensors.values() if kept.name.startswith("rope."))
        return ONNX_HALF_TABLES if any(kept.type_name == "F16" for kept in tables) else ONNX

    def no_text(self, file: OnnxArtifact) -> str | None:
        missing = [name for name in (CONFIG_NAME, TOKENIZER) if not (file.folder / name).is_file()]
        return f"its folder has no {' and no '.join(missing)}, so nothing in it reads text" if missing else None

    def template(self, file: OnnxArtifact) -> str | None:
        return file.template

    def token_texts(self, file: OnnxArtifact) -> list[object]:
        return []

    def context_length(self, file: OnnxArtifact) -> int:
        told = file.beside.get(CONFIG_NAME, {}).get("model")
        found = told.get("context_length") if isinstance(told, dict) else None
        if not isinstance(found, int) or found < 1:
            what = f"{CONFIG_NAME} does not say how many tokens the model takes"
            raise IntegrityError(what, where=file.folder, fix="give the checkpoint as --reference")
        return found

    def stock_types(self, case: Case) -> list[dict[str, Any]]:
        return []


def weight_entry(spec: TensorSpec, model: Model) -> Entry:
    """What a canonical tensor is in a graph."""
    gain = spec.role in NORM_ROLES and spec.part == "weight" and model.architecture.norm_offset != 0
    quantizable = spec.part == "weight" and len(spec.shape) > 1 and spec.role not in ("router", "position_embedding")
    return Entry(spec.name, spec.role, spec.layer, spec.shape, quantizable, (Piece(spec, "gain" if gain else "none"),))


def _tables(file: OnnxArtifact, model: Model) -> Iterator[Entry]:
    """What the exporter made itself: cosines and sines of all positions."""
    found = onnx_graph.recorded(file, model)
    stored = () if isinstance(found, str) else found[0].values()
    for one in stored:
        if one.table is not None:
            yield Entry(one.name, None, None, one.shape, False, constant=one.table.astype(np.float32))


def _holds(file: OnnxArtifact, tensor: HashedTensor) -> bool:
    """Whether the bytes at the tensor's place are those that were written."""
    path = next((path for path in file.paths if path.name == tensor.file), None)
    mapped_file = None if path is None else file.file.maps.get(path)
    if mapped_file is None or tensor.offset is None or tensor.offset + tensor.nbytes > len(mapped_file):
        return False
    digest = hashlib.sha256()
    for start in range(tensor.offset, tensor.offset + tensor.nbytes, HASH_BYTES):
        digest.update(mapped_file[start : min(start + HASH_BYTES, tensor.offset + tensor.nbytes)])
    return digest.hexdigest() == tensor.sha256


def _padding(file: OnnxArtifact) -> Check:
    """What lies between the weights: nothing reads it, so something there was not written by an exporter."""
    stray = 0
    for path, data in file.file.maps.items():
        placed = sorted((t.offset, t.offset + t.nbytes) for t in file.file.tensors.values() if t.file == path)
        end = 0
        for start, stop in [*placed, (0 if data is None else len(data),) * 2]:
            if data is not None and start > end:
                stray += int(np.count_nonzero(np.frombuffer(data, np.uint8, start - end, end)))
            end = max(end, stop)
    return at_most(
        "bytes.padding", stray, 0, "bytes", "what lies between weights is zero", detail="outside all weights"
    )


KIND = OnnxKind()
