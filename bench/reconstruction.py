"""Reconstruction: AWQ and GPTQ on 4-bit groups of 128, ours against the published procedures, same layers, same data.

    python bench/reconstruction.py MODEL --text calib.txt --judge eval.txt [--layers 0,3,7] [--tokens 8192] \\
        [--threads 2] [--json FILE]

The published procedures are written out below from their papers and READMEs:

    AutoAWQ    20 α on mean |x| and mean weight share, least squared error of the block's output (attention, MLP) with
               min-max groups and zero points; then clipping, 10 shrinks, 512 tokens; not for q and k. v -> o is left
               out under grouped-query attention, as there.
    GPTQ       H = 2/n Σ x xᵀ, damped, blocks of 128, min-max groups. Columns by falling diag H with groups fixed first
               (desc_act and static groups, damp 1 %); in order, groups fitted on the way (damp 5 %); or group by group,
               each sorted inside (act_group_aware, GPTQModel's default, damp 5 %). The best of the three counts,
               matrix by matrix, chosen on the judged tokens themselves.

Ours: AWQ is search_awq's scales, clip_limits and one fit; GPTQ is `solve` (GPTQ and refinement, judged on a quarter of
the tokens held out; theirs calibrate on all of them). Scales of ours are float16, theirs are not rounded at all.

The error of a matrix is Σ‖Ŵx − Wx‖² / Σ‖Wx‖² over the judged text's tokens, x the float model's inputs; of a block,
that of its output with all its matrices quantized. A ratio below 1 is ours in front.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from llmx.models.architecture import Architecture
from llmx.models.calibration_text import read_calibration, sequences
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps, gated
from llmx.quant.awq import Awq, AwqOptions, clip_limits
from llmx.quant.calibrate import Calibration, walk
from llmx.quant.grid import grid
from llmx.quant.inputs import Batch, MatrixInputs, batches
from llmx.quant.scale_search import ScaleSearch, rounded
from llmx.quant.solve import Prepared, SolveOptions, clipped, solve
from llmx.quant.statistics import Inputs, Moments, Statistics, moments, statistics
from llmx.quant.workers import Workers, workers

Tensor = torch.Tensor
Weights = dict[str, Tensor]  # f32[out, in] by role
GROUP, LENGTH, HELD_OUT_EVERY = 128, 256, 4
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
BLOCKS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
METHODS = ("AutoAWQ", "our AWQ", "GPTQ", "our GPTQ", "our AWQ + GPTQ")


# ── the layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Layer:
    """Of each role: inputs, f32[tokens, in], to calibrate on and their statistics (known), and others to judge on with
    their Hessian."""

    architecture: Architecture
    weights: Weights = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    judged: dict[str, Tensor] = field(default_factory=dict)
    known: dict[str, Statistics] = field(default_factory=dict)
    hessian: Weights = field(default_factory=dict)

    def error(self, role: str, value: Tensor) -> float:
        """The share of the outputs' energy that value f32[out, in] loses on the judged tokens."""
        weight, hessian = self.weights[role], self.hessian[role]
        lost, energy = ((part @ hessian * part).sum(dtype=torch.float64) for part in (value - weight, weight))
        return float(lost / energy)

    def block_error(self, block: str, values: Weights) -> float:
        """The same of a block's output, all its matrices replaced."""
        x = self.judged[BLOCKS[block][0]]
        exact, found = (getattr(self, block)(weights, x) for weights in (self.weights, values))
        return float((found - exact).square().sum() / exact.square().sum())

    def attention(self, weights: Weights, x: Tensor) -> Tensor:
        """f32[tokens, H] of sequences laid end to end."""
        a, ops = self.architecture, TorchOps()
        assert a.rope is not None
        states, positions = x.view(-1, LENGTH, x.shape[-1]), torch.arange(LENGTH)
        heads = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
        q, k, v = (ops.split_heads(states @ weights[role].T, count) for role, count in heads.items())
        q, k = (ops.rope(part, positions, a.rope) for part in (q, k))
        mixed = ops.attention(0, q, k, v, positions=positions, scale=a.attention_scale, window=None)
        return (ops.merge_heads(mixed) @ weights["o"].T).view(len(x), -1)

    def mlp(self, weights: Weights, x: Tensor) -> Tensor:
        return gated(x, weights["gate"], weights["up"], self.architecture.activation) @ weights["down"].T


