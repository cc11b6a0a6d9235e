"""What is decided for the user: when to calibrate, what each tensor gets, and which wishes contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stock_types import random_checkpoint

from llmx import api
from llmx.errors import IntegrityError, LlmxError, UnsupportedError, UsageError
from llmx.exporters import quantization
from llmx.exporters.assignment import Assignment
from llmx.exporters.format_types import GGUF, ONNX, FormatTypes
from llmx.exporters.gguf_types import recipe_type
from llmx.exporters.quantization import (
    FEWEST_TOKENS,
    MOST_TOKENS,
    Quantization,
    Wishes,
    assignments,
    calibration_of,
    chosen_recipe,
    default_tokens,
    to_measure,
)
from llmx.formats.gguf import read_gguf
from llmx.models.model import open_model
from llmx.quant.recipe import Recipe
from llmx.quant.recipe_reader import from_data

RULES = """
name: careful
type: Q4_K_S
method: gptq
effort: fast
calibration: {tokens: 3072, length: 128}
rules:
- {roles: [v, down], layers: first 1, type: Q6_K}
- {roles: [o], method: rtn}
- {layers: [-1], roles: [up, gate], type: Q5_K, method: rtn}
"""


@pytest.fixture
def decide(solvable: Callable[[str], Path]) -> Callable[..., Quantization]:
    """decide(recipe as plain data, base=, types=, **wishes): for the small llama, of GGUF files if nothing is said."""

    def run(
        plain: dict[str, Any], threads: int = 2, base: str = "", types: FormatTypes = GGUF, **wishes: Any
    ) -> Quantization:
        recipe = from_data(plain)
        asked = Wishes(**wishes)
        model = open_model(solvable("llama"))
        base = base or recipe_type(recipe.type).base
        return quantization.quantization(model, asked, recipe, base, threads, types)

    return run


@pytest.fixture
def export(solvable: Callable[[str], Path], tmp_path: Path) -> Callable[..., api.ExportResult]:
    def run(family: str, **options: Any) -> api.ExportResult:
        return api.export(
            api.ExportRequest(str(solvable(family)), output=tmp_path / "out.gguf", validate=False, **options)
        )

    return run


# When to calibrate.


def test_auto_calibrates_a_model_that_takes_minutes(decide: Callable[..., Quantization]) -> None:
    found = decide({"type": "Q4_K_M"})
    assert found.calibrated and found.notes == ()
    assert found.text is not None and found.text.name == "built-in corpus"
    assert found.solver == "solved"
    assert found.tokens == default_tokens(1_310_720)


def test_auto_says_why_it_does_not_calibrate(
    decide: Callable[..., Quantization], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "AUTO_WORK", 1.0)
    monkeypatch.setattr(quantization, "_device", lambda asked: "cpu")
    found = decide({"type": "Q4_K_M"})
    assert not found.calibrated and found.solver is None
    (note,) = found.notes
    assert "rounded to the nearest" in note and "minutes" in note and "--method gptq" in note
    assert decide({"type": "Q4_K_M"}, calibration=Path(__file__)).calibrated  # asked for all the same
    assert decide({"type": "Q4_K_M", "method": "gptq"}).calibrated
    monkeypatch.setattr(quantization, "_device", lambda asked: "cuda")
    assert decide({"type": "Q4_K_M"}).calibrated


def test_the_reason_stands_in_the_plan_the_report_and_the_words(
    export: Callable[..., api.ExportResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmx import describe

    monkeypatch.setattr(quantization, "AUTO_WORK", 1.0)
    monkeypatch.setattr(quantization, "_device", lambda asked: "cpu")
    result = export("llama")
    told = json.loads(result.report_path.read_text())["export"]
    assert any("rounded to the nearest" in note for note in told["notes"])
    assert told["quantization"]["calibration"] is None and told["solved"] == []
    assert "rounded to the nearest" in describe.export(result)
    assert "rounded to the nearest" in result.to_json()["notes"][-1]


def test_eight_bits_are_rounded_and_it_is_said(decide: Callable[..., Quantization]) -> None:
    found = decide({"type": "Q8_0"})
    assert not found.calibrated and "8-bit" in found.notes[0]
    assert decide({"type": "Q8_0", "method": "gptq"}).calibrated
    assert decide({"type": "Q8_0", "rules": [{"roles": ["up"], "type": "Q4_K"}]}).calibrated


@pytest.mark.parametrize("plain", [{"type": "F16"}, {"type": "Q4_K_M", "method": "rtn"}])
def test_nobody_is_told_of_a_calibration_that_nobody_expects(
    plain: dict[str, Any], decide: Callable[..., Quantization]
) -> None:
    found = decide(plain)
    assert not found.calibrated and found.notes == ()


def test_an_importance_matrix_takes_the_place_of_a_calibration(decide: Callable[..., Quantization]) -> None:
    found = decide({"type": "Q4_K_M"}, importance=True)
    assert not found.calibrated and found.notes == ()


@pytest.mark.parametrize(
    ("rules", "solver"),
    [
        ([{"roles": ["down"], "method": "gptq"}], "solved"),
        ([{"roles": ["down"], "method": "awq"}], "solved and scaled"),
        ([{"roles": ["down"], "transform": "awq"}], "solved and scaled"),
    ],
)
def test_one_rule_that_needs_a_calibration_is_enough(
    rules: list[dict[str, Any]], solver: str, decide: Callable[..., Quantization]
) -> None:
    found = decide({"type": "Q4_K_M", "method": "rtn", "rules": rules})
    assert found.calibrated and found.solver == solver


def test_the_transform_of_a_recipe_that_rounds_is_not_forgotten(decide: Callable[..., Quantization]) -> None:
    assert decide({"type": "Q4_K_M", "method": "rtn", "transform": "awq"}).solver == "solved and scaled"


def test_a_larger_model_gets_fewer_tokens_within_bounds() -> None:
    assert default_tokens(1_000_000) == MOST_TOKENS
    assert default_tokens(10**12) == FEWEST_TOKENS
    counts = [default_tokens(10**power) for power in range(6, 13)]
    assert counts == sorted(counts, reverse=True)


def test_tokens_come_from_the_command_line_before_the_recipe_before_the_default(
    decide: Callable[..., Quantization],
) -> None:
    plain = {"type": "Q4_K_M", "calibration": {"tokens": 5000, "length": 100}}
    assert (decide(plain).tokens, decide(plain).length) == (5000, 100)
    assert decide(plain, tokens=6000).tokens == 6000
    assert decide({"type": "Q4_K_M", "calibration": {"tokens": 5000, "length": 100_000}}).length == 512  # the context
    with pytest.raises(UsageError, match="at least 16"):
        decide({"type": "Q4_K_M", "calibration": {"tokens": 5000, "length": 1}})


def test_measuring_takes_the_models_own_number_of_tokens(solvable: Callable[[str], Path], some_text: Path) -> None:
    model = open_model(solvable("llama"))
    assert to_measure(model, Wishes(calibration=some_text)).tokens == MOST_TOKENS
    assert to_measure(model, Wishes(calibration=some_text, tokens=4096)).tokens == 4096


# Wishes.


def test_all_contradictions_are_refused_at_once(decide: Callable[..., Quantization]) -> None:
    with pytest.raises(UsageError, match="do not go together") as caught:
        decide(
            {"type": "Q4_K_M", "method": "gptq", "rules": [{"roles": ["o"], "transform": "smoothquant"}]},
            importance=True,
            calibration=Path("text.txt"),
            statistics=Path("folder"),
            device="abacus",
            tokens=0,
        )
    problems = "\n".join(caught.value.problems)
    for words in ("second moments", "--calibration", "--statistics", "SmoothQuant", "'abacus'", "positive"):
        assert words in problems, words
    assert len(caught.value.problems) == 6


def test_awq_and_smoothquant_in_one_recipe_are_refused(decide: Callable[..., Quantization]) -> None:
    rules = [{"roles": ["o"], "transform": "smoothquant"}]
    with pytest.raises(UsageError, match="do not go together") as caught:
        decide({"type": "Q4_K_M", "method": "awq", "rules": rules})
    assert any("same channels" in problem for problem in caught.value.problems)


def test_statistics_of_an_export_that_gathers_none_are_refused(decide: Callable[..., Quantization]) -> None:
    with pytest.raises(UsageError, match="--statistics"):
        decide({"type": "Q4_K_M", "method": "rtn"}, statistics=Path("folder"))
    assert decide({"type": "Q4_K_M"}, statistics=Path("folder")).statistics == Path("folder")


def test_an_importance_matrix_does_for_no_rule_that_needs_more(decide: Callable[..., Quantization]) -> None:
    with pytest.raises(UsageError, match="awq need"):
        decide({"type": "Q4_K_M", "rules": [{"roles": ["o"], "method": "awq"}]}, importance=True)


def test_a_device_that_is_not_there_is_refused(
    decide: Callable[..., Quantization], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        decide({"type": "Q4_K_M"}, device="cuda")
    assert decide({"type": "Q4_K_M"}, device="auto").device == "cpu"


def test_the_command_line_speaks_over_the_recipe_and_does_not_contradict_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{type: Q4_K_M, method: awq, effort: best}")
    asked = Wishes(recipe=str(path))
    assert chosen_recipe(asked, None) == Recipe("mine", "Q4_K_M", "awq", "best")
    changed = chosen_recipe(Wishes(recipe=str(path), method="rtn", effort="fast"), None)
    assert (changed.method, changed.effort) == ("rtn", "fast")
    assert chosen_recipe(Wishes(recipe=str(path), method="auto"), None).method == "awq"
    assert chosen_recipe(Wishes(), "Q5_K_M") == Recipe("command line", "Q5_K_M")
    with pytest.raises(UsageError, match=r"Q4_K_M, .*Q6_K"):
        chosen_recipe(asked, "Q6_K")
    with pytest.raises(UsageError, match="magic"):
        chosen_recipe(Wishes(method="magic"), "Q4_K_M")


def test_a_recipe_may_name_a_mix_or_a_single_block_type_of_gguf_files() -> None:
    assert recipe_type("q4_k_m").name == "Q4_K_M"
    assert recipe_type("Q3_K").base == "Q3_K" and recipe_type("Q3_K").rules == ()
    for name in ("int4-g128-sym", "MXFP4", "nvfp4", "Q9"):
        with pytest.raises(UnsupportedError, match="Q4_K_M"):
            recipe_type(name)


@pytest.mark.parametrize("name", ["int4-g128-sym", "Q4_K_M", "MXFP4"])
def test_a_rule_with_a_type_that_gguf_tensors_do_not_have_is_refused(
    name: str, decide: Callable[..., Quantization]
) -> None:
    with pytest.raises(UnsupportedError, match=name):
        decide({"type": "Q4_K_M", "rules": [{"roles": ["up"], "type": name}]})


def test_a_rule_that_fits_nothing_is_refused_by_its_number(decide: Callable[..., Quantization]) -> None:
    rules = [{"roles": ["up"], "type": "Q6_K"}, {"roles": ["expert_up"], "type": "Q6_K"}]
    with pytest.raises(UsageError, match=r"rules\[1\].*expert_up"):
        decide({"type": "Q4_K_M", "rules": rules})


def test_only_quantized_tensors_are_assigned_a_method(decide: Callable[..., Quantization]) -> None:
    found = decide({"type": "Q4_K_M", "method": "gptq", "rules": [{"roles": ["o"], "method": "awq"}]})
    given = assignments(
        found, {"layers.0.q.weight": "Q4_K", "layers.0.o.weight": "Q5_0", "layers.0.up.weight": "F16", "x": "Q4_K"}
    )
    assert given == {
        "layers.0.q.weight": Assignment("Q4_K", "gptq", False),
        "layers.0.o.weight": Assignment("Q5_0", "rtn", True),
    }


# From end to end.


def test_a_recipe_file_is_followed_and_its_resolved_copy_is_in_the_report(
    export: Callable[..., api.ExportResult], some_text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "careful.yaml"
    path.write_text(RULES)
    result = export("llama", recipe=str(path), calibration=some_text)
    file = read_gguf(result.artifact)
    types = {name: file.tensors[name].type_name for name in file.tensors}
    assert types["blk.0.attn_v.weight"] == types["blk.0.ffn_down.weight"] == "Q6_K"
    assert types["blk.1.ffn_up.weight"] == types["blk.1.ffn_gate.weight"] == "Q5_K"
    assert types["blk.0.ffn_up.weight"] == types["blk.0.attn_q.weight"] == "Q4_K"
    told = json.loads(result.report_path.read_text())["export"]
    assert from_data(told["quantization"]["recipe"]) == from_data(told["quantization"]["recipe"])
    assert told["quantization"]["recipe"]["name"] == "careful"
    assert told["quantization"]["recipe"]["rules"][0] == {"roles": ["v", "down"], "layers": "first 1", "type": "Q6_K"}
    assert told["quantization"]["calibration"]["length"] == 128
    assert told["quantization"]["calibration"]["text"] == some_text.name
    lines = {line["name"]: line for line in told["solved"]}
    assert lines["layers.0.o.weight"]["method"] == lines["layers.1.up.weight"]["method"] == "rtn"
    assert "gptq" in {line["method"] for line in told["solved"]}
    assert lines["layers.0.down.weight"]["type"] == "Q6_K"


def test_a_fused_tensor_cannot_be_given_two_types(export: Callable[..., api.ExportResult], tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("{type: Q4_K_S, method: rtn, rules: [{roles: [v], type: Q6_K}]}")
    with pytest.raises(UsageError, match=r"attn_qkv\.weight is one tensor of one type") as caught:
        export("phi3", recipe=str(path))
    problems = caught.value.problems
    assert any("layers.0.v.weight: Q6_K" in p for p in problems) and any(
        "layers.0.q.weight: as the" in p for p in problems
    )
    path.write_text("{type: Q4_K_S, method: rtn, rules: [{roles: [q, k, v], type: Q6_K}]}")
    file = read_gguf(export("phi3", recipe=str(path)).artifact)
    assert file.tensors["blk.1.attn_qkv.weight"].type_name == "Q6_K"


def test_the_command_lines_type_of_a_tensor_wins_over_the_recipes(
    export: Callable[..., api.ExportResult], tmp_path: Path
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("{type: Q4_K_S, method: rtn, rules: [{roles: [v], type: Q6_K}]}")
    file = read_gguf(export("llama", recipe=str(path), tensor_types=[r"blk\.1\.attn_v=Q8_0"]).artifact)
    assert file.tensors["blk.0.attn_v.weight"].type_name == "Q6_K"
    assert file.tensors["blk.1.attn_v.weight"].type_name == "Q8_0"


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"calibration": Path(__file__)}])
def test_a_file_without_a_quantized_tensor_is_not_calibrated_for(
    options: dict[str, Any], export: Callable[..., api.ExportResult]
) -> None:
    with pytest.raises(UsageError, match="nothing to calibrate"):
        export("llama", type_name="F16", **options)


def test_too_little_text_is_a_usage_error(export: Callable[..., api.ExportResult], tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Once upon a time. " * 20)
    with pytest.raises(UsageError, match="at least 2048 are needed") as caught:
        export("llama", calibration=text)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("*.gguf"))


def test_tokens_outside_the_vocabulary_are_an_integrity_error(some_text: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    random_checkpoint(tmp_path / "model", {**config, **heads, "vocab_size": 400, "tie_word_embeddings": True})
    request = api.CalibrateRequest(str(tmp_path / "model"), tmp_path / "i.gguf", some_text, 2048)
    with pytest.raises(IntegrityError, match="outside the model's vocabulary of 400") as caught:
        api.calibrate(request)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "i.gguf").exists()


def test_a_folder_of_statistics_serves_one_recipe_text_and_model(
    export: Callable[..., api.ExportResult], some_text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(some_text.read_text().upper())
    first: dict[str, Any] = {
        "effort": "fast", "method": "gptq", "calibration": some_text, "calibration_tokens": 2048,
        "statistics": tmp_path / "statistics", "force": True,
    }  # fmt: skip
    export("llama", **first)
    for changed, named in (
        ({"calibration": other}, {"text differs", "sequences differs"}),
        ({"calibration_tokens": 2304}, {"sequences differs"}),
        ({"effort": "best"}, {"effort differs"}),
        ({"method": "awq"}, {"tensors differs"}),
        ({"tensor_types": ["ffn_up=Q6_K"]}, {"tensors differs"}),
    ):
        with pytest.raises(UsageError, match="another run") as caught:
            export("llama", **{**first, **changed})
        assert set(caught.value.problems) == named
    with pytest.raises(UsageError, match="another run") as caught:
        export("gpt2", **first)
    assert {"checkpoint differs", "tensors differs"} <= set(caught.value.problems)


def test_every_tenth_sequence_is_held_out_and_the_device_is_the_one_asked_for(
    decide: Callable[..., Quantization], solvable: Callable[[str], Path], some_text: Path
) -> None:
    found = decide({"type": "Q4_K_M"}, calibration=some_text, tokens=256 * 24)
    calibration, store = calibration_of(open_model(solvable("llama")), found, {})
    assert store is None and calibration.device == "cpu"
    counts = {
        held_out: sum(len(batch.tokens) for batch in calibration.batches if batch.held_out == held_out)
        for held_out in (False, True)
    }
    total = counts[False] + counts[True]
    assert counts[True] == total // quantization.HELD_OUT_EVERY > 0


# Other formats.


def test_rules_name_the_types_of_the_format(decide: Callable[..., Quantization]) -> None:
    rules = [{"roles": ["v"], "type": "INT8-g32-sym-Float32"}, {"roles": ["o"], "type": "f16", "method": "rtn"}]
    plain = {"type": "int4-g128-sym", "method": "awq", "rules": rules}
    found = decide(plain, base="int4-g128-sym", types=ONNX)
    assert found.resolved["layers.0.v.weight"].type == "int8-g32-sym-float32"
    assert found.resolved["layers.1.o.weight"].type == "F16"
    assert found.resolved["layers.1.up.weight"].type is None and found.calibrated
    planned = {
        "layers.0.v.weight": "int8-g32-sym-float32",
        "layers.0.o.weight": "F16",
        "layers.0.up.weight": "int4-g128-sym",
    }
    assert assignments(found, planned) == {
        "layers.0.v.weight": Assignment("int8-g32-sym-float32", "rtn", True),
        "layers.0.up.weight": Assignment("int4-g128-sym", "rtn", True),
    }
    with pytest.raises(UnsupportedError, match=r"no types of ONNX tensors: Q4_K[\s\S]*int\{2\|4\|8\}"):
        decide({**plain, "rules": [{"roles": ["v"], "type": "Q4_K"}]}, base="int4-g128-sym", types=ONNX)


def test_smoothquant_is_for_formats_that_round_activations(decide: Callable[..., Quantization]) -> None:
    plain = {"type": "int8-channel-sym", "method": "rtn", "transform": "smoothquant"}
    assert decide(plain, base="int8-channel-sym", types=ONNX).calibrated
    with pytest.raises(UsageError) as caught:
        decide({**plain, "type": "Q8_0"})
    assert any("GGUF does not" in problem for problem in caught.value.problems)


def test_the_bits_of_a_format_s_own_types_decide_whether_to_calibrate(decide: Callable[..., Quantization]) -> None:
    assert decide({"type": "INT4"}, base="int4-g32-zp-float32", types=ONNX).calibrated
    for base, words in (("int8-g32-sym-float32", "8-bit weights are rounded"), ("F16", None)):
        found = decide({"type": "x"}, base=base, types=ONNX)
        assert not found.calibrated and [words in note for note in found.notes if words] == [True] * bool(words)


def test_a_format_s_types_are_found_in_any_case() -> None:
    assert GGUF.find("q4_k") == "Q4_K" and ONNX.find("Int4-G32-SYM") == "int4-g32-sym"
    assert ONNX.find("Q4_K") is None and ONNX.bits("F16") == 16 and ONNX.bits("int4-g32-sym-float32") == 5
    assert "Q4_K" in GGUF.choices and "int{2|4|8}" in ONNX.choices


# Budgets.


@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3"])
def test_types_are_chosen_within_a_budget(
    family: str, export: Callable[..., api.ExportResult], some_text: Path
) -> None:
    result = export(family, method="rtn", target_bpw=4.6, calibration=some_text)
    assert 4.0 < result.plan["bits_per_weight"] <= 4.6
    types = {tensor["type"] for tensor in result.plan["tensors"]} - {"F32"}
    assert len(types) > 1
    assert result.plan["type"].endswith("bpw")
    whole = export(family, method="rtn", target_size=str(result.nbytes + 1000), calibration=some_text, force=True)
    assert whole.nbytes <= result.nbytes + 1000


def test_a_budget_below_the_smallest_file_is_refused_with_that_size(export: Callable[..., api.ExportResult]) -> None:
    with pytest.raises(UsageError, match="does not fit"):
        export("llama", method="rtn", target_size="1KB")


@pytest.mark.parametrize("bits", [0.0, -4.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_number_of_bits_is_refused(bits: float, export: Callable[..., api.ExportResult]) -> None:
    with pytest.raises(LlmxError, match="no number of bits"):
        export("llama", target_bpw=bits)


def test_a_tensor_whose_type_is_given_keeps_it_within_a_budget(
    export: Callable[..., api.ExportResult], some_text: Path
) -> None:
    result = export("llama", method="rtn", target_bpw=4.6, calibration=some_text, tensor_types=["attn_v=Q8_0"])
    types = {tensor["name"]: tensor["type"] for tensor in result.plan["tensors"]}
    assert types["blk.0.attn_v.weight"] == types["blk.1.attn_v.weight"] == "Q8_0"
    assert result.plan["bits_per_weight"] <= 4.6
