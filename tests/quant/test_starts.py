"""The bench that orders starts: greedy, so each start can only lower what the earlier ones left."""

from __future__ import annotations

import itertools
from dataclasses import replace

import starts

from llmx.quant.searches import GROUP_SEARCHES, SEARCHES


def test_each_start_lowers_the_least_error_and_none_is_taken_twice() -> None:
    for name in ("Q3_K", "int8-sym"):
        job = replace(starts.JOBS[name], sizes=((32, 1024),))
        found, ratios = starts.chosen(job, 6)
        assert len(set(found)) == 6
        assert all(later <= earlier for earlier, later in itertools.pairwise(ratios))
        assert ratios[-1] >= 1


def test_presets_try_more_and_more_of_the_same_starts() -> None:
    for searches in (*SEARCHES.values(), *GROUP_SEARCHES.values()):
        fast, balanced, best = (searches[effort] for effort in ("fast", "balanced", "best"))
        assert balanced.starts[: len(fast.starts)] == fast.starts
        assert best.starts[: len(balanced.starts)] == balanced.starts
        assert len(fast.starts) < len(balanced.starts) < len(best.starts)
        assert len(set(best.starts)) == len(best.starts)
        assert fast.loops <= balanced.loops <= best.loops
