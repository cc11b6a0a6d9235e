"""One matrix, from its weights and what is known of its inputs to scales and codes; judged on held-out tokens.

    λ      chosen by how well the unquantized target does on the held-out tokens
    W*  =  W + (W D + R)(Ĥ + λI)⁻¹          the target that also repairs what earlier layers lost
    RTN, GPTQ, refined                      each on any grid
    gate                                    the best on held-out tokens is kept, never one worse than RTN

Loss of Ŵ on a set of tokens: tr(E Ĥ Eᵀ) + 2 ⟨E, W D + R⟩, E = W − Ŵ, as a share of tr(W Ĥ Wᵀ). It is 0 for the
weights as they are, so a negative one repairs more than it loses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from llmx.formats.ggml_packers import BlockScales
from llmx.quant.gptq import Factor, cholesky, damped, factorize, gptq
from llmx.quant.protocol import Effort, Grid
from llmx.quant.refine import refine
from llmx.quant.sparse import Pruned
from llmx.quant.state import Rows
from llmx.quant.statistics import Moments, Statistics
from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
PLAIN_SHARE = 0.1  # of damping, where nothing is repaired
FITTED = 64  # rows whose scales one worker looks for: 16 cores have work in a matrix of 1024
# Rows solved together: on the CPU their arrays stay in a core's cache; a GPU wants many at once.
ROWS = {"cpu": 256, "cuda": 8192}
KEPT_FACTORS = 512 << 20  # bytes of factors that matrices of one input share; more are made anew, which takes less time


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """How hard to try. shares: λ and damping tried, as shares of the mean diagonal. sweeps: rounds of refinement.

    methods: the candidates of the gate. effort: of the search for scales. repairs: whether the target makes up for
    what earlier layers lost (a tied embedding must not: it is read at both ends of the model). exchanges: rounds in
    which a sparse matrix may choose its zeros anew.
    """

    methods: tuple[str, ...] = ("rtn", "gptq")
    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    sweeps: int = 10
    effort: Effort = "balanced"
    repairs: bool = True
    exchanges: int = 4


EFFORTS: dict[Effort, SolveOptions] = {
    "fast": SolveOptions(shares=(0.1,), sweeps=2, effort="fast", exchanges=2),
    "balanced": SolveOptions(),
    "best": SolveOptions(("rtn", "refined", "gptq"), sweeps=16, effort="best", exchanges=8),
}


@dataclass(frozen=True, slots=True)
class Solution:
    """scales, codes: what the packer takes. value: f32[out, in], what they stand for. held_out: their loss there."""

    scales: BlockScales
    codes: np.ndarray
    value: Tensor
    method: str
    share: float
    held_out: float
    candidates: dict[str, float]
    seconds: float


@dataclass(slots=True)
class Prepared:
    """What the matrices of one input share: factors of its damped Hessian, made once for each share while there is
    room for them."""

    statistics: Statistics
    _inverse: dict[float, Tensor] = field(default_factory=dict)
    _factor: dict[float, Factor | None] = field(default_factory=dict)

    def cholesky(self, share: float) -> Tensor | None:
        """f64[in, in], lower; None where the damped Hessian is not positive definite."""
        if share in self._inverse:
            return self._inverse[share]
        lower = cholesky(damped(self.statistics.fitted.hessian, share))
        if lower is not None and (len(self._inverse) + 1) * lower.nbytes <= KEPT_FACTORS:
            self._inverse[share] = lower
        return lower

    def factor(self, share: float, hessian: Tensor) -> Factor | None:
        """hessian: damped by that share."""
        if share not in self._factor:
            self._factor[share] = factorize(hessian)
        return self._factor[share]


def loss(weight: Tensor, value: Tensor, moments: Moments, pull: Tensor | None) -> float:
    """tr(E Ĥ Eᵀ) + 2 ⟨E, pull⟩, E = weight − value."""
    error = weight - value
    total = (error @ moments.hessian * error).sum(dtype=torch.float64)
    if pull is not None:
        total = total + 2 * (error * pull).sum(dtype=torch.float64)
    return float(total)


def target(
    weight: Tensor, prepared: Prepared, shares: tuple[float, ...], workers: Workers
) -> tuple[Tensor, float, float]:
    """(W*, share, its held-out loss): the share of damping under which the unquantized target does best."""
    found, here = prepared.statistics, workers.on(weight.device)
    if found.fitted.drift is None and found.fitted.residual is None:
        return weight, PLAIN_SHARE, 0.0
    parts = parts_of(weight)

    def moved(part: slice, lower: Tensor) -> Tensor:
        pull = found.fitted.pull(weight, part)
        assert pull is not None, "there is something to repair"
        return weight[part] + torch.cholesky_solve(pull.T.double(), lower).T.float()

    def lost(part: slice, lower: Tensor) -> float:
        return loss(weight[part], moved(part, lower), found.held_out, found.held_out.pull(weight, part))

    best: tuple[float, float, Tensor] | None = None
    for share in shares:
        lower = prepared.cholesky(share)
        if lower is not None:
            loss_there = sum(here.map(partial(lost, lower=lower), parts))
            if best is None or loss_there < best[0]:
                best = loss_there, share, lower
    if best is None:
        return weight, shares[-1], 0.0
    least, share, lower = best
    return torch.cat(here.map(partial(moved, lower=lower), parts)), share, least


def solve(
    weight: Tensor,
    prepared: Prepared,
    grid: Grid,
    options: SolveOptions,
    workers: Workers,
    *,
    limits: Tensor | None = None,
    pruned: Pruned | None = None,
) -> Solution:
    """The best scales and codes for weight (f32[out, in]) among the methods of `options`.

    limits: f32[out, groups], the magnitude at which each group is cut before its scales are looked for; None cuts none.
    pruned: which weights are zero, on a grid that has an exact one, and what the others are before they are rounded.
    They are at their least squares, so the loss of rounding them, given the zeros, is what it adds to theirs.
    """
    started = time.monotonic()
    wanted, share = (weight, PLAIN_SHARE) if pruned is None else (pruned.value, pruned.share)
    if options.repairs and pruned is None:
        wanted, share, _ = target(weight, prepared, options.shares, workers)
    parts = _outcomes(weight, wanted, prepared, share, grid, options, workers, limits, pruned)
    judge = prepared.statistics.held_out.hessian
    energy = sum(workers.on(weight.device).map(lambda part: _energy(weight[part], judge), parts_of(weight))) or 1.0
    losses = {
        method: sum(part[number].lost for part in parts) / energy for number, method in enumerate(options.methods)
    }
    best = min(losses, key=lambda method: losses[method])
    kept = [part[options.methods.index(best)] for part in parts]
    return Solution(
        _joined([outcome.scales for outcome in kept]),
        np.concatenate([outcome.codes for outcome in kept]),
        torch.cat(workers.on(weight.device).map(lambda outcome: outcome.value(weight.device), kept)),
        best,
        share,
        losses[best],
        losses,
        time.monotonic() - started,
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a method made of some rows, and its loss on held-out tokens. Codes take a quarter of what values would."""

    grid: Grid
    scales: BlockScales
    codes: np.ndarray
    rows: int
    lost: float

    def value(self, device: torch.device) -> Tensor:
        """f32[rows, in]: what it stands for."""
        rows = Rows(self.grid, self.scales, self.rows, device)
        rows.set_codes(self.codes)
        return rows.value().T


