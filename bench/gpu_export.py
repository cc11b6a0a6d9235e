"""Where the time of a calibrated export goes on a GPU, phase by phase.

    python bench/gpu_export.py [--size 1.1 | --model FOLDER] [--type Q4_K_M] [--device cuda] [--tokens 24576]
        [--calibration FILE] [--output FILE] [--keep FOLDER] [--serial]

The model is a random llama checkpoint of bench/large.py, its norms made ones, unless a folder is given. Its weights
are no model's: their file proves speed, finite values and losses below those of rounding, and nothing else. Caches of
compiled kernels are filled by a model too small to count. A phase is the time that the main thread spends in it and in
no phase inside it. Without --serial a phase may only queue work that a later one waits for; with it each waits for its
own, and the whole takes a little longer.
"""

from __future__ import annotations

import argparse
import functools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from large import WARM_UP, make

from llmx.api import ExportRequest, ExportResult, export
from llmx.exporters import artifact, gguf, solving
from llmx.formats.safetensors import open_safetensors
from llmx.models.model import Weight
from llmx.quant import inputs, refine, solve
from llmx.quant.state import Rows

ONE = b"\x80\x3f"  # in bfloat16
# (what holds it, its name) -> the phase
PHASES: dict[tuple[Any, str], str] = {
    (gguf, "prepare"): "plan",
    (gguf, "check_weights"): "check every weight",
    (Weight, "read"): "read weights",
    (inputs.Value, "keep"): "forward passes",
    (inputs, "statistics"): "second moments",
    (solve, "target"): "target, damping",
    (solve, "factorize"): "factor",
    (solve, "_starts"): "fit scales (CPU)",
    (solve, "gptq"): "GPTQ",
    (refine.Descent, "sweep_codes"): "descend codes",
    (refine.Descent, "move_scales"): "move scales",
    (refine.Descent, "refit_supers"): "refit super-scales",
    (solve, "loss"): "judge",
    (Rows, "codes"): "codes to the CPU",
    (solving, "pack"): "pack (CPU)",
    (solve, "solve"): "solver, the rest",
    (solving, "decode"): "decode the table (CPU)",
    (solving, "walk"): "walk, the rest",
    (gguf, "write"): "write the file",
    (artifact, "file_sha256"): "sha256 of the file",
}


class Clock:
    """Seconds of each phase in the main thread. serial: the GPU is waited for wherever a phase begins or ends."""

    def __init__(self, serial: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._serial = serial
        self._running: list[str] = []
        self._since = time.perf_counter()

    def timed(self, work: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*given: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return work(*given, **named)
            self._switch()
            self._running.append(phase)
            self.calls[phase] += 1
            try:
                return work(*given, **named)
            finally:
                self._switch()
                self._running.pop()

        return run

    def _switch(self) -> None:
        if self._serial and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._running[-1] if self._running else "the rest"] += now - self._since
        self._since = now

    def install(self) -> None:
        for (holder, name), phase in PHASES.items():
            setattr(holder, name, self.timed(getattr(holder, name), phase))
        solving.solve = solve.solve
        self._since = time.perf_counter()

    def table(self, total: float) -> list[str]:
        rest = total - sum(self.seconds.values())
        self.seconds["the rest"] += rest
        order = sorted(self.seconds.items(), key=lambda item: -item[1])
        return [f"{phase:24} {spent:8.2f} {100 * spent / total:6.1f} % {self.calls[phase]:8}" for phase, spent in order]


def checkpoint(size: str, folder: Path) -> Path:
    """A checkpoint of that size whose norms are ones: random gains near zero would leave the layers next to nothing."""
    make(size, folder)
    for path in folder.glob("*.safetensors"):
        norms = [t for name, t in open_safetensors(path).tensors.items() if name.endswith("norm.weight")]
        with path.open("r+b") as file:
            for tensor in norms:
                file.seek(tensor.offset)
                file.write(ONE * (tensor.nbytes // len(ONE)))
    return folder


def exported(model: Path, options: argparse.Namespace, target: Path, tokens: int) -> ExportResult:
    return export(
        ExportRequest(
            str(model), type_name=options.type, method=options.method, effort=options.effort, device=options.device,
            calibration=options.calibration, calibration_tokens=tokens, output=target, threads=options.threads,
            validate=False, force=True,
        )
    )  # fmt: skip


def machine() -> str:
    import os
    import platform

    from llmx.quant.columns import triton_kernels

    card = "no GPU"
    if torch.cuda.is_available():
        engine = "Triton" if triton_kernels() is not None else "torch"
        card = f"{torch.cuda.get_device_name()}, {engine} kernels"
    precision = torch.get_float32_matmul_precision()
    return (
        f"{card}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"float32 products at {precision!r} precision"
    )


def judged(result: ExportResult) -> str:
    """How the solver's choices did on held-out tokens."""
    lines = [line for line in result.solved if line["error_held_out"] is not None]
    lost, rounding = (sum(line[key] for line in lines) / len(lines) for key in ("error_held_out", "error_of_rounding"))
    kinds = {method: sum(line["method"] == method for line in lines) for method in ("gptq", "rtn", "refined")}
    told = ", ".join(f"{count} {method}" for method, count in kinds.items() if count)
    return f"{told}; mean held-out loss {lost:.5f}, of rounding {rounding:.5f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1", help="of bench/large.py, in billions of weights")
    parser.add_argument("--model", type=Path, help="a checkpoint folder in place of the random one")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--effort", help="fast, balanced or best")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("/tmp/gpu-export"), help="folder of checkpoints and files")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serial", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    started = time.perf_counter()
    print(machine())
    small = checkpoint(WARM_UP, options.keep / WARM_UP)
    exported(small, options, options.keep / "warm-up.gguf", 4096)
    print(f"warm-up, kernels compiled: {time.perf_counter() - started:.1f} s", flush=True)
    model = options.model or checkpoint(options.size, options.keep / options.size)
    target = options.output or options.keep / "out.gguf"
    clock = Clock(options.serial)
    clock.install()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = exported(model, options, target, options.tokens)
    total = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(f"{model.name}, {options.type}, {options.method}, {options.tokens} tokens, {options.device}: {total:.1f} s")
    print(f"peaks: {result.peak_rss_bytes / 2**30:.2f} GiB of main memory, {peak:.2f} GiB of the GPU's")
    print(judged(result))
    print(f"{'phase':24} {'seconds':>8} {'share':>8} {'calls':>8}")
    print("\n".join(clock.table(total)))
    target.with_suffix(".solved.json").write_text(json.dumps(result.solved, indent=1))


if __name__ == "__main__":
    main()
