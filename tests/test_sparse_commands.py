"""Sparse exports on the command line: what is planned, written, inspected and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
Here = Callable[..., Done]


def test_a_sparse_export_is_planned_written_inspected_and_verified(here: Here, tmp_path: Path) -> None:
    asked = ("--sparsity", "2:4", "--method", "magnitude")
    planned = here("plan", EXAMPLE, *asked, "--json")
    assert planned.code == 0, planned.stderr
    assert any("2:4 sparse by magnitude: 28 matrices" in note for note in planned.told["notes"])
    made = here("export", EXAMPLE, *asked, "--no-validate", "-o", tmp_path / "x.gguf", "--threads", 1, "--json")
    assert made.code == 0, made.stderr
    assert made.told["type"] == "F16"
    told = here("inspect", tmp_path / "x.gguf", "--json").told["metadata"]["llmx.sparsity"]["value"]
    assert json.loads(told) == {"pattern": "2:4", "method": "magnitude", "others": {}}
    assert "llmx.sparsity" in here("inspect", tmp_path / "x.gguf").stdout
    assert here("verify", tmp_path / "x.gguf").code == 0
    again = here(
        "export", EXAMPLE, "--from-manifest", tmp_path / "x.manifest.json", "--no-validate", "-o", tmp_path / "b"
    )
    assert again.code == 0, again.stderr


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--sparsity", "3:4"), 2, "2:4, a share such as 50%"),
        (("--method", "wanda"), 2, "needs --sparsity"),
        (("--sparsity", "2:4", "--method", "gptq"), 2, "makes no weight zero"),
        (("--sparsity", "2:4", "--method", "wanda", "--imatrix", "i.gguf"), 2, "i.gguf"),
        (("--sparsity", "2:4", "--bits", "4"), 3, "Q4_K has no exact zero"),
    ],
)
def test_what_cannot_be_sparse_is_refused_before_the_start(
    options: tuple[str, ...], code: int, told: str, here: Here
) -> None:
    done = here("plan", EXAMPLE, *options)
    assert done.code == code, done.stderr
    assert told in done.stderr
