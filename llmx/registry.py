"""Things known by name: ours in a table of import paths, those of installed packages by their entry points."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any


def declared_names(group: str) -> set[str]:
    """The names that installed packages declare in a group of entry points."""
    return {entry.name for entry in importlib.metadata.entry_points(group=group)}


def loaded(target: str) -> Any:
    """What "module:attribute" names; the module is imported."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def found(name: str, table: Mapping[str, str], group: str) -> Any | None:
    """What a name stands for, called without arguments; None for a name that nobody knows.

    table: name -> "module:callable", looked at first. group: of entry points.
    """
    if name in table:
        return loaded(table[name])()
    for entry in importlib.metadata.entry_points(group=group, name=name):
        return entry.load()()
    return None
