"""The kinds of artifacts that the checks know: one record a format, so that no check asks which format it has.

Container      an opened artifact: its tensors, sizes and metadata          GgufFile, OnnxArtifact
ArtifactKind   what is done with a container of one format                  gguf_kind.py, onnx_kind.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmx.errors import IntegrityError, UsageError
from llmx.registry import loaded

if TYPE_CHECKING:
    from llmx.exporters.gguf_tensors import Entry
    from llmx.models.architecture import Architecture
    from llmx.models.model import Model
    from llmx.validate.case import Case
    from llmx.validate.floors import Floor
    from llmx.validate.report import Check

# format -> "module:attribute" of its ArtifactKind; the first one that recognises a file has it.
KINDS: dict[str, str] = {
    "gguf": "llmx.validate.gguf_kind:KIND",
    "onnx": "llmx.validate.onnx_kind:KIND",
    "tensorrt": "llmx.validate.tensorrt_kind:KIND",
    "trtllm": "llmx.validate.trtllm_kind:KIND",
}


class Stored(Protocol):
    """A tensor of an artifact. type_name: what it is kept as, as exporters/encoding.py has it."""

    @property
    def name(self) -> str: ...
    @property
    def type_name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


class Container(Protocol):
    """An opened artifact. format: a key of KINDS. bits_per_weight: of the tensors' data; None where there are none.

    One that was built for sequences of some length has it as `capacity`, in tokens.
    """

    @property
    def format(self) -> str: ...
    @property
    def paths(self) -> tuple[Path, ...]: ...
    @property
    def tensors(self) -> Mapping[str, Stored]: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def bits_per_weight(self) -> float | None: ...

    def release(self, name: str) -> None:
        """Hands the tensor's pages back to the system."""
        ...


class ArtifactKind(Protocol):
    """A format. Everywhere, file: a container that `open` gave, and name: of one of its tensors."""

    @property
    def name(self) -> str: ...
    @property
    def runtime(self) -> str: ...

    def recognises(self, path: Path) -> bool:
        """Whether a path that is there is such an artifact, whatever its name."""
        ...

    def located(self, path: Path) -> Path:
        """The file that a runtime opens, where a folder was named."""
        ...

    def open(self, path: Path) -> Any:
        """The container. Raises: IntegrityError for a broken or hostile one."""
        ...

    def described(self, file: Any) -> dict[str, Any]:
        """What `llmx inspect` tells: format, files, sizes, metadata (key -> type and value), tensors, as plain data."""
        ...

    def mapped(self, file: Any, architecture: Architecture) -> Any:
        """The container with its tensors named and cut as `entries` has them."""
        ...

    def unmapped(self, file: Any, architecture: Architecture) -> str | None:
        """Why its tensors cannot be told to be the checkpoint's, or None."""
        ...

    def entries(self, file: Any, model: Model, vocabulary: int) -> tuple[Entry, ...]:
        """The tensors that it must hold. vocabulary: tokens of the tokenizer."""
        ...

    def source_rows(self, model: Model, entry: Entry, start: int, stop: int) -> np.ndarray:
        """f32[stop - start, columns]: the checkpoint's rows as the artifact has them."""
        ...

    def rows(self, file: Any, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, u8[rows, row bytes]) pieces of a tensor, in order; its pages are handed back at the end."""
        ...

    def decoded(self, file: Any, name: str, start: int, stop: int) -> np.ndarray:
        """f32[stop - start, columns]"""
        ...

    def kept(self, file: Any, name: str, start: int, stop: int) -> np.ndarray:
        """u8[stop - start, row bytes]: rows as they are kept, see exporters/encoding.py."""
        ...

    def restored(self, file: Any, model: Model, entries: Sequence[Entry]) -> dict[str, Callable[[], np.ndarray]]:
        """Checkpoint tensor -> a function that decodes it, in the checkpoint's layout.

        Raises: IntegrityError when the artifact lacks a tensor or has one of another shape.
        """
        ...

    def changed(self, file: Any) -> list[str] | str:
        """The tensors whose bytes are not those that it was written with, or why that cannot be told."""
        ...

    def digest_check(self, file: Any) -> Check:
        """bytes.digests"""
        ...

    def differences(self, file: Any, model: Model) -> list[str] | str:
        """One clause for every number that is not what the checkpoint's config makes of it; or why none is compared."""
        ...

    def more_checks(self, case: Case) -> Iterator[Check]:
        """What else there is to compare of the file itself: bytes.type and what only this format has."""
        ...

    def twin_sizes(self, file: Any, layers: int) -> dict[int | None, int]:
        """Bytes of the float32 twin of the first layers: how many (None: all) -> bytes, the largest first."""
        ...

    def is_its_own_twin(self, file: Any) -> bool:
        """Whether it holds exact float32 weights, so that the checkpoint itself is its reference."""
        ...

    def write_twin(self, file: Any, folder: Path, layers: int | None) -> Path:
        """What the runtime is to run with exact kernels: written into the folder, or the artifact itself."""
        ...

    def no_exact_run(self, file: Any) -> str | None:
        """Why the runtime cannot compute it in float32, or None."""
        ...

    def floor(self, file: Any, architecture: Architecture) -> Floor:
        """How near its exact run comes to transformers."""
        ...

    def no_text(self, file: Any) -> str | None:
        """Why it has no tokenizer, or None."""
        ...

    def template(self, file: Any) -> str | None:
        """Its chat template."""
        ...

    def token_texts(self, file: Any) -> list[object]:
        """Its tokens in the order of their ids; nothing where it does not list them."""
        ...

    def context_length(self, file: Any) -> int:
        """Tokens that the model says it takes. Raises: IntegrityError where it does not."""
        ...

    def stock_types(self, case: Case) -> list[dict[str, Any]]:
        """What the runtime's own mixes of types would take, for the report."""
        ...


def sizes(file: Container) -> dict[str, Any]:
    """What `described` tells of every format."""
    bits = file.bits_per_weight
    return {
        "format": file.format,
        "files": [str(path) for path in file.paths],
        "bytes": file.nbytes,
        "parameters": file.weights,
        "bits_per_weight": None if bits is None else round(bits, 4),
        "tensors": [
            {"name": t.name, "shape": list(t.shape), "type": t.type_name, "bytes": t.nbytes}
            for t in file.tensors.values()
        ],
    }


def kind_named(name: str) -> ArtifactKind:
    """The kind of that format, imported when it is asked for."""
    return loaded(KINDS[name])


def kind_of(file: Container) -> ArtifactKind:
    """The kind of an opened artifact."""
    return kind_named(file.format)


def find_kind(path: Path) -> ArtifactKind:
    """The kind of a file or folder. Raises: UsageError where there is none, IntegrityError where it is of no kind."""
    if not path.exists():
        raise UsageError("no such file", where=path)
    for name in KINDS:
        if (kind := kind_named(name)).recognises(path):
            return kind
    what = "this is no GGUF file, no ONNX graph, no TensorRT engine, no TensorRT-LLM checkpoint and no folder of one"
    raise IntegrityError(what, where=path)
