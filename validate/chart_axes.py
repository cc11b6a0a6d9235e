"""The axes of a chart: which values become round ticks, how they are written, and where a value lies on the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # times a power of ten: what people read as round
# Times powers of ten: the ticks of a logarithmic axis, of these the first that has room.
BETWEEN = ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
CLOSEST = 0.75  # of a tick's room
HEADROOM = 0.04  # of the span, beyond the outermost values
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
SCIENTIFIC_BELOW = 1e-3


def short(value: float) -> str:
    """Returns a number as an axis writes it: 0.02, 1.5, 12k, 3.4M, 2e-5."""
    if value != 0 and abs(value) < SCIENTIFIC_BELOW:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    factor, letter = next(((factor, letter) for factor, letter in PREFIXES if abs(value) >= factor), (1.0, ""))
    return f"{value / factor:.4g}{letter}"


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis says. log: powers of ten; whole: ticks at integers only; zero: a linear axis begins at 0.

    write: how a tick is written.
    """

    title: str = ""
    log: bool = False
    whole: bool = False
    zero: bool = False
    write: Callable[[float], str] = short

    def shows(self, value: float) -> bool:
        """Tells whether a value has a place on the axis: finite, and positive where it is logarithmic."""
        return math.isfinite(value) and (value > 0 or not self.log)


@dataclass(frozen=True, slots=True)
class Scale:
    """A laid-out axis: values low to high lie on the paper from `start` to `end` (which may be the smaller).

    low, high: of a logarithmic axis their decimal logarithms, since ten to their power may be no float.
    """

    axis: Axis
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Returns the coordinate of a value that the axis shows."""
        at = math.log10(value) if self.axis.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, room: float) -> list[float]:
        """Returns round values inside the axis, about one every `room` units of paper, at least two."""
        wanted = max(2, int(abs(self.end - self.start) / room))
        if not self.axis.log:
            return linear_ticks(self.low, self.high, wanted, whole=self.axis.whole)
        for factors in BETWEEN:
            found = _log_ticks(self.low, self.high, factors)
            if len(found) > 1 and self._closest(found) >= CLOSEST * room:
                return found
        thinned = _log_ticks(self.low, self.high, (1,), math.ceil((self.high - self.low) / wanted))
        powers = _log_ticks(self.low, self.high, (1,))
        if len(powers) > 1:
            return thinned if len(thinned) > 1 else [powers[0], powers[-1]]
        return self._apart(linear_ticks(10**self.low, 10**self.high, wanted), CLOSEST * room)

    def _closest(self, values: Sequence[float]) -> float:
        places = [self.place(value) for value in values]
        return min(abs(a - b) for a, b in pairwise(places))

    def _apart(self, values: Sequence[float], distance: float) -> list[float]:
        """The values without those too near to the one before; the first and one far from it always stay."""
        kept = [values[0]]
        for value in values[1:]:
            if abs(self.place(value) - self.place(kept[-1])) >= distance:
                kept.append(value)
        return kept if len(kept) > 1 else [values[0], values[-1]]


def scale_of(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    """Returns the scale on which all the values that the axis shows fit, with a little air on both sides."""
    shown = [value for value in values if axis.shows(value)] or [1.0]
    if axis.log:
        shown = [math.log10(value) for value in shown]
    elif axis.zero:
        shown = [*shown, 0.0]
    low, high = min(shown), max(shown)
    span = (high - low) or (0.3 if axis.log else abs(high) or 1.0)
    bottom = low if axis.zero and low == 0 else low - HEADROOM * span
    return Scale(axis, bottom, high + HEADROOM * span, start, end)


def linear_ticks(low: float, high: float, wanted: int, *, whole: bool = False) -> list[float]:
    """Returns multiples of a round step between low and high: as many as wanted or fewer, where there are any.

    Raises: ValueError when high is not above low.
    """
    if not high > low:
        raise ValueError(f"an axis from {low} to {high}")
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in STEPS if step * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) if abs(step) > 1e-9 else number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float, factors: Sequence[int], every: int = 1) -> list[float]:
    """These factors of each power of ten that `every` divides, from 10^low to 10^high."""
    first, last = max(math.ceil(low - 1), -307), min(math.floor(high), 307)  # of which 5 times are floats
    powers = [power for power in range(first, last + 1) if power % every == 0]
    pairs = [(factor, power) for power in powers for factor in factors]
    return [float(f"{factor}e{power}") for factor, power in pairs if low <= power + math.log10(factor) <= high]
