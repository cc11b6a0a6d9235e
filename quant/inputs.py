"""What flows through the calibration pass, and what a solver may ask about the inputs of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llmx.quant.statistics import Inputs, Later, Statistics, statistics, sum_of_squares
from llmx.quant.workers import Workers

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]  # float, quantized: the same object where nothing has been quantized yet
BATCH_TOKENS = 2048  # one worker's share; fixed, because the order of the sums depends on it


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of equal length. tokens: i64[sequences, length]. held_out: to judge on, not to fit on."""

    tokens: Tensor
    held_out: bool


def batches(sequences: Sequence[Sequence[int]], held_out_every: int, device: str = "cpu") -> tuple[Batch, ...]:
    """The sequences in batches of about BATCH_TOKENS; every n-th sequence is held out (0: none).

    Of fewer than n, but more than one, the last is. With one sequence the judge sees what was fitted.
    """
    size = max(1, BATCH_TOKENS // len(sequences[0]))
    every = min(held_out_every, len(sequences)) if len(sequences) > 1 else 0
    judged = [s for n, s in enumerate(sequences) if every and n % every == every - 1]
    fitted = [s for n, s in enumerate(sequences) if not every or n % every != every - 1]
    return tuple(
        Batch(torch.tensor(part[start : start + size], device=device), held_out)
        for part, held_out in ((fitted, False), (judged, True))
        for start in range(0, len(part), size)
    )


class StatisticsStore(Protocol):
    """Keeps statistics between runs. complete: an earlier run kept those of every matrix."""

    @property
    def complete(self) -> bool: ...

    def load(self, key: str) -> Statistics | None: ...

    def save(self, key: str, found: Statistics) -> None: ...


class Shelf(Protocol):
    """Keeps values elsewhere than in memory until the last who may ask for them is gone."""

    def put(self, value: Pair) -> Callable[[], Pair]:
        """Returns what gives the value again, bit by bit, and one tensor twice where it was. From any thread."""
        ...


class MatrixInputs:
    """The inputs of one or more matrices. key: the first matrix with them, "layers.3.q"; an expert's has its number.

    gather: what they are solved on. reached: the inputs themselves, where that is not the same (a pooled expert).
    """

    __slots__ = ("_found", "_gather", "_pooled", "_reached", "_squares", "_store", "_workers", "key")

    def __init__(
        self,
        key: str,
        gather: Callable[[], Sequence[Inputs]],
        store: StatisticsStore | None,
        workers: Workers,
        *,
        pooled: bool = False,
        reached: Callable[[], Sequence[Inputs]] | None = None,
    ) -> None:
        self.key, self._pooled = key, pooled
        self._gather, self._store, self._workers = gather, store, workers
        self._reached = reached or gather
        self._found: Statistics | None = None
        self._squares: tuple[Tensor, int] | None = None

    @classmethod
    def known(cls, key: str, found: Statistics, workers: Workers) -> MatrixInputs:
        """Inputs of which only the statistics are left."""
        made = cls(key, list, None, workers)
        made._found = found
        return made

    def batches(self) -> Sequence[Inputs]:
        """The inputs themselves; none any more once the statistics have been asked for."""
        return self._gather()

    def statistics(self) -> Statistics:
        """All second moments: gathered at the first call, or read where an earlier run kept them."""
        if self._found is None:
            self._found = self._store.load(self.key) if self._store is not None else None
        if self._found is None:
            self._found = statistics(self._gather(), self._workers, pooled=self._pooled)
            self._gather = self._reached = list  # with them go the activations
            if self._store is not None:
                self._store.save(self.key, self._found)
        return self._found

    def squares(self) -> tuple[Tensor, int]:
        """(f32[in], tokens): the sum over tokens of the float inputs' squares, what an importance matrix holds."""
        if self._found is not None:
            return self._found.squares, self._found.tokens
        if self._squares is None:  # q, k and v ask for the same
            gathered = self._reached()
            tokens = sum(len(batch.float_) for batch in gathered)
            self._squares = sum_of_squares(gathered, self._workers), tokens
        return self._squares


class Value:
    """One tensor of the forward pass, for every batch: computed when asked for, held when `keep` says so."""

    __slots__ = ("__weakref__", "_compute", "_kept", "asked")

    def __init__(self, compute: Callable[[int], Pair]) -> None:
        self._compute: Callable[[int], Pair] | None = compute
        self._kept: list[Callable[[], Pair]] | None = None
        self.asked: MatrixInputs | None = None  # of the matrices that have this input

    def at(self, batch: int) -> Pair:
        if self._kept is not None:
            return self._kept[batch]()
        assert self._compute is not None, "a value is computed or kept"
        return self._compute(batch)

    def keep(self, count: int, workers: Workers, shelf: Shelf | None = None) -> None:
        """Compute every batch now and hold it, on the shelf if there is one; what it was computed from is let go."""
        if self._kept is None:

            def held(batch: int) -> Callable[[], Pair]:
                value = self.at(batch)
                return (lambda: value) if shelf is None else shelf.put(value)

            self._kept = workers.map(held, range(count))
            self._compute = None


def gathered(make: Callable[[int], Inputs], batches: Sequence[Batch], shelf: Shelf | None) -> Sequence[Inputs]:
    """The inputs of every batch: all now, or each when it is asked for, where there is a shelf to get it from."""
    if shelf is None:
        return [make(number) for number in range(len(batches))]
    return Later(make, [batch.held_out for batch in batches])


def flat(values: Tensor) -> Tensor:
    """f32[tokens, n] of f32[sequences, length, n]."""
    return values.reshape(-1, values.shape[-1])
