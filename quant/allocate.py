"""A type for every tensor, so that the losses add up to the least that a byte budget allows.

Multiple-choice knapsack, in two steps:

    loss                    1  Lagrange: each tensor walks down its own convex hull, the steepest step of all tensors
      o                        first, until a step no longer fits; every tensor's next step is then about as good
       ╲ o  above the hull  2  core: the tensors whose last or next step is nearest to that price are decided anew,
        o                      exactly, by all sums of bytes and losses that no other sum beats
          ‾ ─ o
               bytes

Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem (1995).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmx.errors import UsageError

CORE = 32  # tensors decided exactly
SUMS = 1 << 14  # of bytes and losses followed at a time; beyond, the least promising are dropped


@dataclass(frozen=True, slots=True)
class Choice:
    """A type that a tensor may get, what it takes and what it costs: bytes, and loss in nats a token."""

    type: str
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class _Step:
    """A move along one tensor's hull. price: loss saved a byte."""

    price: float
    tensor: int
    place: int  # on the hull, after the step
    nbytes: int


def allocate(tensors: Mapping[str, Sequence[Choice]], budget_bytes: int, fixed_bytes: int = 0) -> dict[str, str]:
    """{tensor: type} of least total loss, in at most `budget_bytes` with the `fixed_bytes` of everything else.

    Tensors that must share a type are one entry with the sums of their bytes and losses. The result does not depend on
    the order of the tensors. It is the best possible for up to 32 tensors unless sums abound; otherwise close to it.
    Raises: UsageError that tells the smallest possible size.
    """
    names = sorted(tensors)
    fronts = [_front(tensors[name]) for name in names]
    smallest = fixed_bytes + sum(front[0].nbytes for front in fronts)
    if smallest > budget_bytes:
        raise UsageError(
            f"the model does not fit into {budget_bytes:,} bytes: with the smallest type for every tensor "
            f"it takes {smallest:,} ({smallest / 1e6:,.1f} MB)",
            fix=f"ask for at least {smallest:,} bytes, or allow smaller types",
        )
    hulls = [_hull(front) for front in fronts]
    steps = sorted(_steps(hulls), key=lambda step: (-step.price, step.tensor, step.place))
    places, price = _descend(steps, len(names), budget_bytes - smallest)
    chosen = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    core = _core(steps, price)
    before = [chosen[number] for number in core]
    room = budget_bytes - fixed_bytes - sum(c.nbytes for c in chosen) + sum(c.nbytes for c in before)
    after = _decide([fronts[number] for number in core], room, price)
    if sum(c.loss for c in after) < sum(c.loss for c in before):
        for number, choice in zip(core, after, strict=True):
            chosen[number] = choice
    return {name: choice.type for name, choice in zip(names, chosen, strict=True)}


def _front(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other beats in both bytes and loss, smallest first."""
    assert choices, "every tensor has a type it may get"
    assert all(c.nbytes >= 0 and math.isfinite(c.loss) for c in choices), "sizes and losses are measured numbers"
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss, c.type)):
        if not front or choice.loss < front[-1].loss:
            front.append(choice)
    return front


def _hull(front: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull: every step saves less loss a byte than the one before."""
    hull: list[Choice] = []
    for choice in front:
        while len(hull) > 1 and _price(hull[-2], hull[-1]) <= _price(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _price(smaller: Choice, larger: Choice) -> float:
    return (smaller.loss - larger.loss) / (larger.nbytes - smaller.nbytes)


def _steps(hulls: Sequence[Sequence[Choice]]) -> list[_Step]:
    return [
        _Step(_price(hull[place - 1], hull[place]), tensor, place, hull[place].nbytes - hull[place - 1].nbytes)
        for tensor, hull in enumerate(hulls)
        for place in range(1, len(hull))
    ]


def _descend(steps: Sequence[_Step], count: int, room: int) -> tuple[list[int], float]:
    """(each tensor's place on its hull, price of the first step that did not fit): the steepest steps that fit."""
    places, stuck, price = [0] * count, set(), 0.0
    for step in steps:
        if step.tensor in stuck or step.nbytes > room:
            price = price if stuck else step.price
            stuck.add(step.tensor)
            continue
        places[step.tensor] = step.place
        room -= step.nbytes
    return places, price


def _core(steps: Sequence[_Step], price: float) -> list[int]:
    """The tensors with a step nearest to the price, by ratio."""

    def distance(step: _Step) -> float:
        return abs(math.log(step.price) - math.log(price)) if step.price > 0 and price > 0 else math.inf

    near = dict.fromkeys(step.tensor for step in sorted(steps, key=distance))
    return sorted(list(near)[:CORE])


def _decide(fronts: Sequence[Sequence[Choice]], room: int, price: float) -> list[Choice]:
    """One choice a tensor, of least loss within room bytes."""
    spare = np.cumsum([0, *(front[0].nbytes for front in reversed(fronts))])[::-1]  # what the tensors after need
    nbytes, loss = np.zeros(1, np.int64), np.zeros(1)
    taken: list[tuple[np.ndarray, np.ndarray]] = []
    for number, front in enumerate(fronts):
        size = np.array([choice.nbytes for choice in front], np.int64)
        lost = np.array([choice.loss for choice in front])
        total, cost = (nbytes[:, None] + size).reshape(-1), (loss[:, None] + lost).reshape(-1)
        kept = _undominated(total, cost, room - int(spare[number + 1]), price)
        taken.append((kept // len(front), kept % len(front)))
        nbytes, loss = total[kept], cost[kept]
    at = int(np.argmin(loss))
    chosen: list[Choice] = []
    for front, (before, which) in zip(reversed(fronts), reversed(taken), strict=True):
        chosen.append(front[which[at]])
        at = int(before[at])
    return chosen[::-1]


def _undominated(nbytes: np.ndarray, loss: np.ndarray, room: int, price: float) -> np.ndarray:
    """i64[kept]: the sums within room that no other beats in both, at most SUMS: those cheapest at this price."""
    order = np.lexsort((loss, nbytes))
    order = order[nbytes[order] <= room]
    best = np.minimum.accumulate(loss[order])
    order = order[np.concatenate(([True], best[1:] < best[:-1]))]
    if len(order) > SUMS:
        reduced = loss[order] + price * nbytes[order]
        order = order[np.sort(np.argsort(reduced, kind="stable")[:SUMS])]
    return order
