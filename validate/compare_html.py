"""The comparison for people: the columns that every form of it shows, and one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from llmx.validate import charts
from llmx.validate.chart_axes import Axis
from llmx.validate.report import number
from llmx.validate.report_figures import as_float, size_of

Told = Mapping[str, Any]
WIDE, NARROW = charts.Size(940, 380), charts.Size(330, 300)
STYLE = """
.side{font-size:.8rem}.side td,.side th{padding-right:9px;min-width:0}.side tbody th{min-width:7em}
.side thead th{font-size:.74rem;overflow-wrap:normal}.side thead th.right{text-align:right}
@media(max-width:880px){.side{font-size:.92rem}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    # key, heading, how it is written
    ("bytes", "size", size_of),
    ("bits_per_weight", "bits/w", lambda value: f"{value:.2f}"),
    ("kl_mean", "KL mean", lambda value: number(as_float(value))),
    ("kl_median", "KL median", lambda value: number(as_float(value))),
    ("kl_999", "KL 99.9 %", lambda value: number(as_float(value))),
    ("same_top1", "same top 1", lambda value: f"{100 * value:.1f} %"),
    ("perplexity_ratio", "ppl ratio", lambda value: f"{as_float(value):.4f}"),
    ("perplexity_ratio_error", "±", lambda value: number(as_float(value))),
    ("rms_delta_p", "RMS Δp", lambda value: f"{100 * as_float(value):.2f} %"),
    ("prefill_tokens_per_second", "prefill t/s", lambda value: f"{value:.0f}"),
    ("decode_tokens_per_second", "decode t/s", lambda value: f"{value:.0f}"),
    ("time_to_first_token_seconds", "first token", lambda value: f"{1000 * value:.0f} ms"),
    ("peak_rss_bytes", "peak memory", size_of),
)
HEADINGS = ("artifact", *(heading for _, heading, _ in COLUMNS))


def cells(row: Told) -> list[str]:
    """Returns an artifact's figures as text under HEADINGS; * marks a Pareto-optimal one, blank is not measured."""
    written = ["" if row[key] is None else write(row[key]) for key, _, write in COLUMNS]
    return [f"{row['name']}{' *' if row['pareto'] else ''}", *written]


def legend(told: Told) -> list[str]:
    """Returns what the figures mean, and which artifacts have none and why."""
    settings = told["settings"]
    kept, drawn = settings["kept"], settings["drawn"]
    how = f" The {kept} most likely tokens are taken exactly, the others by a sample of {drawn}." if drawn else ""
    lines = [
        f"{settings['positions']} positions; KL({told['reference']['id']} ‖ artifact), nats.{how} "
        "* Pareto-optimal: no other is both as small and as near."
    ]
    lines += [f"{row['name']}: {row['status']}: {row['error']}" for row in told["artifacts"] if row["error"]]
    return lines


def markdown(told: Told) -> str:
    """Returns a table for a model card."""

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.replace("|", "\\|").replace("*", "\\*") for value in values) + " |"

    rows = [line(cells(row)) for row in told["artifacts"]]
    rule = "|---|" + "---:|" * len(COLUMNS)
    notes = [text.replace("*", "\\*") for text in legend(told)]
    return "\n".join([line(HEADINGS), rule, *rows, "", "\n\n".join(notes)])


def page(told: Told) -> str:
    """Returns the HTML text of a comparison as `Table.to_dict` gives it. Nothing is fetched, no script runs."""
    head = "".join(
        f"<th scope='col'{' class=right' * (heading != HEADINGS[0])}>{escape(heading)}</th>" for heading in HEADINGS
    )
    body = "".join(_html_row(cells(row)) for row in told["artifacts"])
    notes = "".join(f"<p class='soft'>{escape(line)}</p>" for line in legend(told))
    style = resources.files("llmx.validate").joinpath("templates", "report.css").read_text(encoding="utf-8")
    return charts.printable(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,"><title>llmx compare</title><style>{charts.STYLE}{style}{STYLE}</style></head>
<body><main><p class="kicker">llmx compare</p><h1>{escape(told["reference"]["id"])}, artifacts side by side</h1>
{_pareto(told)}<div class="panel" style="overflow-x:auto"><table class="side"><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>{notes}
<footer><p>{escape(told["schema"])}; the same figures are in compare.json.</p></footer></main></body></html>
""")


def _html_row(values: Sequence[str]) -> str:
    first, *rest = (escape(value) for value in values)
    labelled = zip(HEADINGS[1:], rest, strict=True)
    figures = "".join(f"<td class='right' data-label='{escape(name)}'>{value}</td>" for name, value in labelled)
    return f"<tr><th scope='row'>{first}</th>{figures}</tr>"


def _pareto(told: Told) -> str:
    """Size against KL, with the line of the best; empty where nothing was compared."""
    rows = [row for row in told["artifacts"] if row["kl_mean"] is not None]
    if not rows:
        return ""
    points = [(row["bytes"] / 1e6, as_float(row["kl_mean"])) for row in rows]
    best = charts.Series("Pareto-optimal", charts.frontier(points), marks=False)
    axes = Axis("size, MB"), Axis("mean KL, nats", log=True)

    def drawn(size: charts.Size) -> str:
        labels = [charts.shortened(row["name"].removesuffix(".gguf"), size.width / 3) for row in rows]
        every = charts.Series("artifacts", points, labels=labels, line=False)
        return charts.plot("Size against mean KL", [every, best], *axes, size)

    pictures = f"<div class='wide'>{drawn(WIDE)}</div><div class='narrow'>{drawn(NARROW)}</div>"
    return f"<figure class='panel'>{pictures}</figure>"
