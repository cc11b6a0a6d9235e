"""What single checks say of faults, beyond test_fault_table.py; and a sound artifact passes every check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmx.exporters import gguf_tensors
from llmx.exporters.gguf_metadata import DIGESTS_KEY, SCALED, SOLVER_KEY
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_decode import LEVELS
from llmx.formats.ggml_packers import LAYOUTS, pack, unpack
from llmx.formats.gguf import GgufFile, Value, array, f32, read_gguf, text, u32
from llmx.validate.case import Limits, Settings
from llmx.validate.checks_bytes import STEP_LIMIT, check_bytes, grid_error
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_quality import check_quality, check_speed
from llmx.validate.report import Check
from llmx.validate.runtimes import Runtime
from llmx.validate.suite import check_text, validate
from llmx.validate.type_errors import USUAL_RMS


def failed(checks: Iterable[Check]) -> set[str]:
    return {check.name for check in checks if check.passed is False}


def only(checks: Iterable[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def rows(file: GgufFile, name: str) -> np.ndarray:
    """A copy of a tensor's bytes, u8[rows, row bytes]."""
    tensor = file.tensors[name]
    return file.bytes(name).reshape(-1, row_bytes(tensor.type_name, tensor.shape[-1])).copy()


def flip_high_bit(file: GgufFile, name: str) -> np.ndarray:
    """The tensor with the highest bit of one weight's code flipped."""
    type_name = file.tensors[name].type_name
    block = rows(file, name).reshape(-1, BLOCKS[type_name].bytes)
    scales, codes = unpack(type_name, block)
    # Where the block's scale is largest: a flip of a weight that is nearly zero anyway could hide in rounding.
    where = int(np.argmax(np.abs(scales.d.astype(np.float32))))
    codes[where, 5] ^= np.uint8(len(LEVELS[type_name]) // 2)
    return pack(type_name, scales, codes)


# Sound artifacts.


@pytest.mark.parametrize(
    ("model", "type_name"),
    [("tiny-qwen3", "Q4_K_M"), ("tiny-gemma3", "Q4_K_M"), ("tiny-llama3rope", "Q8_0"), ("tiny-mixtral", "F32")],
)
def test_a_sound_artifact_passes_every_check(model, type_name, artifacts, case_of, llama_cpp):
    artifact, reference = artifacts(model, type_name)
    case = case_of(artifact, reference, llama_cpp)
    checks = [*check_bytes(case), *check_text(case), *check_conversion(case), *check_quality(case)]
    assert failed(checks) == set()
    assert {check.name for check in checks if check.passed is None} == {"template.embedded", "template.runtime"}


def test_the_report_of_a_sound_artifact_has_passed_and_says_what_was_compared(artifacts, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    seen: list[str] = []
    settings = Settings(positions=128, chunk=64)
    report = validate(artifact, reference, runtime=llama_cpp, settings=settings, progress=seen.append)
    assert report.passed, report.to_json()
    assert seen == ["bytes", "tokens", "conversion", "floor", "quality", "speed"]
    told = json.loads(report.to_json())
    assert told["artifact"]["name"] == artifact.name
    assert told["artifact"]["bytes"] == artifact.stat().st_size
    assert "llama.cpp" in told["runtime"]["name"] and told["runtime"]["build"]
    assert all(check["limit"] is not None for check in told["checks"] if check["name"] in ("quality.kl", "bytes.error"))


# Bytes.


@pytest.mark.parametrize("model", ["stories260k-llama", "tiny-llama3rope"])
def test_q_and_k_that_are_not_permuted_are_caught(model, artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts(model, "Q8_0")
    case = case_of(artifact, reference)
    head = case.model.architecture.head_dim
    wrong = {
        name: gguf_tensors._deinterleave(rows(case.file, name), head)
        for name in case.file.tensors
        if "attn_q." in name or "attn_k." in name
    }
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors=wrong)
    checks = list(check_bytes(case_of(bad, reference)))
    assert {"bytes.error", "bytes.steps"} <= failed(checks)
    assert "layers.0.self_attn.q_proj" in only(checks, "bytes.error").detail


def test_an_exporter_that_forgets_the_permutation_is_caught_although_the_check_shares_its_code(
    checkpoint_of, export, case_of, monkeypatch, tmp_path
):
    model = checkpoint_of("stories260k-llama")
    monkeypatch.setattr(gguf_tensors, "_interleave", lambda weights, head: weights)
    bad = export(model, "F32", tmp_path / "bad.gguf")
    checks = list(check_bytes(case_of(bad, model)))
    assert only(checks, "bytes.steps").passed  # forth, it agrees with itself
    assert failed(checks) == {"bytes.error"}  # back, it does not


def test_a_permutation_forgotten_both_ways_is_caught_by_the_runtime(
    *, checkpoint_of, export, case_of, monkeypatch, tmp_path, llama_cpp
):
    model = checkpoint_of("stories260k-llama")
    monkeypatch.setattr(gguf_tensors, "_interleave", lambda weights, head: weights)
    monkeypatch.setattr(gguf_tensors, "_deinterleave", lambda weights, head: weights)
    bad = export(model, "Q8_0", tmp_path / "bad.gguf")
    case = case_of(bad, model, llama_cpp)
    assert failed(check_bytes(case)) == set()
    assert {"conversion.kl", "conversion.logits", "conversion.decode"} <= failed(check_conversion(case))


def test_norm_gains_without_their_one_are_caught(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-gemma3", "Q4_K_M")
    file = read_gguf(artifact)
    wrong = {
        name: (file.bytes(name).view("<f4") - 1).astype("<f4").view(np.uint8)
        for name in file.tensors
        if name.endswith("norm.weight")
    }
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors=wrong)
    checks = list(check_bytes(case_of(bad, reference)))
    assert {"bytes.error", "bytes.steps"} <= failed(checks)
    assert "layernorm" in only(checks, "bytes.error").detail


@pytest.mark.parametrize("type_name", ["Q4_K_M", "Q4_0", "IQ4_XS", "Q8_0", "Q6_K", "Q5_K_M"])
def test_one_flipped_bit_in_every_tensor_is_caught_in_every_tensor(type_name, artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", type_name)
    file = read_gguf(artifact)
    flipped = {name: flip_high_bit(file, name) for name, tensor in file.tensors.items() if tensor.type_name in LAYOUTS}
    assert flipped
    # An exporter's mistake: the digests agree with the wrong bytes, only the distance to the source tells.
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors=flipped)
    case = case_of(bad, reference)
    assert "bytes.steps" in failed(check_bytes(case))
    for entry in case.entries:
        far = grid_error(case.file, case.model, entry).steps > STEP_LIMIT
        assert far == (entry.name in flipped), entry.name


def test_any_flipped_bit_after_the_export_is_caught_by_the_digests(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    file = read_gguf(artifact)
    changed = {}
    for name in file.tensors:
        changed[name] = file.bytes(name).copy()
        changed[name][len(changed[name]) // 2] ^= 1  # the lowest bit of some byte
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors=changed, honest=False)
    found = only(check_bytes(case_of(bad, reference)), "bytes.digests")
    assert found.passed is False
    assert found.value == len(file.tensors)


def test_a_file_without_digests_says_so(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    plain = rewrite(artifact, tmp_path / "plain.gguf", metadata={DIGESTS_KEY: None})
    found = only(check_bytes(case_of(plain, reference)), "bytes.digests")
    assert found.status == "not applicable"
    bad = rewrite(artifact, tmp_path / "bad.gguf", metadata={DIGESTS_KEY: array("u64", [1, 2])}, honest=False)
    assert only(check_bytes(case_of(bad, reference)), "bytes.digests").passed is False


def test_nan_in_a_scale_is_caught_with_the_tensors_name(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    name = "blk.1.ffn_up.weight"
    data = rows(read_gguf(artifact), name)
    data[0, 0:2] = [0x00, 0x7E]  # the block's 16-bit scale becomes NaN
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={name: data})
    checks = list(check_bytes(case_of(bad, reference)))
    assert {"bytes.finite", "bytes.error", "bytes.steps"} <= failed(checks)
    assert name in only(checks, "bytes.finite").detail
    assert only(checks, "bytes.finite").value == 256


def test_two_exchanged_tensors_are_caught(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    file = read_gguf(artifact)
    first, second = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={first: file.bytes(second), second: file.bytes(first)})
    assert {"bytes.error", "bytes.steps"} <= failed(check_bytes(case_of(bad, reference)))


# Solved artifacts: their weights were moved on purpose, further than rounding moves them.


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_sound_solved_artifact_passes_every_check(method, solved, case_of, llama_cpp):
    artifact, reference = solved("tiny-qwen3", method)
    case = case_of(artifact, reference, llama_cpp)
    checks = [*check_bytes(case), *check_text(case), *check_conversion(case), *check_quality(case)]
    assert failed(checks) == set()
    assert only(checks, "bytes.steps").status == "not applicable"
    assert only(checks, "bytes.error").passed


@pytest.mark.parametrize("model", ["tiny-qwen3", "random llama"])
def test_two_exchanged_tensors_of_a_solved_artifact_are_caught(model, solved, case_of, rewrite, tmp_path):
    artifact, reference = solved(model, "gptq")
    assert failed(check_bytes(case_of(artifact, reference))) == set()
    file = read_gguf(artifact)
    first, second = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={first: file.bytes(second), second: file.bytes(first)})
    checks = list(check_bytes(case_of(bad, reference)))
    assert failed(checks) == {"bytes.error"}
    assert "mlp.up_proj" in only(checks, "bytes.error").detail
    assert "mlp.gate_proj" in only(checks, "bytes.error").detail


def test_rows_of_a_solved_artifact_that_are_not_permuted_are_caught(solved, case_of, rewrite, tmp_path):
    artifact, reference = solved("random llama", "gptq")
    case = case_of(artifact, reference)
    head = case.model.architecture.head_dim
    wrong = {
        name: gguf_tensors._deinterleave(rows(case.file, name), head)
        for name in ("blk.1.attn_q.weight", "blk.0.attn_k.weight")
    }
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors=wrong)
    found = only(check_bytes(case_of(bad, reference)), "bytes.error")
    assert found.passed is False
    assert "layers.1.self_attn.q_proj" in found.detail and "layers.0.self_attn.k_proj" in found.detail


def test_one_head_of_a_solved_artifact_in_anothers_place_is_seen_as_far_away(solved, case_of, rewrite, tmp_path):
    artifact, reference = solved("random llama", "gptq")
    name = "blk.0.attn_q.weight"
    moved = np.roll(rows(read_gguf(artifact), name), 64, axis=0)
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={name: moved})
    assert failed(check_bytes(case_of(bad, reference))) == {"bytes.error"}


def test_a_solver_whose_rows_are_written_in_the_order_of_the_checkpoint_is_caught(
    solved, case_of, monkeypatch, tmp_path
):
    from llmx import api

    _, model = solved("random llama", "gptq")
    monkeypatch.setattr(gguf_tensors, "_interleave", lambda weights, head: weights)
    request = api.ExportRequest(
        str(model), method="gptq", effort="fast", calibration_tokens=2048, output=tmp_path / "bad.gguf", validate=False
    )
    checks = list(check_bytes(case_of(api.export(request).artifact, model)))
    assert failed(checks) == {"bytes.error"}
    assert "q_proj" in only(checks, "bytes.error").detail


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_any_flipped_bit_of_a_solved_artifact_is_caught_by_the_digests(method, solved, case_of, rewrite, tmp_path):
    artifact, reference = solved("tiny-qwen3", method)
    name = "blk.2.ffn_down.weight"
    data = read_gguf(artifact).bytes(name).copy()
    data[1234] ^= 1
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={name: data}, honest=False)
    checks = list(check_bytes(case_of(bad, reference)))
    assert failed(checks) == {"bytes.digests"}
    assert only(checks, "bytes.digests").detail == name


