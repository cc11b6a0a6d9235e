"""Attention over a cache, in the operators of each dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from llmx.exporters.onnx_rope import is_static
from llmx.exporters.onnx_run import Run
from llmx.formats.onnx import VENDOR_DOMAIN
from llmx.models.architecture import Rope

TURNED_MULTIPLE = 16  # GroupQueryAttention turns only a multiple of so many elements of a head


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys or values, float[B, T, heads · D]; rope: how they are still to be turned."""

    value: ir.Value
    count: int
    rope: Rope | None = None


class Attend(Protocol):
    """A dialect's attention."""

    def __call__(
        self, run: Run, layer: int, heads: Sequence[Heads], *, scale: float, window: int | None
    ) -> Sequence[ir.Value]:
        """(float[B, T, heads · D], the present keys, the present values) of queries, keys and values."""
        ...


def attend(run: Run, layer: int, heads: Sequence[Heads], *, scale: float, window: int | None) -> Sequence[ir.Value]:
    """ONNX's Attention. The mask is written out: what is causal over a cache, runtimes read in two ways."""
    q, k, v = (turned(run, one) for one in heads)
    return run.graph.outputs(
        3,
        "Attention",
        *(q, k, v, run.seen(window), *run.cached(layer)),
        q_num_heads=heads[0].count,
        kv_num_heads=heads[1].count,
        scale=scale,
    )


def attend_grouped(
    run: Run, layer: int, heads: Sequence[Heads], *, scale: float, window: int | None
) -> Sequence[ir.Value]:
    """onnxruntime's GroupQueryAttention, which turns queries and keys itself where it can."""
    rope = heads[0].rope
    inside = rope is not None and turns_inside(rope)
    if inside or rope is None:
        q, k, v = _packed([one.value for one in heads])
    else:
        q, k, v = (turned(run, one) for one in heads)
    tables = run.tables(rope) if rope is not None and inside else ()
    return run.graph.outputs(
        3,
        "GroupQueryAttention",
        *(q, k, v, *run.cached(layer), run.last_seen, run.total_i32, *tables),
        domain=VENDOR_DOMAIN,
        num_heads=heads[0].count,
        kv_num_heads=heads[1].count,
        scale=scale,
        local_window_size=-1 if window is None else window,
        do_rotary=int(inside),
    )


def _packed(values: Sequence[ir.Value]) -> Sequence[ir.Value | None]:
    """What they were split from, in the place of all three, where that is what they are."""
    split = values[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(values):
        return values
    return split.inputs[0], None, None


def turns_inside(rope: Rope) -> bool:
    """Whether GroupQueryAttention can turn heads so."""
    return is_static(rope) and rope.dim % TURNED_MULTIPLE == 0


def turned(run: Run, heads: Heads) -> ir.Value:
    """float[B, T, heads · D], turned by ONNX's RotaryEmbedding."""
    if heads.rope is None:
        return heads.value
    whole = heads.rope.dim == run.architecture.head_dim
    return run.graph.node(
        "RotaryEmbedding",
        heads.value,
        *run.angles(heads.rope),
        num_heads=heads.count,
        rotary_embedding_dim=None if whole else heads.rope.dim,
    )
