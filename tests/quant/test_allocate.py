"""Types within a byte budget: never over it, as good as trying everything, and the same in any order."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.errors import UsageError
from llmx.quant import allocate as module
from llmx.quant.allocate import Choice, allocate

Tensors = dict[str, list[Choice]]
BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "IQ4_XS": 4.25, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}

LOSSES = st.floats(0, 10) | st.floats(0, 1e-6)
CHOICES = st.lists(st.tuples(st.integers(0, 300), LOSSES), min_size=1, max_size=4).map(
    lambda pairs: [Choice(f"t{n}", nbytes, loss) for n, (nbytes, loss) in enumerate(pairs)]
)
INSTANCES = st.lists(CHOICES, min_size=1, max_size=6).map(lambda made: {f"w{n}": made[n] for n in range(len(made))})


def totals(tensors: Tensors, chosen: dict[str, str]) -> tuple[int, float]:
    """(bytes, loss)."""
    found = [next(c for c in tensors[name] if c.type == type_name) for name, type_name in chosen.items()]
    return sum(c.nbytes for c in found), sum(c.loss for c in found)


def best(tensors: Tensors, budget: int) -> float:
    """The least loss of all combinations that fit, infinity for none."""
    return min(
        (
            sum(choice.loss for choice in combination)
            for combination in itertools.product(*tensors.values())
            if sum(choice.nbytes for choice in combination) <= budget
        ),
        default=math.inf,
    )


def model(layers: int, seed: int) -> Tensors:
    """Matrices of a transformer: a few sizes, losses that fall by four a bit and differ widely between tensors."""
    numbers = random.Random(seed)
    tensors = {}
    for layer in range(layers):
        for role, weights in {"q": 1 << 20, "k": 1 << 18, "v": 1 << 18, "o": 1 << 20, "up": 3 << 20}.items():
            scale = math.exp(numbers.gauss(0, 1.5))
            tensors[f"layers.{layer}.{role}"] = [
                Choice(name, int(weights * bits / 8), scale * 4**-bits * numbers.uniform(0.8, 1.2))
                for name, bits in BITS.items()
            ]
    return tensors


@given(INSTANCES, st.floats(0, 1))
def test_small_instances_are_solved_as_well_as_by_trying_everything(tensors: Tensors, share: float) -> None:
    smallest = sum(min(choice.nbytes for choice in choices) for choices in tensors.values())
    largest = sum(max(choice.nbytes for choice in choices) for choices in tensors.values())
    budget = smallest + int(share * (largest - smallest))
    chosen = allocate(tensors, budget)
    nbytes, loss = totals(tensors, chosen)
    assert chosen.keys() == tensors.keys()
    assert nbytes <= budget
    assert loss <= best(tensors, budget) * (1 + 1e-9)


@given(INSTANCES, st.floats(0, 1), st.randoms(use_true_random=False))
def test_the_order_of_tensors_and_choices_changes_nothing(
    tensors: Tensors, share: float, numbers: random.Random
) -> None:
    budget = sum(max(choice.nbytes for choice in choices) for choices in tensors.values())
    smallest = sum(min(choice.nbytes for choice in choices) for choices in tensors.values())
    budget = smallest + int(share * (budget - smallest))
    names = list(tensors)
    numbers.shuffle(names)
    shuffled = {name: numbers.sample(tensors[name], len(tensors[name])) for name in names}
    assert allocate(shuffled, budget) == allocate(tensors, budget)


@pytest.mark.parametrize("core", [0, 2, 8])
@given(INSTANCES, st.floats(0, 1))
def test_a_core_smaller_than_the_model_never_goes_over_budget(core: int, tensors: Tensors, share: float) -> None:
    largest = sum(max(choice.nbytes for choice in choices) for choices in tensors.values())
    smallest = sum(min(choice.nbytes for choice in choices) for choices in tensors.values())
    budget = smallest + int(share * (largest - smallest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CORE", core)
        patch.setattr(module, "SUMS", 3)
        chosen = allocate(tensors, budget)
    assert chosen.keys() == tensors.keys()
    assert totals(tensors, chosen)[0] <= budget


@pytest.mark.parametrize("layers", [4, 32, 126])
@pytest.mark.parametrize("bits", [2.7, 3.5, 4.5, 6.0])
def test_large_models_use_the_budget_and_lose_hardly_more_than_the_bound(layers: int, bits: float) -> None:
    tensors = model(layers, seed=layers)
    weights = sum(choices[-1].nbytes for choices in tensors.values()) / BITS["Q8_0"]
    budget = int(weights * bits)
    nbytes, loss = totals(tensors, allocate(tensors, budget))
    assert budget * 0.995 < nbytes <= budget
    assert loss <= bound(tensors, budget) * 1.02


def bound(tensors: Tensors, budget: int) -> float:
    """A loss that no allocation can go below: the best of Lagrange's dual over a fine range of prices."""
    prices = [10 ** (exponent / 100) for exponent in range(-1600, -300)]
    return max(
        sum(min(choice.loss + price * choice.nbytes for choice in choices) for choices in tensors.values())
        - price * budget
        for price in prices
    )


def test_an_impossible_budget_tells_the_smallest_size() -> None:
    tensors = {"a": [Choice("Q4_K", 450, 0.1), Choice("Q2_K", 300, 1.0)], "b": [Choice("Q8_0", 850, 0.0)]}
    assert allocate(tensors, 1250, fixed_bytes=100) == {"a": "Q2_K", "b": "Q8_0"}
    with pytest.raises(UsageError, match=r"1,250") as caught:
        allocate(tensors, 1249, fixed_bytes=100)
    assert "1,249" in caught.value.what
    assert "at least 1,250 bytes" in str(caught.value.fix)


def test_a_type_that_is_larger_and_worse_is_never_taken() -> None:
    tensors = {"a": [Choice("Q4_K", 450, 0.1), Choice("Q4_1", 500, 0.2), Choice("Q5_K", 550, 0.1)]}
    assert allocate(tensors, 10_000) == {"a": "Q4_K"}


def test_leftover_bytes_are_used_where_the_steepest_step_does_not_fit() -> None:
    tensors = {
        "large": [Choice("Q4_K", 400, 1.0), Choice("Q8_0", 800, 0.0)],
        "small": [Choice("Q4_K", 40, 0.01), Choice("Q8_0", 80, 0.009)],
    }
    assert allocate(tensors, 600) == {"large": "Q4_K", "small": "Q8_0"}


def test_no_tensors_need_no_bytes() -> None:
    assert allocate({}, 0) == {}