def test_nan_in_a_scale_of_a_solved_artifact_is_caught(solved, case_of, rewrite, tmp_path):
    artifact, reference = solved("random llama", "gptq")
    name = "blk.1.ffn_up.weight"
    data = rows(read_gguf(artifact), name)
    data[0, 0:2] = [0x00, 0x7E]
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={name: data})
    assert failed(check_bytes(case_of(bad, reference))) == {"bytes.finite", "bytes.error"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("blk.0.ffn_up", "blk.2.ffn_up"),
        ("blk.0.attn_k", "blk.0.attn_v"),
        ("blk.1.ffn_up", "blk.1.ffn_gate"),
    ],
)
def test_exchanged_tensors_of_a_scaled_artifact_are_caught(first, second, solved, case_of, rewrite, tmp_path):
    """The conversion has the same wrong tensors on both sides."""
    artifact, reference = solved("tiny-qwen3", "awq")
    file = read_gguf(artifact)
    one, two = f"{first}.weight", f"{second}.weight"
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={one: file.bytes(two), two: file.bytes(one)})
    checks = list(check_bytes(case_of(bad, reference)))
    assert failed(checks) == {"bytes.error"}
    assert one in only(checks, "bytes.error").detail and two in only(checks, "bytes.error").detail


@pytest.mark.parametrize("fault", ["norm", "rows", "columns"])
def test_a_scale_of_a_scaled_artifact_that_its_neighbour_does_not_have_is_caught(
    fault, solved, case_of, rewrite, tmp_path
):
    artifact, reference = solved("tiny-qwen3", "awq")
    file = read_gguf(artifact)
    name = {"norm": "blk.1.ffn_norm.weight", "rows": "blk.1.attn_v.weight", "columns": "blk.2.ffn_down.weight"}[fault]
    if fault == "norm":
        data = (file.bytes(name).view("<f4") * np.float32(1.5)).view(np.uint8)
    else:
        type_name = file.tensors[name].type_name
        scales, codes = unpack(type_name, rows(file, name).reshape(-1, BLOCKS[type_name].bytes))
        offset = None if scales.offset is None else scales.offset * np.float16(2)
        data = pack(type_name, replace(scales, d=scales.d * np.float16(2), offset=offset), codes)
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={name: data})
    assert failed(check_bytes(case_of(bad, reference))) == {"bytes.error"}


