"""The page: everything that the report holds, nothing that it does not, and no way in for a hostile name."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from sample_reports import CHECKS, FACTS, details, failed, sound

from llmx.validate.report import Report, not_run, unproven
from llmx.validate.report_figures import as_float, percent, size_of
from llmx.validate.report_html import page, shown_status, verdict

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}\u202e\x00\ud800'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Elements, their attributes and the text of a page; notes what was closed out of order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.crossed: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


REPORTS = {
    "sound": sound(),
    "failed": failed(),
    "hostile": failed(HOSTILE),
    "nothing ran": Report(()).to_dict(),
    "not validated": unproven({}),
    "no runtime": Report((not_run("quality.kl", "llama.cpp is missing"),), FACTS).to_dict(),
    "no details": Report(CHECKS, FACTS).to_dict(),
    "empty details": sound(kl_by_position=[], kl_quantiles={}, tensors=[], speed={}),
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_makes_a_whole_page_that_asks_for_nothing(name: str) -> None:
    text = page(REPORTS[name])
    read = Reader(text)
    assert read.crossed == [] and read.open == []
    assert not read.named("script") and not read.named("img") and not read.named("iframe") and not read.named("object")
    fetched = [value for _, found in read.elements for key, value in found.items() if key in {"src", "href", "srcset"}]
    assert all(value == "data:," or (value or "").startswith("#") for value in fetched)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert not [key for _, found in read.elements for key in found if key.startswith("on")]
    (policy,) = [m["content"] for m in read.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_hostile_name_is_shown_as_text_wherever_it_stands() -> None:
    told = failed(HOSTILE)
    told["artifact"] = {**FACTS["artifact"], "name": HOSTILE}
    told["reference"] = {"id": HOSTILE, "revision": HOSTILE, "kind": HOSTILE}
    told["runtime"] = {"name": HOSTILE, "build": HOSTILE}
    told["details"] = {**details(name=HOSTILE), "blame": told["details"]["blame"]}
    told["details"]["tensors"][1] |= {"role": HOSTILE, "type": HOSTILE}
    told["details"]["stock_types"] = [{"type": HOSTILE, "bits_per_weight": 4.5, "origin": HOSTILE}]
    text = page(told)
    read = Reader(text)
    assert "<script" not in text and "<img" not in text and "\x00" not in text
    assert text.encode()
    assert "<script>alert(1)</script>" in read.text and "{{ 7*7 }}" in read.text
    assert read.crossed == [] and read.open == []


@pytest.mark.parametrize(
    ("told", "tone", "words"),
    [
        (sound(), "passed", "Passed"),
        (failed(), "failed", "Not passed"),
        (unproven({}), "open", "Not validated"),
        (Report(()).to_dict(), "failed", "Not passed"),
        (Report((not_run("quality.kl", "missing"),)).to_dict(), "failed", "Not passed"),
    ],
)
def test_the_verdict_is_one_word_and_a_skipped_check_is_no_pass(told: dict[str, Any], tone: str, words: str) -> None:
    found = verdict(told)
    assert (found.tone, found.words) == (tone, words)
    assert f'class="verdict {tone}"' in page(told)


def test_the_verdict_names_the_checks_and_links_to_them() -> None:
    found = verdict(failed())
    assert (list(found.failed), list(found.missing)) == (["quality.kl", "bytes.finite"], ["speed.decode"])
    assert found.line == "2 passed, 2 failed, 1 not run."
    read = Reader(page(failed()))
    targets = {attributes.get("id") for _, attributes in read.elements}
    links = [(link["href"] or "").removeprefix("#") for link in read.named("a")]
    assert links == ["quality.kl", "bytes.finite", "speed.decode"]
    assert set(links) <= targets


def test_each_check_stands_with_value_limit_unit_origin_and_detail() -> None:
    text = Reader(page(sound())).text
    for check in CHECKS:
        judged = "" if check.limit is None else check.origin
        for words in (check.name, check.status, check.unit, judged, check.detail):
            assert words in text
    assert "0.0183" in text and "0.15" in text


def test_a_figure_that_nothing_judges_is_reported_and_not_passed() -> None:
    judged, figure = (check for check in sound()["checks"] if check["name"] in ("quality.kl", "speed.decode"))
    assert (shown_status(judged), shown_status(figure)) == ("passed", "reported")
    assert verdict(sound()).line == "3 passed, 1 not run, 3 reported, 1 not applicable."


def test_the_page_has_every_picture_and_table_that_the_report_has_data_for() -> None:
    text = Reader(page(failed())).text
    for heading in (
        "KL by position",
        "KL quantiles",
        "Error by layer",
        "Size by type",
        "Size by role",
        "Speed",
        "Where it goes wrong",
        "Divergence by layer",
        "Suspects, the worst first",
        "What was compared, and how",
    ):
        assert heading in text
    for words in (FACTS["runtime"]["build"], "0123abc", "ab" * 32, "94.1 %", "All 49 tensors"):
        assert words in Reader(page(sound())).text


def test_what_the_report_has_no_data_for_is_left_out() -> None:
    text = Reader(page(REPORTS["no details"])).text
    for heading in (
        "KL by position",
        "KL quantiles",
        "Error by layer",
        "Size by",
        "Other types",
        "Where it goes wrong",
    ):
        assert heading not in text
    assert "How the file was made" not in text
    assert "801.5 tokens/s" in text  # of the check itself


def test_other_types_are_shown_for_orientation_only_where_they_were_measured() -> None:
    stock = [
        {"type": "Q8_0", "bits_per_weight": 8.5, "kl": 0.0002, "origin": "llama-quantize b9000"},
        {"type": "Q3_K_M", "bits_per_weight": 3.9},
    ]
    text = Reader(page(sound(stock_types=stock))).text
    at = [text.index(name) for name in ("Q3_K_M", "this file", "Q8_0")]
    assert at == sorted(at) and "llama-quantize b9000" in text


def test_pictures_have_a_name_and_tables_have_headers() -> None:
    read = Reader(page(failed()))
    charts = read.named("svg")
    assert len(charts) == 2 * 6
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert len(read.named("caption")) == len(read.named("table")) > 3
    assert all(header["scope"] in {"col", "row", "rowgroup"} for header in read.named("th"))
    assert read.named("html") == [{"lang": "en"}]


def test_a_long_curve_is_thinned_and_its_largest_value_stays() -> None:
    curve = [{"position": i, "kl": 1e-3} for i in range(50_000)]
    curve[31_234]["kl"] = 7.5
    text = page(sound(kl_by_position=curve))
    assert "50,000 points" in text and "7.5" in text
    assert len(text) < 600_000


def test_a_stored_report_gives_the_same_page() -> None:
    assert page(json.loads(json.dumps(failed()))) == page(failed())


def test_sizes_and_shares_are_written_for_people() -> None:
    assert [size_of(count) for count in (12, 1_500, 2_270_000, 44_910_688, 123_456_789, 3.2e9, 0)] == [
        "12 B", "1.5 kB", "2.27 MB", "44.9 MB", "123 MB", "3.2 GB", "0 B",
    ]  # fmt: skip
    assert [percent(share) for share in (0.5, 0.999, 0.9999, 1.0)] == ["50 %", "99.9 %", "99.99 %", "100 %"]
    assert as_float("inf") == float("inf") and as_float(None) != as_float(None)


def test_colours_have_the_contrast_that_small_text_needs() -> None:
    """4.5 to 1 (WCAG 2.1, AA) of every text colour on the papers that it stands on, in both palettes."""
    css = page(sound())
    palettes = [
        dict(re.findall(r"--([\w-]+):(#[0-9a-f]{3,6})", part)) for part in re.findall(r":root\{(.*?)\}", css, re.S)
    ]
    assert len(palettes) == 2
    pairs = [("ink", "paper"), ("ink", "page"), ("soft", "paper"), ("soft", "page"), ("accent", "paper")]
    pairs += [(tone, f"{tone}-paper") for tone in ("good", "bad", "warn")]
    pairs += [(tone, "paper") for tone in ("good", "bad", "warn")] + [
        ("ink", f"{t}-paper") for t in ("good", "bad", "warn")
    ]
    for palette in palettes:
        for front, back in pairs:
            assert _contrast(palette[front], palette[back]) >= 4.5, (front, back)


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
