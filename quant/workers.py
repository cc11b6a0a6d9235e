"""Work spread over threads so that the result never depends on how many there are.

Every item is computed whole by one thread, torch runs single-threaded inside it, and results come back in order:
a sum has the same terms in the same order on 1 thread and on 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of threads, or the caller's own alone. `map` gives results in the order of the items."""

    __slots__ = ("_pool", "threads")

    def __init__(self, threads: int, pool: ThreadPoolExecutor | None) -> None:
        self.threads = threads
        self._pool = pool

    def on(self, device: torch.device | str) -> Workers:
        """Those for work that torch does on that device: all of them on the CPU, and the caller alone on a GPU.

        A GPU is fed in many small steps of Python: two threads wait for each other, and six take longer than one.
        """
        return self if torch.device(device).type == "cpu" else Workers(1, None)

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """work(item) of every item, in their order. An exception of one is raised here."""

        def alone(item: Item) -> Result:
            with torch.inference_mode():  # a thread's own setting
                return work(item)

        return list(map(alone, items) if self._pool is None else self._pool.map(alone, items))


@contextmanager
def workers(threads: int) -> Iterator[Workers]:
    """A pool for the block; torch's own threads are switched off meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield Workers(threads, pool)
    finally:
        torch.set_num_threads(before)


def spans(count: int, step: int) -> list[slice]:
    """Slices of `step` that cover 0 … count: the fixed cut that makes results independent of threads."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
