"""The loops on a GPU do what the CPU's do, on every grid. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmx.api import ExportRequest, export
from llmx.quant import columns
from llmx.quant.columns import BLOCK, descend_block, gptq_block, move_block, moved_together
from llmx.quant.gptq import damped, factorize, gptq
from llmx.quant.grid import GRIDS, grid
from llmx.quant.pruning import prune
from llmx.quant.refine import Descent, refine
from llmx.quant.solve import EFFORTS, Prepared, solve
from llmx.quant.sparsity import crowded, find_pattern
from llmx.quant.state import Rows
from llmx.quant.statistics import Inputs, Statistics, statistics
from llmx.quant.workers import workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, COLS, TOKENS = 72, 512, 2000
NAMES = (
    *GRIDS,
    "nvfp4",
    "fp8-channel-float32",
    "fp8-tensor-float32",
    "int4-g128-zp",
    "int4-g32-sym",
    "int8-channel-pos",
)
OTHER_ROUNDING = 0.05  # of the rows may differ: one weight half-way between two levels is enough


def inputs(held_out: bool, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLS, COLS, generator=torch.Generator().manual_seed(7)) / COLS**0.5
    exact = torch.randn(TOKENS, COLS, generator=random) @ mix
    moved = exact + 0.02 * torch.randn(TOKENS, COLS, generator=random)
    return Inputs(exact, moved, 0.05 * torch.randn(TOKENS, ROWS, generator=random), None, held_out)


def found(device: torch.device) -> Statistics:
    with workers(2) as pool:
        parts = [inputs(False, 1), inputs(False, 2), inputs(True, 3)]
        assert all(part.residual is not None for part in parts)
        moved = [
            Inputs(p.float_.to(device), p.quantized.to(device), p.residual.to(device), None, p.held_out)  # type: ignore
            for p in parts
        ]
        return statistics(moved, pool)


def weights() -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(5)) * 0.02


def start(name: str, device: torch.device) -> Rows:
    values = weights().numpy()
    own = grid(name, COLS).bound(values)
    scales = own.fit(values)
    rows = Rows(own, scales, ROWS, device)
    rows.set_codes(own.round(values, scales))
    return rows


def same_rows(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of rows (the second axis) that are equal in every column."""
    return float((a.cpu() == b.cpu()).all(0).float().mean())


