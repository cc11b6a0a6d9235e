"""The weights of a GGUF file as MatMulNBits takes them: taken over exactly wherever whole numbers and scales allow it.

A ggml type whose weights are scale · level, with whole levels and no minimum, is the same numbers in groups of its
sub-blocks: the level moved up by the zero point is the code, and the scale, a product of at most two stored ones, is
kept as float32.

    Q4_0, Q3_K                        4 bits, groups of 32 and 16
    Q8_0, Q5_0, IQ4_NL, IQ4_XS, MXFP4 8 bits, groups of 32: their levels take more than 4 bits
    Q6_K, NVFP4                       8 bits, groups of 16
    Q4_1, Q5_1, Q2_K, Q4_K, Q5_K      have minimums, which MatMulNBits has not: rounded to 8 bits in groups of 32
    F32, F16, BF16                    floats, as they are

Rounding to 8 bits moves a weight by a seventeenth of what the type's own rounding did, or less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmx.errors import UsageError
from llmx.exporters.encoding import GROUP_ENCODINGS, GroupEncoding
from llmx.exporters.gguf_metadata import SOLVED, SOLVER_KEY
from llmx.exporters.gguf_model import GgufModel, GgufWeight
from llmx.exporters.gguf_types import FILE_TYPES
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import LEVELS, expand
from llmx.formats.ggml_packers import LAYOUTS, unpack
from llmx.formats.onnx_groups import Groups, pack

if TYPE_CHECKING:
    from llmx.exporters.onnx import OnnxOptions
    from llmx.models.model import Model

Bytes = npt.NDArray[np.uint8]

TAKEN = "GGUF"
"""The mix of an export that keeps what a GGUF file has."""

ROUNDED = "int8-g32-sym-float32"
"""The encoding of types that cannot be taken over."""


def exact_encoding(type_name: str) -> GroupEncoding | None:
    """The encoding in groups that holds the same numbers as this ggml type; None where there is none."""
    form, levels = LAYOUTS.get(type_name), LEVELS.get(type_name)
    if form is None or levels is None or form.offset is not None or (levels != np.rint(levels)).any():
        return None
    bits = next((bits for bits in (4, 8) if -(1 << bits >> 1) <= levels.min() and levels.max() < 1 << bits >> 1), None)
    return GROUP_ENCODINGS.get(f"int{bits}-g{BLOCKS[type_name].weights // form.subs}-sym-float32")


def kept_types(model: GgufModel) -> dict[str, str]:
    """Canonical name of each matrix that the file has quantized -> the encoding it gets."""
    quantized = {w.spec.name: w.stored_type for w in _matrices(model) if w.stored_type in LAYOUTS}
    exact = {kind: exact_encoding(kind) for kind in set(quantized.values())}
    return {name: ROUNDED if (found := exact[kind]) is None else found.name for name, kind in quantized.items()}


def taking_over(model: Model, options: OnnxOptions, ruled: Mapping[str, str] | None = None) -> OnnxOptions:
    """The options of an export that keeps what the model's file has; its floats are float32.

    ruled: canonical name -> the type that a recipe gives it instead.
    Raises: UsageError where the model is of no GGUF file.
    """
    if not isinstance(model, GgufModel):
        raise UsageError(f"the type {TAKEN} keeps what a GGUF file has, and this is none", fix="choose another --type")
    types = {**kept_types(model), **(ruled or {})}
    # Whoever made the file rounded to other steps than these encodings have: beside the checkpoint, weights are moved.
    solver = str(model.gguf.file.metadata.get(SOLVER_KEY, SOLVED))
    return replace(options, type_name="F32", types=types, wanted={}, mix=mix_name(model), solver=solver)


def mix_name(model: GgufModel) -> str:
    """What the file calls its mix of types: Q4_0; TAKEN where it does not say."""
    told = model.gguf.file.metadata.get("general.file_type")
    return next((name for name, mix in FILE_TYPES.items() if mix.id == told), TAKEN)


def source_notes(model: Model, types: Mapping[str, str], *, keeps: bool) -> tuple[str, ...]:
    """What a user should know of weights that come from a GGUF file, in words; nothing of a checkpoint's.

    types: the encodings planned. keeps: the export keeps what the file has.
    """
    if not isinstance(model, GgufModel):
        return ()
    taken = TakenOver(model, types if keeps else {})
    lost = [w for w in _matrices(model) if w.stored_type in LAYOUTS and w.spec.name not in taken]
    if not keeps:
        told = f"{len(lost)} matrices were quantized before, in the GGUF file, and are rounded a second time"
        return (told,) if lost else ()
    counts = Counter((w.stored_type, types.get(w.spec.name, "F32")) for w in lost)
    return tuple(
        f"{count} {kind} matrices are not taken over as they are: rounded to {name}"
        + (", because onnxruntime's operators have no minimums" if exact_encoding(kind) is None else "")
        for (kind, name), count in sorted(counts.items())
    )


def _matrices(model: Model) -> Iterator[GgufWeight]:
    for weight in model.weights():
        if isinstance(weight, GgufWeight) and len(weight.spec.shape) > 1:
            yield weight


def repacked(encoding: GroupEncoding, type_name: str, stored: Bytes) -> Bytes:
    """u8[rows, row bytes] of the encoding: the numbers of rows of a ggml type (u8[rows, its row bytes]), none changed.

    encoding: that of `exact_encoding`.
    """
    block = BLOCKS[type_name]
    scales, codes = unpack(type_name, stored.reshape(-1, block.bytes))
    scale, _ = expand(type_name, scales)
    middle = 1 << encoding.layout.bits >> 1
    moved = (LEVELS[type_name].astype(np.int16) + middle).astype(np.uint8)[codes]
    rows = len(stored)
    return pack(encoding.layout, Groups(moved.reshape(rows, -1), np.ascontiguousarray(scale).reshape(rows, -1), None))


@dataclass(frozen=True, slots=True)
class TakenRows:
    """Rows of one weight in its encoding, made when a range of them is asked for."""

    weight: GgufWeight
    encoding: GroupEncoding

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.rows, self.encoding.row_bytes(self.weight.cols)

    def __len__(self) -> int:
        return self.weight.rows

    def __getitem__(self, rows: slice) -> Bytes:
        """u8[rows of the slice, row bytes]."""
        start, stop, _ = rows.indices(self.weight.rows)
        return repacked(self.encoding, self.weight.stored_type, self.weight.read_stored(start, stop))


class TakenOver(Mapping[str, TakenRows]):
    """Canonical name -> its rows, of every matrix that is taken over exactly.

    types: what is planned for each; a matrix that gets another encoding than its own is rounded like any other.
    """

    def __init__(self, model: Model, types: Mapping[str, str]) -> None:
        self._rows = {
            weight.spec.name: TakenRows(weight, encoding)
            for weight in _matrices(model)
            if (encoding := exact_encoding(weight.stored_type)) is not None
            and types.get(weight.spec.name) == encoding.name
        }

    def __getitem__(self, name: str) -> TakenRows:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
