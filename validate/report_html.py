"""The report as one HTML file that opens without a network: no script, no font, nothing fetched.

The page is made from the same plain values as report.json, so that a stored report gives the same page. Names of
tensors and files come from strangers: the template escapes everything, and the page's own policy forbids scripts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from llmx.validate import charts, report_figures
from llmx.validate.report import number
from llmx.validate.report_figures import Figure, as_float, size_of

Told = Mapping[str, Any]

QUESTIONS = {
    "bytes": "Is every tensor what it should be?",
    "runtime": "Does the runtime load the file?",
    "tokens": "Does text become the same ids?",
    "template": "Does a chat become the same prompt?",
    "conversion": "Is it the same model?",
    "floor": "How far does the runtime lie from itself?",
    "quality": "What did quantization cost?",
    "blame": "What is at fault?",
    "speed": "How fast is it here?",
}
REPORTED = "reported"  # a figure without a limit: it ran, and there was nothing to pass
# Beside the word, never instead of it.
MARKS = {"passed": "✓", "failed": "✗", "not run": "!", REPORTED: "·", "not applicable": "–"}
KEY_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    # check, what people call it, how it is written
    ("quality.kl", "mean KL, nats", number),
    ("quality.same_top1", "same top token", lambda value: f"{100 * value:.1f} %"),
    ("quality.ppl_ratio", "perplexity ratio", number),
    ("speed.decode", "tokens/s, decoding", number),
)
SPEED_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("prefill_tokens_per_second", "prefill", lambda value: f"{number(value)} tokens/s"),
    ("decode_tokens_per_second", "decoding", lambda value: f"{number(value)} tokens/s"),
    ("time_to_first_token_seconds", "time to first token", lambda value: f"{number(value)} s"),
    ("load_seconds", "load", lambda value: f"{number(value)} s"),
    ("peak_rss_bytes", "peak memory of the runtime", size_of),
    ("peak_device_bytes", "memory of the GPU", size_of),
    ("threads", "threads", lambda value: f"{value:.0f}"),
    ("prefill_tokens", "prompt", lambda value: f"{value:,.0f} tokens"),
    ("decode_tokens", "decoded", lambda value: f"{value:,.0f} tokens"),
)
SPEED_OF_CHECK = {
    "speed.prefill": "prefill_tokens_per_second",
    "speed.decode": "decode_tokens_per_second",
    "speed.first_token": "time_to_first_token_seconds",
    "speed.load": "load_seconds",
    "speed.peak_rss": "peak_rss_bytes",
    "speed.device_memory": "peak_device_bytes",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stands on top. tone: passed, failed or open; names: the checks that are to blame."""

    tone: str
    words: str
    line: str
    failed: Sequence[str] = ()
    missing: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows of text. numeric: numbers of the columns that are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    caption: str = ""
    fold: str = ""  # what a reader clicks to see it; open where empty


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its pictures and tables; left out of the page where it has neither."""

    heading: str
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def page(told: Told) -> str:
    """Returns the HTML text of a report as `Report.to_dict` gives it, or as report.json holds it."""
    details: Mapping[str, Any] = told.get("details", {})
    tensors: Sequence[Mapping[str, Any]] = details.get("tensors", ())
    sized = tensors or told.get("export", {}).get("tensors", ())
    errors = report_figures.tensor_errors(tensors)
    figures = [*([] if errors is None else [errors]), *report_figures.size_figures(sized)]
    quality = Section("Quality", report_figures.quality_figures(details))
    sections = (
        Section("Weights", figures, list(_tensor_tables(tensors))),
        Section("Speed", (), list(_speed(told, details))),
        Section("Other types, for orientation", (), list(_stock(told, details))),
        Section("How the file was made", (), list(_made(told.get("export")))),
        Section("What was compared, and how", (), list(_compared(told))),
    )
    text = _template().render(
        told=told,
        name=_name(told),
        verdict=verdict(told),
        cards=list(_cards(told)),
        groups=_groups(told["checks"]),
        blame=details.get("blame"),
        blamed=list(_blamed(details.get("blame") or {})),
        quality=quality if quality.figures else None,
        sections=[section for section in sections if section.figures or section.tables],
        css=Markup(charts.STYLE + _read("report.css")),  # files of this package
        number=number,
        marks=MARKS,
        status=shown_status,
        questions=QUESTIONS,
        no_numbers=("inf", "-inf", "nan"),
    )
    return charts.printable(text)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _read(name: str) -> str:
    return resources.files("llmx.validate").joinpath("templates", name).read_text(encoding="utf-8")


def verdict(told: Told) -> Verdict:
    """Returns what a report says in one word, and why."""
    checks: Sequence[Mapping[str, Any]] = told["checks"]
    counts = Counter(map(shown_status, checks))
    line = ", ".join(f"{counts[status]} {status}" for status in MARKS if counts[status])
    if told["passed"] is None:
        return Verdict(
            "open", "Not validated", "Nothing was checked. Run llmx validate before anybody relies on the file."
        )
    if told["passed"]:
        return Verdict("passed", "Passed", f"{line}.")
    failed = [check["name"] for check in checks if check["passed"] is False]
    missing = [check["name"] for check in checks if check["passed"] is None and check["required"]]
    return Verdict("failed", "Not passed", f"{line}." if line else "No check ran.", failed, missing)


def shown_status(check: Mapping[str, Any]) -> str:
    """Returns a check's status as the page says it: a figure that nothing judges is reported, not passed."""
    figure = check["passed"] and check["value"] is not None and check["limit"] is None
    return REPORTED if figure else str(check["status"])


