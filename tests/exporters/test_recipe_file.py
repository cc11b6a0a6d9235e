"""Recipes from files: which names are files, and what a file must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmx.errors import IntegrityError, UsageError
from llmx.exporters.recipe_file import find_recipe, read_recipe
from llmx.quant.recipe_presets import preset
from llmx.quant.recipe_reader import RECIPE_BYTES


def test_a_recipe_file_is_called_after_itself_unless_it_says_a_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("type: Q4_K_M")
    assert read_recipe(path).name == "mine"
    path.write_text("{name: yours, type: Q4_K_M}")
    assert read_recipe(path).name == "yours"
    path.write_text("\ufeff{type: Q4_K_M}", encoding="utf-8")
    assert find_recipe(str(path)).type == "Q4_K_M"


def test_a_name_without_a_folder_or_a_suffix_is_a_preset() -> None:
    assert find_recipe("Q4_K_M+gptq") == preset("q4_k_m+gptq")
    with pytest.raises(UsageError, match="did you mean q4_k_m"):
        find_recipe("q4_km")


@pytest.mark.parametrize("name", ["nowhere.yaml", "nowhere.JSON", "folder/q4_k_m", "."])
def test_a_file_that_is_not_there_is_a_usage_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such recipe file"):
        find_recipe(name)


def test_problems_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yml"
    path.write_text("rules: [")
    with pytest.raises(IntegrityError, match=r"broken\.yml"):
        find_recipe(str(path))
    path.write_text("rules: []")
    with pytest.raises(UsageError, match=r"broken\.yml") as caught:
        find_recipe(str(path))
    assert caught.value.problems[0].startswith("type: missing")
    path.write_bytes(b" " * (RECIPE_BYTES + 1))
    with pytest.raises(UsageError, match=r"64 KiB"):
        find_recipe(str(path))
