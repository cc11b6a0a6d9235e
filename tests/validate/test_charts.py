"""Charts: round ticks, every point in its place or counted, nothing that a name can break."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.validate.chart_axes import STEPS, Axis, linear_ticks, scale_of, short
from llmx.validate.charts import (
    COLORS,
    STYLE,
    Row,
    Series,
    Size,
    bars,
    frontier,
    plot,
    printable,
    shortened,
    standalone,
)

SIZE = Size(480, 240)
HOSTILE = '</title></svg><script>alert("x")</script>\x00\ud800 & \u202eelttil'
numbers = st.floats(-1e9, 1e9, allow_nan=False)


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def marks(svg: str) -> list[tuple[float, float]]:
    """Where the markers of the points stand; those of the legend have no tooltip."""
    found = []
    for path in parsed(svg).iter("path"):
        if "mark" in path.attrib["class"] and path.find("title") is not None:
            x, y = re.findall(r"[-\d.]+", path.attrib["transform"])
            found.append((float(x), float(y)))
    return found


def words(svg: str) -> list[str]:
    return [text.text or "" for text in parsed(svg).iter("text")]


@given(numbers, numbers.filter(lambda value: abs(value) > 1e-6), st.integers(2, 12))
def test_ticks_are_few_round_and_inside_the_axis(low: float, span: float, wanted: int) -> None:
    high = low + abs(span)
    if not high > low:
        return
    ticks = linear_ticks(low, high, wanted)
    assert 0 < len(ticks) <= wanted + 1
    margin = 1e-6 * (high - low) + 1e-9 * abs(low)
    assert all(low - margin <= tick <= high + margin for tick in ticks)
    # The difference of two ticks is only as exact as they are.
    if len(ticks) > 1 and (step := ticks[1] - ticks[0]) > 1e4 * math.ulp(max(abs(low), abs(high))):
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert any(mantissa == pytest.approx(round_step, rel=1e-3) for round_step in STEPS)


def test_an_axis_of_layers_has_whole_ticks_only() -> None:
    assert linear_ticks(0, 3, 12, whole=True) == [0, 1, 2, 3]
    assert all(tick == int(tick) for tick in linear_ticks(0, 7, 3, whole=True))


def test_an_axis_that_has_no_length_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1"):
        linear_ticks(1, 1, 4)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.02, "0.02"), (1.5, "1.5"), (12_000, "12k"), (3.4e6, "3.4M"), (2e-5, "2e-5"), (-0.5, "-0.5")],
)
def test_axes_write_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1e-6, 1.0, 3), (0.02, 0.09, 2), (0.0101, 0.0103, 2), (3.0, 3.0, 2), (1e-300, 1e300, 2)],
)
def test_a_logarithmic_axis_of_any_length_has_at_least_two_ticks(low: float, high: float, ticks: int) -> None:
    scale = scale_of(Axis(log=True), [low, high], 0, 240)
    found = scale.ticks(40)
    assert len(found) >= ticks
    assert all(-1e-6 <= scale.place(tick) <= 240 + 1e-6 for tick in found)


@given(st.floats(-12, 6), st.floats(0, 14), st.integers(100, 900))
def test_ticks_of_a_logarithmic_axis_leave_room_for_their_words(low: float, decades: float, width: int) -> None:
    scale = scale_of(Axis(log=True), [10**low, 10 ** (low + decades)], 0, width)
    places = [scale.place(tick) for tick in scale.ticks(64)]
    assert 2 <= len(places) <= 2 + width / 40
    if len(places) > 2:
        assert min(b - a for a, b in pairwise(places)) >= 40


@given(st.lists(st.tuples(numbers, st.floats(1e-12, 1e6)), min_size=1, max_size=30), st.booleans())
def test_every_point_stands_on_the_paper_in_the_order_of_its_value(points: list, log: bool) -> None:
    svg = plot("t", [Series("s", points)], Axis("x"), Axis("y", log=log), SIZE)
    found = marks(svg)
    assert len(found) == len(points)
    assert all(0 <= x <= SIZE.width and 0 <= y <= SIZE.height for x, y in found)
    by_value = [at for _, at in sorted(zip(points, found, strict=True), key=lambda pair: pair[0][1])]
    assert all(a[1] >= b[1] for a, b in pairwise(by_value))


def test_points_without_a_place_are_counted_and_said() -> None:
    points = [(0, 1.0), (1, math.inf), (2, math.nan), (3, 0.0), (4, 2.0)]
    svg = plot("t", [Series("s", points)], Axis("x"), Axis("KL", log=True), SIZE)
    assert len(marks(svg)) == 2
    assert any("3 of the points not drawn" in text for text in words(svg))
    assert not any("not drawn" in text for text in words(plot("t", [Series("s", points[:1])], Axis(), Axis(), SIZE)))


def test_a_chart_without_any_point_is_still_a_chart() -> None:
    assert marks(plot("t", [Series("s", [])], Axis("x"), Axis("y", log=True), SIZE)) == []


def test_many_series_differ_in_shape_and_filling_not_in_colour_alone() -> None:
    series = [Series(f"role {n}", [(0, n + 1.0)]) for n in range(2 * COLORS)]
    svg = plot("t", series, Axis("x"), Axis("y"), Size(340, 400))
    drawn = [p for p in parsed(svg).iter("path") if "mark" in p.attrib["class"] and p.find("title") is not None]
    assert len({(p.attrib["d"], "hollow" in p.attrib["class"]) for p in drawn}) == 2 * COLORS
    assert {f"role {n}" for n in range(2 * COLORS)} <= set(words(svg))


def test_labels_of_points_close_to_each_other_do_not_cover_each_other() -> None:
    points = [(4.5, 0.01), (4.6, 0.0101), (4.55, 0.0099), (9, 0.5)]
    svg = plot("t", [Series("s", points, ["Q4_K_M", "Q4_K_S", "IQ4_XS", "Q8_0"], line=False)], Axis(), Axis(), SIZE)
    boxes = []
    for text in parsed(svg).iter("text"):
        if text.attrib.get("class") == "label":
            x, y = float(text.attrib["x"]), float(text.attrib["y"])
            boxes.append((x, y - 9, x + 6 * len(text.text or ""), y))
    assert len(boxes) == 4
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for a, b in pairs)


def test_bars_are_as_long_as_their_values() -> None:
    svg = bars("t", [Row("Q4_K", 100, "100 B"), Row("Q6_K", 50, "50 B"), Row("F32", 0, "0 B")], Axis(), SIZE)
    paths = [p.attrib["d"] for p in parsed(svg).iter("path") if "bar" in p.attrib["class"]]
    lengths = [float(d.split("H")[1].split("v")[0]) - float(d[1:].split()[0]) for d in paths]
    assert lengths[0] == pytest.approx(2 * lengths[1], rel=0.01)
    assert 0 < lengths[2] <= 1
    assert {"Q4_K", "100 B"} <= set(words(svg))


def test_bars_on_a_logarithmic_axis_are_refused_and_dots_are_drawn() -> None:
    rows = [Row("median", 1e-4), Row("99 %", 1e-2), Row("never", 0.0), Row("broken", math.inf, "inf")]
    with pytest.raises(ValueError, match="dots"):
        bars("t", rows, Axis(log=True), SIZE)
    svg = bars("t", rows, Axis("KL", log=True), SIZE, dots=True)
    assert [x for x, _ in marks(svg)] == sorted(x for x, _ in marks(svg)) and len(marks(svg)) == 2
    assert {"0, not drawn", "inf, not drawn"} <= set(words(svg))


def test_hostile_names_stay_text() -> None:
    series = [Series(HOSTILE, [(0, 1)], [HOSTILE], [HOSTILE]), Series("b", [(1, 1)])]
    drawn = (
        plot(HOSTILE, series, Axis(HOSTILE), Axis(HOSTILE), SIZE),
        bars(HOSTILE, [Row(HOSTILE, 1, HOSTILE)], Axis(), SIZE),
    )
    for svg in drawn:
        assert "<script" not in svg and "\x00" not in svg
        assert not list(parsed(svg).iter("script"))
        svg.encode()
        parsed(standalone(svg))


def test_a_chart_says_what_it_is_to_those_who_do_not_see_it() -> None:
    root = parsed(plot("KL by position", [Series("s", [(0, 1)])], Axis(), Axis(), SIZE))
    assert (root.attrib["role"], root.attrib["aria-label"], root[0].text) == ("img", "KL by position", "KL by position")


def test_a_file_of_its_own_carries_both_palettes_and_asks_for_nothing() -> None:
    svg = standalone(plot("t", [Series("s", [(0, 1), (1, 2)])], Axis(), Axis(), SIZE))
    assert "prefers-color-scheme:dark" in svg and STYLE[:40] in svg
    assert "url(" not in svg and svg.count("http") == 1  # the name of the SVG namespace
    assert parsed(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_long_names_keep_both_ends() -> None:
    name = "model.layers.0.mlp.experts.17.gate_up_proj.weight"
    cut = shortened(name, 140)
    assert len(cut) <= 140 / 6 and cut.startswith("model.") and cut.endswith(".weight") and "…" in cut
    assert shortened("short", 140) == "short"
    assert printable("a\x00b\ud800") == "a\ufffdb\ufffd"


def test_the_frontier_holds_what_nothing_else_beats() -> None:
    assert frontier([(3, 1), (1, 5), (2, 6), (4, 1), (2, 2)]) == [(1, 5), (2, 2), (3, 1)]
    assert frontier([]) == []
