"""Artifacts side by side: each judged against one record of the reference, on the runtime of its format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import CheckFailed, IntegrityError, LlmxError, ResourceError, RuntimeMissing, UnsupportedError
from llmx.validate.case import PARALLEL_PARAMETERS
from llmx.validate.charts import frontier
from llmx.validate.kinds import Container, find_kind, kind_of
from llmx.validate.metrics import Comparison
from llmx.validate.record import Header, Record, compared, ids_digest
from llmx.validate.report import EXIT_CODES, plain
from llmx.validate.runtimes import Runtime, Session

SCHEMA = "llmx.compare/1"  # raise the number when a key changes its meaning or goes away
SCHEMA_FILE = "schemas/compare-1.json"
COMPARED, FAILED, NOT_RUN = "compared", "failed", "not run"
SPEED_PREFILL, SPEED_DECODE = 256, 32


@dataclass(frozen=True, slots=True)
class Row:
    """One artifact. Figures are None where it was not compared; status: compared, failed or not run, with the error.

    kl_*: nats. perplexity_ratio: artifact / reference, perplexity_ratio_error: one standard error. pareto: no other
    artifact is both as small and as near to the reference.
    """

    name: str
    bytes: int | None = None
    bits_per_weight: float | None = None
    status: str = COMPARED
    error: str | None = None
    code: int = 0
    positions: int = 0
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_999: float | None = None
    same_top1: float | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    rms_delta_p: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    time_to_first_token_seconds: float | None = None
    peak_rss_bytes: int | None = None
    runtime: str | None = None
    pareto: bool = False


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) that every comparison keeps to."""
    return json.loads(resources.files("llmx.validate").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Table:
    """All artifacts, by size; those of no known size stand last."""

    rows: tuple[Row, ...]
    header: Header

    @property
    def exit_code(self) -> int:
        """0 when every artifact was compared, else the first of 4, 7, 5; any other failure is 4."""
        codes = {row.code for row in self.rows if row.status != COMPARED}
        return 0 if not codes else next((code for code in EXIT_CODES if code in codes), CheckFailed.exit_code)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values in schema `SCHEMA`; NaN and infinity as strings."""
        h = self.header
        return {
            "schema": SCHEMA,
            "reference": {"id": h.model, "kind": "transformers, float32, eager attention"},
            "settings": {
                "positions": h.positions,
                "chunk": h.chunk,
                "text_sha256": h.text_sha256,
                "kept": h.kept,
                "vocab": h.vocab,
                "drawn": h.drawn,
                "kl": "estimated" if h.drawn else "exact",
            },
            "artifacts": [plain(asdict(row)) for row in self.rows],
        }


def compare(
    artifacts: Sequence[Path],
    record: Record,
    text: str,
    runtime_of: Callable[[Path], Runtime],
    *,
    threads: int,
    progress: Callable[[str], None] = lambda name: None,
) -> Table:
    """Judges every artifact; a broken one, or one without its runtime, gets a row that says so, and the rest go on.

    runtime_of: the runtime of a format; raises UnsupportedError for none. text: what the record was made on.
    threads: for the speed, and for the logits of all but small models.
    """
    rows = []
    for path, name in zip(artifacts, names(artifacts), strict=True):
        progress(name)
        rows.append(_row(path, name, record, text, runtime_of, threads))
    rows.sort(key=lambda row: (row.bytes is None, row.bytes or 0, row.name))
    return Table(tuple(_marked(rows)), record.header)


def names(paths: Sequence[Path]) -> list[str]:
    """Returns the files' names; with as much of their folders as tells equal names apart."""
    for depth in range(1, 1 + max((len(path.absolute().parts) for path in paths), default=1)):
        found = ["/".join(path.absolute().parts[-depth:]) for path in paths]
        if len(set(found)) == len(set(paths)):
            return found
    return [str(path) for path in paths]


def _row(path: Path, name: str, record: Record, text: str, runtime_of: Callable[[Path], Runtime], threads: int) -> Row:
    row = Row(name)
    try:
        row, file = _sized(row, path)
        runtime = runtime_of(path)
        path = path if file is None else kind_of(file).located(path)
        if (reason := runtime.unavailable()) is not None:
            raise RuntimeMissing(f"{runtime.name} is missing: {reason}")
        # As Case.threads: those of a small model would only wait for each other.
        judging = threads if file is not None and file.weights >= PARALLEL_PARAMETERS else 1
        read = text if file is None or kind_of(file).no_text(file) is None else None
        row = _judged(row, path, record, read, runtime, judging)
        return _timed(row, path, record.header, runtime, threads)
    except (RuntimeMissing, ResourceError) as error:
        return replace(row, status=NOT_RUN, error=error.one_line, code=error.exit_code)
    except LlmxError as error:
        return replace(row, status=FAILED, error=error.one_line, code=CheckFailed.exit_code)


def _sized(row: Row, path: Path) -> tuple[Row, Container | None]:
    """The row with its size, and the opened artifact; None where it is of no format that llmx knows."""
    if not path.exists():
        raise UnsupportedError("there is no such artifact")
    try:
        kind = find_kind(path)
    except IntegrityError:
        return replace(row, bytes=path.stat().st_size), None
    file = kind.open(path)
    return replace(row, bytes=file.nbytes, bits_per_weight=file.bits_per_weight), file


def _judged(row: Row, path: Path, record: Record, text: str | None, runtime: Runtime, threads: int) -> Row:
    """The row with the figures. text: None for an artifact without a tokenizer, which is given the reference's ids."""
    header, found = record.header, Comparison()
    with runtime.open(path, threads=threads, context=header.chunk) as session:
        if text is not None:
            _check_ids(session, text, header)
        build = session.build
        for tokens, rows in record.chunks():
            for figures in _blocks(session.logits(tokens), tokens, rows, header):
                found.add_figures(*figures)
    if found.positions != header.positions:
        raise CheckFailed(f"logits came for {found.positions} of {header.positions} positions")
    summary = found.summary()
    return replace(
        row,
        runtime=f"{runtime.name}: {build}",
        positions=summary.positions,
        kl_mean=summary.kl_mean,
        kl_median=summary.kl_median,
        kl_999=summary.kl_999,
        same_top1=summary.same_top1,
        perplexity=summary.perplexity_artifact,
        perplexity_ratio=summary.perplexity_ratio,
        perplexity_ratio_error=summary.perplexity_ratio_error,
        rms_delta_p=summary.rms_delta_p,
    )


def _timed(row: Row, path: Path, header: Header, runtime: Runtime, threads: int) -> Row:
    context = min(SPEED_PREFILL + SPEED_DECODE, header.context)
    decode = min(SPEED_DECODE, context // 2)
    with runtime.open(path, threads=threads, context=context) as session:
        speed = session.speed(context - decode, decode)
    return replace(
        row,
        prefill_tokens_per_second=speed.prefill_tokens_per_second,
        decode_tokens_per_second=speed.decode_tokens_per_second,
        time_to_first_token_seconds=speed.time_to_first_token_seconds,
        peak_rss_bytes=speed.peak_rss_bytes,
    )


def _check_ids(session: Session, text: str, header: Header) -> None:
    """Another tokenizer would be judged on tokens that mean something else to it."""
    ids = session.tokenize(text[: header.characters], add_special=False)[: header.text_tokens]
    if ids_digest(ids) != header.ids_sha256:
        raise CheckFailed("its tokenizer gives other ids for the text than the reference's")


def _blocks(
    logits: Iterable[np.ndarray], tokens: list[int], rows: np.ndarray, header: Header
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    following, start = np.array([*tokens[1:], 0]), 0
    for block in logits:
        first, last = max(header.first - start, 0), min(header.last - start, len(block))
        if first < last:
            at = slice(start + first - header.first, start + last - header.first)
            yield compared(rows[at], block[first:last], following[start + first : start + last], header)
        start += len(block)


def _marked(rows: Sequence[Row]) -> Iterator[Row]:
    points = {row: (row.bytes, row.kl_mean) for row in rows if row.status == COMPARED}
    best = set(frontier(points.values()))  # type: ignore[arg-type]
    yield from (replace(row, pareto=points.get(row) in best) for row in rows)
