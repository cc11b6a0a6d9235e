"""From a plan to solved tensors: the calibration pass with every matrix quantized on the way, rows kept on disk.

checkpoint ── walk ── matrix ── solve ── pack ── rows on disk ── the writer moves them into the artifact's order
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llmx.errors import IntegrityError
from llmx.exporters.artifact import set_aside
from llmx.exporters.assignment import Assignment
from llmx.exporters.encoding import Encoding, encoding
from llmx.exporters.journal import Journal
from llmx.exporters.shared_scales import SharedScales
from llmx.exporters.solved import Line, Solved
from llmx.exporters.sparse_rows import encode, handed_over, pruned, told
from llmx.formats.ggml_packers import BlockScales
from llmx.models.model import Model, Weight
from llmx.progress import Progress, track
from llmx.quant.activations import Rounding
from llmx.quant.awq import AwqOptions, clip_limits, search_awq
from llmx.quant.calibrate import Calibration, loaded, walk
from llmx.quant.inputs import MatrixInputs
from llmx.quant.protocol import Floats, Grid
from llmx.quant.scale_search import Scaling
from llmx.quant.smooth import SmoothOptions, search_smooth
from llmx.quant.solve import EFFORTS, Prepared, Solution, SolveOptions, solve
from llmx.quant.sparse import Pruned
from llmx.quant.statistics import Statistics
from llmx.quant.workers import Workers, spans, workers

Bytes = npt.NDArray[np.uint8]
# The candidates of each method. The gate always has rounding to the nearest among them.
METHODS: Mapping[str, tuple[str, ...] | None] = {
    **{"rtn": ("rtn",), "gptq": None, "auto": None},
    # of what is left of a sparse matrix
    **{"sparsegpt": None, "wanda": ("rtn",), "magnitude": ("rtn",)},
}
TABLE_ROWS = 4096  # of an embedding encoded by one worker
PACKED_ROWS = 256  # of a matrix packed by one worker


@dataclass(slots=True)
class MatrixSolver:
    """The calibration pass's Solver: solves every matrix that has an assignment, and keeps its rows in `folder`.

    What the quantized model computes with is what its rows decode to: so a run that goes on from rows makes the same.
    """

    assignments: Mapping[str, Assignment]
    options: SolveOptions
    folder: Path
    journal: Journal
    device: str
    workers: Workers
    progress: Progress
    tied: bool
    scales: SharedScales | None = None  # of encodings that have one for a product; None takes one for each matrix
    head: MatrixInputs | None = None  # of a tied embedding: the head's inputs in the float model
    rows: dict[str, Bytes] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    _shared: tuple[MatrixInputs, Prepared] | None = None

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        name = weight.spec.name
        assigned = self.assignments.get(name)
        if assigned is None or (self.tied and weight.spec.role == "embedding"):
            return None
        known = self._known(weight, expert)
        return self._solve(weight, expert, inputs, assigned, self._options(assigned)) if known is None else known

    def table(self, weight: Weight) -> torch.Tensor | None:
        """The embedding: solved as the head where it is that too, else rounded to the nearest."""
        assigned = self.assignments.get(weight.spec.name)
        if assigned is None:
            return None
        known = self._known(weight, None)
        if known is not None:
            return known
        if self.head is not None:
            options = replace(self._options(assigned), repairs=False)
            return self._solve(weight, None, self.head, assigned, options)
        started = time.monotonic()
        kept, rows = encoding(assigned.type_name), self._rows_of(weight, None)
        self._encode(weight, 0, rows, kept, None)
        weight.release()
        spent = time.monotonic() - started
        size = weight.rows * weight.cols
        line = Line(weight.spec.name, None, kept.name, "rtn", None, None, None, None, False, size, spent)
        return self._done(weight, line, rows)

    def _known(self, weight: Weight, expert: int | None) -> torch.Tensor | None:
        """What a matrix was solved to before the export was stopped; None where it was not."""
        facts = self.journal.facts(_step(weight, expert))
        if facts is None:
            return None
        rows = self._rows_of(weight, expert)
        if _sha256(rows) != facts["sha256"]:
            raise IntegrityError(
                "the rows kept of a solved matrix have changed",
                where=self._path_of(weight),
                fix="leave out --resume to start anew",
            )
        line = Line(**{key: value for key, value in facts.items() if key != "sha256"})
        self.lines.append(line)
        self._advance(weight, line)
        return self._value(weight, rows)

    def _options(self, assigned: Assignment) -> SolveOptions:
        """With the candidates of the tensor's method."""
        return replace(self.options, methods=METHODS[assigned.method] or self.options.methods)

    def _solve(
        self, weight: Weight, expert: int | None, inputs: MatrixInputs, assigned: Assignment, options: SolveOptions
    ) -> torch.Tensor:
        found = inputs.statistics()
        if not _finite(found):
            raise IntegrityError(
                "the calibration pass met values that are not finite",
                where=f"the inputs of {weight.spec.name}",
                fix="check that the model works on this text in float32, or export with --method rtn",
            )
        if self._shared is None or self._shared[0] is not inputs:
            self._shared = (inputs, Prepared(found))
        own = encoding(assigned.type_name) if self.scales is None else self.scales.bound(weight.spec, expert)
        kept, count = own, weight.spec.shape[-2]
        first, rows = count * (expert or 0), self._rows_of(weight, expert)
        if not kept.solvable(weight.cols) and assigned.sparsity is None:
            return self._rounded(weight, expert, kept, rows, found)
        values = loaded(weight, self.workers, found.squares.device, first, count)
        sparse = pruned(values, self._shared[1], assigned, options, self.workers)
        if sparse is not None and not kept.solvable(weight.cols):
            encode(sparse, kept, rows, self.workers)
            return self._done(weight, _line(weight, expert, kept.name, sparse, found.tokens, found.pooled), rows)
        grid, limits = kept.grid(weight.cols), None
        if assigned.scaled:
            limits = clip_limits(weight.spec.role, values, found, grid, AwqOptions(), self.workers)
        solution = solve(values, self._shared[1], grid, options, self.workers, limits=limits, pruned=sparse)
        self._pack(kept, solution, rows)
        line = _line(weight, expert, kept.name, told(solution, sparse), found.tokens, found.pooled)
        return self._done(weight, line, rows)

    def _rounded(
        self, weight: Weight, expert: int | None, kept: Encoding, rows: Bytes, found: Statistics
    ) -> torch.Tensor:
        """A matrix whose rows end in a short group, which no solver takes: rounded to the nearest."""
        started = time.monotonic()
        importance = found.fitted.hessian.diagonal().cpu().numpy()
        self._encode(weight, len(rows) * (expert or 0), rows, kept, importance if importance.any() else None)
        size, spent = len(rows) * weight.cols, time.monotonic() - started
        name, tokens = weight.spec.name, found.tokens
        line = Line(name, expert, kept.name, "rtn", None, None, None, tokens, found.pooled, size, spent)
        return self._done(weight, line, rows)

    def _encode(self, weight: Weight, first: int, rows: Bytes, kept: Encoding, importance: Floats | None) -> None:
        """Fills the rows on disk, rounded to the nearest; first: the weight's row that the first is."""

        def encoded(part: slice) -> None:
            values = weight.read(first + part.start, first + part.stop)
            rows[part] = kept.encode(values, importance, self.options.effort)

        self.workers.map(encoded, spans(len(rows), TABLE_ROWS))

    def _pack(self, kept: Encoding, solution: Solution, rows: Bytes) -> None:
        """Fills the rows on disk; the workers share them."""
        blocks = len(solution.codes) // len(rows)

        def packed(part: slice) -> None:
            own = slice(part.start * blocks, part.stop * blocks)
            codes = solution.codes[own].reshape(part.stop - part.start, -1)
            kept.pack(part_of(solution.scales, own), codes, rows[part])

        self.workers.map(packed, spans(len(rows), PACKED_ROWS))

    def _rows_of(self, weight: Weight, expert: int | None) -> Bytes:
        """A tensor's rows on disk, or those of one of its experts."""
        name, count = weight.spec.name, weight.spec.shape[-2]
        if name not in self.rows:
            shape = (weight.rows, encoding(self.assignments[name].type_name).row_bytes(weight.cols))
            path = self._path_of(weight)
            set_aside(path, math.prod(shape))
            self.rows[name] = np.memmap(path, np.uint8, "r+", shape=shape)
        return self.rows[name] if expert is None else self.rows[name][count * expert : count * (expert + 1)]

    def _path_of(self, weight: Weight) -> Path:
        return self.folder / f"{weight.spec.name}.rows"

    def _done(self, weight: Weight, line: Line, rows: Bytes) -> torch.Tensor:
        """Note that a matrix, or one expert's, is solved; returned is what its rows stand for."""
        self.lines.append(line)
        facts = {**asdict(line), "sha256": _sha256(rows)}
        self.journal.record({_step(weight, line.expert): facts}, [self._path_of(weight)])
        self._advance(weight, line)
        return self._value(weight, rows)

    def _advance(self, weight: Weight, line: Line) -> None:
        self.progress.advance(line.weights * weight.nbytes // (weight.rows * weight.cols))

    def _value(self, weight: Weight, rows: Bytes) -> torch.Tensor:
        """f32[rows, in]: what the rows stand for, on the device."""
        kept, values = encoding(self.assignments[weight.spec.name].type_name), np.empty((len(rows), weight.cols), "f4")

        def decoded(part: slice) -> None:
            values[part] = kept.decode(rows[part], weight.cols)

        self.workers.map(decoded, spans(len(rows), PACKED_ROWS))
        return torch.from_numpy(values).to(self.device)


def _step(weight: Weight, expert: int | None) -> str:
    """What a journal calls it."""
    return f"solved {weight.spec.name}{'' if expert is None else f'[{expert}]'}"


def _sha256(rows: Bytes) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest()


def _finite(found: Statistics) -> bool:
    sums = [found.squares]
    for part in (found.fitted, found.held_out):
        sums += [tensor for tensor in (part.hessian, part.drift, part.residual) if tensor is not None]
    return all(bool(torch.isfinite(tensor).all()) for tensor in sums)


def part_of(scales: BlockScales, blocks: slice) -> BlockScales:
    """The scales of some blocks."""
    fields = (scales.d, scales.offset, scales.scales, scales.mins)
    return BlockScales(*(None if values is None else values[blocks] for values in fields))  # type: ignore[arg-type]


def _line(
    weight: Weight, expert: int | None, type_name: str, found: Solution | Pruned, tokens: int, pooled: bool
) -> Line:
    rounding = found.candidates.get("rtn")
    size = weight.spec.shape[-2] * weight.spec.shape[-1]
    return Line(
        weight.spec.name, expert, type_name, found.method, found.share, found.held_out, rounding, tokens, pooled, size,
        found.seconds,
    )  # fmt: skip


@dataclass(slots=True)
class _HeadInputs:
    """A Solver that solves nothing and remembers the inputs of the head."""

    found: MatrixInputs | None = None

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> torch.Tensor | None:
        if weight.spec.role in ("embedding", "head"):
            inputs.statistics()
            self.found = inputs
        return None

    def table(self, weight: Weight) -> torch.Tensor | None:
        return None


def solve_tensors(
    model: Model,
    assignments: Mapping[str, Assignment],
    calibration: Calibration,
    effort: str,
    folder: Path,
    journal: Journal,
    threads: int,
    inputs: Mapping[str, Rounding] | None = None,
) -> Solved:
    """Solve every assigned matrix in one walk over the model; their rows are kept in `folder`.

    assignments: canonical name -> what it gets. journal: notes each, and knows those that are done. static: the
    matrices whose inputs will be rounded on one static scale, which SmoothQuant has to know. Memory: a layer in
    float32, its statistics, the hidden states.
    Raises: IntegrityError where the model computes no finite values on the calibration text.
    """
    options = EFFORTS[effort]  # type: ignore[index]
    total = sum(model.weight(name).nbytes for name in assignments)
    tied = model.architecture.tied
    with workers(threads) as pool, track(total, "solving") as progress:
        scaling = _scaling(model, assignments, calibration, inputs or {}, pool)
        if scaling is not None:
            model = scaling.folds.applied(model)
        scales = SharedScales(model, {name: assigned.type_name for name, assigned in assignments.items()})
        solver = MatrixSolver(assignments, options, folder, journal, calibration.device, pool, progress, tied, scales)
        if tied and "embedding.weight" in assignments and journal.facts("solved embedding.weight") is None:
            solver.head = _head_inputs(model, calibration, pool)
        walk(model, calibration, solver, pool)
    tokens = sum(batch.tokens.numel() for batch in calibration.batches)
    model, rows = handed_over(model, assignments, solver.rows)
    return Solved(model, rows, tuple(solver.lines), scaling, tokens)


def _scaling(
    model: Model,
    assignments: Mapping[str, Assignment],
    calibration: Calibration,
    inputs: Mapping[str, Rounding],
    pool: Workers,
) -> Scaling | None:
    """AWQ's scales, or SmoothQuant's; None where the recipe asks for neither. It never asks for both."""
    scaled = _grids(model, {name: a for name, a in assignments.items() if a.scaled})
    smoothed = _grids(model, {name: a for name, a in assignments.items() if a.smoothed})
    if scaled:
        return search_awq(model, calibration, scaled, AwqOptions(), pool)
    if smoothed:
        return search_smooth(model, calibration, smoothed, SmoothOptions(inputs=inputs), pool)
    return None


def _grids(model: Model, assignments: Mapping[str, Assignment]) -> dict[str, Grid]:
    """Canonical name -> grid of the matrices that can be scaled."""
    wanted = {name: (encoding(a.type_name), model.weight(name).cols) for name, a in assignments.items()}
    return {name: kept.grid(cols) for name, (kept, cols) in wanted.items() if kept.solvable(cols)}


def _head_inputs(model: Model, calibration: Calibration, pool: Workers) -> MatrixInputs | None:
    """The inputs of the float model's head, from a pass of its own: a tied embedding is solved before everything."""
    key = "head of the float model"
    store = calibration.store
    if store is not None and (kept := store.load(key)) is not None:
        return MatrixInputs.known(key, kept, pool)
    seen = _HeadInputs()
    walk(model, replace(calibration, store=None), seen, pool)
    if store is not None and seen.found is not None:
        store.save(key, seen.found.statistics())
    return seen.found