def test_a_file_that_is_marked_scaled_although_nothing_was_scaled_is_compared(artifacts, case_of, rewrite, tmp_path):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    marked = {SOLVER_KEY: text(SCALED)}
    sound = rewrite(artifact, tmp_path / "sound.gguf", metadata=marked)
    assert only(check_bytes(case_of(sound, reference)), "bytes.error").passed
    file = read_gguf(artifact)
    one, two = "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"
    swapped = {one: file.bytes(two), two: file.bytes(one)}
    bad = rewrite(artifact, tmp_path / "bad.gguf", metadata=marked, tensors=swapped)
    assert failed(check_bytes(case_of(bad, reference))) == {"bytes.error"}


def test_every_stored_tensor_has_a_row_for_the_report(artifacts, case_of):
    case = case_of(*artifacts("tiny-llama3rope", "Q4_K_M"))
    assert not failed(check_bytes(case))
    table = {row["name"]: row for row in case.findings.found["tensors"]}
    assert set(table) == set(case.file.tensors)
    assert table["rope_freqs.weight"]["role"] == "rope" and table["rope_freqs.weight"]["layer"] is None
    row = table["blk.1.ffn_up.weight"]
    assert (row["type"], row["layer"], row["role"], row["expected"]) == ("Q4_K", 1, "up", USUAL_RMS["Q4_K"])
    assert row["bytes"] == case.file.tensors["blk.1.ffn_up.weight"].nbytes
    assert row["rms"] == pytest.approx(row["expected"], rel=0.15)


