"""The reference: transformers float32, its logits in blocks, its tokenizer as the file says."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from llmx.errors import IntegrityError, UnsupportedError
from llmx.validate import oracle
from llmx.validate.oracle import Reference, Tokens, end_ids, quiet

TOKENS = [1, 403, 407, 261, 378, 300, 12, 77, 5, 9]


def whole_logits(folder: Path, tokens: list[int]) -> np.ndarray:
    """What transformers computes in one piece, without our code."""
    import torch

    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        with torch.inference_mode():
            return model(input_ids=torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-gemma3", "tiny-gpt2", "tiny-mixtral"])
def test_the_blocks_together_are_what_transformers_computes(name, checkpoint_of, monkeypatch):
    folder = checkpoint_of(name)
    reference = Reference(folder, threads=1)
    monkeypatch.setattr(oracle, "HEAD_BYTES", 3 * 4 * reference.vocab)
    blocks = list(reference.logits(TOKENS))
    assert [len(block) for block in blocks] == [3, 3, 3, 1]
    assert all(block.dtype == np.float32 and block.shape[1] == reference.vocab for block in blocks)
    np.testing.assert_allclose(np.concatenate(blocks), whole_logits(folder, TOKENS), rtol=1e-5, atol=1e-5)


def test_a_head_that_does_more_than_multiply_is_noticed(checkpoint_of, monkeypatch):
    monkeypatch.setattr(Reference, "_head", lambda self, hidden: self._model.get_output_embeddings()(hidden) * 1.1)
    with pytest.raises(UnsupportedError, match="after the head"):
        Reference(checkpoint_of("tiny-qwen3"), threads=1)


def test_the_gelu_table_changes_little_and_only_while_it_is_asked_for(checkpoint_of):
    reference = Reference(checkpoint_of("tiny-gpt2"), threads=1)
    before = np.concatenate(list(reference.logits(TOKENS)))
    with reference.gelu_table():
        within = np.concatenate(list(reference.logits(TOKENS)))
    after = np.concatenate(list(reference.logits(TOKENS)))
    assert 0 < np.abs(within - before).max() < 0.05
    np.testing.assert_array_equal(after, before)


def test_a_model_without_gelu_has_no_gelu_table(checkpoint_of):
    with pytest.raises(UnsupportedError, match="no GELU"), Reference(checkpoint_of("tiny-qwen3")).gelu_table():
        pass


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(UnsupportedError, match="cannot load this model"):
        Reference(tmp_path)
    with pytest.raises(UnsupportedError, match="cannot load this tokenizer"):
        Tokens(tmp_path)


def test_loading_is_silent_and_leaves_the_warning_filters_alone(checkpoint_of, capfd):
    before = warnings.filters[:]
    Reference(checkpoint_of("tiny-qwen3"), threads=1)
    Tokens(checkpoint_of("tiny-qwen3")).encode("quiet", True)
    assert warnings.filters == before
    found = capfd.readouterr()
    assert found.out == found.err == ""


def test_a_tokenizer_json_counts_whatever_the_family_usually_has(checkpoint_of):
    # transformers 5 would take a byte-level tokenizer for every qwen2.
    tokens = Tokens(checkpoint_of("tiny-qwen2"))
    assert tokens.encode("Once upon a time", False) == Tokens(checkpoint_of("tiny-qwen3")).encode(
        "Once upon a time", False
    )
    assert tokens.size == 512


def test_special_tokens_are_known_by_id_and_by_role(checkpoint_of):
    tokens = Tokens(checkpoint_of("tiny-qwen3"))
    assert tokens.added == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert (tokens.bos, tokens.eos) == (1, 2)
    assert tokens.special_texts["bos_token"] == "<s>"
    assert tokens.encode("a", True)[0] == 1
    assert tokens.encode("a", False)[0] != 1
    assert not tokens.has_template


def test_a_template_is_rendered_by_transformers(checkpoint_of, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(checkpoint_of("tiny-qwen3"), folder)
    path = folder / "tokenizer_config.json"
    path.chmod(0o644)
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    tokens = Tokens(folder)
    assert tokens.has_template
    assert tokens.render([{"role": "user", "content": "hi"}], True) == "<s>[user]hiTrue"


@pytest.mark.parametrize(("listed", "expected"), [(2, {2}), ([2, 7, 9], {2, 7, 9}), (None, {2}), ([], {2})], ids=str)
def test_every_end_token_counts(listed, expected, checkpoint_of):
    assert end_ids({"eos_token_id": listed}, Tokens(checkpoint_of("tiny-qwen3"))) == expected


def test_an_end_token_that_is_no_id_is_refused(checkpoint_of):
    with pytest.raises(IntegrityError, match="eos_token_id"):
        end_ids({"eos_token_id": ["</s>"]}, Tokens(checkpoint_of("tiny-qwen3")))
