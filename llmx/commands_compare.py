"""The command that puts artifacts side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmx import options


@click.command(short_help="Artifacts side by side: size, KL, perplexity, speed, memory.")
@click.argument("artifacts", type=options.ANY, nargs=-1, required=True)
@click.option("--reference", required=True, metavar="MODEL|FILE", help="The checkpoint, or a kept reference record.")
@options.revision
@click.option("--text", type=options.FILE, help="Text to judge on. [default: a built-in mixed text]")
@click.option(
    "--positions", type=click.IntRange(min=1), metavar="N",
    help="How many next-token distributions; a text with fewer is refused. [default: 512, or fewer]",
)  # fmt: skip
@click.option("--keep-reference", type=options.FILE, metavar="FILE", help="Keep the reference's record here.")
@click.option("-o", "--output", type=options.ANY, help="Folder for compare.json and compare.html.")
@click.option("--csv", "csv_file", type=options.FILE, metavar="FILE", help="Write every figure as CSV.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown, for a model card.")
@options.threads
@options.json_option
def compare(artifacts: tuple[Path, ...], markdown: bool, as_json: bool, **chosen: Any) -> None:
    """Judge ARTIFACTS against one run of MODEL, by size; * marks the Pareto-optimal ones (size against KL).

    Exit codes: 0 all compared, 4 one is broken, 7 a runtime is missing; the others still have their row.

    \b
    Examples:
      llmx compare a.gguf b.gguf --reference ./model -o comparison/
      llmx compare *.gguf --reference ./model --text my.txt --csv table.csv --markdown
      llmx compare a.gguf --reference ./model --keep-reference model.reference
      llmx compare b.gguf --reference model.reference
    """
    from llmx import comparing, describe
    from llmx.validate import compare_html

    found = comparing.compare(artifacts, **chosen)
    told = found.to_dict()
    options.answer(as_json, told, lambda: compare_html.markdown(told) if markdown else describe.comparison(told))
    click.get_current_context().exit(found.exit_code)
