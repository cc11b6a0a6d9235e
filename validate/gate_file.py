"""Limits from a YAML file that anybody may have written: everything wrong with it is told at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from llmx.errors import UsageError
from llmx.validate.gate import LIMITED, WORDS, problem_with

GATE_BYTES = 64 << 10
KEYS = (*WORDS, *LIMITED)
FIX = "for example `max_kl: 0.05` or `conversion.kl: 1.0e-6`, a line each"


class _Loader(yaml.SafeLoader):
    """YAML in which no key is said twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is repeated", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_gate(path: Path) -> dict[str, float]:
    """Returns the limits of a gate file: a word of WORDS or the name of a check -> a number.

    Raises: UsageError when the file cannot be read, is no flat YAML, or says what no gate says, every problem at once.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError("the gate cannot be read", where=f"{path}: {error.strerror}") from error
    if len(data) > GATE_BYTES:
        raise UsageError(f"a gate has at most {GATE_BYTES >> 10} KiB", where=path)
    try:
        told = yaml.load(data.decode("utf-8-sig"), _Loader)
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise UsageError("the gate is not plain YAML", where=path, problems=[_told(error)], fix=FIX) from error
    if not isinstance(told, Mapping) or not told:
        raise UsageError("the gate says nothing: keys and numbers were expected", where=path, fix=FIX)
    return _limits(told, path)


def _limits(told: Mapping[Any, Any], path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    problems: list[str] = []
    unknown = False
    for said, value in told.items():
        key = said.replace("-", "_") if isinstance(said, str) else said
        limit = _number(value)
        if key not in KEYS:
            unknown = True
            near = " or ".join(get_close_matches(str(key), KEYS, 2))
            problems.append(f"{said}: there is no such limit" + (f"; did you mean {near}?" if near else ""))
        elif (problem := problem_with(key, limit)) is not None:
            problems.append(problem)
        elif key in found:
            problems.append(f"{said}: said twice")
        else:
            found[key] = float(limit)
    if problems:
        fix = f"choose from: {', '.join(KEYS)}" if unknown else FIX
        raise UsageError("the gate cannot be followed", where=path, problems=problems, fix=fix)
    return found


def _number(value: Any) -> Any:
    """The value; YAML 1.1 reads 1e-6, without a point, as a text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _told(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)
