"""The pictures of a report, each from one curve or table of its `details`; a picture without data is not made.

Every picture is drawn twice, for a desk and for a phone, because the letters of one that is scaled down cannot be read;
the page shows one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from llmx.validate.chart_axes import Axis, short
from llmx.validate.charts import Row, Series, Size, bars, plot

Details = Mapping[str, Any]
Tensors = Sequence[Mapping[str, Any]]
FULL, HALF, PHONE = Size(940, 330), Size(480, 270), Size(330, 280)
CLOUD = 600  # points drawn of a long curve
WINDOWS = 32  # of the running mean
SHORTEST_WINDOW = 8  # positions
LAYER = Axis("layer", whole=True)
RELATIVE = Axis("relative RMS error", log=True)


@dataclass(frozen=True, slots=True)
class Figure:
    """A heading, a sentence that says how to read the picture, and the picture for wide and for narrow pages."""

    heading: str
    caption: str
    wide: Markup
    narrow: Markup
    full: bool = False  # as wide as the page


def as_float(value: float | int | str | None) -> float:
    """Returns a figure of the report as a float; the words "nan", "inf" and "-inf" are understood, None is NaN."""
    return float("nan") if value is None else float(value)


def percent(share: float) -> str:
    """Returns a share in per cent, with the digits that tell 99.9 from 99.99."""
    return f"{100 * share:.10g} %"


def size_of(count: float) -> str:
    """Returns bytes as people say them, in powers of 1000."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:,.3g} {unit}" if count < 100 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count:,.0f} B"


def _figure(heading: str, caption: str, draw: Callable[[Size], str], *, full: bool = False) -> Figure:
    wide, narrow = (Markup(draw(size)) for size in (FULL if full else HALF, PHONE))  # escaped where it is made
    return Figure(heading, caption, wide, narrow, full)


def quality_figures(details: Details) -> list[Figure]:
    """Returns KL by position and the quantiles of the KL, of those that the report holds."""
    made = (_kl_by_position(details.get("kl_by_position")), _kl_quantiles(details.get("kl_quantiles")))
    return [figure for figure in made if figure is not None]


def _kl_by_position(curve: Sequence[Mapping[str, Any]] | None) -> Figure | None:
    if not curve:
        return None
    points = [(float(at["position"]), as_float(at["kl"])) for at in curve]
    every = -(-len(points) // CLOUD)
    cloud = [max(points[i : i + every], key=lambda point: point[1]) for i in range(0, len(points), every)]
    span = max(SHORTEST_WINDOW, -(-len(points) // WINDOWS))
    parts = [points[i : i + span] for i in range(0, len(points), span)]
    means = [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]
    name = "one point of the curve" if every == 1 else f"largest of {every} points"
    series = [Series(name, cloud, line=False, faint=True), Series(f"mean of {span} points", means, marks=False)]
    y = Axis("KL, nats", log=True)
    apart = (points[-1][0] - points[0][0]) / max(1, len(points) - 1)
    each = "" if apart < 1.5 else f", each the mean of about {apart:.0f} positions"
    caption = (
        f"{len(points):,} points{each}, in the order of the evaluation text. "
        "A level cloud is what rounding leaves; a rise means that something adds up."
    )
    title = f"KL divergence by position, {len(points)} points"
    return _figure("KL by position", caption, lambda size: plot(title, series, Axis("position"), y, size))


def _kl_quantiles(quantiles: Mapping[str, Any] | None) -> Figure | None:
    if not quantiles:
        return None
    pairs = sorted((float(share), as_float(kl)) for share, kl in quantiles.items())
    rows = [Row(f"{percent(share)} of the positions", kl, f"≤ {short(kl)} nats") for share, kl in pairs]
    caption = "How large the KL divergence is at most, for this share of the positions: what a mean hides."
    axis = Axis("KL, nats", log=True)
    return _figure(
        "KL quantiles", caption, lambda size: bars("Quantiles of the KL divergence", rows, axis, size, dots=True)
    )


def tensor_errors(tensors: Tensors) -> Figure | None:
    """Returns the error of every tensor that stands in a layer and is not exact, a series a role."""
    placed = [tensor for tensor in tensors if tensor["layer"] is not None and as_float(tensor["rms"]) != 0]
    placed = [tensor for tensor in placed if tensor["rms"] is not None]
    if not placed:
        return None
    roles = list(dict.fromkeys(tensor["role"] for tensor in placed))
    series = []
    for role in roles:
        mine = sorted((tensor for tensor in placed if tensor["role"] == role), key=lambda tensor: tensor["layer"])
        points = [(float(tensor["layer"]), as_float(tensor["rms"])) for tensor in mine]
        notes = [f"{t['name']} ({t['type']}): {short(as_float(t['rms']))}" for t in mine]
        series.append(Series(str(role), points, notes=notes))
    exact = sum(as_float(tensor["rms"]) == 0 for tensor in tensors)
    caption = "‖decoded − source‖ / ‖source‖ of each tensor. A point far above its neighbours is damaged or misplaced."
    if exact:
        caption += f" {exact} tensors are exact and not drawn."
    title = "Relative error of each tensor by layer"
    return _figure("Error by layer", caption, lambda size: plot(title, series, LAYER, RELATIVE, size), full=True)


def size_figures(tensors: Tensors) -> list[Figure]:
    """Returns the bytes by type and, where the tensors tell their roles, by role."""
    words = {"type": "Size by type", "role": "Size by role"}
    return [_sizes(tensors, key, heading) for key, heading in words.items() if tensors and key in tensors[0]]


def _sizes(tensors: Tensors, key: str, heading: str) -> Figure:
    totals: dict[str, int] = {}
    counts: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor[key]] = totals.get(tensor[key], 0) + tensor["bytes"]
        counts[tensor[key]] = counts.get(tensor[key], 0) + 1
    whole = sum(totals.values()) or 1
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    rows = [
        Row(
            f"{name}, {counts[name]} tensor{'s' * (counts[name] > 1)}",
            count,
            f"{size_of(count)}, {100 * count / whole:.1f} %",
        )
        for name, count in ordered
    ]
    caption = f"{size_of(whole)} of tensors in all."
    return _figure(heading, caption, lambda size: bars(heading, rows, Axis(zero=True), size))


def layer_errors(blame: Mapping[str, Any]) -> Figure | None:
    """Returns how far the hidden states lie apart behind each layer."""
    layers = blame.get("layers")
    if not layers:
        return None
    points = [(float(at["layer"]), as_float(at["error"])) for at in layers]
    caption = (
        "How far the hidden states behind each layer lie from the reference. The first step up is where it begins."
    )
    series = [Series("hidden states", points)]
    title = "Divergence of the hidden states by layer"
    return _figure("Divergence by layer", caption, lambda size: plot(title, series, LAYER, RELATIVE, size), full=True)
