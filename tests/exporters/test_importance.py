"""Importance matrices of our own: the mean squares that the model's inputs have, as llama.cpp names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmx import api
from llmx.errors import IntegrityError, UsageError
from llmx.exporters.importance import mean_squares
from llmx.formats.gguf import read_gguf
from llmx.formats.imatrix import ImportanceMatrix, read_imatrix
from llmx.models.calibration_text import read_calibration, sequences
from llmx.models.model import Model, Weight, open_model
from llmx.models.ops_torch import TorchOps, gated, run
from llmx.quant.calibrate import Calibration
from llmx.quant.inputs import batches
from llmx.quant.workers import workers

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TOKENS, LENGTH = 2048, 256
Squares = dict[str, np.ndarray[Any, Any]]


class Squaring(TorchOps):
    """The decoder's own operations, with a sum of squares of what each matrix is given."""

    sums: Squares
    counts: dict[str, np.ndarray[Any, Any]]

    def _add(self, name: str, experts: int, expert: int, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double().numpy()
        self.sums.setdefault(name, np.zeros((experts, rows.shape[1])))[expert] += (rows**2).sum(0)
        self.counts.setdefault(name, np.zeros(experts))[expert] += len(rows)

    def linear(self, x: torch.Tensor, weight: Weight, bias: Weight | None) -> torch.Tensor:
        self._add(weight.spec.name, 1, 0, x)
        return super().linear(x, weight, bias)

    def experts(self, x: torch.Tensor, router: Weight, matrices: Any, **options: Any) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        _, chosen = self.route(rows, router, used=options["used"], normalize=options["normalize"])
        gate, up, down = matrices
        count = gate.spec.shape[0]
        for expert in range(count):
            reached = rows[torch.where(chosen == expert)[0]]
            states = gated(reached, self.expert(gate, expert), self.expert(up, expert), options["activation"])
            for weight, given in ((gate, reached), (up, reached), (down, states)):
                self._add(weight.spec.name, count, expert, given)
        return super().experts(x, router, matrices, **options)


def by_hand(model: Model, text: Path, tokens: int = TOKENS) -> Squaring:
    ops = Squaring(keep=True)
    ops.sums, ops.counts = {}, {}
    read = read_calibration(text)
    vocab = model.architecture.vocab
    for ids in sequences(read, model.checkpoint.folder, tokens=tokens, length=LENGTH, vocab=vocab):
        run(model, ids, ops)
    return ops


@pytest.fixture
def measured(solvable: Callable[[str], Path], some_text: Path, tmp_path: Path) -> Callable[..., ImportanceMatrix]:
    def run_(family: str) -> ImportanceMatrix:
        path = tmp_path / f"{family}.gguf"
        request = api.CalibrateRequest(
            str(solvable(family)), path, calibration=some_text, calibration_tokens=TOKENS, threads=2
        )
        result = api.calibrate(request)
        assert result.path == path and result.tokens == TOKENS and result.entries == len(read_imatrix(path).entries)
        return read_imatrix(path)

    return run_


def close(found: Any, expected: Any) -> bool:
    return np.allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3"])
def test_what_is_read_back_are_the_mean_squares_of_every_matrix(
    family: str, measured: Callable[..., ImportanceMatrix], solvable: Callable[[str], Path], some_text: Path
) -> None:
    found, model = measured(family), open_model(solvable(family))
    direct = by_hand(model, some_text)
    fused = {"phi3": {"attn_q": "attn_qkv", "ffn_up": "ffn_up"}, "gpt2": {"attn_q": "attn_qkv"}}.get(family, {})
    for role, name in (("q", "attn_q"), ("o", "attn_output"), ("up", "ffn_up"), ("down", "ffn_down")):
        for index in (0, 1):
            entry = found.entries[f"blk.{index}.{fused.get(name, name)}.weight"]
            matrix = f"layers.{index}.{role}.weight"
            assert entry.shape == (1, direct.sums[matrix].shape[1])
            assert close(entry, direct.sums[matrix] / TOKENS), matrix
    assert "token_embd.weight" not in found.entries
    assert ("output.weight" in found.entries) == (not model.architecture.tied)
    assert found.datasets == (some_text.name,)
    assert (found.chunk_count, found.chunk_size) == (TOKENS // LENGTH, LENGTH)
    assert not found.entries_without_data


def test_each_expert_has_the_squares_and_the_count_of_its_own_tokens(
    measured: Callable[..., ImportanceMatrix], solvable: Callable[[str], Path], some_text: Path
) -> None:
    found, direct = measured("mixtral"), by_hand(open_model(solvable("mixtral")), some_text)
    for role in ("gate", "up", "down"):
        entry, counts = (part[f"blk.1.ffn_{role}_exps.weight"] for part in (found.entries, found.counts))
        matrix = f"layers.1.expert_{role}.weight"
        assert counts.tolist() == direct.counts[matrix].tolist()
        assert counts.sum() == 2 * TOKENS
        reached = counts > 0
        assert close(entry[reached], (direct.sums[matrix] / np.maximum(direct.counts[matrix], 1)[:, None])[reached])


def test_an_expert_that_few_tokens_reach_is_counted_with_those_alone_and_one_that_none_reach_is_named(
    solvable: Callable[[str], Path], some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = TorchOps.route

    def skewed(self: TorchOps, rows: torch.Tensor, router: Weight, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shares, chosen = route(self, rows, router, **options)
        place = torch.arange(len(rows))
        chosen = torch.stack([torch.zeros_like(place), torch.where(place < 3, 1, 2)], 1)
        return torch.full_like(shares, 0.5), chosen  # nobody is sent to expert 3

    monkeypatch.setattr(TorchOps, "route", skewed)
    request = api.CalibrateRequest(
        str(solvable("mixtral")), tmp_path / "i.gguf", calibration=some_text, calibration_tokens=TOKENS
    )
    result = api.calibrate(request)
    counts = read_imatrix(result.path).counts["blk.0.ffn_up_exps.weight"]
    assert counts[0] == TOKENS and counts[3] == 0
    assert 0 < counts[1] < 64
    assert result.silent["blk.0.ffn_down_exps.weight"] == 1
    assert "reached by no token" in _described(result)


def _described(result: api.CalibrateResult) -> str:
    from llmx import describe

    return describe.calibrated(result)


def test_one_thread_and_two_write_the_same_file(
    solvable: Callable[[str], Path], some_text: Path, tmp_path: Path
) -> None:
    written = []
    for threads in (1, 2):
        path = tmp_path / f"{threads}.gguf"
        request = api.CalibrateRequest(str(solvable("llama")), path, some_text, TOKENS, threads=threads)
        api.calibrate(request)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_an_export_is_guided_by_it_and_another_models_is_refused(
    measured: Callable[..., ImportanceMatrix], solvable: Callable[[str], Path], tmp_path: Path
) -> None:
    measured("llama")

    def export(model: Path, name: str, **options: Any) -> Path:
        request = api.ExportRequest(str(model), bits=3, output=tmp_path / name, validate=False, method="rtn", **options)
        return api.export(request).artifact

    plain = read_gguf(export(solvable("llama"), "plain.gguf"))
    guided = read_gguf(export(solvable("llama"), "guided.gguf", imatrix=tmp_path / "llama.gguf"))
    name = "blk.1.ffn_gate.weight"
    assert plain.tensors[name].type_name == guided.tensors[name].type_name
    assert not np.array_equal(plain.bytes(name), guided.bytes(name))
    told = json.loads((tmp_path / "guided.gguf.report.json").read_text())
    assert told["export"]["importance"] == "llama.gguf"
    with pytest.raises(IntegrityError, match="another model"):
        export(EXAMPLE, "other.gguf", imatrix=tmp_path / "llama.gguf")


def test_a_file_that_exists_needs_force(solvable: Callable[[str], Path], some_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="--force"):
        api.calibrate(api.CalibrateRequest(str(solvable("llama")), path, some_text, TOKENS))
    assert path.read_bytes() == b"mine"
    api.calibrate(api.CalibrateRequest(str(solvable("llama")), path, some_text, TOKENS, force=True))
    assert read_imatrix(path).entries


def test_means_by_canonical_name_weigh_all_columns_alike_where_nothing_came(
    solvable: Callable[[str], Path], some_text: Path
) -> None:
    model = open_model(solvable("llama"))
    direct = by_hand(model, some_text)
    vocab = model.architecture.vocab
    ids = sequences(read_calibration(some_text), model.checkpoint.folder, tokens=TOKENS, length=LENGTH, vocab=vocab)
    with workers(1) as pool:
        found = mean_squares(model, Calibration(batches(ids, 0)), pool)
    assert close(found["layers.1.down.weight"], direct.sums["layers.1.down.weight"][0] / TOKENS)
    assert "embedding.weight" not in found
