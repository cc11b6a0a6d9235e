"""Blame names the damaged tensor, or the number of the metadata, and nothing in a sound file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corruptions import DAMAGES, Stored, draw, measurable

from llmx.exporters.gguf_metadata import DIGESTS_KEY
from llmx.exporters.gguf_tensors import read_rows
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.gguf import GgufFile, f32, read_gguf, u32
from llmx.validate.blame import check_blame, find_blame
from llmx.validate.case import Case, Limits, Settings
from llmx.validate.evidence import gather
from llmx.validate.hyperparameters import differences
from llmx.validate.restored import restored_model
from llmx.validate.streams import OutputError, compare
from llmx.validate.suite import validate
from llmx.validate.suspicion import suspects

Make = Callable[..., Case]


def stored(case: Case, name: str) -> Stored:
    entry = next(entry for entry in case.entries if entry.name == name)
    type_name = case.file.tensors[name].type_name
    data = case.file.bytes(name).reshape(-1, row_bytes(type_name, entry.columns)).copy()
    return Stored(name, type_name, data, read_rows(case.model, entry, 0, entry.rows).astype(np.float32))


def damaged(case: Case, kind: str, name: str, seed: int = 0) -> np.ndarray:
    data, _ = draw(np.random.default_rng(seed), kind, stored(case, name))
    assert data is not None
    return data


@pytest.fixture
def harmed(case_of: Make, rewrite: Callable[..., Path], tmp_path: Path) -> Callable[..., Case]:
    """A case of a copy without digests, with some tensors' bytes or metadata replaced."""

    def made(artifact: Path, reference: Path, **changes: object) -> Case:
        metadata = {DIGESTS_KEY: None, **changes.pop("metadata", {})}  # type: ignore[dict-item]
        bad = rewrite(artifact, tmp_path / "harmed.gguf", metadata=metadata, honest=False, **changes)
        return case_of(bad, reference)

    return made


# What is named.


@pytest.mark.parametrize("kind", sorted(set(DAMAGES) - {"transposed"}))
def test_every_kind_of_damage_is_blamed_on_its_tensor(kind, artifacts, case_of, harmed):
    artifact, reference = artifacts("tiny-qwen3", "Q5_K_M")
    name = "blk.2.ffn_gate.weight"
    found = find_blame(harmed(artifact, reference, tensors={name: damaged(case_of(artifact, reference), kind, name)}))
    assert (found.tensor, found.layer) == (name, 2), found.reason
    assert found.suspects[0].tensor == name
    assert found.suspects[0].score > 1 >= found.suspects[1].score


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("kind", ["noise", "rows exchanged", "a scale doubled", "two bits", "rows zeroed"])
def test_damage_is_told_from_what_a_solver_moved(kind, method, solved, case_of, harmed):
    artifact, reference = solved("tiny-qwen3", method)
    name = "blk.1.ffn_gate.weight"
    found = find_blame(harmed(artifact, reference, tensors={name: damaged(case_of(artifact, reference), kind, name)}))
    assert found.tensor == name, found.reason


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_sound_solved_file_is_blamed_for_nothing(method, solved, case_of):
    found = find_blame(case_of(*solved("tiny-qwen3", method)))
    assert found.tensor is None, found.reason
    assert "stands out" in found.reason


@pytest.mark.parametrize(
    ("model", "type_name"),
    [("tiny-qwen3", "Q4_K_M"), ("tiny-gemma3", "Q4_0"), ("tiny-gpt2", "Q8_0"), ("tiny-phi3", "Q4_K_M"),
     ("tiny-mixtral", "Q3_K_M"), ("tiny-llama3rope", "F32"), ("stories260k-llama", "Q8_0")],
)  # fmt: skip
def test_a_sound_rounded_file_is_blamed_for_nothing(model, type_name, artifacts, case_of):
    found = find_blame(case_of(*artifacts(model, type_name)))
    assert found.tensor is None, found.reason
    assert all(one.score <= 1 for one in found.suspects)


def test_two_exchanged_tensors_are_named_with_what_they_hold(artifacts, harmed):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    file = read_gguf(artifact)
    first, second = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
    found = find_blame(harmed(artifact, reference, tensors={first: file.bytes(second), second: file.bytes(first)}))
    assert found.tensor == first
    assert f"it holds {second}" in found.reason
    assert "1 more tensor" in found.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: -values, "opposite sign"),
        (lambda values: np.roll(values, 5, axis=0), "in another order"),
        (np.zeros_like, "rows are zero"),
        (lambda values: values * np.float32(1.5), "1.5 times"),
    ],
    ids=["sign", "order", "zero", "scale"],
)
def test_the_reason_says_what_the_tensor_holds_instead(change, words, artifacts, case_of, harmed):
    artifact, reference = artifacts("tiny-qwen3", "F32")
    name = "blk.1.ffn_up.weight"
    values = change(stored(case_of(artifact, reference), name).decoded)
    found = find_blame(harmed(artifact, reference, tensors={name: values.astype("<f4").view(np.uint8)}))
    assert found.tensor == name
    assert words in found.reason


