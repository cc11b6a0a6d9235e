"""TensorRT-LLM checkpoints, as the checks see them."""

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
from llmx.formats.safetensors import SafetensorsFile
from llmx.formats.trtllm import RANKS
from llmx.models.architecture import Architecture, TensorSpec
from llmx.models.folded import NORM_ROLES
from llmx.models.model import Model
from llmx.validate import canonical, trtllm_checks
from llmx.validate.case import Case
from llmx.validate.floors import SAME_LIBRARY, Floor
from llmx.validate.folder_text import TOKENIZERS, has_tokenizer, template_of
from llmx.validate.kinds import sizes
from llmx.validate.report import Check, not_run
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_folder import is_folder
from llmx.validate.trtllm_opening import mapped, open_trtllm

CHUNK_BYTES = 8 << 20  # of decoded float32 rows at a time
HASH_BYTES = 1 << 20
OURS = 0.5  # of the checkpoint's tensors, by name: then all others are missing
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
FLOAT_ROLES = ("router", "position_embedding", "embedding", "head")
RUNS = "runtime.tensorrt_llm"
NOT_RUN = (
    "TensorRT-LLM, which takes an NVIDIA GPU, did not load the folder; transformers emulates what its numbers cost, "
    "and nothing here tells its speed"
)


class TrtllmKind:
    """See ArtifactKind."""

    name = "trtllm"
    runtime = "transformers"

    def recognises(self, path: Path) -> bool:
        return is_folder(path)

    def located(self, path: Path) -> Path:
        return path / "config.json" if path.is_dir() else path

    def open(self, path: Path) -> TrtllmArtifact:
        return open_trtllm(path)

    def described(self, file: TrtllmArtifact) -> dict[str, Any]:
        told = file.folder.quantization
        tensor_parallel, pipeline_parallel = file.folder.parallel
        return {
            **sizes(file),
            "layout": file.folder.layout,
            "tensor_parallel": tensor_parallel,
            "pipeline_parallel": pipeline_parallel,
            "algorithm": told.algorithm,
            "cache": told.cache,
            "group": told.group,
            "excluded": list(told.excluded),
            "cache_scales": dict(file.cache),
            "metadata": {key: {"type": "str", "value": value} for key, value in file.metadata.items()},
        }

    def mapped(self, file: TrtllmArtifact, architecture: Architecture) -> TrtllmArtifact:
        return mapped(file, architecture)

    def unmapped(self, file: TrtllmArtifact, architecture: Architecture) -> str | None:
        wanted = {spec.name for spec in architecture.tensors}
        if len(wanted & file.tensors.keys()) >= OURS * len(wanted):
            return None
        return "its tensors have names that no checkpoint of this architecture has"

    def entries(self, file: TrtllmArtifact, model: Model, vocabulary: int) -> tuple[Entry, ...]:
        added = model.architecture.norm_offset if file.folder.layout == RANKS else 0.0
        return tuple(_entry(spec, added) for spec in model.architecture.tensors)

    def source_rows(self, model: Model, entry: Entry, start: int, stop: int) -> np.ndarray:
        return read_rows(model, entry, start, stop)

    def rows(self, file: TrtllmArtifact, name: str) -> Iterator[tuple[int, np.ndarray]]:
        tensor = file.tensors[name]
        # Two rows are one of packed bytes.
        step = max(2, CHUNK_BYTES // (4 * tensor.shape[-1]) // 2 * 2)
        for start in range(0, tensor.count, step):
            yield start, tensor.rows(start, min(start + step, tensor.count))
        file.release(name)

    def decoded(self, file: TrtllmArtifact, name: str, start: int, stop: int) -> np.ndarray:
        tensor = file.tensors[name]
        values = encoding(tensor.type_name).decode(tensor.rows(start, stop), tensor.shape[-1])
        return values if (factors := tensor.factors(start, stop)) is None else values * factors

    def kept(self, file: TrtllmArtifact, name: str, start: int, stop: int) -> np.ndarray:
        return file.tensors[name].rows(start, stop)

    def restored(
        self, file: TrtllmArtifact, model: Model, entries: Sequence[Entry]
    ) -> dict[str, Callable[[], np.ndarray]]:
        return canonical.restored(file.tensors, model, entries, partial(self.decoded, file))

    def changed(self, file: TrtllmArtifact) -> list[str] | str:
        files = {one.path.name: one for one in file.folder.files}
        return canonical.changed(file.paths[0], lambda tensor: _holds(files.get(tensor.file or ""), tensor))

    def digest_check(self, file: TrtllmArtifact) -> Check:
        return canonical.digest_check(self.changed(file))

    def differences(self, file: TrtllmArtifact, model: Model) -> list[str] | str:
        return trtllm_checks.differences(file, model)

    def more_checks(self, case: Case) -> Iterator[Check]:
        yield from trtllm_checks.more_checks(case.file)  # type: ignore[arg-type]
        yield trtllm_checks.files_check(case.file, case.model.checkpoint.folder)  # type: ignore[arg-type]
        yield not_run(RUNS, NOT_RUN, required=False)

    def twin_sizes(self, file: TrtllmArtifact, layers: int) -> dict[int | None, int]:
        return {None: 4 * file.weights}

    def is_its_own_twin(self, file: TrtllmArtifact) -> bool:
        return all(tensor.type_name == "F32" for tensor in file.tensors.values())

    def write_twin(self, file: TrtllmArtifact, folder: Path, layers: int | None) -> Path:
        return file.paths[0]  # what is asked to run exactly, rounds nothing

    def no_exact_run(self, file: TrtllmArtifact) -> str | None:
        return None

    def floor(self, file: TrtllmArtifact, architecture: Architecture) -> Floor:
        return SAME_LIBRARY

    def no_text(self, file: TrtllmArtifact) -> str | None:
        if has_tokenizer(file.folder.path):
            return None
        return f"its folder has no {' and no '.join(TOKENIZERS)}, so nothing in it reads text"

    def template(self, file: TrtllmArtifact) -> str | None:
        return template_of(file.folder.path)

    def token_texts(self, file: TrtllmArtifact) -> list[object]:
        return []

    def context_length(self, file: TrtllmArtifact) -> int:
        config = file.folder.config
        found = next((config[key] for key in CONTEXT_KEYS if key in config), None)
        if not isinstance(found, int) or found < 1:
            what = "config.json does not say how many tokens the model takes"
            raise IntegrityError(what, where=file.folder.path, fix="give the checkpoint as --reference")
        return found

    def stock_types(self, case: Case) -> list[dict[str, Any]]:
        return []


def _entry(spec: TensorSpec, added: float) -> Entry:
    """What a canonical tensor is in a folder: itself; ranks hold norm gains with what their model adds to them."""
    gain = added != 0 and spec.role in NORM_ROLES and spec.part == "weight"
    quantizable = spec.part == "weight" and len(spec.shape) > 1 and spec.role not in FLOAT_ROLES
    return Entry(spec.name, spec.role, spec.layer, spec.shape, quantizable, (Piece(spec, "gain" if gain else "none"),))


def _holds(file: SafetensorsFile | None, tensor: HashedTensor) -> bool:
    """Whether the file has the tensor with those bytes. Of several ranks, the name begins with the file's own."""
    if file is None:
        return False
    name = tensor.name if tensor.name in file.tensors else tensor.name.removeprefix(f"{file.path.stem}.")
    stored = file.tensors.get(name)
    if stored is None or (stored.offset, stored.nbytes) != (tensor.offset, tensor.nbytes):
        return False
    digest = hashlib.sha256()
    for start in range(0, stored.nbytes, HASH_BYTES):
        digest.update(file.bytes(name, start, min(start + HASH_BYTES, stored.nbytes)).data)
    file.release(name)
    return digest.hexdigest() == tensor.sha256


KIND = TrtllmKind()
