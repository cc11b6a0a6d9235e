"""Patterns of zeros, and what magnitude alone keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmx.errors import UsageError
from llmx.quant.recipe import Recipe, Rule, explicit, resolve
from llmx.quant.recipe_reader import from_data, parse_recipe
from llmx.quant.sparsity import by_magnitude, crowded, find_pattern, largest_kept

TENSORS = [
    ("embedding.weight", "embedding", None, 2),
    ("layers.0.q.weight", "q", 0, 2),
    ("layers.1.q.weight", "q", 1, 2),
    ("layers.0.router.weight", "router", 0, 2),
]


def test_patterns_are_known_by_their_names() -> None:
    two = find_pattern("2:4")
    assert (two.group, two.kept, two.zeros) == (4, 2, 0.5)
    assert [find_pattern(name).name for name in ("50%", "62.5%", "5.0%")] == ["50%", "62.5%", "5%"]
    assert find_pattern("62.5%").pruned(1000) == 625
    assert find_pattern("2:4").problem(126) is not None and find_pattern("50%").problem(126) is None


@pytest.mark.parametrize("name", ["2:3", "0%", "100%", "half", "", "-5%", "50"])
def test_what_is_no_pattern_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match="no sparsity") as caught:
        find_pattern(name)
    assert "2:4" in str(caught.value.fix)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(["2:4", "50%", "30%"]))
def test_magnitude_keeps_the_largest_weights_as_they_are(seed: int, name: str) -> None:
    weight, pattern = np.random.default_rng(seed).standard_normal((5, 40)).astype(np.float32), find_pattern(name)
    found = by_magnitude(weight, pattern)
    kept = found != 0
    assert np.array_equal(found[kept], weight[kept])
    size = pattern.group or 40
    for part, whole in zip(kept.reshape(-1, size), np.abs(weight).reshape(-1, size), strict=True):
        assert part.sum() == size - round(size * pattern.zeros)
        assert whole[part].min() >= whole[~part].max()


def test_of_equal_weights_the_first_are_kept() -> None:
    kept = largest_kept(np.ones((1, 8), np.float32), find_pattern("2:4"))
    assert kept.tolist() == [[True, True, False, False] * 2]


def test_crowded_groups_are_counted() -> None:
    values = np.array([[1, 2, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]], np.float32)
    assert crowded(values, find_pattern("2:4")) == 2
    assert crowded(values, find_pattern("50%")) == 9


def test_a_recipe_says_sparsity_at_its_top_and_rules_turn_it_off() -> None:
    recipe = parse_recipe("type: F16\nsparsity: 2:4\nrules:\n- {roles: [q], layers: [1], sparsity: none}\n")
    assert recipe.sparsity == "2:4"
    got = {one.name: (one.sparsity, one.method) for one in resolve(recipe, TENSORS)}
    assert got == {
        "embedding.weight": (None, "auto"),
        "layers.0.q.weight": ("2:4", "sparsegpt"),
        "layers.1.q.weight": (None, "auto"),
        "layers.0.router.weight": (None, "auto"),
    }
    assert from_data(recipe.to_json()) == recipe
    assert parse_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(("method", "dense"), [("sparsegpt", "auto"), ("wanda", "rtn"), ("magnitude", "rtn")])
def test_where_nothing_is_pruned_the_method_rounds_in_the_same_spirit(method: str, dense: str) -> None:
    recipe = from_data({"type": "F16", "method": method, "sparsity": "50%"})
    assert [one.method for one in resolve(recipe, TENSORS)] == [dense, method, method, dense]


def test_a_sparse_recipe_spelt_out_resolves_to_the_same() -> None:
    recipe = Recipe("r", "F16", "wanda", sparsity="2:4", rules=(Rule(("q",), layers=(0,), sparsity="none"),))
    again = explicit(recipe, TENSORS)

    def meant(one: Recipe) -> list[tuple[str | None, str]]:
        return [(got.sparsity, got.method) for got in resolve(one, TENSORS)]

    assert meant(again) == meant(recipe)


@pytest.mark.parametrize("said", ["sparsity: 2:3", "sparsity: 0.5", "sparsity: [2, 4]"])
def test_a_recipe_with_an_unknown_sparsity_is_refused_with_its_place(said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(f"type: F16\n{said}\n")
    assert any(problem.startswith("sparsity:") and "2:4" in problem for problem in caught.value.problems)


def test_numbers_of_a_recipe_are_still_numbers() -> None:
    recipe = parse_recipe(
        "type: F16\ncalibration: {tokens: 65536, length: 512}\nrules:\n- {layers: [-1, 0], type: F32}\n"
    )
    assert recipe.calibration is not None and recipe.calibration.tokens == 65536
    assert recipe.rules[0].layers == (-1, 0)
