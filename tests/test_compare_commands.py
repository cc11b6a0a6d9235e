"""The commands that judge artifacts side by side or against each other, as they are typed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llmx import api
from llmx.cli import commands
from llmx.errors import UsageError
from llmx.validate.runtimes import find_runtime

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
FEW = ("--positions", "64", "--threads", "1")
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(commands, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a coarse artifact, a fine one)."""
    if (reason := find_runtime("llama.cpp").unavailable()) is not None:
        pytest.skip(f"llama.cpp is not here: {reason}")
    folder = tmp_path_factory.mktemp("made")
    paths = folder / "coarse.gguf", folder / "fine.gguf"
    for path, bits in zip(paths, (4, 8), strict=True):
        api.export(api.ExportRequest(str(EXAMPLE), bits=bits, method="rtn", validate=False, threads=1, output=path))
    return paths


def test_a_comparison_is_a_table_a_page_json_and_csv_and_goes_on_from_a_kept_reference(
    run: Run, made: tuple[Path, Path], tmp_path: Path
) -> None:
    coarse, fine = made
    kept, table = tmp_path / "kept", tmp_path / "table.csv"
    keeping = ("--keep-reference", kept, "-o", tmp_path / "out", "--csv", table, "--json")
    first = run("compare", fine, coarse, "--reference", EXAMPLE, *FEW, *keeping)
    assert first.exit_code == 0
    told = json.loads(first.stdout)
    assert [row["name"] for row in told["artifacts"]] == ["coarse.gguf", "fine.gguf"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == told
    assert "fine.gguf" in (tmp_path / "out" / "compare.html").read_text()
    with table.open() as lines:
        assert [float(row["kl_mean"]) for row in csv.DictReader(lines)] == [r["kl_mean"] for r in told["artifacts"]]
    shown = run("compare", coarse, "--reference", kept, "--threads", 1, "--markdown").stdout
    assert shown.startswith("| artifact | size |") and f"{told['artifacts'][0]['kl_mean']:.4g}" in shown
    refused = run("compare", coarse, "--reference", kept, *FEW)
    assert isinstance(refused.exception, UsageError) and "--positions" in str(refused.exception)
    other = run("compare", coarse, "--reference", kept, "--text", ROOT / "README.md")
    assert isinstance(other.exception, UsageError) and "another text" in str(other.exception)


def test_a_comparison_takes_a_text_and_a_broken_file_exits_4_with_its_row(
    run: Run, made: tuple[Path, Path], tmp_path: Path
) -> None:
    text, broken = tmp_path / "text.txt", tmp_path / "broken.gguf"
    text.write_text("Once upon a time there was a fox. It lived in a wood and ate what it found. " * 60)
    broken.write_bytes(made[0].read_bytes()[:5000])
    done = run("compare", broken, made[0], "--reference", EXAMPLE, "--text", text, *FEW)
    assert done.exit_code == 4
    assert "broken.gguf: failed" in done.stdout and "coarse.gguf" in done.stdout


def test_an_artifact_is_validated_against_another_without_a_checkpoint(run: Run, made: tuple[Path, Path]) -> None:
    coarse, fine = made
    same = run("validate", fine, "--against", fine, *FEW, "--json")
    told = json.loads(same.stdout)
    assert same.exit_code == 0 and told["passed"] is True and told["against"]["name"] == "fine.gguf"
    tight = run("validate", coarse, "--against", fine, *FEW, "--max-kl", 0.002)
    assert tight.exit_code == 4 and "failed: against.kl" in tight.stdout
