"""What the commands print for people: plain text and tables, made from the records that `--json` prints whole."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llmx.printing import on_one_line

if TYPE_CHECKING:
    from llmx.exporting import ExportResult
    from llmx.measuring import CalibrateResult
    from llmx.preparing import Prepared
    from llmx.validate.report import Report

_SHOWN_ITEMS = 4
_SHOWN_TEXT = 72
_UNBROKEN = 1000  # characters: a line an artifact, as long as it is


def export(result: ExportResult) -> str:
    """The artifact, what it cost, what was done otherwise than asked, and the checks."""
    lines = [
        f"{result.artifact}",
        f"  {result.plan['type']}, {_megabytes(result.nbytes)}, {result.plan['bits_per_weight']:.2f} bits per weight",
        f"  written in {result.seconds:.1f} s, peak memory {_megabytes(result.peak_rss_bytes)}{_beyond(result)}",
        *_remarks(result.plan),
        *_methods(result),
    ]
    if result.validation is None:
        lines.append("  not validated: run `llmx validate` before anybody relies on it")
    else:
        lines += ["", report(result.validation).rstrip()]
    converted = [] if result.ort is None else [f"for phones: {result.ort}"]
    return "\n".join([*lines, *converted, f"report: {result.report_path}"])


def _beyond(result: ExportResult) -> str:
    """That more memory was taken than was allowed."""
    limit = result.plan["needs"]["memory_limit_bytes"]
    if limit is None or result.peak_rss_bytes <= limit:
        return ""
    return f": MORE than the {_megabytes(limit)} that --max-memory allows"


def calibrated(result: CalibrateResult) -> str:
    """The file, what it was measured on, and experts that nothing reached."""
    lines = [
        f"{result.path}",
        f"  {result.entries} matrices, {result.tokens:,} tokens of {result.text}, {result.seconds:.1f} s",
        *(f"  note: {count} experts of {name} were reached by no token" for name, count in result.silent.items()),
    ]
    return "\n".join(lines)


def report(found: Report) -> str:
    """The checks as a table, with a line of explanation under it for each that did not pass."""
    from llmx.validate.report import as_table

    return as_table(found)


def comparison(told: dict[str, Any]) -> str:
    """Artifacts side by side, then what the figures mean and what went wrong."""
    from llmx.validate import compare_html

    rows = [compare_html.cells(row) for row in told["artifacts"]]
    return "\n".join([_table(compare_html.HEADINGS, rows, width=_UNBROKEN), *compare_html.legend(told)])


def plan(prepared: Prepared) -> str:
    """Every tensor's type and size, then the totals."""
    planned, described = prepared.exporter.plan, prepared.described()
    rows = [
        (t["name"], "x".join(map(str, t["shape"])), t["type"], f"{t['bytes']:,}", t["fell_back_from"] or "")
        for t in described["tensors"]
    ]
    types = ", ".join(f"{count} {name}" for name, count in described["types"].items())
    lines = [
        _table(("tensor", "shape", "type", "bytes", "instead of"), rows),
        *(f"{f['name']}  {'about ' * ('estimated' in f)}{f['bytes']:,} bytes" for f in described["files"]),
        f"  {planned.parameters:,} parameters, {planned.bits_per_weight:.2f} bits per weight: {types}",
        *_needs(described["needs"]),
        *_remarks(described),
    ]
    return "\n".join(lines)


