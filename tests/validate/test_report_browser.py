"""The page in a real browser: offline, quiet, and as wide as the window, on a phone and on a desk."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, chromium, find_chromium
from sample_reports import FACTS, details, failed, sound

from llmx.validate import compare_html
from llmx.validate.compare import Row, Table
from llmx.validate.record import Header
from llmx.validate.report import unproven
from llmx.validate.report_html import page

pytestmark = pytest.mark.browser
SIZES = {"phone": (360, 740), "desk": (1280, 800)}
HOSTILE = '<script>document.title="hacked";alert(1)</script>' + "x" * 200
STOCK = [{"type": "Q8_0", "bits_per_weight": 8.5, "kl": 0.0002, "origin": "llama-quantize, the same text"}]


def hostile() -> dict:
    told = failed(HOSTILE)
    told["artifact"] = {**FACTS["artifact"], "name": HOSTILE}
    told["details"] = {**details(name=HOSTILE), "blame": told["details"]["blame"]}
    return told


def comparison() -> dict:
    """Eight artifacts, the last of a hostile name and the one before it broken."""
    header = Header("org/tiny", 32000, 32000, 256, 256, 512, 5, 256, 128, 255, 1, 1300, 7000, "ab" * 32, "cd" * 32)
    figures = {
        "positions": 635, "same_top1": 0.9, "perplexity": 9.5, "perplexity_ratio": 1.01, "rms_delta_p": 0.05,
        "perplexity_ratio_error": 0.002, "prefill_tokens_per_second": 7263.4, "decode_tokens_per_second": 1620.1,
        "time_to_first_token_seconds": 0.035, "peak_rss_bytes": 54_000_000, "kl_median": 0.01, "kl_999": 1.5,
    }  # fmt: skip
    sizes = (1_290_000, 1_490_000, 1_900_000, 2_020_000, 2_021_000, 3_510_000)
    rows = [
        Row(f"model-{n}.gguf", size, 8 * size / 3.3e6, kl_mean=0.2 / 4**n, pareto=n % 2 == 0, **figures)
        for n, size in enumerate(sizes)
    ]
    broken = Row("broken.gguf", 5000, status="failed", error="the file is cut", code=4)
    return Table((*rows, broken, Row(HOSTILE, 4_000_000, 9.7, kl_mean=1e-5, **figures)), header).to_dict()


REPORTS = {
    "sound": sound(stock_types=STOCK),
    "failed": failed(),
    "hostile": hostile(),
    "not validated": unproven({}),
    "forty layers": sound(**details(positions=5000, layers=40)),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed here")
    with chromium(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REPORTS)
def test_the_page_opens_offline_without_a_complaint_and_fits_its_window(
    name: str, size: str, dark: bool, browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(REPORTS[name]), encoding="utf-8")
    browser.open(path, *SIZES[size], dark=dark)
    assert browser.messages == []
    assert browser.overflow() == []
    assert browser.value("document.title") != "hacked"
    picture = tmp_path / "seen.png"
    browser.screenshot(picture)
    assert _different_rows(picture) > 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_of_a_comparison_opens_and_fits_too(size: str, dark: bool, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    path.write_text(compare_html.page(comparison()), encoding="utf-8")
    browser.open(path, *SIZES[size], dark=dark)
    assert browser.messages == []
    assert browser.overflow() == []
    assert browser.value("document.title") == "llmx compare"
    assert browser.value("document.querySelectorAll('tbody tr').length") == 8
    browser.screenshot(tmp_path / "seen.png")
    assert _different_rows(tmp_path / "seen.png") > 20


def test_every_fold_opens_and_still_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(hostile()), encoding="utf-8")
    browser.open(path, *SIZES["phone"])
    assert browser.value("document.querySelectorAll('details').forEach(d => d.open = true)") is None
    assert browser.value("document.querySelectorAll('details[open]').length") > 0
    assert browser.overflow() == []


@pytest.mark.parametrize("size", SIZES)
def test_one_drawing_of_each_picture_is_seen_and_its_letters_can_be_read(
    size: str, browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(failed()), encoding="utf-8")
    browser.open(path, *SIZES[size])
    widths = browser.value("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
    assert sum(width > 0 for width in widths) == len(widths) / 2 == 6
    heights = browser.value(
        "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert min(heights) >= 10  # of a line; the letters of 12 units are about 14 pixels high with their leading


def test_the_listener_hears_what_a_bad_page_does(browser: Browser, tmp_path: Path) -> None:
    """Without this, silence would prove nothing."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><link rel=icon href='data:,'><p style='width:3000px'>wide</p>"
        "<img src='http://127.0.0.1:9/x.png'><script>console.error('a'); nothing()</script>"
    )
    browser.open(path, *SIZES["phone"])
    said = " ".join(browser.messages)
    assert "console.error" in said and "exception" in said and "request: http://127.0.0.1:9/x.png" in said
    assert browser.overflow()


def _different_rows(path: Path) -> int:
    """Different rows of a screenshot: a page that draws nothing has one."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    at, packed = 8, b""
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        packed += data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    raw = zlib.decompress(packed)
    row = len(raw) // height
    assert row >= width
    return len({raw[i * row : (i + 1) * row] for i in range(height)})
