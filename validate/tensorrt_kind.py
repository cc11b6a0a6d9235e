"""TensorRT engines, as the checks see them: what stands beside the plan is checked, and what the plan computes.

Its weights lie there as the builder arranged them for the kernels that it chose, and nothing reads them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError
from llmx.exporters.gguf_metadata import SOLVER_KEY
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.sparsity import SPARSITY_KEY
from llmx.formats.tensorrt import (
    BUILD_REPORT_NAME,
    CONFIG_NAME,
    ENGINE_NAME,
    EngineConfig,
    check_engine,
    engine_folder,
    read_config,
)
from llmx.models.architecture import Architecture
from llmx.models.model import Model
from llmx.validate.case import Case
from llmx.validate.floors import TENSORRT, Floor
from llmx.validate.folder_text import has_tokenizer, template_of
from llmx.validate.kinds import sizes
from llmx.validate.report import Check, at_most
from llmx.validate.runtimes.tensorrt import NO_TEXT, check_size, inexact, located

UNREADABLE = "an engine's weights cannot be read back; quality and speed judge what they compute"
BUILT_ALIKE = ("vocab_size", "layers", "kv_heads", "head_dim", "context_length")


@dataclass(frozen=True, slots=True)
class Declared:
    """A tensor as config.json names it. shape: () where nothing says it; nbytes: nothing tells that of one tensor."""

    name: str
    type_name: str
    shape: tuple[int, ...] = ()
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineArtifact:
    """The folder of an engine; see Container."""

    folder: Path
    config: EngineConfig
    tensors: Mapping[str, Declared]

    @property
    def format(self) -> str:
        return "tensorrt"

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.folder / ENGINE_NAME, self.folder / CONFIG_NAME)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What else the artifact says of its weights, under the keys that all formats have."""
        told = {SOLVER_KEY: self.config.solver, SPARSITY_KEY: self.config.sparsity}
        return {key: value for key, value in told.items() if value is not None}

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence that it was built for."""
        return self.config.max_length

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def weights(self) -> int:
        return self.config.parameters

    @property
    def bits_per_weight(self) -> float | None:
        """Of the engine's bytes, kernels and all."""
        return 8 * self.config.engine_bytes / self.config.parameters

    def release(self, name: str) -> None:
        """Nothing of it is mapped."""


class TensorRtKind:
    """See ArtifactKind."""

    name = "tensorrt"
    runtime = "tensorrt"

    def recognises(self, path: Path) -> bool:
        return engine_folder(path) is not None

    def located(self, path: Path) -> Path:
        return located(path) / ENGINE_NAME

    def open(self, path: Path) -> EngineArtifact:
        folder = located(path)
        config = read_config(folder)
        check_size(folder, config)
        return EngineArtifact(folder, config, {name: Declared(name, kept) for name, kept in config.encodings.items()})

    def described(self, file: EngineArtifact) -> dict[str, Any]:
        told, kept = asdict(file.config), file.folder / BUILD_REPORT_NAME
        numbers = {key: value for key, value in told.items() if key not in {"encodings", "profiles", "options"}}
        numbers["tensors"] = ", ".join(f"{count} {kept}" for kept, count in Counter(told["encodings"].values()).items())
        return {
            **sizes(file),
            "tensors": [],  # nobody knows where in the plan they lie, or in how many bytes
            "encodings": told["encodings"],
            "profiles": told["profiles"],
            "options": told["options"],
            "build_report": kept.name if kept.is_file() else None,
            "metadata": {key: {"type": type(value).__name__, "value": value} for key, value in numbers.items()},
        }

    def mapped(self, file: EngineArtifact, architecture: Architecture) -> EngineArtifact:
        shapes = {spec.name: spec.shape for spec in architecture.tensors}
        named = {name: replace(one, shape=shapes.get(name, ())) for name, one in file.tensors.items()}
        return replace(file, tensors=named)

    def unmapped(self, file: EngineArtifact, architecture: Architecture) -> str | None:
        return UNREADABLE

    def entries(self, file: EngineArtifact, model: Model, vocabulary: int) -> tuple[Entry, ...]:
        return ()

    def source_rows(self, model: Model, entry: Entry, start: int, stop: int) -> np.ndarray:
        _unreadable()

    def rows(self, file: EngineArtifact, name: str) -> Iterator[tuple[int, np.ndarray]]:
        _unreadable()

    def decoded(self, file: EngineArtifact, name: str, start: int, stop: int) -> np.ndarray:
        _unreadable()

    def kept(self, file: EngineArtifact, name: str, start: int, stop: int) -> np.ndarray:
        _unreadable()

    def restored(
        self, file: EngineArtifact, model: Model, entries: Sequence[Entry]
    ) -> dict[str, Callable[[], np.ndarray]]:
        _unreadable()

    def changed(self, file: EngineArtifact) -> list[str] | str:
        return UNREADABLE

    def digest_check(self, file: EngineArtifact) -> Check:
        origin = f"{CONFIG_NAME}: the engine's SHA-256"
        try:
            check_engine(file.folder, file.config)
        except IntegrityError as error:
            return at_most("bytes.digests", 1, 0, "files", origin, detail=error.one_line)
        return at_most("bytes.digests", 0, 0, "files", origin, detail=f"{ENGINE_NAME}, every byte")

    def differences(self, file: EngineArtifact, model: Model) -> list[str] | str:
        told, source = file.config, model.architecture
        wanted = {**dict(zip(BUILT_ALIKE, _numbers(source), strict=True)), "architecture": source.family}
        found = {key: getattr(told, key) for key in wanted}
        problems = [f"{key} is {found[key]}, expected {wanted[key]}" for key in wanted if found[key] != wanted[key]]
        names = {spec.name for spec in source.tensors}
        problems += [f"encodings: {name} is missing" for name in sorted(names - told.encodings.keys())]
        return problems + [f"encodings: {name} is no tensor" for name in sorted(told.encodings.keys() - names)]

    def more_checks(self, case: Case) -> Iterator[Check]:
        return iter(())

    def twin_sizes(self, file: EngineArtifact, layers: int) -> dict[int | None, int]:
        return {None: 4 * file.weights}

    def is_its_own_twin(self, file: EngineArtifact) -> bool:
        return not inexact(file.config)

    def write_twin(self, file: EngineArtifact, folder: Path, layers: int | None) -> Path:
        return file.paths[0]  # only what is its own twin is asked

    def no_exact_run(self, file: EngineArtifact) -> str | None:
        return inexact(file.config)

    def floor(self, file: EngineArtifact, architecture: Architecture) -> Floor:
        return TENSORRT

    def no_text(self, file: EngineArtifact) -> str | None:
        return None if has_tokenizer(file.folder) else NO_TEXT

    def template(self, file: EngineArtifact) -> str | None:
        return template_of(file.folder)

    def token_texts(self, file: EngineArtifact) -> list[object]:
        return []

    def context_length(self, file: EngineArtifact) -> int:
        return min(file.config.context_length, file.config.max_length)

    def stock_types(self, case: Case) -> list[dict[str, Any]]:
        return []


def _numbers(a: Architecture) -> tuple[int, ...]:
    """Of the architecture, in the order of BUILT_ALIKE."""
    return a.vocab, a.layers, a.kv_heads, a.head_dim, a.context_length


def _unreadable() -> NoReturn:
    raise UnsupportedError(UNREADABLE, fix="compare what two engines compute with `llmx compare`")


KIND = TensorRtKind()
