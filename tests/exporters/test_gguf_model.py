"""A GGUF file read back as a model: its config, its tokenizer, its weights, for every family that GGUF can hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_cases import CASES, kl, random_tokens, save  # noqa: E402
from gguf_cases import FAMILIES, gguf_of, letters  # noqa: E402

from llmx.errors import IntegrityError, UnsupportedError, UsageError  # noqa: E402
from llmx.exporters.gguf import GgufOptions, prepare, write  # noqa: E402
from llmx.exporters.gguf_config import config  # noqa: E402
from llmx.exporters.gguf_families import gguf_family  # noqa: E402
from llmx.exporters.gguf_model import GgufModel, is_gguf, open_gguf_model  # noqa: E402
from llmx.exporters.gguf_tensors import entries  # noqa: E402
from llmx.exporters.gguf_tokenizer import tokenizer_files  # noqa: E402
from llmx.exporters.gguf_types import file_type  # noqa: E402
from llmx.exporters.gguf_vocab import vocabulary  # noqa: E402
from llmx.formats.gguf import array, header_bytes, layout, read_gguf, text, u32  # noqa: E402
from llmx.models import decoder  # noqa: E402
from llmx.models.architecture import Architecture  # noqa: E402
from llmx.models.model import Model, open_model  # noqa: E402
from llmx.models.tokenizer import Tokenizer, open_tokenizer  # noqa: E402
from llmx.validate.corpus import CORPUS  # noqa: E402
from llmx.validate.restored import restored_model  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
TYPES = ("Q4_0", "Q8_0")
MAX_KL = 1e-9
SHORT = 9  # positions within every window that llama.cpp's graphs do not have


def differing(a: Architecture, b: Architecture) -> list[str]:
    """The names of what two architectures do not share, but for where their tensors lie."""
    return [f.name for f in fields(a) if f.name != "tensors" and getattr(a, f.name) != getattr(b, f.name)]


def same_without_gguf(source: Model, path: Path) -> Model:
    """The checkpoint's own architecture over the file's decoded weights."""
    a, file = source.architecture, read_gguf(path)
    return restored_model(file, source, entries(a, gguf_family(a), a.vocab))


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_with_the_decoded_weights_bit_for_bit_and_the_same_logits(
    name: str, type_name: str, tmp_path: Path
) -> None:
    save(CASES[name], tmp_path / "model")
    path = gguf_of(tmp_path / "model", tmp_path / "a.gguf", type_name)
    source, made = open_model(tmp_path / "model"), open_gguf_model(path)
    theirs = same_without_gguf(source, path)
    assert {spec.name: spec.shape for spec in made.architecture.tensors} == {
        spec.name: spec.shape for spec in source.architecture.tensors
    }
    for weight in made.weights():
        assert np.array_equal(weight.read(), theirs.weight(weight.spec.name).read()), weight.spec.name
    a = source.architecture
    lost = "gemma3" not in name and "sliding" in a.layer_kinds
    tokens = random_tokens(SHORT if lost else CASES[name].length if "past its context" in name else a.context_length)
    if a.rope is not None and a.rope.kind == "dynamic":
        tokens = tokens[: a.context_length]
    assert kl(decoder.logits(theirs, tokens), decoder.logits(made, tokens)) < MAX_KL


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_of_a_file_loads_as_a_checkpoint_once_its_weights_are_written(
    name: str, solvable: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of matrices so wide that a Q4_0 file holds Q6_K, too."""
    path = gguf_of(solvable(name), tmp_path / "a.gguf", "Q4_0")
    made, theirs = open_gguf_model(path), same_without_gguf(open_model(solvable(name)), path)
    made.gguf.materialize()
    again = open_model(made.checkpoint.folder)
    assert again.architecture == made.architecture
    assert differing(made.architecture, theirs.architecture) == []
    for weight in made.weights():
        assert np.array_equal(weight.read(), again.weight(weight.spec.name).read()), weight.spec.name
        assert np.array_equal(weight.read(), theirs.weight(weight.spec.name).read()), weight.spec.name


def test_transformers_computes_the_logits_of_the_file_from_that_folder(tmp_path: Path) -> None:
    save(CASES["llama, llama3 rope"], tmp_path / "model")
    made = open_gguf_model(gguf_of(tmp_path / "model", tmp_path / "a.gguf", "Q4_0"))
    made.gguf.materialize()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(made.checkpoint.folder, dtype=torch.float32)
    tokens = random_tokens(60)
    with torch.inference_mode():
        theirs = loaded(torch.tensor([tokens])).logits[0].numpy()
    assert kl(theirs, decoder.logits(made, tokens)) < MAX_KL


def test_the_folder_is_removed_with_the_model(tmp_path: Path) -> None:
    made = _example(tmp_path)
    folder = made.checkpoint.folder
    assert folder.is_dir()
    del made
    assert not folder.exists()


def _example(tmp_path: Path, type_name: str = "Q8_0") -> GgufModel:
    export = prepare(open_model(EXAMPLE), open_tokenizer(EXAMPLE), GgufOptions(file_type=file_type(type_name)))
    write(export, [tmp_path / "example.gguf"])
    return open_gguf_model(tmp_path / "example.gguf")


def test_the_example_comes_back_as_the_architecture_and_the_name_that_it_was(tmp_path: Path) -> None:
    made, source = _example(tmp_path), open_model(EXAMPLE)
    assert differing(made.architecture, source.architecture) == []
    assert made.checkpoint.source.name == source.checkpoint.source.name


