"""How far a decoded weight may lie from its source, in units of the grid's local step.

A sound encoder rounds to the grid: an error is about half a step, two or three where a value was clipped on purpose. A
flipped high bit of a stored 4-bit number moves its weight by eight steps, while the tensor's relative RMS error hardly
changes; a damaged scale makes the step itself so small, or so large, that the error leaves the grid.

    source            x
    grid        .--.--.--.--.--.--.--.--.--.      steps of |scale| x smallest gap between two levels
    decoded                             o         8 steps away: not rounding

What moves a weight by a step or two (low bits) is not seen here; the digests see it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmx.exporters.encoding import FLOAT8_ENCODINGS, GROUP_ENCODINGS, GroupEncoding
from llmx.formats import float8_rows, onnx_groups
from llmx.formats.ggml_blocks import BLOCKS
from llmx.formats.ggml_decode import LEVELS, decode, decode_codes, expand
from llmx.formats.ggml_packers import LAYOUTS, BlockScales, unpack

FLOATS: Mapping[str, tuple[float, float]] = {
    # spacing relative to the bottom of a binade, smallest spacing of all
    "F32": (2.0**-23, 2.0**-23),  # absolute: a norm gain is stored plus one, which rounds at one
    "F16": (2.0**-10, 2.0**-24),
    "BF16": (2.0**-7, 2.0**-133),
}
E4M3_SPACING = (2.0**-3, 2.0**-9)  # the same, in units of a row's scale
E4M3_TOP = 448.0
SMALLEST_HALF = 2.0**-24  # a scale is stored as a 16-bit float: nothing below this can be told from zero


def decode_with_error(type_name: str, data: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns (decoded f32[rows, cols], the largest |decoded - source| in steps of the grid; infinite for NaN).

    data: u8[rows, row bytes]. source: f32[rows, cols].
    Raises: UnsupportedError for a type that llmx cannot decode.
    """
    if type_name in GROUP_ENCODINGS:
        return _groups_with_error(GROUP_ENCODINGS[type_name], data, source)
    if type_name in FLOAT8_ENCODINGS:
        return _float8_with_error(data, source)
    if type_name not in LAYOUTS:
        decoded = decode(type_name, data)
        relative, smallest = FLOATS[type_name]
        with np.errstate(invalid="ignore", over="ignore"):
            return decoded, _largest(np.abs(decoded - source) / np.maximum(np.abs(source) * relative, smallest))
    scales, codes = unpack(type_name, data.reshape(-1, BLOCKS[type_name].bytes))
    decoded = decode_codes(type_name, scales, codes).reshape(source.shape)
    step, rounding = steps(type_name, scales)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(decoded - source).reshape(*step.shape, -1).max(axis=2)
        return decoded, _largest((error - rounding) / np.maximum(step, SMALLEST_HALF))


def block_weights(type_name: str, cols: int) -> int:
    """Returns how many weights of a row share their scales; 0 for floats, which have none."""
    if type_name in GROUP_ENCODINGS:
        group = GROUP_ENCODINGS[type_name].layout.group_weights(cols)
        return group if cols % group == 0 else cols  # a ragged row is looked at as a whole
    if type_name in FLOAT8_ENCODINGS:
        return cols
    return BLOCKS[type_name].weights if type_name in LAYOUTS else 0


def _groups_with_error(kept: GroupEncoding, data: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, float]:
    """The same of whole numbers in groups: the step is the group's scale."""
    cols = source.shape[1]
    decoded = kept.decode(data, cols)
    scales = onnx_groups.unpack(kept.layout, data, cols).scales
    step = np.repeat(np.abs(scales), kept.layout.group_weights(cols), axis=1)[:, :cols]
    with np.errstate(invalid="ignore", over="ignore"):
        return decoded, _largest(np.abs(decoded - source) / np.maximum(step, SMALLEST_HALF))


def _float8_with_error(data: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, float]:
    """The same of FP8: the step is the gap between two values there; above the largest, the gap below it."""
    found = float8_rows.decode(data, source.shape[1])
    scales = float8_rows.parts(data, source.shape[1]).scales[:, None]
    relative, smallest = E4M3_SPACING
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.minimum(np.abs(source), E4M3_TOP * np.abs(scales))
        step = np.maximum(size * np.float32(relative), np.abs(scales) * np.float32(smallest))
        return found, _largest(np.abs(found - source) / np.maximum(step, SMALLEST_HALF))


def steps(type_name: str, scales: BlockScales) -> tuple[np.ndarray, np.ndarray]:
    """Returns (step, rounding), both f32[blocks, subs], never negative.

    rounding: what the sub-block's own scale and minimum add by being multiples of the block's units: half a unit each.
    A sub-block whose scale is rounded to zero has no step of its own; its rounding is taken for it.
    """
    levels = LEVELS[type_name]
    with np.errstate(invalid="ignore"):
        step = np.abs(expand(type_name, scales)[0]) * np.diff(np.unique(levels)).min()  # FP4 has zero twice
        rounding = np.zeros(len(step), np.float32)
        if scales.scales is not None:
            rounding += 0.5 * np.abs(scales.d.astype(np.float32)) * np.abs(levels).max()
        if scales.mins is not None and scales.offset is not None:
            rounding += 0.5 * np.abs(scales.offset.astype(np.float32))
    rounding = np.broadcast_to(rounding[:, None], step.shape)
    return np.where(step == 0, rounding, step), rounding


def _largest(ratio: np.ndarray) -> float:
    largest = float(ratio.max(initial=0.0))
    return float("inf") if np.isnan(largest) else largest
