"""Which types the tensors of each format can have, for everything that is decided alike for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from llmx.errors import UnsupportedError, UsageError
from llmx.exporters.encoding import ENCODINGS, GROUP_ENCODINGS, group_names
from llmx.exporters.gguf_types import WRITABLE_TYPES
from llmx.formats.ggml_blocks import BLOCKS

_ROW = 4096  # weights of a row whose bits stand for a type's


@dataclass(frozen=True, slots=True)
class FormatTypes:
    """name: of the format, as messages say it. types: those of a tensor, as they are spelt. bits: per weight of a type.

    told: the types as messages list them. quantizes_activations: whether some type rounds what goes into a matrix.
    """

    name: str
    types: tuple[str, ...]
    bits: Callable[[str], float]
    quantizes_activations: bool = False
    told: str = ""

    def find(self, type_name: str) -> str | None:
        """The type of this name, in any case, as it is spelt here; None where there is none."""
        wanted = type_name.lower()
        return next((name for name in self.types if name.lower() == wanted), None)

    @property
    def choices(self) -> str:
        """The types in words."""
        return self.told or ", ".join(self.types)


def bits_of(name: str) -> float:
    """Bits per weight of an encoding, in rows of a usual length."""
    return ENCODINGS[name].bits(_ROW)


GGUF = FormatTypes("GGUF", WRITABLE_TYPES, lambda name: BLOCKS[name].bits)
_OF_ENGINES = (
    "F32", "F16", "BF16", *(f"int4-g{size}-pos{store}" for store in ("", "-bfloat16") for size in (128, 64, 32)),
    "int8-channel-pos-float32", "fp8-channel-float32",
)  # fmt: skip
TENSORRT = FormatTypes("TensorRT", _OF_ENGINES, bits_of, quantizes_activations=True)
ONNX = FormatTypes(
    "ONNX", ("F32", "F16", *GROUP_ENCODINGS), bits_of, quantizes_activations=True, told=f"F32, F16, {group_names()}"
)


class NamedMix(Protocol):
    """A mix of types, by its name."""

    @property
    def name(self) -> str: ...


def named_mix(
    bits: int | None, type_name: str | None, find: Callable[[str], NamedMix], by_bits: Mapping[int, str]
) -> str | None:
    """The mix that --bits or --type names, as it is spelt; None for neither. Raises: UsageError, with all names.

    find: the mix of a name, in any case, or UnsupportedError. by_bits: the mix of each size class.
    """
    if type_name is not None:
        try:
            return find(type_name).name
        except UnsupportedError as error:
            raise UsageError(error.what, fix=error.fix) from error
    if bits is None:
        return None
    if bits not in by_bits:
        raise UsageError(f"there is no {bits}-bit size class", fix=f"choose one of {', '.join(map(str, by_bits))}")
    return by_bits[bits]
