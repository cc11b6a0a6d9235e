"""The command line as scripts use it: exit codes, one JSON object on stdout, every command documented and run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmx.cli import commands

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
ROUNDED = ("--method", "rtn")  # what is tested here needs no calibration


def llmx(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmx.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("exported")
    done = llmx("export", EXAMPLE, "--format", "gguf", "--bits", 4, "--method", "rtn", "-o", folder, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_export_prints_the_contract_and_writes_the_report(exported: dict[str, object]) -> None:
    assert {"artifact", "bytes", "files", "seconds", "peak_rss_bytes", "report"} <= exported.keys()
    artifact, report = Path(str(exported["artifact"])), Path(str(exported["report"]))
    assert artifact.stat().st_size == exported["bytes"]
    assert report == artifact.parent / "report.json"
    told = json.loads(report.read_text())
    assert told["passed"] is True
    assert told["export"]["files"][0]["name"] == artifact.name
    assert {tensor["type"] for tensor in told["export"]["tensors"]} == {"F32", "Q4_K", "Q6_K"}


def test_validate_prints_checks_with_value_limit_and_unit(exported: dict[str, object], tmp_path: Path) -> None:
    done = llmx("validate", exported["artifact"], "--reference", EXAMPLE, "-o", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] is True
    assert all({"name", "passed", "value", "limit", "unit"} <= check.keys() for check in told["checks"])
    assert json.loads((tmp_path / "report.json").read_text()) == told


def test_a_limit_that_is_not_met_exits_4_and_still_prints_the_report(exported: dict[str, object]) -> None:
    done = llmx("validate", exported["artifact"], "--reference", EXAMPLE, "--max-kl", "1e-9", "--json")
    assert done.returncode == 4
    told = json.loads(done.stdout)
    assert told["passed"] is False
    assert "quality.kl" in {check["name"] for check in told["checks"] if check["passed"] is False}


def test_an_export_that_fails_its_limit_is_not_left_under_the_final_name(tmp_path: Path) -> None:
    done = llmx("export", EXAMPLE, *ROUNDED, "--bits", 2, "--max-kl", "1e-9", "-o", tmp_path / "a.gguf", "--json")
    assert done.returncode == 4
    assert "quality.kl" in json.dumps(json.loads(done.stdout)["error"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf.failed", "report.json"]


def test_plan_tells_types_and_exact_sizes_without_writing(exported: dict[str, object], tmp_path: Path) -> None:
    done = llmx("plan", EXAMPLE, *ROUNDED, "--format", "gguf", "--bits", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] == exported["bytes"]
    assert "token_embd.weight" in llmx("plan", EXAMPLE, "--type", "q4_k_m").stdout


def test_inspect_reads_any_gguf_file(exported: dict[str, object]) -> None:
    told = json.loads(llmx("inspect", exported["artifact"], "--json").stdout)
    assert told["metadata"]["general.architecture"]["value"] == "qwen3"
    assert "blk.0.attn_q.weight" in llmx("inspect", exported["artifact"]).stdout


def test_doctor_tells_each_runtime_and_why_it_is_missing() -> None:
    told = json.loads(llmx("doctor", "--json").stdout)
    assert "llama.cpp" in {runtime["name"] for runtime in told["runtimes"]}
    assert all(runtime["available"] or runtime["reason"] for runtime in told["runtimes"])
    assert "llama.cpp" in llmx("doctor").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", EXAMPLE, "--bits", "7"], 2, "choose one of 2, 3, 4"),
        (["export", EXAMPLE, "--type", "Q9"], 2, "Q4_K_M"),
        (["export", EXAMPLE, "--bits", "4", "--type", "Q8_0"], 2, "one of them"),
        (["export", EXAMPLE, "--format", "nothing"], 2, "gguf"),
        (["export", "no/such/folder/here"], 2, "neither a folder"),
        (["export", EXAMPLE, "--split-max-size", "many"], 2, "2GB"),
        (["export", EXAMPLE, "--method", "magic"], 2, "auto, rtn, awq, gptq"),
        (["validate", "missing.gguf", "--reference", EXAMPLE], 2, "missing.gguf"),
        (["validate", EXAMPLE / "config.json", "--reference", EXAMPLE], 6, "GGUF"),
        (["inspect", EXAMPLE / "config.json"], 6, "GGUF"),
        (["export"], 2, "MODEL"),
    ],
)
def test_bad_input_exits_with_its_code_and_says_what_to_do(arguments: list[object], code: int, words: str) -> None:
    done = llmx(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_under_json_is_one_json_object() -> None:
    done = llmx("export", EXAMPLE, "--type", "Q9", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_help_imports_neither_torch_nor_numba_nor_numpy() -> None:
    code = "import sys, llmx.cli; print([m for m in ('torch', 'numba', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help_with_an_example_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in commands.commands:
        shown = llmx(name, "--help").stdout
        assert re.search(rf"Examples?:\n\s+llmx {name}\b", shown), name
        assert f"llmx {name}" in readme, name


def test_a_missing_runtime_exits_7_before_anything_is_written(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['xllamacpp'] = None; sys.modules['llama_cpp'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('xllamacpp', 'llama_cpp') else find(name, *a)\n"
        f"sys.argv = ['llmx', 'export', {str(EXAMPLE)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "from llmx.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert not (tmp_path / "out").exists()


def test_asked_to_stop_it_leaves_nothing_behind(tmp_path: Path) -> None:
    import time

    command = [sys.executable, "-m", "llmx.cli", "export", str(EXAMPLE), "-o", str(tmp_path / "out"), *ROUNDED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob("out/.*partial*/*.gguf")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        process.wait(60)
    assert process.returncode == 143
    assert list((tmp_path / "out").iterdir()) == []
