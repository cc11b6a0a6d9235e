"""The command line as scripts use it: exit codes, one JSON object on stdout, every command documented and run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from commands import Done

from llmx.cli import commands
from llmx.formats.gguf import read_gguf
from llmx.formats.imatrix import read_imatrix
from llmx.validate.sample_text import SAMPLE_TEXT

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
ROUNDED = ("--method", "rtn")  # what is tested here needs no calibration
QUICK = ("--method", "gptq", "--effort", "fast", "--calibration-tokens", 2048, "--device", "cpu", "--no-validate")
BUDGET_BITS = 4.6


def llmx(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmx.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("exported")
    done = llmx("export", EXAMPLE, "--format", "gguf", "--bits", 4, *ROUNDED, "-o", folder, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(SAMPLE_TEXT)
    return path


def test_export_prints_the_contract_and_writes_the_report(exported: dict[str, object]) -> None:
    assert {"artifact", "bytes", "files", "seconds", "peak_rss_bytes", "report"} <= exported.keys()
    artifact, report = Path(str(exported["artifact"])), Path(str(exported["report"]))
    assert artifact.stat().st_size == exported["bytes"]
    assert report == artifact.parent / "report.json"
    told = json.loads(report.read_text())
    assert told["passed"] is True
    assert told["export"]["files"][0]["name"] == artifact.name
    assert {tensor["type"] for tensor in told["export"]["tensors"]} == {"F32", "Q4_K", "Q6_K"}
    assert exported["method"] == "rtn" and told["export"]["quantization"]["calibration"] is None


def test_an_export_as_users_begin_calibrates_by_itself_and_passes(tmp_path: Path) -> None:
    done = llmx("export", EXAMPLE, "--bits", 4, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"solved on [\d,]+ tokens of built-in corpus: \d+ gptq", done.stdout)
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["passed"] is True
    quantization = told["export"]["quantization"]
    assert quantization["recipe"]["method"] == "auto" and quantization["recipe"]["effort"] == "balanced"
    assert quantization["calibration"]["text"] == "built-in corpus"
    assert len(told["export"]["solved"]) == 1 + 7 * 4
    assert all(line["error_held_out"] <= line["error_of_rounding"] for line in told["export"]["solved"])
    (artifact,) = tmp_path.glob("*.gguf")
    assert read_gguf(artifact).metadata["llmx.solver"] == "solved"


def test_validate_prints_checks_with_value_limit_and_unit(
    exported: dict[str, object], tmp_path: Path, here: Callable[..., Done]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text(SAMPLE_TEXT)
    limits = ("--min-top1", 0.5, "--max-ppl-ratio", 1.5, "--min-tokens-per-second", 1e-3, "--threads", 1)
    artifact = exported["artifact"]
    done = here("validate", artifact, "--reference", EXAMPLE, "--text", text, *limits, "-o", tmp_path, "--json")
    assert done.code == 0, done.stderr
    assert done.told["passed"] is True
    assert all({"name", "passed", "value", "limit", "unit"} <= check.keys() for check in done.told["checks"])
    assert json.loads((tmp_path / "report.json").read_text()) == done.told
    asked = {check["name"] for check in done.told["checks"] if check["origin"] == "asked for"}
    assert {"quality.same_top1", "quality.ppl_ratio", "speed.decode"} <= asked


def test_plan_export_and_validate_take_a_limit_of_memory_and_exit_5_where_nothing_keeps_it(
    exported: dict[str, object], tmp_path: Path, here: Callable[..., Done]
) -> None:
    planned = here("plan", EXAMPLE, "--bits", 4, *ROUNDED, "--max-memory", "2GB", "--json")
    assert planned.told["needs"]["memory_bytes"] < planned.told["needs"]["memory_limit_bytes"] == 2_000_000_000
    small = ("--max-memory", "100MB", "--json")
    done = here("export", EXAMPLE, "--bits", 4, *ROUNDED, *small, "-o", tmp_path)
    assert done.code == 5 and "--max-memory" in done.stderr
    assert not list(tmp_path.iterdir())
    assert here("validate", exported["artifact"], "--reference", EXAMPLE, *small).code == 5


def test_a_limit_that_is_not_met_exits_4_and_still_prints_the_report(
    exported: dict[str, object], here: Callable[..., Done]
) -> None:
    done = here("validate", exported["artifact"], "--reference", EXAMPLE, "--max-kl", "1e-9", "--blame", "--json")
    assert done.code == 4
    assert done.told["passed"] is False
    assert done.told["details"]["blame"]["tensor"] is None  # every tensor is sound, the limit is strict
    assert "quality.kl" in {check["name"] for check in done.told["checks"] if check["passed"] is False}


def test_a_gate_judges_any_check_and_the_command_line_goes_before_it(
    exported: dict[str, object], tmp_path: Path, here: Callable[..., Done]
) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("max_kl: 1e-9\nspeed.load: 1e-9\nquality.rms_delta_p: 0.5\n")
    given = ("--reference", EXAMPLE, "--gate", gate, "--max-kl", 0.5, "--positions", 64, "--json")
    done = here("validate", exported["artifact"], *given)
    assert done.code == 4, done.stderr
    checks = {check["name"]: check for check in done.told["checks"]}
    assert [name for name, check in checks.items() if check["passed"] is False] == ["speed.load"]
    assert checks["quality.positions"]["value"] >= checks["quality.positions"]["limit"] == 64
    assert done.told["gate"]["quality.kl"] == {"limit": 0.5, "origin": "asked for"}
    assert done.told["gate"]["speed.load"] == {"limit": 1e-9, "origin": "asked for in gate.yaml"}
    gate.write_text("max_kll: 1\n")
    done = here("export", EXAMPLE, "--gate", gate, "-o", tmp_path / "out", "--json")
    assert done.code == 2 and "max_kl" in done.told["error"]["problems"][0]
    assert not (tmp_path / "out").exists()


def test_more_positions_than_the_text_has_exit_2(exported: dict[str, object], here: Callable[..., Done]) -> None:
    done = here("validate", exported["artifact"], "--reference", EXAMPLE, "--positions", 100_000, "--json")
    assert done.code == 2
    assert "100000 were asked for" in done.told["error"]["what"]


def test_an_export_that_fails_its_limit_is_not_left_under_the_final_name(
    tmp_path: Path, here: Callable[..., Done]
) -> None:
    done = here("export", EXAMPLE, *ROUNDED, "--bits", 2, "--max-kl", "1e-9", "-o", tmp_path / "a.gguf", "--json")
    assert done.code == 4
    assert "quality.kl" in json.dumps(done.told["error"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf.failed", "report.html", "report.json"]


def test_plan_tells_types_and_exact_sizes_without_writing(
    exported: dict[str, object], here: Callable[..., Done]
) -> None:
    done = here("plan", EXAMPLE, *ROUNDED, "--format", "gguf", "--bits", 4, "--json")
    assert done.code == 0, done.stderr
    assert done.told["bytes"] == exported["bytes"]
    assert done.told["quantization"]["recipe"]["method"] == "rtn"
    assert "token_embd.weight" in here("plan", EXAMPLE, "--type", "q4_k_m", "--threads", 1).stdout


def test_inspect_reads_any_gguf_file(exported: dict[str, object], here: Callable[..., Done]) -> None:
    told = here("inspect", exported["artifact"], "--json").told
    assert told["metadata"]["general.architecture"]["value"] == "qwen3"
    assert "blk.0.attn_q.weight" in here("inspect", exported["artifact"]).stdout


def test_doctor_tells_each_runtime_and_why_it_is_missing(here: Callable[..., Done]) -> None:
    told = here("doctor", "--json").told
    assert "llama.cpp" in {runtime["name"] for runtime in told["runtimes"]}
    assert all(runtime["available"] or runtime["reason"] for runtime in told["runtimes"])
    assert "llama.cpp" in here("doctor").stdout


# How it is quantized.


def test_calibrate_writes_an_importance_matrix_that_export_reads(
    calibration: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    path = tmp_path / "imatrix.gguf"
    options = ("--calibration", calibration, "--calibration-tokens", 2048, "--device", "cpu", "--threads", 2)
    done = here("calibrate", EXAMPLE, *options, "-o", path, "--json")
    assert done.code == 0, done.stderr
    assert done.told["imatrix"] == str(path) and done.told["tokens"] == 2048 and done.told["silent_experts"] == {}
    assert done.told["entries"] == len(read_imatrix(path).entries) == 7 * 4
    refused = here("calibrate", EXAMPLE, *options, "-o", path)
    assert refused.code == 2 and "--force" in refused.stderr
    again = here("calibrate", EXAMPLE, *options, "-o", path, "--force")
    assert again.code == 0 and "28 matrices, 2,048 tokens of some.txt" in again.stdout
    target = tmp_path / "guided.gguf"
    exported = here("export", EXAMPLE, "--imatrix", path, "-o", target, "--no-validate", "--json")
    assert exported.code == 0, exported.stderr
    assert json.loads(Path(exported.told["report"]).read_text())["export"]["importance"] == "imatrix.gguf"


def test_a_recipe_is_a_name_or_a_file(calibration: Path, tmp_path: Path, here: Callable[..., Done]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{type: Q4_K_S, method: gptq, rules: [{roles: [v], layers: last 1, type: Q8_0, method: rtn}]}")
    options = ("--calibration", calibration, "--calibration-tokens", 2048, "--effort", "fast", "--no-validate")
    done = here("export", EXAMPLE, "--recipe", path, *options, "-o", tmp_path / "a.gguf", "--json")
    assert done.code == 0, done.stderr
    assert done.told["method"] == "gptq" and done.told["type"] == "Q4_K_S"
    types = {name: tensor.type_name for name, tensor in read_gguf(tmp_path / "a.gguf").tensors.items()}
    assert types["blk.3.attn_v.weight"] == "Q8_0" and types["blk.2.attn_v.weight"] != "Q8_0"
    recipe = json.loads(Path(done.told["report"]).read_text())["export"]["quantization"]["recipe"]
    assert (recipe["name"], recipe["effort"]) == ("mine", "fast")
    named = here("plan", EXAMPLE, "--recipe", "q5_k_m+rtn", "--json")
    assert named.told["type"] == "Q5_K_M" and named.told["quantization"]["calibration"] is None


def test_statistics_are_kept_and_gone_on_from(calibration: Path, tmp_path: Path, here: Callable[..., Done]) -> None:
    folder = tmp_path / "statistics"
    options = (*QUICK, "--calibration", calibration, "--statistics", folder)
    for name in ("one.gguf", "two.gguf"):
        done = here("export", EXAMPLE, *options, "-o", tmp_path / name)
        assert done.code == 0, done.stderr
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert json.loads((folder / "statistics.json").read_text())["complete"] is True
    other = here("export", EXAMPLE, *options, "--type", "Q5_K_M", "-o", tmp_path / "three.gguf")
    assert other.code == 2 and "tensors differs" in other.stderr
    assert not (tmp_path / "three.gguf").exists()


def test_a_budget_chooses_the_types(calibration: Path, here: Callable[..., Done]) -> None:
    options = (*ROUNDED, "--calibration", calibration, "--json")
    bits = here("plan", EXAMPLE, "--target-bpw", BUDGET_BITS, *options)
    assert bits.code == 0, bits.stderr
    assert 0.9 * BUDGET_BITS < bits.told["bits_per_weight"] <= BUDGET_BITS
    assert len(bits.told["types"]) > 2
    size = here("plan", EXAMPLE, "--target-size", f"{bits.told['bytes']}", *options)
    assert size.told["bytes"] <= bits.told["bytes"]
    small = here("plan", EXAMPLE, "--target-size", "100KB", *options)
    assert small.code == 2 and "does not fit" in small.stderr


def test_single_tensors_and_shards_are_as_asked_for(tmp_path: Path, here: Callable[..., Done]) -> None:
    options = ("--tensor-type", "attn_v=Q8_0", "--tensor-type", "ffn_up=Q5_K", "--split-max-size", "700KB")
    done = here("export", EXAMPLE, *ROUNDED, *options, "--no-validate", "-o", tmp_path, "--json")
    assert done.code == 0, done.stderr
    assert len(done.told["files"]) > 1
    tensors = here("inspect", done.told["artifact"], "--json").told["tensors"]
    types = {tensor["name"]: tensor["type"] for tensor in tensors}
    assert (types["blk.0.attn_v.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q5_K")
    report = json.loads(Path(done.told["report"]).read_text())
    assert report["passed"] is None


# What goes wrong.


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
        (["export", EXAMPLE, "--effort", "heroic"], 2, "fast, balanced, best"),
        (["export", EXAMPLE, "--device", "abacus"], 2, "auto, cpu, cuda"),
        (["export", EXAMPLE, "--threads", "-1"], 2, "negative"),
        (["export", EXAMPLE, "--calibration-tokens", "0"], 2, "must be positive"),
        (["export", EXAMPLE, "--calibration", "missing.txt"], 2, "missing.txt"),
        (["export", EXAMPLE, "--calibration", EXAMPLE / "model.safetensors"], 6, "not UTF-8"),
        (["export", EXAMPLE, "--calibration", EXAMPLE / "config.json"], 6, "cannot be used"),
        (["export", EXAMPLE, "--recipe", "q4_km"], 2, "did you mean q4_k_m"),
        (["export", EXAMPLE, "--recipe", "missing.yaml"], 2, "no such recipe file"),
        (["export", EXAMPLE, "--recipe", "w4a16-awq"], 3, "no type of GGUF files"),
        (["export", EXAMPLE, "--recipe", "q4_k_m", "--type", "Q6_K"], 2, "give one of them"),
        (["export", EXAMPLE, "--method", "gptq", "--imatrix", "i.gguf"], 2, "i.gguf"),
        (["export", EXAMPLE, "--method", "rtn", "--statistics", "kept"], 2, "does not calibrate"),
        (["export", EXAMPLE, "--type", "F16", "--method", "gptq"], 2, "nothing to calibrate"),
        (["plan", EXAMPLE, "--target-size", "1GB", "--target-bpw", "4"], 2, "give one of them"),
        (["plan", EXAMPLE, "--target-size", "small"], 2, "write it like 2GB"),
        (["plan", EXAMPLE, "--target-bpw", "-1"], 2, "no number of bits"),
        (["plan", EXAMPLE, "--target-bpw", "4", "--tensor-type", ".=Q8_0"], 2, "name the type of every tensor"),
        (["plan", EXAMPLE, "--dialect", "ort"], 2, "gguf has no use"),
        (["export", EXAMPLE, "--ort"], 2, "gguf has no use"),
        (["plan", EXAMPLE, "--format", "onnx", "--dialect", "latin"], 2, "ort, standard"),
        (["plan", EXAMPLE, "--format", "onnx", "--bits", "5"], 2, "size class"),
        (
            ["export", EXAMPLE, "--format", "onnx", "--imatrix", "i.gguf", "--split-max-size", "1GB"],
            2,
            "--split-max-size",
        ),
        (["export", EXAMPLE, "--format", "onnx", "-o", "model-q.onnx"], 2, "-o model-q"),
        (["calibrate", EXAMPLE], 2, "-o"),
        (["calibrate", EXAMPLE, "-o", "i.gguf", "--device", "abacus"], 2, "auto, cpu, cuda"),
        (["calibrate", EXAMPLE, "-o", "i.gguf", "--calibration-tokens", "-5"], 2, "must be positive"),
        (["calibrate", EXAMPLE, "-o", "i.gguf", "--threads", "-1"], 2, "negative"),
        (["calibrate", "no/such/folder/here", "-o", "i.gguf"], 2, "neither a folder"),
        (["calibrate", EXAMPLE, "-o", "i.gguf", "--revision", "v1"], 2, "revision"),
        (["validate", "missing.gguf", "--reference", EXAMPLE], 2, "missing.gguf"),
        (["validate", "missing.gguf", "--reference", EXAMPLE, "--threads", "-1"], 2, "negative"),
        (["validate", EXAMPLE / "config.json", "--reference", EXAMPLE], 6, "GGUF"),
        (["validate", EXAMPLE / "config.json"], 2, "nothing to judge"),
        (["validate", EXAMPLE / "config.json", "--against", "missing.gguf"], 2, "missing.gguf"),
        (["compare", EXAMPLE / "config.json"], 2, "--reference"),
        (["compare", "a.gguf", "a.gguf", "--reference", EXAMPLE], 2, "twice"),
        (["inspect", EXAMPLE / "config.json"], 6, "GGUF"),
        (["export"], 2, "MODEL"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(f"{ROOT}/", "") if isinstance(value, list) else "",
)
def test_bad_input_exits_with_its_code_and_says_what_to_do(
    *,
    arguments: list[object],
    code: int,
    words: str,
    here: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here(*arguments)
    assert done.code == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_process_exits_with_the_code_and_shows_no_traceback() -> None:
    done = llmx("export", EXAMPLE, "--type", "Q9")
    assert done.returncode == 2
    assert "Q4_K_M" in done.stderr and "Traceback" not in done.stderr


def test_every_contradiction_is_listed_at_once(calibration: Path, tmp_path: Path, here: Callable[..., Done]) -> None:
    imatrix = tmp_path / "i.gguf"
    here("calibrate", EXAMPLE, "--calibration", calibration, "--calibration-tokens", 2048, "-o", imatrix)
    options = (
        "--imatrix",
        imatrix,
        "--calibration",
        calibration,
        "--statistics",
        tmp_path / "kept",
        "--device",
        "abacus",
    )
    done = here("export", EXAMPLE, "--method", "gptq", *options, "--json")
    assert done.code == 2
    assert len(done.told["error"]["problems"]) == 4
    assert not (tmp_path / "kept").exists()


def test_too_little_text_exits_2(tmp_path: Path, here: Callable[..., Done]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time there was a llama. " * 9)
    for command in (["export", EXAMPLE, "-o", tmp_path / "out"], ["calibrate", EXAMPLE, "-o", tmp_path / "i.gguf"]):
        done = here(*command, "--calibration", text, "--json")
        assert done.code == 2
        assert "at least 2048 are needed" in done.told["error"]["what"]
    assert not any((tmp_path / "out").glob("**/*")) and not (tmp_path / "i.gguf").exists()


def test_tokens_that_the_model_does_not_have_exit_6(
    calibration: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    broken = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    path = broken / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    # The tokenizer of a larger model: a token that this one's embedding has no row for.
    vocabulary = tokenizer["model"]["vocab"]
    for token, number in vocabulary.items():
        if token == "▁a" or number == 300:
            vocabulary[token] = 5000 + number
    path.write_text(json.dumps(tokenizer))
    done = here("calibrate", broken, "--calibration", calibration, "-o", tmp_path / "i.gguf", "--json")
    assert done.code == 6
    assert "outside the model's vocabulary" in done.told["error"]["what"]


def test_a_gpu_that_is_not_there_exits_2(tmp_path: Path, here: Callable[..., Done]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = here("export", EXAMPLE, "--device", "cuda", "-o", tmp_path / "out")
    assert done.code == 2
    assert "--device cpu" in done.stderr


def test_an_error_under_json_is_one_json_object(here: Callable[..., Done]) -> None:
    done = here("export", EXAMPLE, "--type", "Q9", "--json")
    assert done.code == 2
    assert done.told["error"]["exit_code"] == 2


def test_help_imports_neither_torch_nor_numba_nor_numpy() -> None:
    code = "import sys, llmx.cli; print([m for m in ('torch', 'numba', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rounding_imports_no_torch(tmp_path: Path) -> None:
    arguments = ["llmx", "export", str(EXAMPLE), "--method", "rtn", "--no-validate", "-o", str(tmp_path)]
    code = f"""
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules, file=sys.stderr))
sys.argv = {arguments!r}
from llmx.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False"]


