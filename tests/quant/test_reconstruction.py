"""The bench of AWQ and GPTQ against their published procedures, on one layer of a small trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import reconstruction as bench

from llmx.models.model import open_model

SHARED = Path(__file__).parents[3] / "shared"
MODEL, TEXT = SHARED / "models" / "tiny-llama3rope", SHARED / "text"


def test_no_matrix_is_reconstructed_worse_than_by_the_published_procedures() -> None:
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"{MODEL} is not here")
    model = open_model(MODEL)
    calibration = bench.cut(MODEL, TEXT / "stories.calib.txt", 3072, model.architecture.vocab, 4)
    judged = bench.cut(MODEL, TEXT / "stories.eval.txt", 2048, model.architecture.vocab, 0)
    rows = bench.compare(model, calibration, judged, {1}, "int4-g128-zp", threads=1)
    assert [row["part"] for row in rows] == [*bench.ROLES, *bench.BLOCKS]
    for row in rows:
        assert row["our GPTQ"] < row["GPTQ"]
        assert row["our AWQ + GPTQ"] < row["AutoAWQ"]
        # AutoAWQ judges scales by the whole attention's output, ours by each matrix's.
        assert row["our AWQ"] < row["AutoAWQ"] or row["part"] == "attention"