def test_a_square_matrix_that_is_transposed_is_recognized(solved, case_of, harmed):
    artifact, reference = solved("random llama", "gptq")
    name = "blk.1.attn_v.weight"
    bad = harmed(artifact, reference, tensors={name: damaged(case_of(artifact, reference), "transposed", name)})
    found = find_blame(bad)
    assert found.tensor == name
    assert "transposed" in found.reason


def test_a_fault_of_every_layer_is_named_where_it_comes_first(artifacts, harmed):
    artifact, reference = artifacts("tiny-llama3rope", "Q8_0")
    file = read_gguf(artifact)

    def rolled(name: str) -> np.ndarray:
        return np.roll(file.bytes(name).reshape(file.tensors[name].shape[0], -1), 1, axis=0)

    found = find_blame(harmed(artifact, reference, tensors={n: rolled(n) for n in file.tensors if "attn_k." in n}))
    assert (found.tensor, found.layer) == ("blk.0.attn_k.weight", 0)
    assert "more tensors like it" in found.reason


def test_a_single_bit_that_flipped_after_the_export_is_named_by_its_digest(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    name = "blk.3.attn_k.weight"
    data = read_gguf(artifact).bytes(name).copy()
    data[777] ^= 1
    found = find_blame(case_of(rewrite(artifact, tmp_path / "bad.gguf", tensors={name: data}, honest=False), reference))
    assert found.tensor == name
    assert "changed after the file was written" in found.reason
    assert len([one for one in found.suspects if one.score > 1]) == 1


def test_a_missing_tensor_is_named(artifacts, harmed):
    artifact, reference = artifacts("tiny-llama3rope", "Q8_0")
    found = find_blame(harmed(artifact, reference, tensors={"rope_freqs.weight": None}))
    assert found.tensor == "rope_freqs.weight"
    assert "missing" in found.reason


# The metadata.


def wrong(file: GgufFile, ending: str, factor: float) -> dict[str, object]:
    make = {"f32": f32, "u32": u32}
    return {
        key: make[file.types[key]](type(value)(value * factor))  # type: ignore[call-arg, operator]
        for key, value in file.metadata.items()
        if key.endswith(ending)
    }


@pytest.mark.parametrize(
    ("model", "ending", "factor"),
    [
        ("tiny-qwen3", "layer_norm_rms_epsilon", 100),
        ("tiny-qwen3", "rope.freq_base", 1.01),
        ("tiny-gemma3", "attention.sliding_window", 0.5),
        ("tiny-mixtral", "expert_used_count", 0.5),
    ],
)
def test_a_wrong_number_in_the_metadata_is_named_where_every_tensor_is_sound(model, ending, factor, artifacts, harmed):
    artifact, reference = artifacts(model, "Q8_0")
    changes = wrong(read_gguf(artifact), ending, factor)
    assert changes
    found = find_blame(harmed(artifact, reference, metadata=changes))
    assert found.tensor is None
    assert "every tensor is sound" in found.reason
    assert next(iter(changes)) in found.reason


def test_a_dropped_number_counts_unless_the_runtime_takes_the_same(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    case = case_of(artifact, reference)
    assert differences(case.file, case.model.architecture) == []
    keys = {"qwen3.rope.dimension_count": None, "qwen3.attention.layer_norm_rms_epsilon": None}
    bad = read_gguf(rewrite(artifact, tmp_path / "bad.gguf", metadata=keys))
    told = differences(bad, case.model.architecture)
    assert len(told) == 1
    assert "epsilon is not there" in told[0]


def test_a_scaling_that_the_checkpoint_does_not_have_counts(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    bad = read_gguf(rewrite(artifact, tmp_path / "bad.gguf", metadata={"qwen3.rope.scaling.factor": f32(2.0)}))
    told = differences(bad, case_of(artifact, reference).model.architecture)
    assert len(told) == 1
    assert "rope.scaling.factor is 2" in told[0]


# The parts.


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-gpt2", "tiny-phi3", "tiny-mixtral", "tiny-gemma3"])
def test_a_float_files_weights_come_back_as_the_checkpoints(model, artifacts, case_of):
    case = case_of(*artifacts(model, "F32"))
    restored = restored_model(case.file, case.model, case.entries)
    for weight in case.model.weights():
        np.testing.assert_allclose(restored.weight(weight.spec.name).read(), weight.read(), atol=2e-7)


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-mixtral", "tiny-phi3"])
def test_what_rounding_does_to_outputs_is_what_its_size_and_the_inputs_explain(model, artifacts, case_of):
    case = case_of(*artifacts(model, "Q4_K_M"))
    restored = restored_model(case.file, case.model, case.entries)
    found = compare(case.model, restored, case.ids[:64])
    assert len(found.layers) == case.model.architecture.layers
    assert 0 < found.embedding < min(found.layers)
    for entry in case.entries:
        parts = [found.outputs[p.spec.name] for p in entry.pieces if p.spec.name in found.outputs]
        if entry.quantizable and entry.role != "embedding":
            assert parts
            value = parts[0].over_expected(gather(case.file, case.model, entry).usual_variance)
            assert value < 1.3, entry.name


def test_outputs_that_are_no_numbers_say_nothing():
    assert OutputError(float("nan"), 1.0, 1.0).over_expected(1.0) == 0.0
    assert OutputError().over_expected(1.0) == 0.0


def test_the_residual_stream_departs_in_the_damaged_layer(artifacts, case_of, harmed):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    name = "blk.2.ffn_down.weight"
    rolled = np.roll(stored(case_of(artifact, reference), name).data, 1, axis=0)
    bad = harmed(artifact, reference, tensors={name: rolled})
    before, after = find_blame(case_of(artifact, reference)).layers, find_blame(bad).layers
    assert before[:2] == pytest.approx(after[:2])
    assert after[2] > 10 * before[2]


def test_a_checkpoint_that_lies_on_the_grid_already_does_not_make_its_rounding_suspicious(artifacts, case_of):
    case = case_of(*artifacts("tiny-qwen3", "Q4_0"))
    restored = restored_model(case.file, case.model, case.entries)
    entry = next(entry for entry in case.entries if entry.quantizable)
    assert gather(case.file, restored, entry).figures["size"] == 0.0


def test_a_damage_below_the_noise_is_not_measurable(artifacts, case_of):
    case = case_of(*artifacts("tiny-qwen3", "Q4_K_M"))
    one = stored(case, "blk.0.ffn_up.weight")
    scales, codes = one.unpacked
    codes[0, 0] ^= 1  # one step of one weight of 256
    assert not measurable(one, one.packed(scales, codes))
    assert not measurable(one, one.data)


def test_suspects_are_ordered_by_score(artifacts, case_of):
    case = case_of(*artifacts("tiny-qwen3", "Q4_K_M"))
    evidence = [gather(case.file, case.model, entry) for entry in case.entries]
    scores = [one.score for one in suspects(evidence, {}, solved=False)]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == len(case.entries)


# In the report.


def test_the_finding_is_plain_json(artifacts, case_of, harmed):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    name = "blk.1.ffn_up.weight"
    case = harmed(artifact, reference, tensors={name: damaged(case_of(artifact, reference), "a scale NaN", name)})
    (check,) = check_blame(case)
    assert (check.name, check.passed, check.value) == ("blame.tensor", True, name)
    told = json.loads(json.dumps(case.findings.found["blame"], allow_nan=False))
    assert told["tensor"] == name
    assert told["layer"] == 1
    assert told["suspects"][0] == {"tensor": name, "score": "inf", "reason": "256 of its values are NaN or infinite"}
    assert len(told["suspects"]) == 8
    assert [row["layer"] for row in told["layers"]] == [-1, 0, 1, 2, 3]


def test_blame_is_asked_when_a_check_fails_or_the_user_asks(artifacts, harmed, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    settings = Settings(positions=128, chunk=64)
    sound = validate(artifact, reference, runtime=llama_cpp, settings=settings)
    assert "blame" not in {check.kind for check in sound.checks}
    asked = validate(artifact, reference, runtime=llama_cpp, settings=Settings(positions=128, chunk=64, blame=True))
    assert next(check for check in asked.checks if check.name == "blame.tensor").value == "none"
    assert asked.passed
    strict = validate(artifact, reference, runtime=llama_cpp, settings=settings, limits=Limits(max_kl=1e-9))
    assert not strict.passed
    assert "most is lost in layer" in next(check for check in strict.checks if check.name == "blame.tensor").detail