# Structure.


def test_dropped_rope_scaling_is_caught_where_the_tensor_is_missing(artifacts, case_of, rewrite, tmp_path, llama_cpp):
    artifact, reference = artifacts("tiny-llama3rope", "Q8_0")
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={"rope_freqs.weight": None})
    case = case_of(bad, reference, llama_cpp)
    found = only(check_bytes(case), "bytes.tensors")
    assert found.passed is False
    assert found.detail == "rope_freqs.weight is missing"
    assert all(check.passed is None and check.required for check in check_conversion(case))


def test_dropped_rope_scaling_is_caught_by_the_runtime_even_in_a_coarse_file(
    *, artifacts, case_of, rewrite, tmp_path, llama_cpp
):
    artifact, reference = artifacts("tiny-llama3rope", "Q4_K_M")
    freqs = np.ones(read_gguf(artifact).tensors["rope_freqs.weight"].shape, np.float32)
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors={"rope_freqs.weight": freqs.view(np.uint8)})
    case = case_of(bad, reference, llama_cpp)
    checks = list(check_conversion(case))
    assert {"conversion.kl", "conversion.logits", "conversion.decode"} <= failed(checks)
    assert only(checks, "conversion.kl").value > 1e-5


def wrong_epsilon(file: GgufFile) -> dict[str, Value]:
    return {key: f32(1e-3) for key in file.metadata if key.endswith("layer_norm_rms_epsilon")}