def test_rows_read_in_pieces_equal_rows_read_at_once(tmp_path: Path) -> None:
    save(CASES["llama"], tmp_path / "model")
    made = open_gguf_model(gguf_of(tmp_path / "model", tmp_path / "a.gguf", "Q8_0"))
    for name in ("layers.1.q.weight", "layers.1.k.weight", "layers.0.down.weight"):
        weight = made.weight(name)
        pieces = [weight.read(start, min(start + 3, weight.rows)) for start in range(0, weight.rows, 3)]
        assert np.array_equal(np.concatenate(pieces), weight.read())


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    made = _example(tmp_path)
    made.checkpoint.check_unchanged()
    (tmp_path / "example.gguf").touch()
    with pytest.raises(IntegrityError, match="changed"):
        made.checkpoint.check_unchanged()


def test_llama3_scaling_is_found_in_the_divisors_and_other_divisors_are_kept_as_they_are(tmp_path: Path) -> None:
    save(CASES["llama, llama3 rope"], tmp_path / "llama3")
    told = config(read_gguf(gguf_of(tmp_path / "llama3", tmp_path / "llama3.gguf", "Q8_0")))["rope_parameters"]
    assert told["rope_type"] == "llama3" and (told["factor"], told["high_freq_factor"]) == (8.0, 4.0)
    assert told["original_max_position_embeddings"] == 32
    save(CASES["llama, yarn with every option"], tmp_path / "yarn")
    told = config(read_gguf(gguf_of(tmp_path / "yarn", tmp_path / "yarn.gguf", "Q8_0")))["rope_parameters"]
    assert told["rope_type"] == "longrope" and told["short_factor"] == told["long_factor"]


def _broken(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The example's metadata, changed, over its tensors."""
    export = prepare(open_model(EXAMPLE), open_tokenizer(EXAMPLE), GgufOptions(file_type=file_type("Q8_0")))
    change(export.metadata)
    placed = layout(export.metadata, export.shards[0])
    write(replace(export, layouts=(placed,)), [tmp_path / "broken.gguf"])
    return tmp_path / "broken.gguf"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda m: m.update({"qwen3.attention.scale": u32(2)}), UnsupportedError, "attention.scale"),
        (lambda m: m.update({"general.architecture": text("mamba")}), UnsupportedError, "mamba"),
        (lambda m: m.pop("qwen3.block_count"), IntegrityError, "block_count"),
        (lambda m: m.update({"qwen3.embedding_length": u32(64)}), IntegrityError, "shape"),
        (lambda m: m.update({"qwen3.block_count": u32(1)}), IntegrityError, "left over"),
        (lambda m: m.update({"qwen3.rope.scaling.type": text("magic")}), UnsupportedError, "magic"),
        (lambda m: m.update({"tokenizer.ggml.model": text("rwkv")}), UnsupportedError, "rwkv"),
        (lambda m: m.update({"tokenizer.ggml.eos_token_id": u32(1 << 30)}), IntegrityError, "eos"),
        (lambda m: m.update({"tokenizer.ggml.tokens": array("str", ["a", "a"])}), IntegrityError, "different"),
    ],
)
def test_a_file_that_means_something_else_is_refused_by_what_it_says(
    change: Callable[[dict[str, Any]], None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as refused:
        open_gguf_model(_broken(tmp_path, change))
    assert said in str(refused.value)


def test_what_is_no_file_is_no_gguf_model(tmp_path: Path) -> None:
    assert not is_gguf(tmp_path) and not is_gguf("owner/name.gguf")
    with pytest.raises(UsageError, match="no such file"):
        open_gguf_model(tmp_path / "none.gguf")


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_back(tokenizer: Tokenizer, folder: Path, padding: int = 5) -> Tokenizer:
    folder.mkdir()
    path = folder / "words.gguf"
    metadata = {"general.architecture": text("llama")} | vocabulary(tokenizer, len(tokenizer.tokens) + padding)
    path.write_bytes(header_bytes(metadata, []))
    for name, content in tokenizer_files(read_gguf(path)).items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return open_tokenizer(folder)


@pytest.mark.parametrize("kind", ["byte_bpe", "spm_bpe", "unigram", "sentencepiece_bpe", "sentencepiece_unigram"])
def test_texts_become_the_same_ids(kind: str, tokenizer_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = open_tokenizer(tokenizer_folder(kind))
    again = _read_back(source, tmp_path / "again")
    for parse in (True, False):
        theirs = [source.encode(sample, parse_special=parse) for sample in CORPUS]
        assert [again.encode(sample, parse_special=parse) for sample in CORPUS] == theirs
    assert (again.add_bos, again.add_eos) == (source.add_bos, source.add_eos)
    assert set(source.end_ids) <= set(again.end_ids)


def test_templates_come_back_by_their_names(tokenizer_folder: Callable[..., Path], tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    source = open_tokenizer(
        tokenizer_folder(
            "byte_bpe", **{"tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": templates}}
        )
    )
    assert (
        _read_back(source, tmp_path / "again").templates
        == source.templates
        == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    )


def test_a_pretokenizer_that_is_not_known_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    metadata = vocabulary(letters(10), 10) | {"tokenizer.ggml.pre": text("sorcery")}
    (tmp_path / "a.gguf").write_bytes(header_bytes(metadata, []))
    with pytest.raises(UnsupportedError, match="sorcery") as refused:
        tokenizer_files(read_gguf(tmp_path / "a.gguf"))
    assert "llama-bpe" in str(refused.value)
