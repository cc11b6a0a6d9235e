"""Recipes from text that anybody may have written: everything wrong with one is told at once, with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

import yaml

from llmx.errors import IntegrityError, UsageError
from llmx.models.architecture import Role
from llmx.quant.protocol import EFFORTS
from llmx.quant.recipe import CalibrationSettings, Layers, Method, Recipe, Rule, Transform
from llmx.quant.sparsity import CHOICES, NONE, find_pattern

RECIPE_BYTES = 64 << 10
DEPTH = 8  # of nested collections; a recipe has three
METHODS: tuple[Method, ...] = get_args(Method)
TRANSFORMS: tuple[str, ...] = ("none", *get_args(Transform))
ROLES: tuple[Role, ...] = get_args(Role)
Reader = Callable[[Any, str, list[str]], Any]  # (value, its place, problems to add to) -> what it means, None if bad

_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_LAYERS = re.compile(r"(?:(first|last) (\d{1,6})|(-?\d{1,6})-(-?\d{1,6}))?(?: ?\bevery (\d{1,6}))?")
_LAYERS_FIX = 'say "first 4", "last 2", "3-7", "every 3" or a list of numbers, negative from the end'


class _Loader(yaml.SafeLoader):
    """YAML without aliases, by which a few lines stand for gigabytes, without keys said twice, and not deep."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent) or getattr(self.peek_event(), "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=self._mark())
        if self.depth >= DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEPTH} levels", problem_mark=self._mark())
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is repeated", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _mark(self) -> yaml.Mark:
        return self.peek_event().start_mark


def _without_base_sixty() -> None:
    """YAML 1.1 reads 2:4 as a number to the base of sixty, 124; YAML 1.2, and everybody who writes it, as a text."""
    integer = "tag:yaml.org,2002:int"
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != integer]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.add_implicit_resolver(
        integer, re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
    )


_without_base_sixty()


def parse_recipe(data: bytes | str, name: str = "recipe", where: object | None = None) -> Recipe:
    """The recipe in a YAML (or JSON) text. name: what it is called unless it says so itself; where: for errors.

    Raises: IntegrityError when the text is not UTF-8, not YAML, or uses aliases; UsageError when it is too large, and
    for what the recipe says, every problem with its place ("rules[2].roles").
    """
    if len(data) > RECIPE_BYTES:
        raise UsageError(f"a recipe has at most {RECIPE_BYTES >> 10} KiB", where=where, fix="fold rules into patterns")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        raise IntegrityError("the recipe is not UTF-8", where=where, problems=[str(error)]) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        raise IntegrityError("the recipe is not plain YAML", where=where, problems=[_told(error)]) from error
    return from_data(value, name, where)


def from_data(value: object, name: str = "recipe", where: object | None = None) -> Recipe:
    """The recipe that `Recipe.to_json` gives, or that a YAML text holds. Raises: UsageError as `parse_recipe`."""
    problems: list[str] = []
    fields = _fields(value, _RECIPE, "", problems)
    if isinstance(value, Mapping) and value.get("type") is None:
        problems.append("type: missing; a file mix such as Q4_K_M, or a grid")
    if problems:
        raise UsageError("the recipe cannot be followed", where=where, problems=problems)
    for key in ("transform", "sparsity"):
        if fields.get(key) == NONE:
            del fields[key]
    return Recipe(**{"name": name, **fields})


def _no_such(what: str, value: object, choices: Collection[str]) -> str:
    """ "there is no role 'gates'; did you mean gate?", or all the choices where none is near."""
    near = get_close_matches(value.lower(), choices, 3) if isinstance(value, str) else []
    told = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"
    return f"there is no {what} {value!r}; {told}"


