"""`llmx compare`: artifacts side by side, judged against one run of the reference."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import UsageError
from llmx.validating import available_cores, check_threads, read_text

if TYPE_CHECKING:
    from llmx.validate.compare import Table
    from llmx.validate.record import Record
    from llmx.validate.runtimes import Runtime

JSON_NAME, HTML_NAME = "compare.json", "compare.html"


def compare(
    artifacts: Sequence[Path],
    reference: str,
    *,
    revision: str | None = None,
    text: Path | None = None,
    positions: int | None = None,
    keep_reference: Path | None = None,
    output: Path | None = None,
    csv_file: Path | None = None,
    threads: int = 0,
) -> Table:
    """Judge artifacts against a checkpoint, or against a record that an earlier comparison kept (a file).

    output: a folder for compare.json and compare.html. positions: as in validate.
    Raises: UsageError for artifacts named twice, a text that cannot be used; IntegrityError for a broken record.
    """
    from llmx.progress import stages
    from llmx.validate import compare as side_by_side
    from llmx.validate.sample_text import SAMPLE_TEXT

    check_threads(threads)
    if len({path.absolute() for path in artifacts}) != len(artifacts):
        raise UsageError("an artifact is named twice", fix="name every artifact once")
    if keep_reference is not None and keep_reference.exists():
        raise UsageError("the reference record exists", where=keep_reference, fix="choose another name")
    read, cores = SAMPLE_TEXT if text is None else _text(text), threads or available_cores()
    with stages("comparing") as stage:
        stage("the reference")
        with _record(reference, revision, read, positions, keep_reference, cores) as record:
            found = side_by_side.compare(artifacts, record, read, runtime_of, threads=cores, progress=stage)
    _write(found, output, csv_file)
    return found


def runtime_of(artifact: Path) -> Runtime:
    """Returns the runtime of an artifact's format. Raises: UnsupportedError for a file of no known format."""
    from llmx.validate.kinds import find_kind
    from llmx.validate.runtimes import find_runtime

    return find_runtime(find_kind(artifact).runtime)


@contextmanager
def _record(
    reference: str, revision: str | None, text: str, positions: int | None, keep: Path | None, cores: int
) -> Iterator[Record]:
    """The record: read from a file, or made from a checkpoint in a temporary one that is removed or kept."""
    from llmx.exporters import artifact as files
    from llmx.models.model import open_model
    from llmx.validate.case import Settings
    from llmx.validate.record import Record, threads_of, write_record

    if Path(reference).is_file():
        _refuse_with_record(positions, keep)
        with Record(Path(reference)) as record:
            _same_text(record, text)
            yield record
        return
    settings = Settings()
    if positions is not None:
        settings = replace(settings, positions=positions, least_positions=positions)
    model = open_model(reference, revision)
    with tempfile.TemporaryDirectory(prefix="llmx-compare-") as scratch:
        path = Path(scratch) / "reference"
        if keep is None:
            write_record(path, model, text, settings, threads_of(model, cores))
        else:
            files.make_folder(keep.parent)
            with files.partial_files([keep]) as [partial]:
                write_record(partial, model, text, settings, threads_of(model, cores))
                files.publish([partial], [keep])
            path = keep
        with Record(path) as record:
            yield record


def _refuse_with_record(positions: int | None, keep: Path | None) -> None:
    given = [name for name, value in (("--positions", positions), ("--keep-reference", keep)) if value is not None]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot go with a kept reference", fix="give a model, or leave it out")


def _same_text(record: Record, text: str) -> None:
    if sha256(text.encode()).hexdigest() != record.header.text_sha256:
        raise UsageError(
            "the reference record was made on another text",
            fix="give the --text that it was made with, or none if none",
        )


def _text(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise UsageError("the evaluation text is empty", where=path, fix="give a text of a few thousand words")
    return text


def _write(found: Table, output: Path | None, csv_file: Path | None) -> None:
    from llmx.exporters import artifact as files
    from llmx.validate.compare_html import page
    from llmx.validate.report import as_json

    told = found.to_dict()
    if output is not None:
        files.make_folder(output)
        files.write_text(output / JSON_NAME, as_json(told))
        files.write_text(output / HTML_NAME, page(told))
    if csv_file is not None:
        files.make_folder(csv_file.parent)
        files.write_text(csv_file, as_csv(told))


def as_csv(told: Mapping[str, Any]) -> str:
    """Returns a line an artifact, with every figure in full."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(told["artifacts"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(told["artifacts"])
    return out.getvalue()