def _needs(told: dict[str, Any]) -> list[str]:
    """Memory, disk and time, all estimated."""
    limit = told["memory_limit_bytes"]
    within = "" if limit is None else f" of {_megabytes(limit)} that --max-memory allows"
    kept = ", activations kept on disk" if told["activations_on_disk"] else ""
    return [
        f"  peak memory about {_megabytes(told['memory_bytes'])}{within}, on {told['threads']} threads{kept}",
        f"  validation takes about {_megabytes(told['validation_memory_bytes'])} of memory",
        f"  disk about {_megabytes(told['disk_bytes'])}, time about {_duration(told['seconds'])}",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"


def file(found: dict[str, Any]) -> str:
    """The metadata, shortened, then the tensors."""
    metadata = [(key, value["type"], _shortened(value["value"])) for key, value in found["metadata"].items()]
    tensors = [(t["name"], "x".join(map(str, t["shape"])), t["type"], f"{t['bytes']:,}") for t in found["tensors"]]
    lines = [
        _table(("key", "type", "value"), metadata),
        _table(("tensor", "shape", "type", "bytes"), tensors),
        f"{_kind(found)}, {found['bytes']:,} bytes, {found['parameters']:,} parameters, "
        f"{found['bits_per_weight'] or 0:.2f} bits per weight",
    ]
    if operators := found.get("operators"):
        lines.insert(2, _table(("operator", "nodes"), [(name, str(count)) for name, count in operators.items()]))
    if phones := found.get("phones"):
        lines.insert(3, "\n".join(["on phones", *(f"  {line}" for line in phones["lines"])]))
    return "\n".join(lines)


def _kind(found: dict[str, Any]) -> str:
    """The format and its version in words."""
    return _KINDS[found["format"]](found)


def _onnx(found: dict[str, Any]) -> str:
    return f"ONNX, {', '.join(f'{domain} {version}' for domain, version in found['opsets'].items())}"


def _trtllm(found: dict[str, Any]) -> str:
    """Its layout, ranks, and quantization in TensorRT-LLM's words."""
    ranks = f", tp {found['tensor_parallel']}, pp {found['pipeline_parallel']}" if found["layout"] == "ranks" else ""
    cache = f", {found['cache']} cache" if found["cache"] else ""
    return f"TensorRT-LLM checkpoint, layout {found['layout']}{ranks}, {found['algorithm'] or 'floats'}{cache}"


_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gguf": lambda found: f"GGUF version {found['version']}",
    "onnx": _onnx,
    "tensorrt": lambda found: "TensorRT engine",
    "trtllm": _trtllm,
}


def doctor(found: dict[str, Any]) -> str:
    """Runtimes with the reason where one is missing, then libraries and the machine."""
    runtimes = [(r["name"], "ready" if r["available"] else "missing", r["reason"] or "") for r in found["runtimes"]]
    libraries = [(name, version or "not installed") for name, version in found["libraries"].items()]
    machine = f"{found['cores']} cores, {_megabytes(found['memory_bytes'])} memory, Python {found['python']}"
    return "\n".join(
        [_table(("runtime", "state", "reason"), runtimes), _table(("library", "version"), libraries), machine]
    )


def _methods(result: ExportResult) -> list[str]:
    """How the matrices were solved, and how the held-out error compares with rounding to the nearest."""
    if not result.solved:
        return []
    counts = Counter(line["method"] for line in result.solved)
    told = ", ".join(f"{count} {method}" for method, count in counts.most_common())
    text = result.plan["quantization"]["calibration"]
    return [f"  solved on {text['tokens']:,} tokens of {text['text']}: {told} (a line a tensor is in the report)"]


def _remarks(described: dict[str, Any]) -> list[str]:
    lines = [f"  note: {note}" for note in described["notes"]]
    if described["fall_backs"]:
        shown = "; ".join(described["fall_backs"][:_SHOWN_ITEMS])
        more = len(described["fall_backs"]) - _SHOWN_ITEMS
        lines.append(f"  {len(described['fall_backs'])} tensors in another type, for their row length: {shown}")
        if more > 0:
            lines[-1] += f"; and {more} more"
    return lines


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _shortened(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(_shortened, value[:_SHOWN_ITEMS]))
        return f"[{shown}{', …' if len(value) > _SHOWN_ITEMS else ''}] ({len(value)})"
    written = repr(value) if isinstance(value, str) else str(value)
    return written if len(written) <= _SHOWN_TEXT else f"{written[:_SHOWN_TEXT]}…"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int = 160) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(on_one_line(cell)) for cell in row))
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