# ── AutoAWQ ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def min_max(weight: Tensor) -> Tensor:
    """Each group rounded to 16 levels from its smallest to its largest weight, with an integer zero point."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-torch.round(low / scale)).clamp(0, 15)
    return (((groups / scale).round() + zero).clamp(0, 15).sub(zero) * scale).view(weight.shape)


def awq_scales(weights: Sequence[Tensor], x: Tensor, output: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """f32[in]: the scales under which `output` of the rounded weights is nearest to that of the weights."""
    stacked = torch.cat(list(weights))
    shares = stacked.view(-1, GROUP).abs()
    w = (shares / (shares.amax(1, keepdim=True) + 1e-6)).view(stacked.shape).mean(0)
    x_mean, exact = x.abs().mean(0), output(weights)
    best, least = torch.ones_like(x_mean), float("inf")
    for step in range(20):
        scales = (x_mean ** (step / 20) / (w ** (1 - step / 20) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        lost = float((output([min_max(part * scales) / scales for part in weights]) - exact).square().mean())
        if lost < least:
            best, least = scales, lost
    return best


def awq_clip(weight: Tensor, x: Tensor) -> Tensor:
    """The weights, each group cut where its outputs on 512 tokens suffer least from being rounded."""
    tokens = x[:: max(1, len(x) // 512)].view(-1, 1, x.shape[1] // GROUP, GROUP).float()
    parts = []
    for rows in weight.split(64):
        groups = rows.view(1, len(rows), -1, GROUP)
        largest, exact = groups.abs().amax(-1, keepdim=True), (tokens * groups).sum(-1)
        best, least = largest.clone(), torch.full_like(largest, float("inf"))
        for step in range(10):
            limit = largest * (1 - step / 20)
            cut = torch.minimum(torch.maximum(groups, -limit), limit)
            lost = ((tokens * min_max(cut)).sum(-1) - exact).square().mean(0)[None, ..., None]
            best, least = torch.where(lost < least, limit, best), torch.minimum(lost, least)
        parts.append(torch.minimum(torch.maximum(groups, -best), best).view(rows.shape))
    return torch.cat(parts)


def autoawq(layer: Layer) -> Weights:
    """What AutoAWQ makes of the layer, scales divided out again."""
    w, x = layer.weights, layer.inputs
    inspected: dict[tuple[str, ...], Callable[[Sequence[Tensor]], Tensor]] = {
        ("q", "k", "v"): lambda parts: layer.attention({**w, **dict(zip(("q", "k", "v"), parts, strict=True))}, x["q"]),
        ("gate", "up"): lambda parts: layer.mlp({**w, **dict(zip(("gate", "up"), parts, strict=True))}, x["up"]),
        ("down",): lambda parts: x["down"] @ parts[0].T,
    }
    if w["v"].shape == w["o"].shape:
        inspected[("o",)] = lambda parts: x["o"] @ parts[0].T
    scales = {role: torch.ones(w[role].shape[1]) for role in ROLES}
    for roles, output in inspected.items():
        scales |= dict.fromkeys(roles, awq_scales([w[role] for role in roles], x[roles[0]], output))
    found = {}
    for role in ROLES:
        scaled = w[role] * scales[role]
        cut = scaled if role in ("q", "k") else awq_clip(scaled, x[role] / scales[role])
        found[role] = min_max(cut) / scales[role]
    return found


# ── GPTQ ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def gptq_group(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(scale, zero), f32[rows, 1] each: from the smallest to the largest weight, 0 among them."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    scale = (high - low) / 15
    return scale, torch.full_like(scale, 8) if symmetric else torch.round(-low / scale)


def _by_group(diagonal: Tensor) -> Tensor:
    """The groups by their heaviest column, each sorted inside."""
    groups = diagonal.view(-1, GROUP)
    inside, outside = groups.argsort(1, descending=True), groups.amax(1).argsort(descending=True)
    return (outside[:, None] * GROUP + inside[outside]).flatten()


# The order of the columns from the Hessian's diagonal, whether groups are fixed first, and the damping.
VARIANTS: dict[str, tuple[Callable[[Tensor], Tensor], bool, float]] = {
    "desc_act, static groups": (lambda diagonal: diagonal.argsort(descending=True), True, 0.01),
    "in order": (lambda diagonal: torch.arange(len(diagonal)), False, 0.05),
    "act_group_aware": (_by_group, False, 0.05),
}


def published_gptq(weight: Tensor, x: Tensor, symmetric: bool, variant: str) -> Tensor:
    """What GPTQ makes of f32[out, in]."""
    order_of, static, damp = VARIANTS[variant]
    hessian = 2 / len(x) * (x.T @ x)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    w = weight.clone()
    w[:, dead] = 0
    fixed = [gptq_group(part, symmetric) for part in w.split(GROUP, 1)]
    order = order_of(hessian.diagonal())
    w, hessian = w[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rounded_ = torch.empty_like(w)
    for start in range(0, w.shape[1], GROUP):
        block = slice(start, start + GROUP)
        errors = torch.empty_like(w[:, block])
        group = fixed[0] if static else gptq_group(w[:, block], symmetric)
        for j in range(start, start + GROUP):
            scale, zero = fixed[int(order[j]) // GROUP] if static else group
            column = w[:, j : j + 1]
            q = scale * (((column / scale).round() + zero).clamp(0, 15) - zero)
            errors[:, j - start : j - start + 1] = error = (column - q) / upper[j, j]
            w[:, j : block.stop] -= error @ upper[j : j + 1, j : block.stop]
            rounded_[:, j : j + 1] = q
        w[:, block.stop :] -= errors @ upper[block, block.stop :]
    return rounded_[:, order.argsort()]


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def scaled(known: Statistics, columns: Tensor) -> Statistics:
    """The statistics of inputs divided by f32[in]."""

    def divided(part: Moments) -> Moments:
        return replace(part, hessian=part.hessian / columns[:, None] / columns)

    return Statistics(divided(known.fitted), divided(known.held_out), known.squares / columns.square())


def our_awq(role: str, weight: Tensor, known: Statistics, columns: Tensor, name: str, pool: Workers) -> Tensor:
    on, here = grid(name, weight.shape[1]), scaled(known, columns)
    moved = weight * columns
    limits = clip_limits(role, moved, here, on, AwqOptions(effort="balanced"), pool)
    cut = moved if limits is None else clipped(moved, limits)
    importance = here.fitted.hessian.diagonal().numpy()
    return torch.from_numpy(rounded(cut.numpy(), on, None, importance, "balanced")) / columns


def our_gptq(weight: Tensor, known: Statistics, columns: Tensor, name: str, pool: Workers) -> Tensor:
    prepared = Prepared(scaled(known, columns))
    return solve(weight * columns, prepared, grid(name, weight.shape[1]), SolveOptions(), pool).value / columns


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────


class Judge:
    """A calibrate.Solver that leaves everything float and compares all methods once a layer has been seen."""

    def __init__(self, model: Model, layers: set[int], calibration: int, name: str, pool: Workers) -> None:
        self._architecture, self._layers, self._calibration = model.architecture, layers, calibration
        self._name, self._pool = name, pool
        self._layer = Layer(model.architecture)
        self._shared: tuple[str, list[Inputs], Statistics] | None = None
        self._search = self._new_search()
        self.rows: list[dict[str, object]] = []

    def _new_search(self) -> ScaleSearch:
        grids = {
            spec.name: grid(self._name, spec.shape[-1]) for spec in self._architecture.tensors if spec.role in ROLES
        }
        return ScaleSearch(self._architecture, Awq(), grids, self._pool)

    def table(self, weight: Weight) -> None:
        return None

    def matrix(self, weight: Weight, expert: int | None, inputs: MatrixInputs) -> None:
        spec = weight.spec
        if spec.layer not in self._layers:
            return
        if self._shared is None or self._shared[0] != inputs.key:
            gathered = inputs._gather()
            self._shared = inputs.key, gathered, statistics(gathered[: self._calibration], self._pool)
        _, gathered, known = self._shared
        layer, role = self._layer, spec.role
        layer.weights[role], layer.known[role] = torch.from_numpy(weight.read()), known
        layer.inputs[role] = torch.cat([batch.float_ for batch in gathered[: self._calibration]])
        layer.judged[role] = torch.cat([batch.float_ for batch in gathered[self._calibration :]])
        layer.hessian[role] = moments(gathered[self._calibration :], self._pool).hessian
        self._search.matrix(weight, expert, MatrixInputs.known(inputs.key, known, self._pool))
        if role == "down":
            self.rows += self._compare(spec.layer)
            self._layer, self._search = Layer(self._architecture), self._new_search()

    def _compare(self, number: int) -> list[dict[str, object]]:
        layer, symmetric = self._layer, "zp" not in self._name
        found = self._search.found()
        columns = {role: torch.ones(layer.weights[role].shape[1]) for role in ROLES}
        for pair, scales in found.folds.scales.items():
            for consumer in pair.consumers:
                columns[consumer.rpartition(".")[2]] = torch.from_numpy(pair.columns(scales))
        results: dict[str, Weights] = {} if symmetric else {"AutoAWQ": autoawq(layer)}
        results |= {method: {} for method in METHODS[1:]}
        for role in ROLES:
            w, known, plain = layer.weights[role], layer.known[role], torch.ones(layer.weights[role].shape[1])
            variants = [published_gptq(w, layer.inputs[role], symmetric, variant) for variant in VARIANTS]
            results["GPTQ"][role] = min(variants, key=lambda value, role=role: layer.error(role, value))
            results["our GPTQ"][role] = our_gptq(w, known, plain, self._name, self._pool)
            results["our AWQ"][role] = our_awq(role, w, known, columns[role], self._name, self._pool)
            results["our AWQ + GPTQ"][role] = our_gptq(w, known, columns[role], self._name, self._pool)
        rows = []
        for part in (*ROLES, *BLOCKS):
            errors = {
                method: layer.block_error(part, values) if part in BLOCKS else layer.error(part, values[part])
                for method, values in results.items()
            }
            rows.append({"grid": self._name, "layer": number, "part": part, **errors})
            print(_line(rows[-1]), flush=True)
        return rows


def _line(row: dict[str, object]) -> str:
    def of(method: str) -> str:
        return f"{row[method]:12.3e}" if method in row else f"{'-':>12}"

    def ratio(ours: str, theirs: str) -> str:
        return f"{row[ours] / row[theirs]:7.3f}" if theirs in row else f"{'-':>7}"  # type: ignore[operator]

    return (
        f"{row['layer']:>5} {row['part']:9} {of('AutoAWQ')} {of('our AWQ')} {ratio('our AWQ', 'AutoAWQ')}"
        f" {of('GPTQ')} {of('our GPTQ')} {ratio('our GPTQ', 'GPTQ')} {of('our AWQ + GPTQ')}"
    )


def compare(
    model: Model, calibration: Sequence[Batch], judged: Sequence[Batch], layers: set[int], name: str, threads: int
) -> list[dict[str, object]]:
    """A row for each matrix and block of these layers on that grid; each is printed as soon as it is known."""
    with workers(threads) as pool:
        judge = Judge(model, layers, len(calibration), name, pool)
        walk(model, Calibration((*calibration, *judged)), judge, pool)
    return judge.rows


def cut(model: Path, text: Path, tokens: int, vocab: int, every: int) -> tuple[Batch, ...]:
    """The text in sequences of LENGTH tokens, every n-th held out (0: none)."""
    found = sequences(read_calibration(text), model, tokens=tokens, length=LENGTH, vocab=vocab)
    return batches(found, every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--layers", default="0,3,7")
    parser.add_argument("--grids", default="int4-g128-zp,int4-g128-pos")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    model = open_model(options.model)
    vocab = model.architecture.vocab
    calibration = cut(options.model, options.text, options.tokens, vocab, HELD_OUT_EVERY)
    judged = cut(options.model, options.judge, options.tokens // 2, vocab, 0)
    layers = {int(layer) for layer in options.layers.split(",")}
    rows = []
    for name in options.grids.split(","):
        print(
            f"{name}: error on judged tokens\n{'layer':>5} {'part':9} {'AutoAWQ':>12} {'our AWQ':>12} {'ratio':>7}",
            end="",
        )
        print(f" {'GPTQ':>12} {'our GPTQ':>12} {'ratio':>7} {'our AWQ+GPTQ':>12}")
        found = compare(model, calibration, judged, layers, name, options.threads)
        rows += found
        for ours, theirs in (("our AWQ", "AutoAWQ"), ("our GPTQ", "GPTQ")):
            ratios = [row[ours] / row[theirs] for row in found if theirs in row]  # type: ignore[operator]
            if ratios:
                print(
                    f"{ours} / {theirs}: geometric mean {np.exp(np.log(ratios).mean()):.3f}, largest {max(ratios):.3f}"
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
