"""Take docs/report.png, the README's picture: the page of a real export of the embedded checkpoint, in Chromium.

python bench/report_picture.py [REPORT.html]     (without a page: export first)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from llmx import api

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from chromium import chromium, find_chromium  # noqa: E402

WIDTH, HEIGHT = 1180, 1010  # the verdict, the curves and the first checks
LARGEST = 200_000  # bytes of a picture in a README


def main() -> None:
    program = find_chromium()
    if program is None:
        sys.exit("no Chromium or Chrome is installed here")
    picture = ROOT / "docs" / "report.png"
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(sys.argv[1]) if len(sys.argv) > 1 else _exported(Path(scratch) / "out")
        with chromium(program, Path(scratch) / "profile") as browser:
            browser.open(page, WIDTH, HEIGHT)
            browser.screenshot(picture)
    if picture.stat().st_size > LARGEST:
        sys.exit(f"{picture} has {picture.stat().st_size} bytes, more than {LARGEST}")
    print(picture.relative_to(ROOT))


def _exported(folder: Path) -> Path:
    model = ROOT / "examples" / "tiny-qwen3"
    made = api.export(api.ExportRequest(str(model), bits=4, output=folder))
    return made.report_path.with_suffix(".html")


if __name__ == "__main__":
    main()
