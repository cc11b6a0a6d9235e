"""Charts as SVG text: lines and points on two axes, and rows of bars or dots. No dependency, no script, no font.

A chart says what it shows without colours: every series has a marker of its own, every mark a tooltip, the whole a
title that is read aloud. Its colours are CSS variables with values for light and dark; `STYLE` holds them, for the page
around a chart or, with `standalone`, for a file of its own.

Coordinates are SVG's: x to the right, y downward, in units of the chart's width as `Size` gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from llmx.validate.chart_axes import Axis, Scale, scale_of

TEXT = 12  # font size of everything
CHARACTER = 0.58 * TEXT  # about the width of one letter
LINE = 17
MARK = 4.0  # half the width of a marker
GAP = 8.0
COLORS = 8
TICK_ROOM_X, TICK_ROOM_Y = 64, 36
UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold

# Okabe and Ito's colours, told apart by colour-blind readers; darkened for white paper, lightened for black.
STYLE = """
.chart{--c0:#0067a3;--c1:#b8500a;--c2:#00785a;--c3:#a3407f;--c4:#7a6a00;--c5:#1f86c9;--c6:#5b5b66;--c7:#8a2d1c;
--grid:#dfe1e6;--ink:#42464f;--paper:#fff;font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){.chart{--c0:#56b4e9;--c1:#f0a45a;--c2:#2fc79e;--c3:#e39ac8;--c4:#e6d84a;--c5:#8fb7ff;
--c6:#b4b7c2;--c7:#ff8f78;--grid:#333842;--ink:#b9bec9;--paper:#16181d}}
.chart text{fill:var(--ink)}.chart .grid{stroke:var(--grid);stroke-width:1;fill:none}
.chart .axis{stroke:var(--ink);stroke-width:1;fill:none}.chart .line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.chart .dash{stroke-dasharray:5 4}.chart .mark{stroke-width:1.4}.chart .hollow{fill:var(--paper)}
.chart .faint{opacity:.4}.chart .label{font-weight:500}.chart .bar{stroke:none}
""" + "".join(
    f".chart .s{n}{{stroke:var(--c{n});fill:var(--c{n})}}.chart .line.s{n}{{fill:none}}" for n in range(COLORS)
)

# Around (0, 0), MARK wide to each side.
MARKERS = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",  # circle
    "M-3.2 -3.2h6.4v6.4h-6.4z",  # square
    "M0 -4.4L4.4 0L0 4.4L-4.4 0z",  # diamond
    "M0 -4.2L4 3.2H-4z",  # triangle
    "M0 4.2L4 -3.2H-4z",  # triangle, point down
    "M-1.4 -4h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",  # plus
    "M-4 -4h2.6L0 -1.8L1.4 -4H4L1.6 0L4 4H1.4L0 1.8L-1.4 4H-4L-1.6 0z",  # cross
    "M-4 -1.4H4V1.4H-4z",  # dash
)


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in SVG units; a page shows a chart at about one CSS pixel a unit, or letters shrink."""

    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud of points (x, y), in the order in which they are joined.

    labels: written beside the points, as many as there are, or none. line, marks: what is drawn. faint: many points
    that are to be seen as a cloud. notes: the tooltips; without them a tooltip gives the two values.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    notes: Sequence[str] = ()
    line: bool = True
    marks: bool = True
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One bar or dot: its label, its value, and how the value is written."""

    label: str
    value: float
    text: str = ""


@dataclass(slots=True)
class _Labels:
    """Where words stand already, so that the next ones go elsewhere."""

    size: Size
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # left, top, right, bottom

    def block(self, x: float, y: float) -> None:
        self.taken.append((x - MARK, y - MARK, x + MARK, y + MARK))

    def place(self, x: float, y: float, text: str) -> tuple[float, float]:
        """Returns the left end and the baseline of a label near (x, y): right, left, above, below, the first free."""
        width, reach = len(text) * CHARACTER, MARK + 3
        lefts = (x + reach, x - reach - width, x - width / 2, x - width / 2, x + reach, x - reach - width)
        bases = (y + 4, y + 4, y - reach - 2, y + reach + TEXT - 2, y - reach - 2, y - reach - 2)
        boxes = [(left, base - TEXT, left + width, base + 3) for left, base in zip(lefts, bases, strict=True)]
        inside = [box for box in boxes if box[0] >= 0 and box[2] <= self.size.width and box[1] >= 0] or boxes
        box = next((box for box in inside if not any(_overlap(box, other) for other in self.taken)), inside[0])
        self.taken.append(box)
        return box[0], box[3] - 3


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def plot(title: str, series: Sequence[Series], x: Axis, y: Axis, size: Size) -> str:
    """Returns an SVG element: every series on common axes, its legend above where there are several.

    title: what a reader who does not see the chart should know. Points without a place on an axis (not finite; not
    positive on a logarithmic one) are left out and counted in a line of the chart.
    """
    svg = _canvas(title, size)
    top = _legend(svg, series, size) if len(series) > 1 else GAP
    shown = [[p for p in one.points if x.shows(p[0]) and y.shows(p[1])] for one in series]
    hidden = sum(len(one.points) for one in series) - sum(map(len, shown))
    if hidden:
        top += LINE
        _text(svg, size.width, top - 4, f"{hidden} of the points not drawn: no place on these axes", "end")
    top += LINE  # the vertical axis's title stands above it
    bottom = size.height - (2.6 if x.title else 1.4) * LINE
    down = scale_of(y, [p[1] for points in shown for p in points], bottom, top + GAP)
    left = GAP + CHARACTER * max(len(y.write(tick)) for tick in down.ticks(TICK_ROOM_Y))
    across = scale_of(x, [p[0] for points in shown for p in points], left, size.width - GAP)
    _frame(svg, across, down, size)
    labels = _Labels(size)
    for points in shown:
        for at in points:
            labels.block(across.place(at[0]), down.place(at[1]))
    for number, one in enumerate(series):
        _draw(svg, number, one, (across, down), labels)
    return _written(svg)


def bars(title: str, rows: Sequence[Row], axis: Axis, size: Size, *, dots: bool = False) -> str:
    """Returns an SVG element: a labelled row for each value, as bars from zero or as dots; of the height they need.

    A logarithmic axis has no zero for a bar to begin at: it takes dots. Raises: ValueError for bars on one.
    """
    if axis.log and not dots:
        raise ValueError("bars begin at zero, which a logarithmic axis does not have; ask for dots")
    step = 2 * LINE  # the label above its bar, so that long names fit on a phone
    sheet = Size(size.width, GAP + step * len(rows) + (LINE * 2.4 if dots else 4))
    svg = _canvas(title, sheet)
    values = [row.value for row in rows]
    room = GAP + CHARACTER * max((len(row.text) for row in rows), default=0)
    across = scale_of(axis, values if dots else [*values, 0.0], GAP, size.width - (GAP if dots else room))
    bottom = GAP + step * len(rows)
    if dots:
        for tick in across.ticks(TICK_ROOM_X):
            at = across.place(tick)
            _path(svg, f"M{at:.1f} {GAP}V{bottom:.1f}", "grid")
            _text(svg, at, bottom + LINE, axis.write(tick), "middle")
        _text(svg, size.width - GAP, bottom + 2 * LINE, axis.title, "end")
    for number, row in enumerate(rows):
        _row(svg, row, across, GAP + step * number, size.width - GAP, dots=dots)
    return _written(svg)


def standalone(svg: str) -> str:
    """Returns the chart as the text of an SVG file, which carries its own style and background."""
    head, _, rest = svg.partition(">")
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    paper = '<rect width="100%" height="100%" style="fill:var(--paper)"/>'
    return f"{head}><style>{STYLE}</style>{paper}{rest}\n"


def printable(text: str) -> str:
    """Returns the text with what XML cannot hold (control characters, lone surrogates) as U+FFFD."""
    return UNWRITABLE.sub("\ufffd", text)


def shortened(text: str, room: float) -> str:
    """Returns the text, cut in the middle where it is longer than `room` units of a chart; both its ends tell."""
    most = max(5, int(room / CHARACTER))
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def _canvas(title: str, size: Size) -> ElementTree.Element:
    name = printable(title)
    view = f"0 0 {size.width:g} {size.height:g}"
    svg = ElementTree.Element("svg", {"class": "chart", "viewBox": view, "role": "img", "aria-label": name})
    ElementTree.SubElement(svg, "title").text = name
    return svg


def _legend(svg: ElementTree.Element, series: Sequence[Series], size: Size) -> float:
    """Draws marker and name of each series in lines across the chart; returns where the lines end."""
    x, y = GAP, float(LINE)
    for number, one in enumerate(series):
        name = shortened(one.name, size.width - 4 * GAP)
        width = 3 * GAP + len(name) * CHARACTER
        if x + width > size.width and x > GAP:
            x, y = GAP, y + LINE
        if one.marks:
            _mark(svg, number, x + MARK, y - 4)
        else:
            _path(svg, f"M{x - 3:.1f} {y - 4:.1f}h{2 * GAP:.1f}", f"line s{number % COLORS}{' dash' * one.dashed}")
        _text(svg, x + (2 if one.marks else 2.2) * GAP, y, name)
        x += width
    return y + GAP / 2


def _frame(svg: ElementTree.Element, across: Scale, down: Scale, size: Size) -> None:
    """Grid, ticks and titles of both axes."""
    left, right, top, bottom = across.start, across.end, down.end, down.start
    for tick in down.ticks(TICK_ROOM_Y):
        at = down.place(tick)
        _path(svg, f"M{left:.1f} {at:.1f}H{right:.1f}", "grid")
        _text(svg, left - 5, at + 4, down.axis.write(tick), "end")
    for tick in across.ticks(TICK_ROOM_X):
        at = across.place(tick)
        _path(svg, f"M{at:.1f} {bottom:.1f}v4", "axis")
        written = across.axis.write(tick)
        _text(svg, min(at, size.width - CHARACTER * len(written) / 2), bottom + LINE, written, "middle")
    _path(svg, f"M{left:.1f} {bottom:.1f}H{right:.1f}", "axis")
    _text(svg, 0, top - GAP, down.axis.title)
    _text(svg, right, bottom + 2.2 * LINE, across.axis.title, "end")


def _draw(svg: ElementTree.Element, number: int, one: Series, scales: tuple[Scale, Scale], labels: _Labels) -> None:
    across, down = scales
    kept = [i for i, (x, y) in enumerate(one.points) if across.axis.shows(x) and down.axis.shows(y)]
    places = [(across.place(one.points[i][0]), down.place(one.points[i][1])) for i in kept]
    if one.line and len(places) > 1:
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        _path(svg, f"M{steps}", f"line s{number % COLORS}{' dash' * one.dashed}")
    if not one.marks:
        return
    for i, (x, y) in zip(kept, places, strict=True):
        mark = _mark(svg, number, x, y, faint=one.faint)
        value = one.points[i]
        said = one.notes[i] if one.notes else f"{one.name}: {across.axis.write(value[0])}, {down.axis.write(value[1])}"
        ElementTree.SubElement(mark, "title").text = printable(said)
        if one.labels:
            left, base = labels.place(x, y, one.labels[i])
            _text(svg, left, base, one.labels[i]).set("class", "label")


def _row(svg: ElementTree.Element, row: Row, across: Scale, top: float, right: float, *, dots: bool) -> None:
    """One label with its bar or dot beneath; the value stands at the bar's end, or at the right above a dot."""
    written = row.text or across.axis.write(row.value)
    room = right - across.start - (GAP + CHARACTER * len(written) if dots else 0)
    _text(svg, across.start, top + TEXT, shortened(row.label, room))
    if not across.axis.shows(row.value):
        _text(svg, right, top + TEXT, f"{written}, not drawn", "end")
        return
    at = across.place(row.value)
    if dots:
        _text(svg, right, top + TEXT, written, "end")
        _path(svg, f"M{across.start:.1f} {top + 24:.1f}H{across.end:.1f}", "grid")
        mark = _mark(svg, 0, at, top + 24)
    else:
        zero, at = across.place(0.0), max(at, across.place(0.0) + 1)  # a bar of almost nothing is still seen
        mark = _path(svg, f"M{zero:.1f} {top + LINE:.1f}H{at:.1f}v11H{zero:.1f}z", "bar s0")
        _text(svg, at + 6, top + LINE + 10, written)
    ElementTree.SubElement(mark, "title").text = printable(f"{row.label}: {written}")


def _mark(svg: ElementTree.Element, number: int, x: float, y: float, *, faint: bool = False) -> ElementTree.Element:
    """The marker of a series: eight shapes, filled the first time round and hollow after that."""
    hollow = " hollow" if (number // COLORS) % 2 else ""
    mark = _path(svg, MARKERS[number % len(MARKERS)], f"mark s{number % COLORS}{hollow}{' faint' * faint}")
    mark.set("transform", f"translate({x:.1f} {y:.1f})")
    return mark


def _path(svg: ElementTree.Element, steps: str, style: str) -> ElementTree.Element:
    return ElementTree.SubElement(svg, "path", {"d": steps, "class": style})


def _text(svg: ElementTree.Element, x: float, y: float, words: str, anchor: str = "start") -> ElementTree.Element:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}"} | ({} if anchor == "start" else {"text-anchor": anchor})
    element = ElementTree.SubElement(svg, "text", at)
    element.text = printable(words)
    return element


def _written(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode", short_empty_elements=True)


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other beats in both values (smaller is better), by rising x."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best
