"""Memory that follows the largest tensor: minutes and gigabytes, so `make test-slow` only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def _bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("large", ROOT / "bench" / "large.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_checkpoint_four_times_as_large_exports_in_the_same_memory(tmp_path: Path) -> None:
    bench = _bench()
    peaks = []
    for size in ("1.1", "4.4"):
        bench.make(size, tmp_path / size)
        peaks.append(bench.export(tmp_path / size, "Q4_K_M", 2, tmp_path / "out.gguf")["peak"])
    assert max(peaks) < 1.15 * min(peaks)
    assert max(peaks) < 1200  # MB
