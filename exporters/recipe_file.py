"""Recipes by name or from a file: the quantizer itself opens no file."""

from __future__ import annotations

from pathlib import Path

from llmx.errors import UsageError
from llmx.quant.recipe import Recipe
from llmx.quant.recipe_presets import preset
from llmx.quant.recipe_reader import RECIPE_BYTES, parse_recipe

SUFFIXES = (".yaml", ".yml", ".json")


def find_recipe(name_or_path: str) -> Recipe:
    """The recipe in a file, or the one of this name.

    A file is what has a folder in its name or ends in .yaml, .yml or .json. Raises: as `read_recipe` and `preset`.
    """
    path = Path(name_or_path)
    return read_recipe(path) if path.suffix.lower() in SUFFIXES or path.name != name_or_path else preset(name_or_path)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML or JSON file, called after the file unless it says a name.

    Raises: UsageError when there is no such file, it is too large, or it says what no recipe says, every problem at
    once; IntegrityError when it is not UTF-8, not YAML, or uses aliases.
    """
    if not path.is_file():
        raise UsageError("there is no such recipe file", where=path)
    try:
        with path.open("rb") as stream:
            data = stream.read(RECIPE_BYTES + 1)
    except OSError as error:
        raise UsageError("the recipe cannot be read", where=f"{path}: {error}") from error
    return parse_recipe(data, path.stem, path)