def _told(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def _fields(value: object, readers: Mapping[str, Reader], place: str, problems: list[str]) -> dict[str, Any]:
    """The fields that are said, read."""
    if not isinstance(value, Mapping):
        problems.append(f"{place or 'the recipe'}: keys and values were expected, this is {_kind(value)}")
        return {}
    dot = f"{place}." if place else ""
    problems += [f"{dot}{key}: {_no_such('key', key, readers)}" for key in value if key not in readers]
    known = {key: value[key] for key in readers if value.get(key) is not None}
    if known.get("method") == "awq" and known.get("transform", "awq") != "awq":
        problems.append(f"{dot}transform: method awq is the transform awq and rounding; say one of the two")
    return {key: readers[key](said, f"{dot}{key}", problems) for key, said in known.items()}


def _kind(value: object) -> str:
    names = {str: "a text", list: "a list", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")


def _text(value: object, place: str, problems: list[str]) -> str | None:
    if isinstance(value, str) and value:
        return value
    problems.append(f"{place}: a text was expected, this is {_kind(value)}")
    return None


def _type(value: object, place: str, problems: list[str]) -> str | None:
    if isinstance(value, str) and _TYPE.fullmatch(value):
        return value
    problems.append(f"{place}: {value!r} is no name of a type, such as Q4_K")
    return None


def _one_of(what: str, choices: tuple[str, ...]) -> Reader:
    def read(value: object, place: str, problems: list[str]) -> str | None:
        if isinstance(value, str) and value in choices:
            return value
        problems.append(f"{place}: {_no_such(what, value, choices)}")
        return None

    return read


def _sparsity(value: object, place: str, problems: list[str]) -> str | None:
    if value == NONE:
        return NONE
    try:
        if isinstance(value, str):
            return find_pattern(value).name
    except UsageError as error:
        problems.append(f"{place}: {error.what}; choose {CHOICES}")
        return None
    problems.append(f"{place}: this is {_kind(value)}; choose {CHOICES}")
    return None


def _roles(value: object, place: str, problems: list[str]) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names:
        problems.append(f"{place}: no role at all; leave the key out for every role")
    read = _one_of("role", ROLES)
    return tuple(read(name, place, problems) for name in names)


def _layers(value: object, place: str, problems: list[str]) -> Layers | tuple[int, ...] | None:
    numbers = [value] if type(value) is int else value
    if isinstance(numbers, list):
        if numbers and all(type(number) is int for number in numbers):
            return tuple(numbers)
    elif isinstance(value, str) and (found := _LAYERS.fullmatch(value.strip())) and any(found.groups()):
        end, count, first, last, every = found.groups()
        layers = Layers(int(first or 0), int(last or -1), int(every or 1))
        if end is not None:
            layers = (
                Layers(0, int(count) - 1, layers.every) if end == "first" else Layers(-int(count), -1, layers.every)
            )
        ordered = (layers.first < 0) != (layers.last < 0) or layers.first <= layers.last
        if ordered and layers.every > 0 and int(count or 1) > 0:
            return layers
    problems.append(f"{place}: {value!r} names no layers; {_LAYERS_FIX}")
    return None


def _pattern(value: object, place: str, problems: list[str]) -> str | None:
    text = _text(value, place, problems)
    if text is not None:
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"{place}: {text!r} is no regular expression: {error}")
    return text


def _count(value: object, place: str, problems: list[str]) -> int | None:
    if type(value) is int and value > 0:
        return value
    problems.append(f"{place}: a number above 0 was expected, this is {value!r}")
    return None


def _calibration(value: object, place: str, problems: list[str]) -> CalibrationSettings | None:
    fields = _fields(value, {"tokens": _count, "length": _count}, place, problems)
    if not isinstance(value, Mapping):
        return None
    missing = [key for key in ("tokens", "length") if value.get(key) is None]
    problems += [f"{place}.{key}: missing" for key in missing]
    return None if missing else CalibrationSettings(**fields)


def _rules(value: object, place: str, problems: list[str]) -> tuple[Rule, ...]:
    if not isinstance(value, list):
        problems.append(f"{place}: a list was expected, this is {_kind(value)}")
        return ()
    return tuple(_rule(rule, f"{place}[{number}]", problems) for number, rule in enumerate(value))


def _rule(value: object, place: str, problems: list[str]) -> Rule:
    fields = _fields(value, _RULE, place, problems)
    if isinstance(value, Mapping) and not value.keys() & _GIVEN.keys():
        problems.append(f"{place}: gives nothing; say a type, a method, a transform or a sparsity")
    return Rule(**fields)


_GIVEN: Mapping[str, Reader] = {
    "type": _type,
    "method": _one_of("method", METHODS),
    "transform": _one_of("transform", TRANSFORMS),
    "sparsity": _sparsity,
}
_RULE: Mapping[str, Reader] = {"roles": _roles, "layers": _layers, "pattern": _pattern, **_GIVEN}
_RECIPE: Mapping[str, Reader] = {
    "name": _text,
    **_GIVEN,
    "effort": _one_of("effort", EFFORTS),
    "calibration": _calibration,
    "rules": _rules,
}