def test_every_command_has_help_with_an_example_and_stands_in_the_readme(here: Callable[..., Done]) -> None:
    readme = (ROOT / "README.md").read_text()
    for name in commands.commands:
        shown = here(name, "--help").stdout
        assert re.search(rf"Examples?:\n\s+llmx {name}\b", shown), name
        assert f"llmx {name}" in readme, name


def test_every_option_has_help_and_is_run_by_a_test_of_the_command_line() -> None:
    others = sorted((ROOT / "tests").glob("test_*_commands.py"))
    source = "".join(path.read_text() for path in (Path(__file__), *others))
    for name, command in commands.commands.items():
        for option in command.params:
            if not isinstance(option, click.Option):
                continue
            assert option.help, f"{name} {option.opts}"
            spelt = [*option.opts, *option.secondary_opts]
            assert any(f'"{opt}"' in source for opt in spelt), f"{name} {spelt}"


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


def stopped(options: tuple[str, ...], sign: str, out: Path) -> str:
    """What an export said that was asked to stop once a file like `sign` was there."""
    command = [sys.executable, "-m", "llmx.cli", "export", str(EXAMPLE), "-o", str(out), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not any(out.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 143, told
    return told


def test_asked_to_stop_while_it_writes_it_leaves_nothing_behind(tmp_path: Path) -> None:
    stopped(ROUNDED, ".*partial/files/*.gguf", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_asked_to_stop_while_it_solves_it_keeps_what_is_solved_and_says_so(tmp_path: Path) -> None:
    options = tuple(map(str, QUICK[:4]))
    told = stopped(options, ".*partial/kept/layers.1.q.weight.rows", tmp_path / "out")
    [folder] = (tmp_path / "out").iterdir()
    assert folder.name.endswith(".partial") and f"are kept in {folder}: the same command with --resume goes on" in told
    command = [sys.executable, "-m", "llmx.cli", "export", str(EXAMPLE), "-o", str(tmp_path / "out"), *options]
    subprocess.run([*command, "--resume", "--no-validate"], check=True, capture_output=True)
    assert not folder.exists() and len(list((tmp_path / "out").glob("*.gguf"))) == 1