def wrong_theta(file: GgufFile) -> dict[str, Value]:
    return {key: f32(float(v) * 2) for key, v in file.metadata.items() if key.endswith("rope.freq_base")}


def wrong_window(file: GgufFile) -> dict[str, Value]:
    return {key: u32(int(v) // 2) for key, v in file.metadata.items() if key.endswith("attention.sliding_window")}


@pytest.mark.parametrize(
    ("model", "fault"),
    [("tiny-qwen3", wrong_epsilon), ("tiny-qwen3", wrong_theta), ("tiny-gemma3", wrong_window)],
)
def test_a_wrong_number_in_the_metadata_is_caught_through_quantization(
    *, model, fault, artifacts, case_of, rewrite, tmp_path, llama_cpp
):
    artifact, reference = artifacts(model, "Q4_K_M")
    changes = fault(read_gguf(artifact))
    assert changes
    bad = rewrite(artifact, tmp_path / "bad.gguf", metadata=changes)
    case = case_of(bad, reference, llama_cpp)
    assert failed(check_bytes(case)) == {"bytes.numbers"}
    assert failed(check_conversion(case)) & {"conversion.kl", "conversion.window"}


# Tokens.


def test_a_second_end_token_that_the_file_does_not_know_is_caught(
    *, checkpoint_of, artifacts, export, case_of, tmp_path, llama_cpp
):
    folder = tmp_path / "two-ends"
    shutil.copytree(checkpoint_of("tiny-qwen3"), folder)
    path = folder / "generation_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 7]}))
    bad = only(check_text(case_of(artifacts("tiny-qwen3", "Q8_0")[0], folder, llama_cpp)), "tokens.ends")
    assert bad.passed is False
    assert "token 7 does not end generation" in bad.detail
    sound = export(folder, "Q8_0", tmp_path / "sound.gguf")
    assert only(check_text(case_of(sound, folder, llama_cpp)), "tokens.ends").passed


def cut_vocabulary(artifact: Path, rewrite, target: Path, rows_left: int, cut_embedding: bool) -> Path:
    file = read_gguf(artifact)
    metadata = {
        f"tokenizer.ggml.{key}": array(kind, list(file.metadata[f"tokenizer.ggml.{key}"])[:rows_left])  # type: ignore[arg-type]
        for key, kind in (("tokens", "str"), ("scores", "f32"), ("token_type", "i32"))
    }
    if not cut_embedding:
        return rewrite(artifact, target, metadata=metadata)
    metadata |= {key: u32(rows_left) for key in file.metadata if key.endswith(".vocab_size")}
    name = "token_embd.weight"
    shape = (rows_left, file.tensors[name].shape[1])
    data = rows(file, name)[:rows_left]
    return rewrite(artifact, target, metadata=metadata, tensors={name: data}, shapes={name: shape})


def test_a_vocabulary_cut_with_its_embedding_is_caught(artifacts, case_of, rewrite, tmp_path, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    bad = cut_vocabulary(artifact, rewrite, tmp_path / "bad.gguf", 500, cut_embedding=True)
    case = case_of(bad, reference, llama_cpp)
    assert "bytes.tensors" in failed(check_bytes(case))
    checks = list(check_text(case))
    assert "tokens.vocabulary" in failed(checks)
    assert only(checks, "tokens.vocabulary").value == 500


def test_a_vocabulary_cut_without_its_embedding_is_refused_by_the_runtime_and_nothing_else_reads_as_passed(
    artifacts, rewrite, tmp_path, llama_cpp
):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    bad = cut_vocabulary(artifact, rewrite, tmp_path / "bad.gguf", 500, cut_embedding=False)
    report = validate(bad, reference, runtime=llama_cpp)
    assert not report.passed
    assert failed(report.checks) == {"runtime.loads"}
    assert {check.kind for check in report.missing} == {"tokens", "template", "conversion", "floor", "quality", "speed"}


# Chat template.

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, checkpoint_of) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    shutil.copytree(checkpoint_of("tiny-qwen3"), folder)
    path = folder / "tokenizer_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHATML}))
    return folder


@pytest.fixture(scope="module")
def chat_artifact(chat_model: Path, export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(chat_model, "Q8_0", tmp_path_factory.mktemp("chat") / "chat.gguf")


def test_a_sound_template_passes_in_the_file_and_in_the_runtime(chat_artifact, chat_model, case_of, llama_cpp):
    checks = list(check_text(case_of(chat_artifact, chat_model, llama_cpp)))
    assert failed(checks) == set()
    assert only(checks, "template.embedded").passed
    assert only(checks, "template.runtime").status in ("passed", "not run")


# Quality and speed.


def test_weights_of_another_layer_fail_the_quality(artifacts, case_of, rewrite, tmp_path, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    file = read_gguf(artifact)
    swap = {"blk.1.ffn_down.weight": file.bytes("blk.2.ffn_down.weight")}
    bad = rewrite(artifact, tmp_path / "bad.gguf", tensors=swap)
    assert {"quality.kl", "quality.decode"} <= failed(check_quality(case_of(bad, reference, llama_cpp)))


def test_limits_that_the_user_sets_are_kept(artifacts, case_of, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    strict = Limits(max_kl=1e-9, min_top1=1.0, max_ppl_ratio=0.5)
    case = case_of(artifact, reference, llama_cpp, limits=strict)
    checks = list(check_quality(case))
    assert failed(checks) == {"quality.kl", "quality.decode", "quality.same_top1", "quality.ppl_ratio"}
    assert {check.origin for check in checks if check.passed is False} == {"asked for"}


def test_a_speed_that_is_too_slow_fails_only_when_asked(artifacts, case_of, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    assert failed(check_speed(case_of(artifact, reference, llama_cpp))) == set()
    hasty = case_of(artifact, reference, llama_cpp, limits=Limits(min_tokens_per_second=1e9))
    assert failed(check_speed(hasty)) == {"speed.decode"}


# A missing runtime.


class Absent:
    """A runtime that is not installed."""

    name = "llama.cpp"

    def unavailable(self) -> str | None:
        return "no package has it"

    def open(self, artifact: Path, **options: Any) -> Any:
        raise AssertionError("must not be opened")


def test_a_missing_runtime_leaves_not_run_in_the_report_which_has_not_passed(artifacts):
    artifact, reference = artifacts("tiny-qwen3", "Q4_K_M")
    runtime: Runtime = Absent()
    report = validate(artifact, reference, runtime=runtime)
    assert not report.passed
    assert report.failed == ()
    assert {check.kind for check in report.checks if check.passed} == {"bytes"}
    assert {check.kind for check in report.missing} == {"tokens", "template", "conversion", "floor", "quality", "speed"}
    assert all("no package has it" in check.detail for check in report.missing)
