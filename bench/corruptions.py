"""Ways to damage one stored tensor, each at random: what bench/blame.py and its tests plant.

A damage is drawn again when it does not move the tensor measurably: in the blocks that it changes it must move the
weights at least SHARE times as far as quantizing had moved them already (root mean squares over these blocks; where
that was nothing, by 1e-4 of the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_decode import LEVELS, decode, expand
from llmx.formats.ggml_packers import LAYOUTS, BlockScales, pack, unpack
from llmx.quant.grid import encode

Bytes = np.ndarray
SHARE = 0.5
EXACT = 1e-4
DRAWS = 40  # of one kind for one tensor, before another tensor is taken


@dataclass(frozen=True)
class Stored:
    """One stored tensor: data u8[rows, row bytes], and what it was made from, f32[rows, columns]."""

    name: str
    type_name: str
    data: Bytes
    source: np.ndarray

    @property
    def decoded(self) -> np.ndarray:
        return decode(self.type_name, self.data)

    @property
    def has_blocks(self) -> bool:
        return self.type_name in LAYOUTS

    @property
    def unpacked(self) -> tuple[BlockScales, np.ndarray]:
        return unpack(self.type_name, self.data.reshape(-1, BLOCKS[self.type_name].bytes))

    def packed(self, scales: BlockScales, codes: np.ndarray) -> Bytes:
        return pack(self.type_name, scales, codes).reshape(self.data.shape)

    def encoded(self, values: np.ndarray) -> Bytes:
        return encode(self.type_name, np.ascontiguousarray(values, np.float32), effort="fast")


Damage = Callable[[np.random.Generator, Stored], Bytes | None]  # None: this tensor cannot have it


def flipped_bits(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """One bit of each of 4 codes to 1 % of them (a float type: of that many words)."""
    if not stored.has_blocks:
        words = stored.data.copy().reshape(-1).view(f"<u{BLOCKS[stored.type_name].bytes}")
        some = rng.choice(len(words), _several(rng, len(words)), replace=False)
        words[some] ^= (1 << rng.integers(0, 8 * words.itemsize, len(some))).astype(words.dtype)
        return words.view(np.uint8).reshape(stored.data.shape)
    scales, codes = stored.unpacked
    flat = codes.reshape(-1)
    some = rng.choice(len(flat), _several(rng, len(flat)), replace=False)
    bits = int(np.log2(len(LEVELS[stored.type_name])))
    flat[some] ^= (1 << rng.integers(0, bits, len(some))).astype(np.uint8)
    return stored.packed(scales, codes)


def _several(rng: np.random.Generator, count: int) -> int:
    return min(count, int(rng.integers(4, max(5, count // 100) + 1)))


def doubled_scale(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """The scale of one block times two."""
    return _one_scale(rng, stored, lambda d: d * 2)


def broken_scale(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """The scale of one block is NaN (a float type: one value)."""
    if not stored.has_blocks:
        values = stored.decoded
        values.reshape(-1)[rng.integers(values.size)] = np.nan
        return _floats(stored, values)
    return _one_scale(rng, stored, lambda d: d * np.float16(np.nan))


def _one_scale(rng: np.random.Generator, stored: Stored, change: Callable[[np.ndarray], np.ndarray]) -> Bytes | None:
    if not stored.has_blocks or stored.type_name == "MXFP4":
        return None
    scales, codes = stored.unpacked
    d = scales.d.copy()
    where = int(rng.integers(len(d)))
    with np.errstate(over="ignore"):
        d[where] = change(d[where])
    return stored.packed(replace(scales, d=d), codes)


def zeroed_rows(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """One row to a sixteenth of them hold zeros."""
    if len(stored.data) == 1:
        return None
    data = stored.data.copy()
    some = rng.choice(len(data), rng.integers(1, max(1, len(data) // 16) + 1), replace=False)
    data[some] = stored.encoded(np.zeros((len(some), stored.source.shape[1])))
    return data


def exchanged_rows(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """One pair of rows to a sixteenth of all are exchanged."""
    if len(stored.data) < 2:
        return None
    pairs = int(rng.integers(1, max(1, len(stored.data) // 32) + 1))
    some = rng.choice(len(stored.data), 2 * pairs, replace=False)
    data = stored.data.copy()
    data[some[:pairs]], data[some[pairs:]] = stored.data[some[pairs:]], stored.data[some[:pairs]]
    return data


def scaled(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """The whole tensor times 1.05: its scales and offsets, its codes stay."""
    if not stored.has_blocks:
        return _floats(stored, stored.decoded * 1.05)
    if stored.type_name == "MXFP4":
        return None
    scales, codes = stored.unpacked
    offset = None if scales.offset is None else (scales.offset.astype(np.float32) * 1.05).astype(scales.offset.dtype)
    d = (scales.d.astype(np.float32) * 1.05).astype(scales.d.dtype)
    return stored.packed(replace(scales, d=d, offset=offset), codes)


def noisy(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """White noise of twice the root mean square error that the tensor has already, rounded again."""
    error = float(np.sqrt(np.mean((stored.decoded - stored.source) ** 2)))
    if error == 0:
        return None
    values = stored.decoded + rng.standard_normal(stored.source.shape).astype(np.float32) * 2 * error
    return stored.encoded(values) if stored.has_blocks else _floats(stored, values)


def transposed(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """A square matrix transposed."""
    rows, columns = stored.source.shape
    return stored.encoded(stored.decoded.T) if rows == columns > 1 else None


def shifted(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """Every minimum one unit higher; of a type without minimums, every code one higher."""
    if not stored.has_blocks:
        return None
    scales, codes = stored.unpacked
    if scales.mins is not None:
        top = 15 if stored.type_name == "Q2_K" else 63
        return stored.packed(replace(scales, mins=np.minimum(scales.mins + 1, top).astype(np.int8)), codes)
    if scales.offset is not None:
        offset = (scales.offset.astype(np.float32) + expand(stored.type_name, scales)[0][:, 0]).astype(np.float16)
        return stored.packed(replace(scales, offset=offset), codes)
    top = len(LEVELS[stored.type_name]) - 1
    return stored.packed(scales, np.minimum(codes.astype(np.int16) + 1, top).astype(np.uint8))


def two_bits(rng: np.random.Generator, stored: Stored) -> Bytes | None:
    """Rounded to four levels a group of 16 first, then to its own type again."""
    if not stored.has_blocks or stored.type_name == "Q2_K" or stored.source.shape[1] % 16:
        return None
    groups = stored.decoded.reshape(-1, 16)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step = np.where(high > low, (high - low) / 3, 1)
    return stored.encoded((np.round((groups - low) / step) * step + low).reshape(stored.source.shape))


def _floats(stored: Stored, values: np.ndarray) -> Bytes:
    """Values in a float type, NaN included."""
    if stored.type_name == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8).reshape(stored.data.shape)
    with np.errstate(over="ignore"):
        return values.astype({"F32": "<f4", "F16": "<f2"}[stored.type_name]).view(np.uint8).reshape(stored.data.shape)


DAMAGES: Mapping[str, Damage] = {
    "flipped bits": flipped_bits,
    "a scale doubled": doubled_scale,
    "a scale NaN": broken_scale,
    "rows zeroed": zeroed_rows,
    "rows exchanged": exchanged_rows,
    "scaled by 1.05": scaled,
    "noise": noisy,
    "transposed": transposed,
    "shifted": shifted,
    "two bits": two_bits,
}
EXCHANGED = "tensors exchanged"  # two of one layer, shape and type: no damage of one tensor alone


def measurable(stored: Stored, damaged: Bytes) -> bool:
    """Whether the damage moves the blocks that it changes far enough, see above."""
    size = BLOCKS[stored.type_name].bytes if stored.has_blocks else row_bytes(stored.type_name, stored.source.shape[1])
    touched = (stored.data.reshape(-1, size) != damaged.reshape(-1, size)).any(1)
    if not touched.any():
        return False
    before, after = (
        decode(stored.type_name, data).reshape(len(touched), -1)[touched] for data in (stored.data, damaged)
    )
    if not np.isfinite(after).all():
        return True
    source = stored.source.reshape(len(touched), -1)[touched]
    with np.errstate(over="ignore"):
        moved, noise, size = (float(np.linalg.norm(part)) for part in (after - before, before - source, source))
    return moved >= max(SHARE * noise, EXACT * size)


def draw(rng: np.random.Generator, kind: str, stored: Stored) -> tuple[Bytes | None, int]:
    """Returns (a measurable damage of that kind, how many were drawn before it that are not); None after DRAWS."""
    for number in range(DRAWS):
        damaged = DAMAGES[kind](rng, stored)
        if damaged is None:
            return None, number
        if measurable(stored, damaged):
            return damaged, number
    return None, DRAWS
