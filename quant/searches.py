"""How hard each grid looks for its scales: presets in a table, and the starts they take the first of.

The starts of a list stand in the order of what each adds: chosen one after another, from a fine raster, so that the
mean of the least error over many sub-blocks (Student's t of 4 to 60 degrees of freedom, half with importance) falls
most. So a preset is a number of starts: the first k are about the best k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmx.quant.protocol import EFFORTS, Effort


@dataclass(frozen=True, slots=True)
class Search:
    """How thoroughly a grid looks for its scales.

    starts: the first scales tried (see affine.search, symmetric.search, integer.search, microfloat.fit_steps).
    lloyd: refits of the best. loops: rounds of ±1 moves of what is stored as an integer.
    """

    starts: tuple[Any, ...]
    lloyd: int = 1
    loops: int = 2


Searches = Mapping[Effort, Search]


def presets(starts: tuple[Any, ...], *rows: tuple[int, int, int]) -> Searches:
    """One Search an effort, from rows of (how many starts, lloyd, loops)."""
    return {effort: Search(starts[:k], lloyd, loops) for effort, (k, lloyd, loops) in zip(EFFORTS, rows, strict=True)}


# (extra, part): the range of the weights is laid on top + extra steps, the minimum on `part` of the lowest weight.
# fmt: off
_TWO_BITS = (
    (0.4, 0.9), (0.4, 0.7), (0.5, 1), (0.3, 0.85), (0.3, 0.5), (0.4, 0.95), (0.7, 1.05), (-1, 1), (1.2, 0.6),
    (0.9, 0.5), (0.1, 0.4), (-0.2, 1.05), (1.4, 0.75), (0.3, 0.8), (-0.1, 1.15), (1.2, 1), (-0.3, 0.85),
    (-1, 0.55), (1.1, 0.9), (1.1, 0.7), (0.9, 0.4), (1.4, 0.5), (0.5, 0.95), (0.2, 1.15), (0, 1.05), (0.3, 0.4),
    (1.6, 1), (-0.3, 1), (0.3, 0.9), (-0.1, 0.4), (0.4, 0.65), (-0.5, 0.75),
)
_FOUR_BITS = (
    (0.2, 1), (0.2, 0.95), (-1, 1), (0.6, 1), (-0.2, 1), (0.6, 0.95), (-0.6, 1.1), (0.6, 0.9), (-2, 1), (0.4, 1),
    (0, 1), (-0.8, 0.95), (1, 1), (-0.8, 1), (0.8, 0.85), (1, 0.95), (-0.2, 1.05), (0.4, 0.95), (-1.8, 0.95),
    (1, 0.9), (-3, 1), (-1.2, 1), (-1.2, 1.05), (-1.8, 1), (0, 1.05), (0.8, 0.75), (1.4, 0.85), (1.4, 1),
    (-0.4, 1), (1.6, 0.95), (1.4, 0.9), (-0.2, 1.1), (-0.4, 1.05), (0.8, 0.95), (-2.8, 0.95), (0, 0.95), (-2.2, 1),
    (1.2, 0.8), (-2.2, 1.05), (-0.6, 1.05), (-0.8, 1.1), (1.2, 0.95), (-2.6, 1), (-0.6, 1.15), (0.8, 1), (2, 0.8),
    (1.8, 1), (0.4, 0.9), (-1, 1.15), (-1.4, 1.1), (0.8, 0.9), (2, 0.95), (1.8, 0.9), (-1.4, 1.05), (1.8, 0.85),
    (-0.4, 1.1), (2.2, 0.75), (-1, 1.1), (0.2, 1.05), (-0.8, 1.05), (-1.6, 0.95), (-2.8, 1), (1.2, 0.85),
    (0.6, 0.85),
)
_FIVE_BITS = (
    (0, 1), (-1, 1), (-2, 1), (0.5, 1), (-0.25, 1), (-3, 1), (-0.75, 1.05), (0.75, 0.95), (0.25, 1), (-4, 1),
    (-0.75, 1), (-1.5, 1.05), (-1.25, 1), (-5, 1), (-1.75, 1), (-2.25, 1), (-2.5, 1.05), (-0.25, 1.05), (-6, 1),
    (1.25, 0.95), (-3.25, 1), (0.75, 1), (-2.75, 1), (-1.25, 1.1), (-3.75, 1), (0.5, 0.95), (-3.75, 1.05),
    (1, 0.95), (-7, 1), (-0.5, 1.05), (-1, 1.05), (-1.75, 1.1), (-2.5, 1.1), (-0.25, 0.95), (-4.25, 1), (-0.5, 1),
    (-4.5, 1.05), (-1.75, 1.05), (-1.25, 1.05), (-3.25, 1.1), (1.5, 0.95), (-4.75, 1), (-2.25, 1.1), (-5.25, 1),
    (1.25, 1), (-5.75, 1), (1.5, 0.9), (-2.5, 1.15), (-0.75, 1.1), (-1.5, 1.1), (-3.5, 1.05), (-5.5, 1.05),
    (-2, 1.1), (0.5, 0.9), (0.25, 0.95), (-2.25, 1.15), (-2.75, 1.05), (-3, 1.1), (-3.75, 1.15), (-1.5, 1.15),
    (-6.25, 1), (1, 1), (1.75, 0.95), (-1, 1.1),
)
# The level on which the weight of largest magnitude is put.
_EIGHT = (
    -4.05, -3.15, -4.55, -3.75, 4.3, -5, -4.25, -2.9, -2.25, -3.35, -3.9, 4.9, 3.9, -3.6, -2.65, -4.4, -3.05,
    -4.15, -4.8, -2.05,
)
_SIXTEEN = (
    -8, -7.1, -8.4, -7.7, -9, -6.1, -6.8, -8.2, -7.3, 8.1, -9.6, -8.7, -7.9, -5.1, 8.7, -7, -6.3, -5.8, -8.1, -9.9,
    -9.3, 7.8, -8.5, -7.5, -7.8, -6.6, -8.3, -7.2,
)
_THIRTY_TWO = (
    -16, -15, -14, -16.4, -13, -15.8, -15.2, -16.8, -14.8, -12, -16.2, -14.2, -13.8, -17.4, -15.6, -13.2, -11,
    -15.4, -18, 16.2, -14.6, -12.8, -16.6, -10, -17, -12.2, -14.4, -13.6, -13.4, -11.2, 15.8, -18.4,
)
_SIXTY_FOUR = (
    -32, -31, -30, -29, -28, -27, -26, -25, -24, -23, -31.75, -22, -32.5, -21, -30.75, -31.25, -20, -29.25, -30.25,
    -29.75, -28.75, -16.75, -28.25, -18.5, -32.25, -27.25, -27.75, -19, -26.75, -24.75, -26.25, -25.25,
)
_UNEVEN = (
    -128, 114, -108, -122, -136, 108, 122, 90, -104, -86, -132, -144, 130, -126, -112, 118, 112, -118, -98, 96, 70,
    -82, 140, -130, -68, -154, -124, -140,
)
_WIDE = tuple(float(-level) for level in (127, 125, 123, 126, 121, 124, 122, 119, 120, 117, 118, 115, 114, 116, 110))
# fmt: on

SEARCHES: dict[str, Searches] = {
    # starts, lloyd, loops: fast, balanced, best
    "Q2_K": presets(_TWO_BITS, (10, 0, 0), (12, 1, 2), (32, 2, 3)),
    "Q4_K": presets(_FOUR_BITS, (10, 0, 0), (16, 1, 2), (48, 2, 3)),
    "Q5_K": presets(_FIVE_BITS, (10, 0, 0), (16, 1, 2), (48, 2, 3)),
    "Q4_1": presets(_FOUR_BITS, (6, 0, 0), (16, 1, 0), (64, 2, 0)),
    "Q5_1": presets(_FIVE_BITS, (6, 0, 0), (16, 1, 0), (64, 2, 0)),
    "Q3_K": presets(_EIGHT, (4, 0, 0), (8, 1, 2), (20, 2, 3)),
    "Q6_K": presets(_SIXTY_FOUR, (6, 0, 0), (8, 1, 2), (32, 2, 3)),
    "Q4_0": presets(_SIXTEEN, (3, 0, 0), (10, 1, 0), (28, 2, 0)),
    "Q5_0": presets(_THIRTY_TWO, (3, 0, 0), (10, 1, 0), (32, 2, 0)),
    "Q8_0": presets(_WIDE, (2, 0, 0), (5, 1, 0), (15, 1, 0)),
    "IQ4_NL": presets(_UNEVEN, (6, 0, 0), (12, 1, 0), (28, 2, 0)),
    "IQ4_XS": presets(_UNEVEN, (6, 0, 0), (12, 1, 2), (28, 2, 3)),
}
"""How hard each of ggml's block types is fitted, keyed by type name."""
