"""The named mixes against stock llama.cpp's own choices, recorded by bench/stock_types.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stock_types import summary

from llmx.errors import UsageError
from llmx.exporters.gguf import GgufOptions, planned_steps
from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_tensors import entries
from llmx.exporters.gguf_types import FILE_TYPES, fitting, parse_overrides
from llmx.formats.imatrix import ImportanceMatrix
from llmx.models.families import describe

ROOT = Path(__file__).parents[2]
GOLDEN: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "stock_types.json").read_text())
NO_IMPORTANCE = ImportanceMatrix({}, {}, (), 0, 0)


def chosen_types(config: dict[str, Any], file_type: str, **options: Any) -> dict[str, str]:
    architecture = describe(config)
    family = gguf_family(architecture)
    name, _, importance = file_type.partition("+")
    chosen = GgufOptions(FILE_TYPES[name], importance=NO_IMPORTANCE if importance else None, **options)
    planned = entries(architecture, family, architecture.vocab)
    return {step.name: step.type_name for step in planned_steps(architecture, family, planned, chosen)}


@pytest.mark.parametrize("case", GOLDEN)
def test_every_mix_has_the_types_that_stock_llama_cpp_chooses(case: str) -> None:
    config = GOLDEN[case]["config"]
    for file_type, expected in GOLDEN[case]["types"].items():
        assert summary(chosen_types(config, file_type)) == expected, file_type


def test_the_recorded_cases_cover_every_quantized_mix() -> None:
    recorded = {name.partition("+")[0] for case in GOLDEN.values() for name in case["types"]}
    assert recorded == {name for name in FILE_TYPES if name not in ("F32", "F16", "BF16")}


@pytest.mark.parametrize(
    ("type_name", "columns", "expected"),
    [("Q4_K", 256, "Q4_K"), ("Q4_K", 96, "Q5_0"), ("Q2_K", 32, "Q4_0"), ("IQ4_XS", 96, "IQ4_NL"), ("Q6_K", 40, "F16")],
)
def test_a_row_that_does_not_divide_falls_back(type_name: str, columns: int, expected: str) -> None:
    assert fitting(type_name, columns) == expected


def test_an_override_wins_over_the_mix_and_the_first_one_counts() -> None:
    overrides = parse_overrides(["attn_v=Q8_0", r"blk\.0\.=Q2_K"])
    types = chosen_types(GOLDEN["llama-32"]["config"], "Q4_K_M", overrides=overrides)
    assert types["blk.0.attn_v.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q2_K"
    assert types["blk.1.ffn_up.weight"] == "Q4_K"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_all_mistakes_of_overrides_are_named_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        parse_overrides(["attn_v", "(=Q8_0", "x=Q9"])
    assert len(raised.value.problems) == 3
