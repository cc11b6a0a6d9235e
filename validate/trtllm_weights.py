"""The weights of a TensorRT-LLM checkpoint as kept rows, see exporters/encoding.py, whatever their scales lie in.

    stored                                       kept as
    U8   [out/2, in], scales [out, in/g]         int4-gG-pos       byte = row 2j in its low bits, 2j + 1 in the high
    I8   [out, in],   scales [out]               int8-channel-pos  two's complement
    F8   [out, in],   a scale, or one a row      fp8-tensor, fp8-channel
    F32, F16, BF16                               as they are

Codes are two's complement there and count from 0 here. A classic checkpoint calls its packed bytes I8 as well; their
scales have columns, and those of whole bytes do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.encoding import GROUP_ENCODINGS
from llmx.formats import float8_rows, trtllm
from llmx.formats.onnx_groups import GroupLayout, Groups, pack
from llmx.validate.trtllm_arrays import Array, released

STORES: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NAMES: Mapping[GroupLayout, str] = {kept.layout: name for name, kept in GROUP_ENCODINGS.items() if "-pos" in name}


@dataclass(frozen=True, slots=True)
class Parts:
    """The arrays of one linear layer. inputs: what its inputs are multiplied by before; None for ones that are absent.

    step: the scale that its inputs are rounded on; None where they are not rounded.
    """

    weight: Array
    scale: Array | None = None
    inputs: Array | None = None
    step: Array | None = None

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(one for one in (self.weight, self.scale, self.inputs, self.step) if one is not None)


@dataclass(frozen=True, slots=True)
class Held:
    """A whole tensor. shape: of its values. rows: reads its kept rows. parts: what it is stored in.

    inputs: f32[1 or experts, columns] that its columns are multiplied by, where they are not all one.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    parts: Parts
    inputs: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Rows of the 2-D view."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of weight and scales as stored."""
        scale = self.parts.scale
        return self.parts.weight.nbytes + (0 if scale is None else scale.nbytes)

    def factors(self, start: int, stop: int) -> np.ndarray | None:
        """f32[stop - start or 1, columns] that decoded rows are multiplied by, or None."""
        if self.inputs is None or len(self.inputs) == 1:
            return self.inputs
        return self.inputs[np.arange(start, stop) // (self.count // len(self.inputs))]

    def release(self) -> None:
        """Hands the pages back to the system."""
        for array in self.parts.arrays:
            released(array)


def held(name: str, parts: Parts) -> Held:
    """The tensor in these arrays. Raises: IntegrityError where their types and shapes make no weight."""
    weight, scale = parts.weight, parts.scale
    if scale is None:
        if weight.dtype not in STORES:
            raise IntegrityError(f"{name} is stored as {weight.dtype} and has no scale")
        return Held(name, weight.dtype, weight.shape, _plain(weight), parts)
    if scale.dtype not in STORES:
        raise IntegrityError(f"the scale of {name} is stored as {scale.dtype}", fix=f"one of {', '.join(STORES)}")
    reader = READERS.get((weight.dtype, _in_groups(weight, scale)))
    if reader is None:
        told = f"{weight.dtype} {list(weight.shape)} with {scale.dtype} scales {list(scale.shape)}"
        raise IntegrityError(f"{name}: no TensorRT-LLM type is {told}")
    return replace(reader(name, parts, scale), inputs=_inputs(name, parts))


def _in_groups(weight: Array, scale: Array) -> bool:
    """Whether the scales have columns, and rows twice as many as the bytes."""
    return weight.dtype == "U8" or (len(scale.shape) > 1 and scale.count == 2 * weight.count)


def _inputs(name: str, parts: Parts) -> np.ndarray | None:
    if parts.inputs is None:
        return None
    found, cols = parts.inputs.floats().reshape(-1), parts.weight.shape[-1]
    if len(found) == 0 or len(found) % cols or parts.weight.count % (len(found) // cols):
        raise IntegrityError(f"{name}: {len(found)} factors for {cols} inputs")
    return None if np.all(found == 1) else found.reshape(-1, cols)


def _plain(weight: Array) -> Callable[[int, int], np.ndarray]:
    def rows(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(weight.read(start, stop)).view(np.uint8)

    return rows


def _int4(name: str, parts: Parts, scale: Array) -> Held:
    weight = parts.weight
    shape = (*weight.shape[:-2], 2 * weight.shape[-2], weight.shape[-1])
    count, cols = prod(shape[:-1]), shape[-1]
    if scale.count != count or cols % scale.shape[-1]:
        told = f"{list(scale.shape)} scales for {list(shape)} weights"
        raise IntegrityError(f"{name}: {told}: each row is cut into equal groups")
    layout = GroupLayout(4, cols // scale.shape[-1], STORES[scale.dtype], False)
    if layout not in NAMES:
        raise IntegrityError(f"{name}: groups of {layout.group} weights")

    def rows(start: int, stop: int) -> np.ndarray:
        first = start // 2
        codes = trtllm.unpack_pairs(weight.read(first, -(-stop // 2)).view(np.uint8))
        return pack(layout, Groups(codes[start - 2 * first : stop - 2 * first], scale.floats(start, stop)))

    return Held(name, NAMES[layout], shape, rows, parts)


def _int8(name: str, parts: Parts, scale: Array) -> Held:
    weight = parts.weight
    layout = GroupLayout(8, None, STORES[scale.dtype], False)
    of_rows = _of_rows(name, weight, scale)

    def rows(start: int, stop: int) -> np.ndarray:
        codes = trtllm.turned(weight.read(start, stop).view(np.uint8))
        return pack(layout, Groups(codes, of_rows(start, stop)[:, None]))

    return Held(name, NAMES[layout], weight.shape, rows, parts)


def _float8(name: str, parts: Parts, scale: Array) -> Held:
    weight, cols = parts.weight, parts.weight.shape[-1]
    of_rows = _of_rows(name, weight, scale)

    def rows(start: int, stop: int) -> np.ndarray:
        data = np.empty((stop - start, float8_rows.row_bytes(cols)), np.uint8)
        data[:, :cols] = weight.read(start, stop)
        data[:, cols:] = of_rows(start, stop)[:, None].astype("<f4").view(np.uint8)
        return data

    kind = "channel" if prod(scale.shape) == weight.count else "tensor"
    return Held(name, f"fp8-{kind}-float32", weight.shape, rows, parts)


def _of_rows(name: str, weight: Array, scale: Array) -> Callable[[int, int], np.ndarray]:
    """(start, stop) -> f32[stop - start]: the scale of each row, where there is one for all, a matrix or a row."""
    values = scale.floats().reshape(-1)
    if len(values) == 0 or weight.count % len(values):
        raise IntegrityError(f"{name}: {len(values)} scales for {weight.count} rows")
    each = weight.count // len(values)
    return lambda start, stop: values[np.arange(start, stop) // each]


READERS: Mapping[tuple[str, bool], Callable[[str, Parts, Array], Held]] = {
    # dtype of the codes, whether their scales are of groups
    ("U8", True): _int4,
    ("I8", True): _int4,
    ("I8", False): _int8,
    ("F8_E4M3", False): _float8,
}