def _name(told: Told) -> str:
    if "export" in told:
        return str(told["export"]["files"][0]["name"])  # the artifact was validated under a temporary name
    return str(told["artifact"]["name"]) if "artifact" in told else "artifact"


def _cards(told: Told) -> Iterator[tuple[str, str]]:
    """Yields (figure, what it is) of what people ask for first."""
    sizes = told.get("artifact") or told.get("export")
    if sizes:
        yield size_of(sizes["bytes"]), "size"
        yield f"{sizes['bits_per_weight']:.2f}", "bits per weight"
    found = {check["name"]: check["value"] for check in told["checks"]}
    for name, words, write in KEY_FIGURES:
        if found.get(name) is not None:
            yield write(as_float(found[name])), words


def _groups(checks: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The checks by kind, in the order in which the kinds began."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for check in checks:
        groups.setdefault(check["kind"], []).append(check)
    return groups


def _blamed(blame: Mapping[str, Any]) -> Iterator[Section]:
    """Yields the section of pictures and suspects under the sentence that names the culprit."""
    figure = report_figures.layer_errors(blame)
    rows = [(s["tensor"], number(as_float(s["score"])), s["reason"]) for s in blame.get("suspects", ())]
    table = Table(("tensor", "score", "why"), rows, (1,), "Suspects, the worst first")
    if figure is not None or rows:
        yield Section("", [] if figure is None else [figure], [table] if rows else [])


def _tensor_tables(tensors: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    if not tensors:
        return
    rows = [
        (t["name"], t["type"], f"{t['bytes']:,}", _error(t["rms"]), _error(t["expected"]), _multiple(t))
        for t in tensors
    ]
    columns = ("tensor", "type", "bytes", "error", "usual", "× usual")
    yield Table(columns, rows, (2, 3, 4, 5), "Relative RMS error of every tensor", f"All {len(rows)} tensors")


def _error(value: float | str | None) -> str:
    return "" if value is None else f"{as_float(value):.3g}"


def _multiple(tensor: Mapping[str, Any]) -> str:
    if tensor["rms"] is None or not tensor["expected"]:
        return ""
    return f"{as_float(tensor['rms']) / as_float(tensor['expected']):.2f}"


def _speed(told: Told, details: Mapping[str, Any]) -> Iterator[Table]:
    """Yields what was measured: the details where a check left them, otherwise the checks' own figures."""
    found = {SPEED_OF_CHECK[c["name"]]: c["value"] for c in told["checks"] if c["name"] in SPEED_OF_CHECK}
    found = {**found, **details.get("speed", {})}
    rows = [(words, write(as_float(found[key]))) for key, words, write in SPEED_ROWS if found.get(key) is not None]
    if rows:
        yield Table(("measured", "value"), rows, (), "Speed on the machine that validated")


def _stock(told: Told, details: Mapping[str, Any]) -> Iterator[Table]:
    """Yields the table of other types, with this file among them, by size; a KL only where it was measured."""
    stock = details.get("stock_types")
    if not stock:
        return
    kl = next((check["value"] for check in told["checks"] if check["name"] == "quality.kl"), None)
    lines = [(t["bits_per_weight"], t["type"], t.get("kl"), t.get("origin", "")) for t in stock]
    if "artifact" in told:
        lines.append((told["artifact"]["bits_per_weight"], "this file", kl, "this report"))
    rows = [(name, f"{bits:.2f}", _error(kl), origin) for bits, name, kl, origin in sorted(lines, key=lambda t: t[:2])]
    yield Table(
        ("type", "bits per weight", "mean KL, nats", "origin"), rows, (1, 2), "The same checkpoint in other types"
    )


def _made(export: Mapping[str, Any] | None) -> Iterator[Table]:
    if export is None:
        return
    recipe, calibration = export["quantization"]["recipe"], export["quantization"]["calibration"]
    facts = {
        "type": export["type"],
        "method": f"{recipe['method']}, effort {recipe['effort']}",
        "calibration": "none",
        "importance matrix": export["importance"] or "none",
        "written in": f"{export['seconds']:.1f} s, peak memory {size_of(export['peak_rss_bytes'])}",
        "in another type than its rule says": "; ".join(export["fall_backs"]),
        "notes": "; ".join(export["notes"]),
    }
    if calibration is not None:
        facts["calibration"] = f"{calibration['tokens']:,} tokens of {calibration['text']}"
        facts["calibration text, sha256"] = calibration["sha256"]
    yield Table(("fact", "value"), [(key, value) for key, value in facts.items() if value], (), "Export")
    files = [(file["name"], f"{file['bytes']:,}", file["sha256"]) for file in export["files"]]
    yield Table(("file", "bytes", "sha256"), files, (1,), "Files")
    if export["solved"]:
        yield _solved(export["solved"])


def _solved(lines: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            line["name"] if line["expert"] is None else f"{line['name']}, expert {line['expert']}",
            line["type"],
            line["method"],
            _error(line["error_held_out"]),
            _error(line["error_of_rounding"]),
        )
        for line in lines
    ]
    columns = ("matrix", "type", "method", "held-out error", "of rounding")
    return Table(
        columns, rows, (3, 4), "Share of the outputs' energy, on held-out tokens", f"All {len(rows)} solved matrices"
    )


def _compared(told: Told) -> Iterator[Table]:
    """Yields the reference, the runtime's build and the text: what somebody needs to repeat the figures."""
    reference, runtime, settings = (told.get(key, {}) for key in ("reference", "runtime", "settings"))
    facts = {
        "reference": reference.get("id"),
        "revision": reference.get("revision") or (reference and "a local path"),
        "computed by": reference.get("kind"),
        "against": told.get("against", {}).get("name"),
        "runtime": runtime.get("name"),
        "runtime build": runtime.get("build") or (runtime and "not loaded"),
        "positions judged, at least": settings.get("positions"),
        "tokens of a chunk": settings.get("chunk"),
        "threads": settings.get("threads"),
        "text": settings.get("text"),
        "text, sha256": settings.get("text_sha256"),
    }
    rows = [(key, str(value)) for key, value in facts.items() if value]
    if rows:
        yield Table(("fact", "value"), rows, (), "Settings of the comparison")
