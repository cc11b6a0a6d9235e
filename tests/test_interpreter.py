"""Modules of ours as programs of another Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmx.errors import RuntimeMissing
from llmx.interpreter import TENSORRT_PYTHON, python_command, python_environment, tensorrt_python
from llmx.validate.runtimes.worker_process import WorkerProcess


def test_this_python_runs_a_module_as_it_always_did() -> None:
    assert python_command("llmx.errors") == [sys.executable, "-P", "-m", "llmx.errors"]
    assert python_environment(None, {"A": "b"})["A"] == "b"


def test_another_python_finds_llmx_alone_and_nothing_of_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    done = subprocess.run(
        python_command("llmx.validate.runtimes.memory", sys.executable),
        env=python_environment(sys.executable, {"LLMX_TEST": "1"}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_set_for_this_python_does_not_reach_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/site")
    assert "PYTHONPATH" not in python_environment("/usr/bin/python3.10", {})
    assert python_environment(None, {})["PYTHONPATH"] == "/site"


def test_the_environment_names_the_python_of_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TENSORRT_PYTHON, "")
    assert tensorrt_python() is None
    monkeypatch.setenv(TENSORRT_PYTHON, "/opt/python3.10")
    assert tensorrt_python() == "/opt/python3.10"


def test_a_python_that_is_not_there_is_a_missing_runtime(tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissing, match="cannot be started"):
        WorkerProcess("llmx.errors", label="TensorRT", timeout=1.0, environment={}, python=str(tmp_path / "python3.10"))
