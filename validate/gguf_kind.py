"""GGUF, as the checks see it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_metadata import DIGESTS_KEY, WRITTEN_TYPE_KEY, short_digest
from llmx.exporters.gguf_tensors import Entry, decoded_rows, entries, read_rows, restore
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.gguf import GgufFile, read_gguf_set
from llmx.models.architecture import Architecture
from llmx.models.model import Model
from llmx.validate import twin
from llmx.validate.case import Case
from llmx.validate.checks_metadata import check_type
from llmx.validate.floors import GGUF_FLOORS, Floor
from llmx.validate.hyperparameters import differences
from llmx.validate.kinds import sizes
from llmx.validate.report import Check, at_most, named, not_applicable
from llmx.validate.stock_types import stock_types

HASH_BYTES = 1 << 20
TOKENS, TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.chat_template"
REWRITTEN = "another program quantized this file again; the digests are of its source"


class GgufKind:
    """See ArtifactKind."""

    name = "gguf"
    runtime = "llama.cpp"

    def recognises(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"

    def located(self, path: Path) -> Path:
        return path

    def open(self, path: Path) -> GgufFile:
        return read_gguf_set(path)

    def described(self, file: GgufFile) -> dict[str, Any]:
        metadata = {key: {"type": file.types[key], "value": value} for key, value in file.metadata.items()}
        return {**sizes(file), "version": file.version, "metadata": metadata}

    def mapped(self, file: GgufFile, architecture: Architecture) -> GgufFile:
        return file

    def unmapped(self, file: GgufFile, architecture: Architecture) -> str | None:
        return None  # llama.cpp itself finds tensors by their names alone

    def entries(self, file: GgufFile, model: Model, vocabulary: int) -> tuple[Entry, ...]:
        a = model.architecture
        family = gguf_family(a)
        return entries(a, family, min(a.vocab, vocabulary) if family.cut_padding_rows else a.vocab)

    def source_rows(self, model: Model, entry: Entry, start: int, stop: int) -> np.ndarray:
        return read_rows(model, entry, start, stop)

    def rows(self, file: GgufFile, name: str) -> Iterator[tuple[int, np.ndarray]]:
        return twin.stored_rows(file, name)

    def decoded(self, file: GgufFile, name: str, start: int, stop: int) -> np.ndarray:
        return decoded_rows(file, name, start, stop)

    def kept(self, file: GgufFile, name: str, start: int, stop: int) -> np.ndarray:
        width = row_bytes(file.tensors[name].type_name, file.tensors[name].shape[-1])
        return file.bytes(name).reshape(-1, width)[start:stop]

    def restored(self, file: GgufFile, model: Model, entries: Sequence[Entry]) -> dict[str, Callable[[], np.ndarray]]:
        return {**restore(file, model, tuple(entries))}

    def changed(self, file: GgufFile) -> list[str] | str:
        stored = file.metadata.get(DIGESTS_KEY)
        if not isinstance(stored, list):
            return f"the file does not carry {DIGESTS_KEY}"
        if file.metadata.get(WRITTEN_TYPE_KEY) != file.metadata.get("general.file_type"):
            return REWRITTEN
        if len(stored) != len(file.tensors):
            return f"{len(stored)} digests for {len(file.tensors)} tensors"
        return [name for name, digest in zip(file.tensors, stored, strict=True) if tensor_digest(file, name) != digest]

    def digest_check(self, file: GgufFile) -> Check:
        origin = "written with the file: the first 8 bytes of each tensor's SHA-256"
        changed, stored = self.changed(file), file.metadata.get(DIGESTS_KEY)
        if not isinstance(changed, str):
            detail = named(changed) or f"{len(file.tensors)} tensors"
            return at_most("bytes.digests", len(changed), 0, "tensors", origin, detail=detail)
        if isinstance(stored, list) and changed != REWRITTEN:  # their number is wrong: a tensor was added or left out
            return Check("bytes.digests", False, len(stored), len(file.tensors), "digests", origin, changed)
        return not_applicable("bytes.digests", changed)

    def differences(self, file: GgufFile, model: Model) -> list[str]:
        return differences(file, model.architecture)

    def more_checks(self, case: Case) -> Iterator[Check]:
        yield check_type(case)

    def twin_sizes(self, file: GgufFile, layers: int) -> dict[int | None, int]:
        return {count: twin.twin_bytes(file, count) for count in (None, *range(layers - 1, 0, -1))}

    def is_its_own_twin(self, file: GgufFile) -> bool:
        return twin.is_its_own_twin(file)

    def write_twin(self, file: GgufFile, folder: Path, layers: int | None) -> Path:
        target = folder / "twin.gguf"
        twin.write_gguf_twin(file, target, layers)
        return target

    def no_exact_run(self, file: GgufFile) -> str | None:
        return None

    def floor(self, file: GgufFile, architecture: Architecture) -> Floor:
        return GGUF_FLOORS[architecture.activation]

    def no_text(self, file: GgufFile) -> str | None:
        return None

    def template(self, file: GgufFile) -> str | None:
        found = file.metadata.get(TEMPLATE)
        return found if isinstance(found, str) else None

    def token_texts(self, file: GgufFile) -> list[object]:
        found = file.metadata.get(TOKENS)
        return list(found) if isinstance(found, list) else []

    def context_length(self, file: GgufFile) -> int:
        key = f"{file.metadata.get('general.architecture')}.context_length"
        found = file.metadata.get(key)
        if not isinstance(found, int) or found < 1:
            raise IntegrityError(f"{key} is {found!r}", where=file.paths[0], fix="give a language model")
        return found

    def stock_types(self, case: Case) -> list[dict[str, Any]]:
        return stock_types(case.model.architecture, case.entries)


def tensor_digest(file: GgufFile, name: str) -> int:
    """Returns the first 8 bytes, little-endian, of the SHA-256 of a tensor's stored bytes."""
    digest = hashlib.sha256()
    data = file.bytes(name)
    for start in range(0, len(data), HASH_BYTES):
        digest.update(data[start : start + HASH_BYTES].data)
    file.release(name)
    return short_digest(digest.digest())


KIND = GgufKind()