def _outcomes(
    weight: Tensor,
    wanted: Tensor,
    prepared: Prepared,
    share: float,
    grid: Grid,
    options: SolveOptions,
    workers: Workers,
    limits: Tensor | None,
    pruned: Pruned | None,
) -> list[list[_Outcome]]:
    """Of every part of the rows, what each method makes of them, in the order of the methods."""
    fitted, judge = prepared.statistics.fitted.hessian, prepared.statistics.held_out
    hessian = damped(fitted, share)
    factor = prepared.factor(share, hessian) if "gptq" in options.methods else None
    cut = wanted if limits is None else clipped(wanted, limits)
    starts = _starts(cut, fitted.diagonal(), grid, options, workers)

    def outcomes(part: slice) -> list[_Outcome]:
        sideways = wanted[part].T.contiguous()
        pull = judge.pull(weight, part) if options.repairs else None
        made = []
        for method in options.methods:
            rows = starts(part)
            rows.kept = None if pruned is None else pruned.kept[part].T.contiguous()
            METHODS[method](rows, sideways, hessian, factor, options)
            lost = loss(weight[part], rows.value().T, judge, pull)
            made.append(_Outcome(rows.grid, rows.scales, rows.codes(), rows.count, lost))
        return made

    return workers.on(weight.device).map(outcomes, parts_of(weight))


