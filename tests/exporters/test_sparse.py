"""Sparse exports: zeros where the artifact says they are, whatever the format, the type and the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx import api
from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.exporters.encoding import ENCODINGS, encoding
from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_tensors import entries, restore
from llmx.exporters.sparsity import SPARSITY_KEY, Sparsity, keeps_zeros, prunable, pruned_by_magnitude, read_sparsity
from llmx.formats.gguf import read_gguf
from llmx.models.model import open_model
from llmx.quant.recipe import Recipe, Tensor, resolve
from llmx.quant.sparsity import by_magnitude, crowded, find_pattern
from llmx.validate.kinds import find_kind

Export = Callable[..., api.ExportResult]
TWO = find_pattern("2:4")


@pytest.fixture
def export(solvable: Callable[[str], Path], some_text: Path, tmp_path: Path) -> Export:
    """export(family, name, **fields): a sparse export, quickly."""

    def run(family: str, name: str, **fields: Any) -> api.ExportResult:
        given = {"sparsity": "2:4", "effort": "fast", "calibration": some_text, "calibration_tokens": 2048, **fields}
        if given.get("method") == "magnitude":
            del given["calibration"]
        request = api.ExportRequest(str(solvable(family)), output=tmp_path / name, validate=False, **given)
        return api.export(request)

    return run


def matrices(artifact: Path, model: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Checkpoint tensor -> what the artifact decodes to, of what may be pruned."""
    opened = open_model(model)
    kind = find_kind(artifact)
    file = kind.mapped(kind.open(artifact), opened.architecture)
    found = kind.restored(file, opened, kind.entries(file, opened, opened.architecture.vocab))
    wanted = {name for spec in opened.architecture.tensors if prunable(spec) for name in spec.source.names}
    return {name: np.array(read()) for name, read in found.items() if name in wanted}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("format_", "type_name"),
    [("gguf", "F16"), ("gguf", "BF16"), ("gguf", "Q4_0"), ("gguf", "Q6_K"), ("onnx", "F16"), ("onnx", "INT4")],
)
def test_every_group_of_four_has_two_zeros(
    format_: str, type_name: str, method: str, export: Export, solvable: Callable[[str], Path]
) -> None:
    if format_ == "onnx":
        pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")
    name = f"{type_name}.gguf" if format_ == "gguf" else type_name
    made = export("llama", name, format=format_, type_name=type_name, method=method)
    found = matrices(made.artifact, solvable("llama"))
    assert len(found) == 14
    for tensor, values in found.items():
        assert crowded(values, TWO) == 0, tensor
        assert np.count_nonzero(values) > 0.4 * values.size, tensor
    file = find_kind(made.artifact).open(made.artifact)
    assert read_sparsity(file.metadata[SPARSITY_KEY]) == Sparsity("2:4", method)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral", "gemma3", "qwen3-tied"])
@pytest.mark.parametrize("type_name", ["F16", "Q8_0"])
def test_fused_turned_and_expert_matrices_are_sparse_along_their_rows(
    family: str, type_name: str, export: Export, solvable: Callable[[str], Path]
) -> None:
    made = export(family, "sparse.gguf", type_name=type_name, method="sparsegpt")
    opened, file = open_model(solvable(family)), read_gguf(made.artifact)
    own = entries(opened.architecture, gguf_family(opened.architecture), opened.architecture.vocab)
    kind = find_kind(made.artifact)
    sparse = [entry for entry in own if any(prunable(piece.spec) for piece in entry.pieces)]
    assert sparse
    for entry in sparse:
        assert crowded(kind.decoded(file, entry.name, 0, entry.rows), TWO) == 0, entry.name
    dense = next(entry for entry in own if entry.role == "embedding")
    assert crowded(kind.decoded(file, dense.name, 0, 32), TWO) > 0


def test_a_share_of_zeros_may_lie_anywhere(export: Export, solvable: Callable[[str], Path]) -> None:
    made = export("llama", "half.gguf", type_name="F16", method="sparsegpt", sparsity="60%")
    for tensor, values in matrices(made.artifact, solvable("llama")).items():
        assert np.count_nonzero(values) <= 0.4 * values.size, tensor
        assert crowded(values, TWO) > 0, tensor


def test_magnitude_alone_keeps_the_weights_that_are_left_bit_for_bit(
    export: Export, solvable: Callable[[str], Path]
) -> None:
    made = export("llama", "m.gguf", type_name="F32", method="magnitude")
    model = open_model(solvable("llama"))
    weight = model.weight("layers.1.down.weight").read()
    found = matrices(made.artifact, solvable("llama"))["model.layers.1.mlp.down_proj.weight"]
    assert np.array_equal(found, by_magnitude(weight, TWO))


def test_without_a_type_floats_are_kept(export: Export) -> None:
    made = export("llama", "floats.gguf", method="magnitude")
    assert made.plan["type"] == "F16"
    assert any("2:4 sparse by magnitude" in note for note in made.plan["notes"])


