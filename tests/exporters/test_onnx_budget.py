"""ONNX packages of a given size: never above it, matrices of one product alike, given types kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir", reason="onnx-ir is not installed: pip install 'llmx[onnx]'")

from llmx.errors import UsageError
from llmx.exporters import onnx_budget
from llmx.exporters.budget import Budget, Part
from llmx.exporters.onnx import OnnxExport, OnnxOptions, prepare
from llmx.exporters.onnx_budget import TYPES, within_budget
from llmx.exporters.onnx_types import find_mix, planned_types
from llmx.models.calibration_text import read_calibration
from llmx.models.model import Model, open_model
from llmx.quant.allocate import Choice

Planned = Callable[..., OnnxExport]
DIALECTS = ("ort", "standard")


@pytest.fixture
def planned(solvable: Callable[[str], Path]) -> Planned:
    """planned(family, mix, dialect): before a size is asked for."""

    def run(family: str = "llama", mix: str = "INT4", dialect: str = "ort") -> OnnxExport:
        model, chosen = open_model(solvable(family)), find_mix(mix)
        types = planned_types(model.architecture, chosen)
        return prepare(model, OnnxOptions(chosen.floats, dialect, types, mix=mix))

    return run


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses by the size alone, in place of those measured on the model, which take a minute."""

    def choices(model: Model, parts: Sequence[Part], text: object, threads: int) -> dict[str, tuple[Choice, ...]]:
        assert parts, "there is something to choose"
        weights: Mapping[str, int] = {part.name: number + 1 for number, part in enumerate(parts)}
        return {
            part.name: tuple(Choice(name, size, weights[part.name] / size) for name, size in part.sizes.items())
            for part in parts
        }

    monkeypatch.setattr(onnx_budget, "choices", choices)


@pytest.mark.usefixtures("guessed")
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", ["llama", "qwen3-tied", "mixtral"])
def test_a_plan_never_takes_more_than_was_asked_for(family: str, dialect: str, planned: Planned) -> None:
    export = planned(family, dialect=dialect)
    for bits in (4.0, 5.5, 8.2):
        found = within_budget(export, None, Budget(bits=bits), None, 1)
        assert bits - 0.4 < found.plan.bits_per_weight <= bits
        assert found.plan.type_name == f"{found.plan.bits_per_weight:.2f}bpw"
    size = export.plan.nbytes - 100_000
    found = within_budget(export, None, Budget(nbytes=size), None, 1)
    assert size - 250_000 < found.plan.nbytes <= size


@pytest.mark.usefixtures("guessed")
def test_a_size_counts_the_places_in_the_data_file(planned: Planned) -> None:
    export = planned("llama")
    for nbytes in range(export.plan.nbytes - 300_000, export.plan.nbytes, 30_011):
        assert within_budget(export, None, Budget(nbytes=nbytes), None, 1).plan.nbytes <= nbytes


@pytest.mark.usefixtures("guessed")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_matrices_of_one_product_get_one_type(family: str, planned: Planned) -> None:
    export = planned(family)
    found = within_budget(export, None, Budget(bits=5.5), None, 1)
    types = found.options.types
    assert len(set(types.values())) > 2
    products = [{p.weight.spec.name for p in one.quantized.pieces} for one in export.stored if one.quantized]
    assert any(len(product) > 1 for product in products)
    for product in products:
        assert len({types[name] for name in product}) == 1, product
    joined = {one.quantized.name for one in found.stored if one.quantized}
    assert joined == {one.quantized.name for one in export.stored if one.quantized}  # as many products as before


@pytest.mark.usefixtures("guessed")
def test_types_that_were_given_are_kept(planned: Planned) -> None:
    fixed = ["layers.0.down.weight", "layers.1.k.weight"]
    found = within_budget(planned(), None, Budget(bits=7.0), None, 1, fixed=fixed)
    base = find_mix("INT4").base
    assert all(found.options.types[name] == base for name in fixed)
    # What is multiplied together with a given one is not chosen either.
    assert found.options.types["layers.1.q.weight"] == base
    assert found.options.types["layers.0.q.weight"] != base


@pytest.mark.usefixtures("guessed")
def test_a_size_below_the_smallest_names_that_size(planned: Planned) -> None:
    with pytest.raises(UsageError, match="does not fit into 1,000 bytes") as told:
        within_budget(planned(), None, Budget(nbytes=1000), None, 1)
    assert told.value.fix is not None and "ask for at least" in told.value.fix


@pytest.mark.parametrize("mix", ["F16", "F32"])
def test_a_size_of_a_package_that_is_not_quantized_is_refused(mix: str, planned: Planned) -> None:
    with pytest.raises(UsageError, match="type of every tensor"):
        within_budget(planned(mix=mix), None, Budget(bits=4.0), None, 1)


def test_measured_losses_give_the_costly_matrices_more_bits(planned: Planned, some_text: Path) -> None:
    export = planned("qwen3-tied")
    found = within_budget(export, None, Budget(bits=4.6), read_calibration(some_text), 1)
    assert 4.3 < found.plan.bits_per_weight <= 4.6
    chosen = set(found.options.types.values())
    assert len(chosen) > 1 and chosen <= set(TYPES)
