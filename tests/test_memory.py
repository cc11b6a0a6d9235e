"""Memory and disk: what is estimated before the start, kept within on the way, and measured at the end."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmx import api, describe, memory, preflight
from llmx.errors import ResourceError, UsageError
from llmx.exporters.calibration_needs import CalibrationNeeds
from llmx.exporters.shelf import DiskShelf
from llmx.exporters.workplace import folder_of
from llmx.quant.smooth import sample, samples
from llmx.quant.statistics import Inputs, Later, statistics
from llmx.quant.workers import workers
from llmx.validating import missing_runtime

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
GPTQ = {"method": "gptq", "effort": "fast", "calibration_tokens": 512, "type_name": "Q4_0"}


def request(folder: Path, **changed: Any) -> api.ExportRequest:
    return api.ExportRequest(
        str(EXAMPLE), **{"output": folder / "m.gguf", "validate": False, "threads": 1, "type_name": "Q4_0"} | changed
    )


def needs(tokens: int) -> CalibrationNeeds:
    return CalibrationNeeds(api.plan(request(Path())).model.architecture, tokens, 256)


def shelving() -> str:
    """A limit that activations in memory just miss."""
    return str(needs(512).memory(1, shelved=False) - 1)


# What is chosen within a limit.


@pytest.mark.parametrize(
    "changed", [GPTQ, GPTQ | {"format": "trtllm", "type_name": "W8A8_SQ", "method": None}], ids=["gptq", "smoothquant"]
)
def test_activations_on_disk_change_no_byte(changed: dict[str, Any], tmp_path: Path) -> None:
    made = []
    for name, limit in (("memory", None), ("disk", shelving())):
        output = tmp_path / name / "m.gguf" if "format" not in changed else tmp_path / name / "m"
        result = api.export(request(tmp_path, **changed | {"output": output, "max_memory": limit}))
        assert result.plan["needs"]["activations_on_disk"] is (limit is not None)
        assert not folder_of(output).exists()
        made.append([file["sha256"] for file in result.files])
    assert made[0] == made[1]


def test_fewer_threads_are_taken_where_all_of_them_would_need_too_much(tmp_path: Path) -> None:
    free = api.plan(request(tmp_path, method="rtn", threads=8))
    limit = free.exporter.plan.peak_memory_bytes - 1
    kept = api.plan(request(tmp_path, method="rtn", threads=8, max_memory=str(limit)))
    assert (free.threads, kept.threads) == (8, 4)
    assert preflight.peak(kept) <= limit
    assert kept.exporter.plan.nbytes == free.exporter.plan.nbytes


def test_the_plan_shows_memory_disk_and_time(tmp_path: Path) -> None:
    planned = api.plan(request(tmp_path, **GPTQ, max_memory="4GB"))
    told = planned.described()["needs"]
    assert told["memory_limit_bytes"] == 4_000_000_000
    assert told["disk_bytes"] == 2 * planned.exporter.plan.nbytes
    assert 0 < told["seconds"] < 60
    words = describe.plan(planned)
    assert "of 4,000.0 MB that --max-memory allows" in words
    assert "disk about" in words


def test_more_tokens_take_more_memory_and_less_of_it_where_activations_are_on_disk() -> None:
    few, many = needs(4096), needs(65536)
    assert few.memory(1, shelved=False) < many.memory(1, shelved=False)
    assert few.memory(1, shelved=True) == many.memory(1, shelved=True)
    assert few.shelf_bytes() * 16 == many.shelf_bytes()


# What does not fit is refused before anything is written, with what would fit.


@pytest.mark.parametrize("changed", [{"method": "rtn"}, GPTQ], ids=["rounded", "calibrated"])
def test_a_limit_that_nothing_keeps_is_refused_and_the_named_one_is_enough(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ResourceError, match="are what --max-memory allows") as refused:
        api.export(request(tmp_path, **changed, max_memory="50MB"))
    assert refused.value.exit_code == 5
    assert not list(tmp_path.iterdir())
    named = re.search(r"--max-memory (\S+?)(,|$)", str(refused.value.fix))
    assert named is not None
    enough = api.plan(request(tmp_path, **changed, max_memory=named[1]))
    preflight.require(enough, tmp_path / "m.gguf")


def test_fewer_tokens_are_named_where_they_would_fit(tmp_path: Path) -> None:
    prepared = api.plan(request(tmp_path, **GPTQ | {"calibration_tokens": 131_072}))
    limit = needs(1024).memory(1, shelved=True)
    with pytest.raises(ResourceError, match="--calibration-tokens 1024"):
        preflight.require(replace(prepared, limit=limit), tmp_path / "m.gguf")


def test_what_this_machine_has_not_is_refused_without_a_limit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda: 1 << 20)
    for changed in ({"method": "rtn"}, GPTQ):
        with pytest.raises(ResourceError, match="are free") as refused:
            api.export(request(tmp_path, **changed))
        assert "--max-memory" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_where_little_is_free_activations_go_to_the_disk_without_a_limit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = int(shelving())
    monkeypatch.setattr(preflight, "free_bytes", lambda: little)
    assert api.plan(request(tmp_path, **GPTQ)).shelved


def test_validation_is_part_of_what_a_limit_is_for(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="validation holds a float32 reference") as refused:
        api.export(request(tmp_path, method="rtn", validate=True, max_memory="600MB"))
    assert "--no-validate" in str(refused.value.fix)
    artifact = api.export(request(tmp_path, method="rtn", max_memory="600MB")).artifact
    with pytest.raises(ResourceError, match="validation holds a float32 reference") as refused:
        api.validate(artifact, str(EXAMPLE), max_memory="600MB")
    assert refused.value.fix == "--max-memory 750MB"


def test_a_disk_that_is_too_small_is_refused_with_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ResourceError) as refused:
        api.export(request(tmp_path, **GPTQ | {"statistics": tmp_path / "kept"}))
    assert "the artifact and what it is made of" in str(refused.value)
    assert "the statistics" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_a_stopped_export_left_is_room_that_it_has_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = api.plan(request(tmp_path, method="rtn", resume=True))
    kept = folder_of(tmp_path / "m.gguf")
    kept.mkdir()
    (kept / "rows").write_bytes(b"1" * prepared.exporter.plan.nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    preflight.require(prepared, tmp_path / "m.gguf")


def test_a_limit_that_is_no_size_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        api.plan(request(tmp_path, max_memory="much"))


# What is measured.


def test_memory_of_workers_counts() -> None:
    mebibytes = 300

    @memory.watched
    def work() -> int:
        code = f"import time; data = bytearray(b'1' * ({mebibytes} << 20)); time.sleep(1.5)"
        subprocess.run([sys.executable, "-c", code], check=True)
        return memory.peak_rss_bytes()

    assert work() > (mebibytes << 20)


def test_the_peak_is_that_of_the_work_and_not_of_what_was_before() -> None:
    torch.ones(64 << 20).sum()  # 256 MiB, gone again

    @memory.watched
    def work() -> int:
        return memory.peak_rss_bytes()

    assert work() < memory.peak_rss_bytes() - (100 << 20)


def test_a_limit_that_was_not_kept_is_said(tmp_path: Path) -> None:
    result = api.export(request(tmp_path, method="rtn", max_memory="1GB"))
    # The process that runs the tests has had more, so the peak is said here.
    assert "--max-memory" not in describe.export(replace(result, peak_rss_bytes=1_000_000_000))
    assert "MORE than the 1,000.0 MB that --max-memory allows" in describe.export(
        replace(result, peak_rss_bytes=1_000_000_001)
    )


@pytest.mark.skipif(missing_runtime() is not None, reason="takes the runtime")
def test_a_validation_within_a_limit_tells_its_peak(tmp_path: Path) -> None:
    artifact = api.export(request(tmp_path, method="rtn")).artifact
    report = api.validate(artifact, str(EXAMPLE), max_memory="4GB")
    assert report.passed
    (check,) = [check for check in report.checks if check.name == "memory.peak"]
    assert check.unit == "bytes"
    assert isinstance(check.value, int)
    assert 100e6 < check.value < 4e9
    assert "within the 4,000,000,000" in check.detail


# Activations on the shelf.


def test_the_shelf_gives_back_what_was_put_on_it_and_no_longer_than_it_is_asked_for(tmp_path: Path) -> None:
    shelf = DiskShelf(tmp_path / "shelf")
    first, second = torch.randn(2, 3, 4), torch.randn(2, 3, 4).transpose(1, 2)
    pair, same = shelf.put((first, second)), shelf.put((first, first))
    a, b = pair()
    assert torch.equal(a, first)
    assert torch.equal(b, second)
    a, b = same()
    assert a is b
    assert len(list((tmp_path / "shelf").iterdir())) == 2
    del pair, same
    gc.collect()
    assert not list((tmp_path / "shelf").iterdir())


def test_a_shelf_begins_without_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "7.f32").write_bytes(b"old")
    DiskShelf(tmp_path / "shelf")
    assert not list((tmp_path / "shelf").iterdir())


def _inputs(number: int) -> Inputs:
    made = torch.Generator().manual_seed(number)
    float_, quantized, residual = (torch.randn(40, size, generator=made) for size in (32, 32, 16))
    return Inputs(float_, quantized, residual, held_out=number % 3 == 2)


def test_batches_that_are_made_one_at_a_time_have_the_same_moments_and_samples() -> None:
    alive: list[Any] = []

    def make(number: int) -> Inputs:
        alive.append(number)
        return _inputs(number)

    whole = [_inputs(number) for number in range(6)]
    later = Later(make, [batch.held_out for batch in whole])
    with workers(2) as pool:
        one, other = statistics(whole, pool), statistics(later, pool)
    for a, b in ((one.fitted, other.fitted), (one.held_out, other.held_out)):
        assert torch.equal(a.hessian, b.hessian)
        assert a.drift is not None
        assert b.drift is not None
        assert torch.equal(a.drift, b.drift)
        assert a.tokens == b.tokens
    assert torch.equal(one.squares, other.squares)
    for a, b in zip(_fields(samples(whole)), _fields(samples(later)), strict=True):
        assert a == b
    assert later.those(True)[0].held_out


def _fields(found: Any) -> list[Any]:
    return [value.tolist() if hasattr(value, "tolist") else value for part in (found.fitted, found.judged)
            for value in (part.rows, part.counts, part.largest, part.low, part.high)]  # fmt: skip


def test_a_sample_is_that_of_all_inputs_together() -> None:
    whole = [_inputs(number) for number in range(4)]
    together = Inputs(torch.cat([batch.float_ for batch in whole]), torch.cat([batch.quantized for batch in whole]))
    one, other = sample(whole, 20), sample([together], 20)
    assert one.rows.tolist() == other.rows.tolist()
    assert (one.low, one.high, one.largest.tolist()) == (other.low, other.high, other.largest.tolist())
