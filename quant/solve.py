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

import numpy as np
import torch

from llmx.formats.ggml_packers import BlockScales
from llmx.quant.gptq import Factor, damped, factorize, gptq
from llmx.quant.protocol import Effort, Grid
from llmx.quant.refine import refine
from llmx.quant.state import Rows
from llmx.quant.statistics import Moments, Statistics
from llmx.quant.workers import Workers, spans

Tensor = torch.Tensor
PLAIN_SHARE = 0.01  # of damping, where nothing is repaired
ROWS = 256  # solved together: their arrays stay in a core's cache


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """How hard to try. shares: λ and damping tried, as shares of the mean diagonal. sweeps: rounds of refinement.

    methods: the candidates of the gate. effort: of the search for scales. repairs: whether the target makes up for
    what earlier layers lost (a tied embedding must not: it is read at both ends of the model).
    """

    methods: tuple[str, ...] = ("rtn", "gptq")
    shares: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    sweeps: int = 3
    effort: Effort = "balanced"
    repairs: bool = True


EFFORTS: dict[Effort, SolveOptions] = {
    "fast": SolveOptions(shares=(0.1,), sweeps=1, effort="fast"),
    "balanced": SolveOptions(),
    "best": SolveOptions(("rtn", "refined", "gptq"), sweeps=6, effort="best"),
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
    """What the matrices of one input share: factors of its damped Hessian, made once for each share."""

    statistics: Statistics
    _inverse: dict[float, Tensor] = field(default_factory=dict)
    _factor: dict[float, Factor | None] = field(default_factory=dict)

    def cholesky(self, share: float) -> Tensor | None:
        """f64[in, in], lower; None where the damped Hessian is not positive definite."""
        if share not in self._inverse:
            lower, failed = torch.linalg.cholesky_ex(damped(self.statistics.fitted.hessian, share).double())
            if int(failed) != 0:
                return None
            self._inverse[share] = lower
        return self._inverse[share]

    def factor(self, share: float) -> Factor | None:
        if share not in self._factor:
            self._factor[share] = factorize(damped(self.statistics.fitted.hessian, share))
        return self._factor[share]


def loss(weight: Tensor, value: Tensor, moments: Moments, pull: Tensor | None) -> float:
    """tr(E Ĥ Eᵀ) + 2 ⟨E, pull⟩, E = weight − value."""
    error = weight - value
    total = (error @ moments.hessian * error).sum(dtype=torch.float64)
    if pull is not None:
        total = total + 2 * (error * pull).sum(dtype=torch.float64)
    return float(total)


def target(weight: Tensor, prepared: Prepared, shares: tuple[float, ...]) -> tuple[Tensor, float, float]:
    """(W*, share, its held-out loss): the share of damping under which the unquantized target does best."""
    found = prepared.statistics
    pull, judged = found.fitted.pull(weight), found.held_out.pull(weight)
    if pull is None:
        return weight, PLAIN_SHARE, 0.0
    best: tuple[Tensor, float, float] | None = None
    for share in shares:
        lower = prepared.cholesky(share)
        if lower is None:
            continue
        moved = weight + torch.cholesky_solve(pull.T.double(), lower).T.float()
        lost = loss(weight, moved, found.held_out, judged)
        if best is None or lost < best[2]:
            best = (moved, share, lost)
    return best if best is not None else (weight, shares[-1], 0.0)


def solve(weight: Tensor, prepared: Prepared, grid: Grid, options: SolveOptions, workers: Workers) -> Solution:
    """The best scales and codes for weight (f32[out, in]) among the methods of `options`."""
    started = time.monotonic()
    found = prepared.statistics
    if options.repairs:
        wanted, share, _ = target(weight, prepared, options.shares)
    else:
        wanted, share = weight, PLAIN_SHARE
    grid = grid.bound(wanted.cpu().numpy())
    hessian = damped(found.fitted.hessian, share)
    importance = found.fitted.hessian.diagonal().cpu().numpy()
    importance = importance if importance.any() else np.ones_like(importance)
    factor = prepared.factor(share) if "gptq" in options.methods else None

    def rows_of(part: slice) -> list[Rows]:
        made = []
        chunk = wanted[part]
        for method in options.methods:
            made.append(METHODS[method](chunk, grid, importance, hessian, factor, options))
        return made

    parts = workers.map(rows_of, spans(len(weight), ROWS))
    energy = float((weight @ found.held_out.hessian * weight).sum(dtype=torch.float64)) or 1.0
    judged = found.held_out.pull(weight) if options.repairs else None
    results = {}
    for number, method in enumerate(options.methods):
        value = torch.cat([part[number].value().T for part in parts])
        results[method] = (
            loss(weight, value, found.held_out, judged) / energy,
            value,
            [part[number] for part in parts],
        )
    best = min(results, key=lambda name: results[name][0])
    lost, value, kept = results[best]
    return Solution(
        _joined([rows.scales for rows in kept]),
        np.concatenate([rows.codes() for rows in kept]),
        value.contiguous(),
        best,
        share,
        lost,
        {name: result[0] for name, result in results.items()},
        time.monotonic() - started,
    )


def _joined(parts: list[BlockScales]) -> BlockScales:
    def all_of(name: str) -> np.ndarray | None:
        fields = [getattr(part, name) for part in parts]
        return None if fields[0] is None else np.concatenate(fields)

    return BlockScales(*(all_of(name) for name in ("d", "offset", "scales", "mins")))  # type: ignore[arg-type]


def _rtn(
    chunk: Tensor, grid: Grid, importance: np.ndarray, hessian: Tensor, factor: Factor | None, options: SolveOptions
) -> Rows:
    weight = np.ascontiguousarray(chunk.cpu().numpy())
    scales = grid.fit(weight, importance, options.effort)
    rows = Rows(grid, scales, len(weight), chunk.device)
    rows.set_codes(grid.round(weight, scales))
    return rows


def _refined(
    chunk: Tensor, grid: Grid, importance: np.ndarray, hessian: Tensor, factor: Factor | None, options: SolveOptions
) -> Rows:
    rows = _rtn(chunk, grid, importance, hessian, factor, options)
    refine(rows, chunk.T.contiguous(), hessian, options.sweeps)
    return rows


def _gptq(
    chunk: Tensor, grid: Grid, importance: np.ndarray, hessian: Tensor, factor: Factor | None, options: SolveOptions
) -> Rows:
    rows = _rtn(chunk, grid, importance, hessian, factor, options)
    sideways = chunk.T.contiguous()
    if factor is not None:
        gptq(sideways, factor, rows)
    refine(rows, sideways, hessian, options.sweeps)
    return rows


METHODS: dict[str, Callable[..., Rows]] = {"rtn": _rtn, "refined": _refined, "gptq": _gptq}