@pytest.fixture(params=["Triton", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setattr(columns, "triton_kernels", lambda: None)
    else:
        assert columns.triton_kernels() is not None
    yield request.param


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_solved_as_on_the_cpu(name: str, engine: str) -> None:
    hessian = damped(found(CPU).fitted.hessian, 0.03)
    factor = factorize(hessian)
    assert factor is not None
    block = slice(0, 96)  # no power of two
    results = {}
    for device in (CPU, CUDA):
        rows = start(name, device)
        scale, offset = (part[block] for part in rows.columns())
        target = weights().T[block].contiguous().to(device)
        upper = factor.upper[block, block].contiguous().to(device)
        level, error = gptq_block(target.clone(), upper, scale, offset, rows.levels)
        value = scale * level + offset
        own = hessian[block, block].contiguous().to(device)
        change = descend_block(
            value, own @ (value - target), own, scale, offset, rows.levels, descended := level.clone()
        )
        results[device.type] = [part.cpu() for part in (level, error, descended, value, change)]
    level, error, descended, value, change = results["cuda"]
    assert torch.isfinite(torch.stack([error, value, change])).all()
    assert same_rows(level, results["cpu"][0]) >= 1 - OTHER_ROUNDING
    assert same_rows(descended, results["cpu"][2]) >= 1 - OTHER_ROUNDING
    equal = (level == results["cpu"][0]).all(0) & (descended == results["cpu"][2]).all(0)
    for got, wanted in zip((error, value, change), (results["cpu"][1], *results["cpu"][3:]), strict=True):
        assert float((got - wanted)[:, equal].norm() / wanted[:, equal].norm().clamp_min(1e-20)) < 1e-4


def best_steps(
    level: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, ds: torch.Tensor, do: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `move_block` returns, by float64 loops over sub-blocks and steps."""
    level, gradient, hessian, ds, do = (part.double() for part in (level, gradient, hessian, ds, do))
    size = len(level) // ds.shape[1]
    chosen, change = torch.zeros(ds.shape[1:], dtype=torch.uint8), torch.zeros_like(level)
    for sub in range(ds.shape[1]):
        own = slice(sub * size, (sub + 1) * size)
        slope = gradient[own] + hessian[own] @ change
        best = torch.zeros(level.shape[1], dtype=torch.float64)
        for step in range(len(ds)):
            moved = level[own] * ds[step, sub] + do[step, sub]
            gain = (moved * (hessian[own, own] @ moved)).sum(0) + 2 * (moved * slope).sum(0)
            better = gain < best
            best = torch.where(better, gain, best)
            chosen[sub] = torch.where(better, step + 1, chosen[sub])
            change[own] = torch.where(better, moved, change[own])
    return chosen, change


@pytest.mark.parametrize(("size", "steps", "width"), [(16, 2, BLOCK), (32, 8, BLOCK), (32, 4, 96), (16, 8, 80)])
def test_scales_take_the_best_step(size: int, steps: int, width: int) -> None:
    random = torch.Generator().manual_seed(size + width)
    hessian = damped(found(CPU).fitted.hessian / TOKENS, 0.03)[:width, :width]
    level = torch.randint(0, 16, (width, ROWS), generator=random).float()
    gradient = torch.randn(width, ROWS, generator=random) * 0.3
    ds, do = (torch.randn(steps, 2 * (width // size), ROWS, generator=random) * 0.01 for _ in range(2))
    given = [level, gradient, hessian, ds[:, width // size :], do[:, width // size :]]
    assert moved_together(size, CUDA) == BLOCK
    chosen, change = (part.cpu() for part in move_block(*(part.to(CUDA) for part in given)))
    wanted, wanted_change = best_steps(*given)
    assert len(wanted.unique()) > 2
    assert same_rows(chosen, wanted) >= 1 - OTHER_ROUNDING
    equal = (chosen == wanted).all(0)
    assert float((change - wanted_change)[:, equal].norm() / wanted_change[:, equal].norm()) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_scales_and_their_neighbours_are_expanded_as_the_grid_does(name: str) -> None:
    on_cpu, on_gpu = start(name, CPU), start(name, CUDA)
    moves = (on_cpu.scales, *on_cpu.grid.neighbours(on_cpu.scales))
    for wanted, got in zip(on_cpu.subs(*moves), on_gpu.subs(*moves), strict=True):
        assert all(torch.equal(one, other.cpu()) for one, other in zip(wanted, got, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_what_multiplies_the_super_scales_are_those_of_the_grid(name: str) -> None:
    on_cpu, on_gpu = start(name, CPU), start(name, CUDA)
    assert np.array_equal(on_cpu.codes(), on_gpu.codes())
    for wanted, got in zip(on_cpu.basis(), on_gpu.basis(), strict=True):
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            assert torch.allclose(got.cpu(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_descent_lowers_the_loss_step_by_step_and_knows_its_gradient(name: str, engine: str) -> None:
    known = found(CUDA)
    hessian = damped(known.fitted.hessian, 0.03)
    descent = Descent(start(name, CUDA), weights().T.contiguous().to(CUDA), hessian)

    def loss() -> float:
        return float(((descent.value - descent.target) * (hessian @ (descent.value - descent.target))).sum())

    last = loss()
    for step in (descent.sweep_codes, descent.move_scales, descent.refit_supers, descent.sweep_codes):
        step()
        true = hessian @ (descent.value - descent.target)
        assert float((descent.gradient - true).norm() / true.norm()) < 1e-4
        assert loss() <= last * (1 + 1e-5)
        last = loss()


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_is_solved_as_well_as_on_the_cpu(name: str) -> None:
    solutions = {}
    for device in (CPU, CUDA):
        with workers(2) as pool:
            prepared, wanted = Prepared(found(device)), weights().to(device)
            solutions[device.type] = solve(wanted, prepared, grid(name, COLS), EFFORTS["balanced"], pool)
    got, wanted = solutions["cuda"], solutions["cpu"]
    assert got.share == wanted.share
    assert got.held_out <= wanted.held_out + 0.02 * abs(wanted.held_out)
    decoded = grid(name, COLS).decode(got.scales, got.codes).reshape(ROWS, COLS)
    assert np.allclose(decoded, got.value.cpu().numpy(), atol=1e-6)


def test_many_blocks_of_many_rows_are_solved_as_well() -> None:
    known = found(CUDA)
    hessian = damped(known.fitted.hessian, 0.03)
    factor = factorize(hessian)
    assert factor is not None
    assert COLS > 2 * BLOCK
    target = weights().T.contiguous().to(CUDA)
    losses = []
    for solver in (lambda rows: None, lambda rows: gptq(target, factor, rows), lambda r: refine(r, target, hessian, 2)):
        rows = start("Q4_K", CUDA)
        solver(rows)
        error = rows.value() - target
        losses.append(float((error * (hessian @ error)).sum()))
    assert losses[1] < losses[0]
    assert losses[2] < losses[0]


def test_a_model_is_exported_as_well_as_on_the_cpu(tmp_path: Path) -> None:
    lost = {}
    for device in ("cpu", "cuda"):
        made = export(
            ExportRequest(
                str(ROOT / "examples" / "tiny-qwen3"), type_name="Q4_K_M", method="gptq", calibration_tokens=8192,
                device=device, output=tmp_path / f"{device}.gguf", validate=False,
            )
        )  # fmt: skip
        lost[device] = np.array([line["error_held_out"] for line in made.solved if line["error_held_out"] is not None])
    assert len(lost["cuda"]) > 20
    assert lost["cuda"].mean() <= lost["cpu"].mean() * 1.02


@pytest.mark.parametrize("name", ["2:4", "50%"])
def test_a_gpu_makes_as_many_zeros_and_loses_as_little(name: str) -> None:
    pattern, options = find_pattern(name), EFFORTS["fast"]
    lost, allowed = {}, 0 if pattern.group else ROWS * COLS // 2
    for device in (CPU, CUDA):
        weight = weights().to(device)
        prepared = Prepared(found(device))
        with workers(1) as pool:
            pruned = prune(weight, prepared, pattern, "sparsegpt", options, pool)
            rounded = solve(weight, prepared, grid("Q4_0", COLS), options, pool, pruned=pruned)
        assert crowded(pruned.value.cpu().numpy(), pattern) <= allowed
        assert not rounded.value[~pruned.kept].any()
        lost[device.type] = pruned.held_out, rounded.held_out
    assert lost["cuda"] == pytest.approx(lost["cpu"], rel=0.05, abs=1e-3)
