"""An export that is killed goes on where it was, and makes the same bytes as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmx.errors import UsageError
from llmx.exporters import solving
from llmx.exporters.artifact import file_sha256
from llmx.exporters.workplace import folder_of
from llmx.exporting import export
from llmx.preparing import ExportRequest

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
TOKENS = 512


def request(folder: Path, **changed: object) -> ExportRequest:
    given = {"method": "gptq", "effort": "fast", "calibration_tokens": TOKENS, "type_name": "Q4_0", **changed}
    return ExportRequest(str(EXAMPLE), output=folder / "m.gguf", validate=False, threads=1, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return file_sha256(export(request(tmp_path_factory.mktemp("undisturbed"))).artifact)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the matrix after so many is solved."""
    solve, seen = solving.solve, []

    def stopping(*given: object, **named: object) -> object:
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(1)
        return solve(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(solving, "solve", stopping)


@pytest.mark.parametrize("count", [1, 6])
def test_an_interrupted_export_goes_on_and_solves_only_the_rest(
    count: int, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(count, patch)
        with pytest.raises(KeyboardInterrupt) as stopped:
            export(request(tmp_path))
    assert f"{count + 1} steps of it are kept" in stopped.value.__notes__[0]
    solved = []
    solve = solving.solve
    monkeypatch.setattr(solving, "solve", lambda *given, **named: solved.append(1) or solve(*given, **named))
    result = export(request(tmp_path, resume=True))
    assert file_sha256(result.artifact) == undisturbed
    assert len(solved) == len(result.solved) - count
    assert not folder_of(tmp_path / "m.gguf").exists()


def test_what_was_stopped_is_not_gone_on_with_as_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            export(request(tmp_path))
    with pytest.raises(UsageError, match="calibration differs\n  - plan differs\n  - recipe differs"):
        export(request(tmp_path, resume=True, type_name="Q8_0", calibration_tokens=1024))
    assert folder_of(tmp_path / "m.gguf").exists()


def test_kept_rows_that_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            export(request(tmp_path))
    path = next((folder_of(tmp_path / "m.gguf") / "kept").glob("*.rows"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="rows kept of a solved matrix have changed"):
        export(request(tmp_path, resume=True))


def test_killed_at_random_moments_it_makes_the_same_bytes(undisturbed: str, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    command = [
        *(sys.executable, "-m", "llmx.cli", "export", str(EXAMPLE), "--type", "Q4_0", "--method", "gptq"),
        *(
            "--effort",
            "fast",
            "--calibration-tokens",
            str(TOKENS),
            "--no-validate",
            "--threads",
            "1",
            "-o",
            str(target),
        ),
    ]
    chance = random.Random(0)
    for _ in range(3):
        more = ["--resume"] if folder_of(target).exists() else []
        run = subprocess.Popen([*command, *more], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(1.0, 6.0))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        if target.exists():
            assert file_sha256(target) == undisturbed
            target.unlink()
    more = ["--resume"] if folder_of(target).exists() else []
    subprocess.run([*command, *more], check=True, capture_output=True)
    assert file_sha256(target) == undisturbed
