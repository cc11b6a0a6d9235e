"""What 2:4 sparsity is worth on this GPU: torch's semi-structured products and TensorRT's sparse flag against dense.

    python bench/sparse_speed.py [--size 1.1] [--tokens 1,8,16,64,256,1024,4096] [--json rows.json]
        [--engines DENSE SPARSE --prompt 512]

Products of the projections of a llama (bench/large.py's shapes) with that many tokens, float16 and int8, each way the
fastest of its kernels: dense and sparse weights hold the same values, two of every four zero. A ratio above 1 means
that sparse is faster. With --engines two engines of one checkpoint, without and with --sparsity 2:4, run in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from large import SHAPES
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

VOCABULARY = 32000
CALLS = 20  # in one replayed graph: a launch costs as much as a small product
REPEATS = 15
Work = Callable[[], torch.Tensor]


@dataclass
class Row:
    """Microseconds of one product by each kernel; why a kernel does not run, where it does not."""

    kind: str
    projection: str
    shape: tuple[int, int]
    tokens: int
    dense: float
    sparse: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.dense / min(self.sparse.values()) if self.sparse else float("nan")

    def told(self) -> str:
        others = ", ".join(f"{name} {spent:.1f}" for name, spent in self.sparse.items())
        wrong = "".join(f"; {name}: {why}" for name, why in self.failed.items())
        size = "x".join(map(str, self.shape))
        return (
            f"{self.kind} {self.projection:8} {size:>11} {self.tokens:5} tokens: dense {self.dense:8.1f} us, "
            f"{others}, ratio {self.ratio:.2f}{wrong}"
        )


def projections(size: str) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of a llama's projections, joined as a server would join them."""
    hidden, intermediate, _, heads, grouped = SHAPES[size]
    wide = (heads + 2 * grouped) * (hidden // heads)
    return {
        "qkv": (wide, hidden),
        "o": (hidden, hidden),
        "gate, up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (VOCABULARY, hidden),
    }


def pruned(out: int, inner: int) -> torch.Tensor:
    """f16[out, in] of normal values, the two smaller of every four zero."""
    values = torch.randn(out, inner // 4, 4, device="cuda", dtype=torch.half) * 0.02
    kept = values.abs().topk(2, -1).indices
    mask = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, kept, True)
    return (values * mask).view(out, inner)


def microseconds(work: Work) -> float:
    """The median time of one call, many of them replayed as a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def sparse_half(weight: torch.Tensor, x: torch.Tensor, cutlass: bool) -> Work:
    SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass  # how torch lets one choose the kernels
    packed = to_sparse_semi_structured(weight)
    return lambda: torch.nn.functional.linear(x, packed)


def sparse_int8(weight: torch.Tensor, x: torch.Tensor, cutlass: bool) -> Work:
    """Sums in int32; torch's own operator would cut them to int8."""
    SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass
    packed: Any = to_sparse_semi_structured(weight)
    across, wide = x.t(), torch.int32
    if cutlass:
        return lambda: torch.ops.aten._sparse_semi_structured_mm(packed.packed, packed.meta, across, out_dtype=wide)
    return lambda: torch.ops.aten._cslt_sparse_mm(packed.packed, across, out_dtype=wide)


def whole_numbers(weight: torch.Tensor) -> torch.Tensor:
    return (weight / weight.abs().amax() * 127).round().to(torch.int8)


def half(weight: torch.Tensor, tokens: int) -> tuple[Work, Callable[[bool], Work], Work]:
    """(dense, sparse by its kernels, the exact result) of a float16 product."""
    x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=torch.half)

    def exact() -> torch.Tensor:
        return x.float() @ weight.float().t()

    return (lambda: torch.nn.functional.linear(x, weight)), (lambda cutlass: sparse_half(weight, x, cutlass)), exact


def int8(weight: torch.Tensor, tokens: int) -> tuple[Work, Callable[[bool], Work], Work]:
    codes = whole_numbers(weight)
    # torch's dense product of int8 takes more than 16 rows: fewer are padded, as a server would have to.
    x = torch.randint(-127, 128, (max(tokens, 32), weight.shape[1]), device="cuda", dtype=torch.int8)

    def exact() -> torch.Tensor:
        return codes.double() @ x.double().t()

    return (lambda: torch.ops.aten._int_mm(x, codes.t())), (lambda cutlass: sparse_int8(codes, x, cutlass)), exact


KINDS = {"f16": half, "int8": int8}
KERNELS = {"cusparselt": False, "cutlass": True}
TOLERANCE = 2e-2


def rows(size: str, counts: list[int]) -> Iterator[Row]:
    for kind, made in KINDS.items():
        for name, shape in projections(size).items():
            weight = pruned(*shape)
            for tokens in counts:
                dense, sparse, exact = made(weight, tokens)
                row = Row(kind, name, shape, tokens, microseconds(dense))
                for kernel, cutlass in KERNELS.items():
                    try:
                        work = sparse(cutlass)
                        row.sparse[kernel] = microseconds(work)
                        found, expected = work().float(), exact().float()
                    except (RuntimeError, NotImplementedError, ValueError) as error:
                        row.failed[kernel] = str(error).splitlines()[0][:120]
                        row.sparse.pop(kernel, None)
                        continue
                    error_share = float((found - expected).norm() / expected.norm())
                    if not error_share < TOLERANCE:
                        row.failed[kernel] = f"wrong result, relative error {error_share:.1e}"
                        row.sparse.pop(kernel)
                yield row


def engines(paths: list[Path], prompt: int, context: int) -> Iterator[str]:
    """Dense and sparse engines in turns: prefill and decode, and the ratios."""
    from llmx.validate.runtimes import find_runtime

    runtime = find_runtime("tensorrt")
    best = [[0.0, 0.0] for _ in paths]
    with (
        runtime.open(paths[0], threads=1, context=context) as dense,
        runtime.open(paths[1], threads=1, context=context) as sparse,
    ):
        for _ in range(3):
            for number, session in enumerate((dense, sparse)):
                speed = session.speed(prompt, 64)
                found = (speed.prefill_tokens_per_second, speed.decode_tokens_per_second)
                best[number] = [max(a, b) for a, b in zip(best[number], found, strict=True)]
    for place, name in enumerate((f"prefill of {prompt}", "decode")):
        a, b = best[0][place], best[1][place]
        yield f"engines, {name}: dense {a:.0f} tokens/s, 2:4 {b:.0f} tokens/s, ratio {b / a:.3f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1", choices=SHAPES)
    parser.add_argument("--tokens", default="1,8,16,64,256,1024,4096")
    parser.add_argument("--engines", type=Path, nargs=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing to measure")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    found = []
    for row in rows(asked.size, [int(count) for count in asked.tokens.split(",")]):
        print(row.told(), flush=True)
        found.append({**asdict(row), "ratio": row.ratio})
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    if asked.engines:
        for line in engines(asked.engines, asked.prompt, asked.context):
            print(line, flush=True)


if __name__ == "__main__":
    main()
