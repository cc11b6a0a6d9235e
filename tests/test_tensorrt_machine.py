"""bench/tensorrt_machine.py and engine_speed.py: what they compare with is right, and what fails is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import engine_speed
import numpy as np
import pytest
import tensorrt_machine
import torch
from large import SHAPES

SCRIPT = Path(tensorrt_machine.__file__)


def test_equal_logits_have_no_divergence_and_others_have_theirs() -> None:
    theirs = np.array([[0.0, 1.0], [2.0, 0.0]], np.float32)
    equal = tensorrt_machine.compared(theirs, theirs.copy())
    assert (equal["kl"], equal["top1"], equal["largest_difference"]) == (0.0, 1.0, 0.0)
    other = tensorrt_machine.compared(theirs, np.array([[0.0, 1.0], [0.0, 2.0]], np.float32))
    p = np.exp([2.0, 0.0]) / np.exp([2.0, 0.0]).sum()
    assert other["kl_max"] == pytest.approx(float((p * (np.log(p) - np.log(p[::-1]))).sum()))
    assert other["kl"] == pytest.approx(other["kl_max"] / 2)
    assert other["top1"] == 0.5


def test_an_export_that_fails_is_counted_and_its_words_are_kept(tmp_path: Path) -> None:
    words = ["prove", str(tmp_path / "nowhere"), "--types", "F16", "--keep", str(tmp_path / "engines")]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words, "--out", str(tmp_path), "--jobs", "1", "--", "--profiles", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "0 of 1 passed" in done.stdout
    (result,) = json.loads((tmp_path / "prove.json").read_text())
    assert result["exit_code"] != 0
    assert any("nowhere" in line for line in result["problem"])
    assert "--profiles 1" in (tmp_path / "prove.log").read_text()


def test_the_plain_llama_decodes_what_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = engine_speed.random_llama("0.02", tmp_path)
    ours = engine_speed.Llama(folder, 16, "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [1]
    with torch.inference_mode():
        for position in range(12):
            ids.append(int(ours(torch.tensor([[ids[-1]]]), torch.tensor([position]))))
        expected = theirs(torch.tensor([ids[:-1]])).logits[0].topk(2, -1)
    clear = expected.values[:, 0] - expected.values[:, 1] > 0.02  # halves may exchange two that are nearly equal
    assert clear.sum() > 6
    assert (expected.indices[:, 0] == torch.tensor(ids[1:]))[clear].all()


def test_a_token_reads_every_matrix_but_an_embedding_of_its_own_and_the_filled_cache(tmp_path: Path) -> None:
    hidden, intermediate, layers, heads, grouped = SHAPES["0.02"]
    folder = engine_speed.random_llama("0.02", tmp_path)
    kv = grouped * hidden // heads
    layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * hidden * intermediate + 2 * hidden
    head = 32000 * hidden
    parameters, nbytes = engine_speed.read_bytes(folder, 100)
    assert parameters == 2 * head + layers * layer + hidden
    assert nbytes == 2 * (parameters - head + 2 * layers * kv * 100)