def test_the_same_zeros_come_of_any_number_of_threads_and_of_the_manifest(
    export: Export, solvable: Callable[[str], Path], some_text: Path, tmp_path: Path
) -> None:
    fields = {"method": "sparsegpt", "type_name": "Q4_0"}
    one, three = (export("llama", f"{n}/x.gguf", threads=n, **fields).artifact.read_bytes() for n in (1, 3))
    assert one == three
    again = api.ExportRequest(
        str(solvable("llama")),
        from_manifest=tmp_path / "1" / "x.manifest.json",
        calibration=some_text,
        output=tmp_path / "again" / "x.gguf",
        validate=False,
    )
    assert api.export(again).artifact.read_bytes() == one


def test_the_manifest_says_what_the_recipe_asked(export: Export) -> None:
    from llmx.exporters.manifest_reader import read_manifest

    made = export("llama", "said.gguf", type_name="F16", method="magnitude", sparsity="50%")
    recipe = read_manifest(made.manifest).told["recipe"]
    assert (recipe["sparsity"], recipe["method"]) == ("50%", "magnitude")


def test_rules_leave_matrices_dense_and_the_artifact_names_them(
    export: Export, solvable: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("type: F16\nmethod: wanda\nsparsity: 2:4\nrules:\n- {roles: [v], layers: [0], sparsity: none}\n")
    made = export("llama", "ruled.gguf", recipe=str(recipe), sparsity=None, effort=None)
    said = read_sparsity(read_gguf(made.artifact).metadata[SPARSITY_KEY])
    assert said == Sparsity("2:4", "wanda", {"layers.0.v.weight": "none"})
    found = matrices(made.artifact, solvable("llama"))
    assert {name for name, values in found.items() if crowded(values, TWO)} == {
        "model.layers.0.self_attn.v_proj.weight"
    }


@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q5_1", "IQ4_XS"])
def test_types_without_an_exact_zero_are_refused_by_name_before_the_start(
    type_name: str, solvable: Callable[[str], Path], tmp_path: Path
) -> None:
    request = api.ExportRequest(
        str(solvable("llama")), type_name=type_name, sparsity="2:4", output=tmp_path / "x.gguf", validate=False
    )
    with pytest.raises(UnsupportedError, match="cannot be made sparse") as caught:
        api.plan(request)
    assert any("has no exact zero" in problem for problem in caught.value.problems)
    assert "F16" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "sparsegpt"}, "needs --sparsity"),
        ({"method": "gptq", "sparsity": "2:4"}, "makes no weight zero"),
        ({"method": "rtn", "sparsity": "50%"}, "makes no weight zero"),
    ],
)
def test_a_method_and_a_sparsity_that_do_not_go_together_are_refused(
    fields: dict[str, Any], told: str, solvable: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError) as caught:
        api.plan(api.ExportRequest(str(solvable("llama")), type_name="Q8_0", **fields))
    assert any(told in problem for problem in caught.value.problems)


def test_an_unknown_sparsity_is_refused_with_the_choices(solvable: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="there is no sparsity '3:4'"):
        api.plan(api.ExportRequest(str(solvable("llama")), sparsity="3:4"))


@pytest.mark.parametrize("name", [name for name in ENCODINGS if "-g" not in name])
def test_a_type_keeps_zeros_or_is_said_not_to(name: str) -> None:
    minimums = {"Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1", "IQ4_NL", "IQ4_XS"}
    assert keeps_zeros(encoding(name), 256) == (name not in minimums)


@pytest.mark.parametrize(
    "text", ["", "2:4", "{}", '{"pattern": "2:3", "method": "wanda", "others": {}}', '{"pattern": "2:4", "method": 1}']
)
def test_what_llmx_does_not_write_is_no_sparsity(text: str) -> None:
    with pytest.raises(IntegrityError):
        read_sparsity(text)


def test_a_pruned_model_reads_zeros_and_leaves_the_rest_as_stored(solvable: Callable[[str], Path]) -> None:
    model = open_model(solvable("mixtral"))
    specs = model.architecture.tensors
    tensors: list[Tensor] = [
        (spec.name, spec.role, spec.layer, model.architecture.layers) for spec in specs if spec.part == "weight"
    ]
    resolved = {got.name: got for got in resolve(Recipe("r", "F16", "magnitude", sparsity="2:4"), tensors)}
    pruned = pruned_by_magnitude(model, resolved)
    for spec in specs:
        before, after = model.weight(spec.name), pruned.weight(spec.name)
        assert after.nbytes == before.nbytes
        if prunable(spec):
            whole = after.read()
            assert crowded(whole, TWO) == 0
            assert np.array_equal(after.read(3, 7), whole[3:7])
            assert np.array_equal(after.read_raw(3, 7), whole[3:7])
            assert np.array_equal(np.concatenate([bits for _, bits in after.views(3, 7)]).view(np.float32), whole[3:7])
        else:
            assert after is before


def test_restored_rows_of_a_sparse_file_are_those_that_were_solved(
    export: Export, solvable: Callable[[str], Path]
) -> None:
    """Rows of q and k move within a head, which must not move zeros between columns."""
    made = export("llama", "rope.gguf", type_name="F32", method="wanda")
    model = open_model(solvable("llama"))
    layout = entries(model.architecture, gguf_family(model.architecture), model.architecture.vocab)
    found = restore(read_gguf(made.artifact), model, layout)["model.layers.0.self_attn.q_proj.weight"]()
    weight = model.weight("layers.0.q.weight").read()
    kept = found != 0
    assert np.array_equal(found[kept], weight[kept]) and crowded(found, TWO) == 0
