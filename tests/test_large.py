"""Memory that follows the largest tensor: minutes and gigabytes, so `make test-slow` only."""

from __future__ import annotations

from pathlib import Path

import large
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_checkpoint_four_times_as_large_exports_in_the_same_memory(tmp_path: Path) -> None:
    peaks = []
    for size in ("1.1", "4.4"):
        large.make(size, tmp_path / size)
        peaks.append(large.export(tmp_path / size, "Q4_K_M", 2, tmp_path / "out.gguf", *large.ROUNDING).peak)
    assert max(peaks) < 1.15 * min(peaks)
    assert max(peaks) < 1200  # MB