def parts_of(weight: Tensor) -> list[slice]:
    """The rows that are solved together."""
    return spans(len(weight), ROWS[weight.device.type])


def _energy(weight: Tensor, hessian: Tensor) -> float:
    return float((weight @ hessian * weight).sum(dtype=torch.float64))


def clipped(weight: Tensor, limits: Tensor) -> Tensor:
    """f32[out, in]: the weights cut at their group's limit (f32[out, groups])."""
    largest = limits.repeat_interleave(weight.shape[1] // limits.shape[1], 1)
    return torch.minimum(torch.maximum(weight, -largest), largest)


def _starts(
    wanted: Tensor, importance: Tensor, grid: Grid, options: SolveOptions, workers: Workers
) -> Callable[[slice], Rows]:
    """Rows of `wanted`, rounded to the nearest on the best scales. All are fitted here, on the CPU, by every worker."""
    values, columns = np.ascontiguousarray(wanted.cpu().numpy()), importance.cpu().numpy()
    columns = columns if columns.any() else np.ones_like(columns)
    grid = grid.bound(values, columns)

    def fitted(part: slice) -> tuple[BlockScales, np.ndarray]:
        scales = grid.fit(values[part], columns, options.effort)
        return scales, grid.round(values[part], scales)

    found = workers.map(fitted, spans(len(values), FITTED))

    def rows_of(part: slice) -> Rows:
        pieces = found[part.start // FITTED : -(-part.stop // FITTED)]
        rows = Rows(grid, _joined([scales for scales, _ in pieces]), part.stop - part.start, wanted.device)
        rows.set_codes(np.concatenate([codes for _, codes in pieces]))
        return rows

    return rows_of


def _joined(parts: list[BlockScales]) -> BlockScales:
    def all_of(name: str) -> np.ndarray | None:
        fields = [getattr(part, name) for part in parts]
        return None if fields[0] is None else np.concatenate(fields)

    return BlockScales(*(all_of(name) for name in ("d", "offset", "scales", "mins")))  # type: ignore[arg-type]


def _rtn(rows: Rows, sideways: Tensor, hessian: Tensor, factor: Factor | None, options: SolveOptions) -> None:
    """Rounded to the nearest, as the rows are at the start."""


def _refined(rows: Rows, sideways: Tensor, hessian: Tensor, factor: Factor | None, options: SolveOptions) -> None:
    refine(rows, sideways, hessian, options.sweeps)


def _gptq(rows: Rows, sideways: Tensor, hessian: Tensor, factor: Factor | None, options: SolveOptions) -> None:
    if factor is not None:
        gptq(sideways, factor, rows)
    refine(rows, sideways, hessian, options.sweeps)


# What each does to rows that are rounded to the nearest; sideways: their target, f32[columns, rows].
METHODS: dict[str, Callable[[Rows, Tensor, Tensor, Factor | None, SolveOptions], None]] = {
    "rtn": _rtn,
    "refined": _refined,
    "gptq": _gptq,
}
