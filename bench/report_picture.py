"""Draw docs/report.svg, the README's picture, from a real export of the embedded checkpoint.

python bench/report_picture.py
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.console import Console

from llmx import api, describe

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "llmx export examples/tiny-qwen3 --format gguf --bits 4 -o out"


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model = ROOT / "examples" / "tiny-qwen3"
        shown = describe.export(api.export(api.ExportRequest(str(model), bits=4, output=Path(scratch) / "out")))
        shown = shown.replace(scratch + "/", "")
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False)
    console.print(f"$ {COMMAND}\n{shown}", markup=False)
    picture = ROOT / "docs" / "report.svg"
    picture.parent.mkdir(exist_ok=True)
    picture.write_text(console.export_svg(title="llmx"), encoding="utf-8")
    print(picture.relative_to(ROOT))


if __name__ == "__main__":
    main()
