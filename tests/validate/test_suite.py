"""What a validation reads and how its text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmx.errors import UsageError
from llmx.exporters.gguf import GgufOptions, prepare, write
from llmx.exporters.gguf_types import file_type
from llmx.formats.gguf import GgufTensor
from llmx.models.model import open_model
from llmx.models.tokenizer import open_tokenizer
from llmx.validate.case import SHORTEST_CHUNK, Settings, chunks
from llmx.validate.checks_bytes import check_bytes, named
from llmx.validate.checks_conversion import check_conversion
from llmx.validate.checks_quality import check_quality
from llmx.validate.gate import COARSEST, DEFAULTS, default_bound
from llmx.validate.oracle import Tokens
from llmx.validate.sample_text import SAMPLE_TEXT
from llmx.validate.suite import validate
from llmx.validate.type_errors import RMS_LIMITS


@given(st.integers(0, 300), st.integers(0, 1), st.integers(2, 40), st.integers(0, 9))
def test_chunks_do_not_overlap_and_each_begins_with_bos(total, leading, length, count):
    ids = list(range(100, 100 + total))
    found = list(chunks(ids, [1] * leading, length, count))
    assert len(found) == min(count, total // (length - leading))
    assert all(len(chunk) == length and chunk[:leading] == [1] * leading for chunk in found)
    joined = [token for chunk in found for token in chunk[leading:]]
    assert joined == ids[: len(joined)]


def test_the_sample_text_is_long_enough_for_a_large_vocabulary_and_has_many_scripts(checkpoint_of):
    tokens = Tokens(checkpoint_of("stories42m-llama"))
    assert len(tokens.encode(SAMPLE_TEXT, False)) > 5 * 256
    for sample in ("Once upon a time", "def ", "SELECT", "größe"[:2], "山", "Старый", "في", "연", "1,146", "\n"):
        assert sample in SAMPLE_TEXT


def test_every_type_has_both_limits():
    groups = {name for name in RMS_LIMITS if name.startswith(("int", "fp8"))}
    assert set(RMS_LIMITS) - groups == set(DEFAULTS["gguf"])
    assert {name.partition("-")[0] for name in groups} <= DEFAULTS["onnx"].keys() | DEFAULTS["tensorrt"].keys()


def test_whole_numbers_in_groups_have_the_limit_of_their_bits_and_groups():
    def tensor(type_name: str) -> GgufTensor:
        return GgufTensor("t", type_name, (8, 256), 0, 0)

    table = DEFAULTS["onnx"]
    for name, row in (("int4-g32-zp-float32", "int4-g32"), ("int4-g128-sym", "int4"), ("int8-channel-sym", "int8")):
        assert default_bound([tensor(name)], "onnx") == table[row]


def test_the_default_limits_follow_the_mix_of_types():
    def tensor(type_name: str, *shape: int) -> GgufTensor:
        return GgufTensor("t", type_name, shape, 0, 0)

    table = DEFAULTS["gguf"]
    assert default_bound([tensor("Q4_K", 8, 256)]) == table["Q4_K"]
    mixed = default_bound([tensor("Q4_K", 8, 256), tensor("Q6_K", 8, 256), tensor("F32", 256)])
    for figure in ("kl", "top1", "ppl_ratio"):
        mean = (getattr(table["Q4_K"], figure) + getattr(table["Q6_K"], figure)) / 2
        assert getattr(mixed, figure) == pytest.approx(mean)
    assert default_bound([tensor("IQ1_S", 8, 256)]) == COARSEST


def test_an_empty_text_is_refused(artifacts):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    with pytest.raises(UsageError, match="empty"):
        validate(artifact, reference, text=" \n")


def test_a_short_text_is_read_in_one_short_chunk_and_the_report_says_so(artifacts, case_of, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    case = case_of(artifact, reference, llama_cpp, text="Once upon a time there was a little otter named Pip.")
    checks = [*check_conversion(case), *check_quality(case)]
    assert all(check.passed for check in checks), checks
    quality = next(check for check in checks if check.name == "quality.kl")
    assert "the text is too short for more" in quality.detail


def test_a_text_of_a_few_letters_judges_nothing_and_does_not_pass(artifacts, case_of, llama_cpp):
    artifact, reference = artifacts("tiny-qwen3", "Q8_0")
    case = case_of(artifact, reference, llama_cpp, text="Hi", settings=Settings(positions=64))
    checks = [*check_conversion(case), *check_quality(case)]
    assert {check.status for check in checks} == {"not run"}
    assert all(str(SHORTEST_CHUNK) in check.detail for check in checks)


def test_long_lists_of_offenders_are_cut():
    assert named([]) == ""
    assert named(["a", "b"]) == "a, b"
    assert named([str(i) for i in range(20)]).endswith("7 and 12 more")


def test_a_split_set_is_validated_as_one_artifact(checkpoint_of, case_of, llama_cpp, tmp_path):
    model = checkpoint_of("tiny-qwen3")
    options = GgufOptions(file_type("Q4_K_M"), split_max_bytes=700_000, threads=1)
    export = prepare(open_model(model), open_tokenizer(model), options)
    files = [tmp_path / file.name for file in export.plan.files]
    assert len(files) == 3
    write(export, files)
    case = case_of(files[0], model, llama_cpp)
    checks = [*check_bytes(case), *check_conversion(case), *check_quality(case)]
    assert all(check.passed for check in checks), checks
