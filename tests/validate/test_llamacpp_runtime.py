"""llama.cpp as a runtime, on a GGUF file written here from examples/tiny-qwen3 with the `gguf` package."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmx.errors import CheckFailed, IntegrityError, ResourceError, RuntimeMissing, UsageError
from llmx.validate.runtimes import RUNTIMES, find_runtime, llamacpp_library, runtime_names
from llmx.validate.runtimes.llamacpp import LlamaCpp, LlamaCppSession
from llmx.validate.runtimes.worker_process import WorkerProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
REASON = LlamaCpp().unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"llama.cpp: {REASON}")
TEXT = "Once upon a time there was a little girl who liked the sun. One day, she found 3 birds near the old tree."
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BROKEN = "{% for message in messages %}{{ message.content"
RAISES = "{% if messages|length > 1 %}{{ raise_exception('no turns') }}{% endif %}x{{ messages[0].content }}"
# From the Hugging Face name of a decoder layer's tensor to llama.cpp's.
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    head = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in head:
        return head[name]
    index, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{index}.{LAYER[inner]}.weight"


def token_type(token: str, index: int) -> int:
    if token.startswith("<0x"):
        return 6
    return {0: 2, 1: 3, 2: 3}.get(index, 1)


def write_tiny(path: Path, *, template: str | None = None, repeat_a_token: bool = False) -> Path:
    import gguf
    from safetensors.torch import load_file

    config = json.loads((EXAMPLE / "config.json").read_text())
    vocabulary = json.loads((EXAMPLE / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    if repeat_a_token:
        tokens[400] = tokens[401]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([token_type(token, index) for index, token in enumerate(tokens)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in load_file(EXAMPLE / "model.safetensors").items():
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("llamacpp") / "tiny.gguf", template=TEMPLATE)


@pytest.fixture(scope="module")
def session(artifact: Path) -> Iterator[LlamaCppSession]:
    with LlamaCpp().open(artifact, threads=1, context=320, exact=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def tokens(session: LlamaCppSession) -> list[int]:
    ids = session.tokenize(TEXT)
    return (ids * 10)[:300]


def rows(session: LlamaCppSession, tokens: list[int], decode_from: int | None = None) -> np.ndarray:
    return np.concatenate(list(session.logits(tokens, decode_from)))


def test_every_position_has_the_logits_of_transformers(session: LlamaCppSession, tokens: list[int]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    blocks = list(session.logits(tokens))
    assert [block.shape[0] for block in blocks] == [128, 128, 44]
    assert all(block.dtype == np.float32 and block.shape[1] == session.vocab == 512 for block in blocks)
    difference = np.abs(np.concatenate(blocks) - expected).max()
    print(f"largest difference to transformers: {difference:.2e}")
    assert difference < 2e-4


def test_without_exact_the_cache_is_rounded(artifact: Path, session: LlamaCppSession, tokens: list[int]) -> None:
    with LlamaCpp().open(artifact, threads=1, context=320) as rounded:
        difference = np.abs(rows(rounded, tokens) - rows(session, tokens)).max()
    assert 5e-4 < difference < 0.1


def test_decoding_through_the_cache_equals_the_prefill(session: LlamaCppSession, tokens: list[int]) -> None:
    whole = rows(session, tokens)
    for decode_from in (0, 150):
        assert np.abs(rows(session, tokens, decode_from) - whole).max() < 2e-4


def test_greedy_text_is_the_argmax_of_the_logits(session: LlamaCppSession, tokens: list[int]) -> None:
    prompt = tokens[:20]
    written = session.generate(prompt, 12)
    predicted = rows(session, prompt + written).argmax(axis=1)
    assert written == predicted[len(prompt) - 1 : -1].tolist()
    assert session.generate(prompt, 0) == []


def test_generation_stops_at_an_end_token(session: LlamaCppSession, tokens: list[int]) -> None:
    special = session.special()
    written = session.generate(tokens[:10], 300)
    ends = [token for token in written if token in special["end_of_generation"]]
    assert ends == written[-1:] if ends else len(written) == 300


def test_a_sequence_is_extended_token_by_token_and_taken_up_again(session: LlamaCppSession, tokens: list[int]) -> None:
    expected = np.concatenate(list(session.logits(tokens)))
    keep = len(tokens) - 6
    close = {"rtol": 0, "atol": 1e-3}
    np.testing.assert_allclose(session.extend(tokens[:keep]), expected[keep - 1], **close)
    for position in range(keep, len(tokens)):
        np.testing.assert_allclose(session.extend([tokens[position]], position), expected[position], **close)
    # Back to an earlier position: what stood after it is forgotten.
    np.testing.assert_allclose(session.extend(tokens[3:keep], 3), expected[keep - 1], **close)
    other = session.extend([tokens[0]], 5)
    np.testing.assert_allclose(other, session.extend([*tokens[:5], tokens[0]]), **close)
    list(session.logits(tokens))
    with pytest.raises(UsageError, match="cannot follow position 2 of 0"):
        session.extend([tokens[0]], 2)


def test_ids_come_back_as_the_text(session: LlamaCppSession) -> None:
    text = "The sun, 😀 é\tand\n\n two  spaces"
    ids = session.tokenize(text, add_special=False)
    assert b"".join(session.piece(token) for token in ids).decode() == " " + text
    assert session.tokenize(text) == [1, *ids]
    assert session.tokenize("") == [1]


def test_special_tokens_are_read_only_when_asked(session: LlamaCppSession) -> None:
    assert 2 in session.tokenize("a</s>", parse_special=True)
    assert 2 not in session.tokenize("a</s>", parse_special=False)
    assert session.piece(2) == b"</s>"


def test_special_ids_are_those_of_the_file(session: LlamaCppSession) -> None:
    assert session.special() == {"bos": 1, "eos": 2, "add_bos": True, "end_of_generation": frozenset({2})}


def test_the_build_is_stated_with_its_instruction_sets(session: LlamaCppSession) -> None:
    assert session.build.startswith(("xllamacpp 2026.10.11549 (llama.cpp b11549) CPU", "llama-cpp-python"))


def test_the_chat_template_is_rendered_by_llama_cpp_itself(session: LlamaCppSession) -> None:
    if reason := session.template_unavailable():
        pytest.skip(reason)
    messages = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Yes"}]
    # No BOS: tokenizing adds it, because the file has add_bos.
    assert session.render(messages, add_generation_prompt=False) == "[user] Hi é\n[assistant] Yes\n"
    assert session.render(messages[:1]) == "[user] Hi é\n[assistant]"


def test_a_template_that_raises_fails_with_its_message(tmp_path: Path) -> None:
    file = write_tiny(
        tmp_path / "raises.gguf",
        template=RAISES,
    )
    with LlamaCpp().open(file, threads=1, context=64) as session:
        if reason := session.template_unavailable():
            pytest.skip(reason)
        with pytest.raises(CheckFailed, match="no turns"):
            session.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_a_template_that_does_not_parse_fails(tmp_path: Path) -> None:
    with LlamaCpp().open(write_tiny(tmp_path / "broken.gguf", template=BROKEN), threads=1, context=64) as session:
        if reason := session.template_unavailable():
            pytest.skip(reason)
        with pytest.raises(CheckFailed) as caught:
            session.render([{"role": "user", "content": "a"}])
        assert any("Parser Error" in line for line in caught.value.problems)
        # The model itself is still there.
        assert session.tokenize("") == [1]


def test_a_file_without_a_template_renders_nothing_and_says_so(tmp_path: Path) -> None:
    with LlamaCpp().open(write_tiny(tmp_path / "plain.gguf"), threads=1, context=64) as session:
        assert session.render([{"role": "user", "content": "Hi"}]) is None
        assert session.template_unavailable() == "the file carries no chat template"


def test_speed_and_memory_are_measured(session: LlamaCppSession, tokens: list[int]) -> None:
    before = rows(session, tokens[:8])
    speed = session.speed(64, 8)
    assert speed.prefill_tokens_per_second > speed.decode_tokens_per_second > 1
    assert 0 < speed.time_to_first_token_seconds < 10
    assert 0 < speed.load_seconds < 60
    # At least the weights (13 MB), and not this process with torch in it.
    assert 20e6 < speed.peak_rss_bytes < 250e6
    assert np.array_equal(rows(session, tokens[:8]), before)


def test_the_same_tokens_give_the_same_bits(artifact: Path, session: LlamaCppSession, tokens: list[int]) -> None:
    first = rows(session, tokens)
    assert np.array_equal(first, rows(session, tokens))
    with LlamaCpp().open(artifact, threads=1, context=320, exact=True) as again:
        assert np.array_equal(first, rows(again, tokens))


def test_an_abandoned_sequence_does_not_leak_into_the_next(session: LlamaCppSession, tokens: list[int]) -> None:
    whole = rows(session, tokens)
    abandoned = session.logits(tokens)
    next(abandoned)
    assert np.array_equal(rows(session, tokens), whole)
    with pytest.raises(UsageError, match="another"):
        next(abandoned)


@pytest.mark.parametrize("kept", [100, 5_000, 1_000_000])
def test_a_cut_file_is_refused_in_llama_cpps_words(artifact: Path, tmp_path: Path, kept: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(artifact.read_bytes()[:kept])
    with pytest.raises(IntegrityError) as caught:
        LlamaCpp().open(cut, threads=1, context=64)
    assert any("failed to" in line or "error" in line for line in caught.value.problems)
    assert caught.value.where == str(cut)


def test_an_abort_of_llama_cpp_is_an_error_here(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "duplicate.gguf", repeat_a_token=True)
    with pytest.raises(IntegrityError, match="SIGABRT") as caught:
        LlamaCpp().open(file, threads=1, context=64)
    assert any("GGML_ASSERT" in line for line in caught.value.problems)


def test_a_killed_worker_is_an_error_and_leaves_no_process(artifact: Path, tokens: list[int]) -> None:
    session = LlamaCpp().open(artifact, threads=1, context=64)
    os.kill(session.process_id, 9)
    with pytest.raises(ResourceError, match="SIGKILL"):
        session.tokenize("a")
    with pytest.raises(UsageError, match="closed"):
        session.tokenize("a")
    session.close()
    assert_gone(session.process_id)


def test_a_silent_worker_is_stopped_at_the_time_limit(artifact: Path, tokens: list[int]) -> None:
    with LlamaCpp(answer_seconds=20).open(artifact, threads=1, context=2048) as session:
        session._worker._process._timeout = 0.2
        begin = time.monotonic()
        with pytest.raises(CheckFailed, match=r"no answer to 'generate' within 0\.2 s"):
            session.generate(tokens[:4], 2000)
        assert time.monotonic() - begin < 10
    assert_gone(session.process_id)


def test_closing_twice_and_forgetting_to_close_leave_no_process(artifact: Path) -> None:
    session = LlamaCpp().open(artifact, threads=1, context=64)
    session.close()
    session.close()
    assert_gone(session.process_id)
    forgotten = LlamaCpp().open(artifact, threads=1, context=64)
    process_id = forgotten.process_id
    del forgotten
    assert_gone(process_id)


def assert_gone(process_id: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_a_wrong_question_is_a_usage_error_and_the_session_lives_on(session: LlamaCppSession) -> None:
    for ask in (
        lambda: list(session.logits([1] * 321)),
        lambda: list(session.logits([512])),
        lambda: session.generate([1], 320),
        lambda: session.generate([], 1),
        lambda: session.piece(-1),
        lambda: session.speed(0, 1),
        lambda: session.tokenize("\ud800"),
    ):
        with pytest.raises(UsageError):
            ask()
    assert session.tokenize("") == [1]
    assert list(session.logits([])) == []


def test_a_context_of_a_few_tokens_is_enough_for_them(artifact: Path, session: LlamaCppSession) -> None:
    with LlamaCpp().open(artifact, threads=1, context=3, exact=True) as small:
        assert np.abs(rows(small, [1, 5, 9], 2) - rows(session, [1, 5, 9])).max() < 2e-4
        assert len(small.generate([1], 2)) <= 2


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        LlamaCpp().open(tmp_path / "none.gguf", threads=1, context=64)


def test_a_version_that_was_not_checked_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_library, "_xllamacpp_version", lambda: "2030.1.1")
    assert "2030.1.1" in (LlamaCpp(backend="xllamacpp").unavailable() or "")
    with pytest.raises(RuntimeMissing, match="layouts that were checked"):
        LlamaCpp(backend="xllamacpp").open(Path("x.gguf"), threads=1, context=64)


def test_a_struct_whose_defaults_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if llamacpp_library._xllamacpp_unavailable() is not None:
        pytest.skip("needs xllamacpp")
    (version, layout), *_ = llamacpp_library.LAYOUTS.items()
    moved = {**layout.context, "type_k": llamacpp_library.Field(112, "i", 1)}
    changed = llamacpp_library.Layout(layout.build, layout.model, moved)
    monkeypatch.setitem(llamacpp_library.LAYOUTS, version, changed)
    with pytest.raises(RuntimeMissing, match="type_k at byte 112: 0, expected 1"):
        llamacpp_library._xllamacpp_load()


def test_the_registry_finds_runtimes_by_name() -> None:
    assert set(RUNTIMES) <= set(runtime_names())
    assert find_runtime("llama.cpp").name == "llama.cpp"
    with pytest.raises(UsageError, match=r"llama\.cpp"):
        find_runtime("none")


def test_an_answer_that_is_no_frame_is_an_error() -> None:
    # A module of the standard library that prints a poem.
    worker = WorkerProcess("this", label="a stranger", timeout=20, environment={})
    with pytest.raises(CheckFailed, match="a stranger died"):
        worker.ask("open")
