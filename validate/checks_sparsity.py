"""bytes.sparsity: an artifact that says it is sparse has its zeros where it says, counted from the decoded file."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.sparsity import SPARSITY_KEY, Sparsity, read_sparsity
from llmx.quant.sparsity import Pattern, crowded
from llmx.validate.case import Case
from llmx.validate.kinds import kind_of
from llmx.validate.report import Check, at_most, named

NAME = "bytes.sparsity"
ORIGIN = "the pattern that the artifact itself names"


def check_sparsity(case: Case) -> Iterator[Check]:
    """Yields bytes.sparsity of an artifact that says it is sparse, nothing of another: how many groups of weights have
    more that are not zero than their pattern allows, or weights, where the pattern is a share of the whole."""
    if SPARSITY_KEY not in case.file.metadata:
        return
    try:
        said = read_sparsity(case.file.metadata[SPARSITY_KEY])
    except IntegrityError as error:
        yield Check(NAME, False, origin=ORIGIN, detail=error.one_line)
        return
    told, count, checked = [], 0, 0
    for entry in case.entries:
        ranges = _ranges(entry, said)
        stored = case.file.tensors.get(entry.name)
        if not ranges or stored is None or tuple(stored.shape) != tuple(entry.shape):
            continue  # what is missing, bytes.tensors tells
        over = sum(_over(case, entry, *one) for one in ranges)
        checked += len(ranges)
        count += over
        told += [f"{entry.name}: {over}"] if over else []
    unit = "groups" if said.pattern == "2:4" and not said.others else "groups or weights"
    if not checked:
        yield Check(NAME, False, origin=ORIGIN, detail=f"{SPARSITY_KEY} names {said.pattern}, and no matrix is sparse")
        return
    detail = named(told) or f"{checked} matrices, {said.pattern} by {said.method}"
    yield at_most(NAME, count, 0, unit, ORIGIN, detail=detail)


def _ranges(entry: Entry, said: Sparsity) -> list[tuple[int, int, Pattern]]:
    """(first row, row after the last, pattern) of each sparse matrix in a stored tensor."""
    found, first = [], 0
    for piece in entry.pieces:
        rows = prod(piece.spec.shape[:-1])
        pattern = said.of(piece.spec)
        if pattern is not None:
            found.append((first, first + rows, pattern))
        first += rows
    return found


def _over(case: Case, entry: Entry, first: int, last: int, pattern: Pattern) -> int:
    """How many groups, or weights, of these rows are not zero beyond what the pattern allows."""
    kind, count = kind_of(case.file), 0
    for start, data in kind.rows(case.file, entry.name):
        low, high = max(start, first), min(start + len(data), last)
        if low < high:
            values = kind.decoded(case.file, entry.name, low, high)
            count += crowded(np.asarray(values, np.float32), pattern)
    if pattern.group:
        return count
    size = (last - first) * entry.columns
    return max(count - (size - pattern.pruned(size)), 0)
