"""Recipes: what a rule fits, what wins, what a text may say, and that a recipe written out is read back the same."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.errors import IntegrityError, LlmxError, UsageError
from llmx.exporters.gguf_types import FILE_TYPES
from llmx.models.architecture import Role
from llmx.quant.grid import FACTORIES
from llmx.quant.protocol import EFFORTS
from llmx.quant.recipe import (
    CalibrationSettings,
    Layers,
    Recipe,
    Resolved,
    Rule,
    Tensor,
    explicit,
    idle_rules,
    resolve,
)
from llmx.quant.recipe_presets import FLOAT_MIXES, PRESETS, preset
from llmx.quant.recipe_reader import METHODS, RECIPE_BYTES, ROLES, TRANSFORMS, from_data, parse_recipe

TOTAL = 6
INSIDE: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")
TENSORS: tuple[Tensor, ...] = (
    ("embedding.weight", "embedding", None, TOTAL),
    *((f"layers.{n}.{role}.weight", role, n, TOTAL) for n in range(TOTAL) for role in INSIDE),
    *((f"layers.{n}.q.bias", "q", n, TOTAL) for n in range(TOTAL)),
    ("head.weight", "head", None, TOTAL),
)
NAMES = [name for name, *_ in TENSORS]


def one(recipe: Recipe, name: str) -> Resolved:
    return resolve(recipe, TENSORS)[NAMES.index(name)]


def layers_with(rule: Rule) -> list[int]:
    return [tensor[2] for tensor in TENSORS if tensor[1] == "v" and tensor[2] is not None and rule.fits(tensor)]


def problems(text: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse_recipe(text)
    return list(caught.value.problems)


def test_the_first_rule_that_says_a_field_decides_that_field() -> None:
    recipe = parse_recipe(
        """
        type: Q4_K_M
        method: gptq
        rules:
        - {roles: v, type: Q6_K}
        - {layers: first 2, method: rtn}
        - {roles: [v, down], type: Q8_0, transform: awq}
        """
    )
    assert one(recipe, "layers.0.v.weight") == Resolved("layers.0.v.weight", "Q6_K", "rtn", "awq", (0, 1, 2))
    assert one(recipe, "layers.5.v.weight") == Resolved("layers.5.v.weight", "Q6_K", "gptq", "awq", (0, 2))
    assert one(recipe, "layers.5.down.weight") == Resolved("layers.5.down.weight", "Q8_0", "gptq", "awq", (2,))
    assert one(recipe, "layers.5.q.weight") == Resolved("layers.5.q.weight", None, "gptq", None, ())
    assert one(recipe, "embedding.weight") == Resolved("embedding.weight", None, "gptq", None, ())


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("first 4", [0, 1, 2, 3]),
        ("first 99", [0, 1, 2, 3, 4, 5]),
        ("last 2", [4, 5]),
        ("last 99", [0, 1, 2, 3, 4, 5]),
        ("3-7", [3, 4, 5]),
        ("-3--2", [3, 4]),
        ("1--2", [1, 2, 3, 4]),
        ("every 3", [0, 3]),
        ("1-5 every 2", [1, 3, 5]),
        ("last 4 every 2", [2, 4]),
        ("[0, -1]", [0, 5]),
        ("[99]", []),
        ("2", [2]),
        ("-2", [4]),
    ],
)
def test_layers_are_said_in_words_ranges_or_numbers(said: str, meant: list[int]) -> None:
    recipe = parse_recipe(f"{{type: Q4_K, rules: [{{layers: {said}, type: Q6_K}}]}}")
    assert layers_with(recipe.rules[0]) == meant
    assert from_data(recipe.to_json()).rules == recipe.rules
    assert not recipe.rules[0].fits(TENSORS[0])


@pytest.mark.parametrize(
    "said", ["first", "first 0", "last -1", "7-3", "-1--3", "every 0", "''", "[]", "[a]", "1.5", "all"]
)
def test_layers_that_mean_nothing_are_refused(said: str) -> None:
    (problem,) = problems(f"{{type: Q4_K, rules: [{{layers: {said}, type: Q6_K}}]}}")
    assert problem.startswith("rules[0].layers: ")
    assert "first 4" in problem


def test_method_awq_is_the_transform_awq_and_rounding() -> None:
    recipe = Recipe("r", "Q4_K_M", method="awq", rules=(Rule(roles=("q",), method="rtn"), Rule(layers=Layers(0, 0))))
    assert one(recipe, "layers.0.v.weight").method == "rtn"
    assert one(recipe, "layers.0.v.weight").transform == "awq"
    assert one(recipe, "layers.0.q.weight").transform is None
    smooth = Recipe("r", "Q4_K_M", "rtn", transform="smoothquant", rules=(Rule(roles=("o",), transform="none"),))
    assert one(smooth, "layers.0.q.weight").transform == "smoothquant"
    assert one(smooth, "layers.0.o.weight").transform is None
    assert one(smooth, "layers.0.o.weight").rules == (0,)


def test_every_problem_is_told_at_once_with_its_place() -> None:
    told = problems(
        """
        typ: Q4_K_M
        method: gptqq
        effort: 3
        calibration: {tokens: -1}
        rules:
        - {roles: [v, gates], type: Q6_K}
        - {pattern: "(", type: 4}
        - {layers: 9-1, method: rtn, extra: 1}
        - {roles: [q]}
        - just words
        - {method: awq, transform: smoothquant}
        """
    )
    places = [problem.split(": ")[0] for problem in told]
    assert sorted(places) == sorted(
        [
            "typ",
            "type",
            "method",
            "effort",
            "calibration.tokens",
            "calibration.length",
            "rules[0].roles",
            "rules[1].pattern",
            "rules[1].type",
            "rules[2].extra",
            "rules[2].layers",
            "rules[3]",
            "rules[4]",
            "rules[5].transform",
        ]
    )
    assert any("did you mean type?" in problem for problem in told)
    assert any("did you mean gptq?" in problem for problem in told)
    assert any("did you mean gate" in problem for problem in told)


@pytest.mark.parametrize("text", ["", "- 1", "just words", "3", "type: [a]", "{type: Q4_K, rules: {}}", "1: 2"])
def test_a_text_that_is_no_recipe_is_a_usage_error(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"type: \xff", "UTF-8"),
        ("type: Q4_K\nrules: &a []\n", "line 2: anchors and aliases"),
        ("a: *b", "anchors and aliases"),
        ("a: &x [1]\nb: &y [*x, *x, *x]\nc: [*y, *y, *y]", "line 1: anchors"),
        ("type: Q4_K\ntype: Q5_K", "line 2: the key 'type' is repeated"),
        ("type: !!python/object/apply:os.system ['true']", "line 1"),
        ("[" * 60_000, "nested deeper"),
        ("{a: " * 10_000, "nested deeper"),
        ("type: [", "line 1"),
        ("type: 2020-13-45", "month"),
        ("? [a]\n: b", "line 1"),
        ("type: \x00", "special characters"),
        ("a: 1\n---\nb: 2", "line 2"),
    ],
)
def test_what_is_not_plain_yaml_is_an_integrity_error(text: str | bytes, why: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        parse_recipe(text)
    assert why in str(caught.value)


def test_a_recipe_of_more_than_64_kib_is_refused_unread() -> None:
    with pytest.raises(UsageError, match="64 KiB"):
        parse_recipe(b"&" * (RECIPE_BYTES + 1))


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_any_text_is_a_recipe_or_one_of_our_errors(text: bytes | str) -> None:
    with contextlib.suppress(LlmxError):
        parse_recipe(text)


KEYS = st.sampled_from(["type", "rules", "roles", "layers", "calibration", "tokens"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)


@given(PLAIN)
def test_any_plain_data_is_a_recipe_or_one_of_our_errors(value: Any) -> None:
    with contextlib.suppress(LlmxError):
        from_data(value)


def _run(first: int, length: int, every: int, from_end: bool) -> Layers:
    if from_end:
        return Layers(-first - length - 1, -first - 1, every)
    return Layers(first, first + length, every)


TYPES = st.sampled_from(["Q4_K", "Q6_K", "int4-g128-sym", "F16"])
PATTERNS = st.text(min_size=1, max_size=12).map(re.escape)
RUNS = st.builds(_run, st.integers(0, 9), st.integers(0, 9), st.integers(1, 4), st.booleans())


def _unless_contrary(rule: Rule) -> bool:
    return rule.method != "awq" or rule.transform in (None, "awq")


RULES = st.builds(
    Rule,
    roles=st.none() | st.lists(st.sampled_from(ROLES), min_size=1, max_size=3).map(tuple),
    layers=st.none() | RUNS | st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(tuple),
    pattern=st.none() | st.sampled_from([r"\.v\.", "bias$", r"^layers\.[0-2]"]) | PATTERNS,
    type=TYPES,
    method=st.none() | st.sampled_from(METHODS),
    transform=st.none() | st.sampled_from(TRANSFORMS),
).filter(_unless_contrary)
RECIPES = st.builds(
    Recipe,
    name=st.text(min_size=1, max_size=12),
    type=TYPES,
    method=st.sampled_from(METHODS),
    effort=st.sampled_from(EFFORTS),
    rules=st.lists(RULES, max_size=4).map(tuple),
    calibration=st.none() | st.builds(CalibrationSettings, st.integers(1, 10**9), st.integers(1, 10**5)),
)


@given(RECIPES)
def test_a_recipe_is_read_back_the_same_from_yaml_and_json(recipe: Recipe) -> None:
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert parse_recipe(recipe.to_yaml().encode()) == recipe
    assert from_data(json.loads(json.dumps(recipe.to_json()))) == recipe


@given(RECIPES)
def test_a_recipe_spelt_out_gives_every_tensor_the_same_and_is_read_back(recipe: Recipe) -> None:
    spelt = parse_recipe(explicit(recipe, TENSORS).to_yaml())
    assert spelt == explicit(recipe, TENSORS)

    def given_to(found: Recipe) -> list[tuple[object, ...]]:
        return [(r.name, r.type, r.method, r.transform) for r in resolve(found, TENSORS)]

    assert given_to(spelt) == given_to(recipe)
    assert all(len(found.rules) == 1 for found in resolve(spelt, TENSORS))
    assert not idle_rules(spelt, resolve(spelt, TENSORS))


def test_an_allocation_becomes_a_recipe_that_people_can_read() -> None:
    types = {name: "Q6_K" if ".v." in name or "head" in name else "Q4_K" for name in NAMES}
    matrices = [tensor for tensor in TENSORS if tensor[0].endswith("weight")]
    recipe = explicit(preset("q4_k_m+rtn"), matrices, types)
    assert recipe.to_yaml() == (
        "name: q4_k_m+rtn\ntype: Q4_K_M\nmethod: rtn\neffort: balanced\nrules:\n"
        "- roles: [embedding]\n  type: Q4_K\n  method: rtn\n  transform: none\n"
        "- roles: [q, k, o, gate, up, down]\n  layers: first 6\n  type: Q4_K\n  method: rtn\n  transform: none\n"
        "- roles: [v]\n  layers: first 6\n  type: Q6_K\n  method: rtn\n  transform: none\n"
        "- roles: [head]\n  type: Q6_K\n  method: rtn\n  transform: none\n"
    )
    assert {r.name: r.type for r in resolve(recipe, matrices)} == {name: types[name] for name, *_ in matrices}


def test_a_spelt_out_recipe_of_a_very_large_model_still_fits_its_file() -> None:
    layers = 200
    random = [("Q4_K", "Q5_K", "Q6_K")[n * n % 7 % 3] for n in range(layers * 7)]
    tensors: list[Tensor] = [(f"layers.{n}.{role}.weight", role, n, layers) for n in range(layers) for role in INSIDE]
    types = {tensor[0]: type_name for tensor, type_name in zip(tensors, random, strict=True)}
    text = explicit(preset("q4_k_m"), tensors, types).to_yaml()
    assert len(text) < RECIPE_BYTES / 4
    assert {r.name: r.type for r in resolve(parse_recipe(text), tensors)} == types


def test_rules_that_give_no_tensor_anything_are_known() -> None:
    recipe = parse_recipe(
        "{type: Q4_K, rules: [{roles: expert_up, type: Q3_K}, {type: Q6_K}, {roles: q, type: Q8_0}, {method: rtn}]}"
    )
    assert idle_rules(recipe, resolve(recipe, TENSORS)) == (0, 2)


def test_every_file_mix_has_a_preset_and_every_quantized_one_its_methods() -> None:
    for name in FILE_TYPES:
        assert preset(name.lower()).type.upper() == name
    for name in set(FILE_TYPES) - set(FLOAT_MIXES):
        for method in ("rtn", "gptq", "awq"):
            found = preset(f"{name}+{method}")
            assert (found.type, found.method) == (name, method)


def test_every_preset_is_named_as_its_key_of_a_type_that_exists_and_read_back_the_same() -> None:
    for name, recipe in PRESETS.items():
        assert recipe.type in FILE_TYPES or recipe.type in FACTORIES
        assert recipe.name == name == name.lower()
        assert parse_recipe(recipe.to_yaml()) == recipe


def test_the_serving_engines_recipes_differ_in_transform_and_method() -> None:
    got = {name: one(preset(name), "layers.0.q.weight") for name in ("w4a16-awq", "w8a8-smoothquant", "w4a16-gptq")}
    assert [(r.method, r.transform) for r in got.values()] == [("rtn", "awq"), ("rtn", "smoothquant"), ("gptq", None)]


def test_an_unknown_preset_names_its_neighbours() -> None:
    with pytest.raises(UsageError, match="w4a16-awq") as caught:
        preset("w4a16_awq")
    assert "did you mean" in str(caught.value)
    with pytest.raises(UsageError, match=r"choose a file mix such as q4_k_m"):
        preset("%%%%")


def test_roles_are_those_of_the_architecture() -> None:
    assert get_args(Role) == ROLES
