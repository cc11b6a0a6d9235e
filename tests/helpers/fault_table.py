"""Faults as data: what is planted into which sound file, which checks must fail, and the exit code.

A fault is a function from the sound file to what of it is replaced. docs/faults.md is this table for people.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from small_llama import SMALL_LLAMA
from stock_types import random_checkpoint

from llmx.exporters import gguf_tensors
from llmx.exporters.gguf_metadata import DIGESTS_KEY, SOLVED, SOLVER_KEY
from llmx.exporters.sparsity import SPARSITY_KEY, Sparsity
from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_decode import LEVELS
from llmx.formats.ggml_packers import pack, unpack
from llmx.formats.gguf import GgufFile, Value, array, f32, flag, text, u32

Planted = dict[str, Any]  # the keyword arguments of the fixture `rewrite`
Plant = Callable[[GgufFile], Planted]
CHECK_FAILED, INTEGRITY = 4, 6

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One row. subject: the sound file, a key of SUBJECTS; caught_by: checks that must fail, all of them.

    limits: what the user asks beside the defaults.
    """

    name: str
    subject: str
    plant: Plant
    caught_by: frozenset[str]
    exit_code: int = CHECK_FAILED
    limits: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A sound file. config: of a random checkpoint; {}: the trained example, with `changes` to its JSON files."""

    type_name: str
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: str | None = None  # a kind of tests/conftest.py
    exported_as: str | None = None  # the file is that of another subject


_SMALL = SMALL_LLAMA | {"hidden_size": 128, "intermediate_size": 128}
_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SUBJECTS: dict[str, Subject] = {
    "four bits": Subject("Q4_K_M"),
    "eight bits": Subject("Q8_0"),
    "chat": Subject("Q8_0", changes={"tokenizer_config.json": {"chat_template": CHAT_TEMPLATE}}),
    "two ends": Subject(
        "Q8_0", changes={"generation_config.json": {"eos_token_id": [2, 7]}}, exported_as="eight bits"
    ),
    "yarn": Subject("Q8_0", changes={"config.json": {"rope_parameters": _YARN, "max_position_embeddings": 256}}),
    "llama": Subject("Q8_0", _SMALL | {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **_SCALING}}),
    "padded": Subject("Q8_0", _SMALL | {"model_type": "llama", "vocab_size": 520}),
    "experts": Subject(
        "Q8_0", _SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "window": Subject(
        "Q8_0",
        _SMALL
        | {"model_type": "gemma3_text", "head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
        | {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
        | {"hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0},
    ),
    "merges": Subject(
        "Q8_0",
        _SMALL | {"model_type": "qwen3", "head_dim": 32, "vocab_size": 604},
        {"tokenizer_config.json": {"chat_template": None}},
        tokenizer="byte_bpe",
    ),
}  # fmt: skip


def checkpoint_for(subject: Subject, folder: Path, example: Path, tokenizer_files: Callable[[str], Any]) -> Path:
    """The subject's checkpoint, made in `folder`."""
    if subject.config:
        random_checkpoint(folder, subject.config)
    else:
        shutil.copytree(example, folder)
    files: dict[str, Any] = {} if subject.tokenizer is None else tokenizer_files(subject.tokenizer)
    for name, values in subject.changes.items():
        files[name] = {**(files[name] if name in files else json.loads((folder / name).read_text())), **values}
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


# Ways to plant.


def rows(file: GgufFile, name: str) -> np.ndarray:
    """A copy of a tensor's bytes, u8[rows, row bytes]."""
    tensor = file.tensors[name]
    return file.bytes(name).reshape(-1, row_bytes(tensor.type_name, tensor.shape[-1])).copy()


def key_of(file: GgufFile, ending: str) -> str:
    """The architecture's key that ends so."""
    return next(key for key in file.metadata if key.endswith(f".{ending}"))


def number(ending: str, change: Callable[[Any], Any]) -> Plant:
    """Another number in the metadata, in the type that it has."""

    def plant(file: GgufFile) -> Planted:
        key = key_of(file, ending)
        return {"metadata": {key: Value(file.types[key], change(file.metadata[key]))}}

    return plant


def added(ending: str, value: Value) -> Plant:
    """A number of the architecture that the file did not have."""
    return lambda file: {"metadata": {f"{file.metadata['general.architecture']}.{ending}": value}}


def says(**values: Value | None) -> Plant:
    """Other tokenizer keys; None removes one."""
    return lambda _: {"metadata": {f"tokenizer.ggml.{key}": value for key, value in values.items()}}


def listed(key: str, kind: str, change: Callable[[list[Any]], list[Any] | None]) -> Plant:
    """Another list of the tokenizer's."""

    def plant(file: GgufFile) -> Planted:
        full = f"tokenizer.ggml.{key}"
        found = change(list(file.metadata[full]))  # type: ignore[arg-type]
        return {"metadata": {full: None if found is None else array(kind, found)}}

    return plant


def template(change: Callable[[str], str | None]) -> Plant:
    """Another chat template."""

    def plant(file: GgufFile) -> Planted:
        changed = change(str(file.metadata.get("tokenizer.chat_template", "")))
        return {"metadata": {"tokenizer.chat_template": None if changed is None else text(changed)}}

    return plant


def exchanged(first: str, second: str) -> Plant:
    """Tensors of two prefixes, in each other's place."""

    def plant(file: GgufFile) -> Planted:
        one = [name for name in file.tensors if name.startswith(first)]
        pairs = [(name, second + name.removeprefix(first)) for name in one]
        assert pairs
        return {"tensors": {a: file.bytes(b) for pair in pairs for a, b in (pair, pair[::-1])}}

    return plant


def changed(names: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The rows of bytes of every tensor that has `names` in its name, changed."""

    def plant(file: GgufFile) -> Planted:
        found = {name: change(rows(file, name)) for name in file.tensors if names in name}
        assert found
        return {"tensors": found}

    return plant


def floats(names: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """The same of F32 tensors, as numbers."""

    def of_bytes(data: np.ndarray) -> np.ndarray:
        return change(data.view("<f4")).astype("<f4").view(np.uint8)

    return changed(names, of_bytes)


def scaled(names: str, factor: float, field_: str = "d") -> Plant:
    """A field of every block's scales, times a factor."""

    def plant(file: GgufFile) -> Planted:
        found = {}
        for name, tensor in file.tensors.items():
            if names not in name or BLOCKS[tensor.type_name].weights == 1:
                continue
            scales, codes = unpack(tensor.type_name, rows(file, name).reshape(-1, BLOCKS[tensor.type_name].bytes))
            value = getattr(scales, field_)
            if value is not None:
                found[name] = pack(
                    tensor.type_name, replace(scales, **{field_: (value * factor).astype(value.dtype)}), codes
                )
        assert found
        return {"tensors": found}

    return plant


def flipped_nibble(file: GgufFile) -> Planted:
    """The highest bit of one weight's code, where the scale is largest: elsewhere it could be nearly no change."""
    name = "blk.1.ffn_up.weight"
    type_name = file.tensors[name].type_name
    scales, codes = unpack(type_name, rows(file, name).reshape(-1, BLOCKS[type_name].bytes))
    codes[int(np.argmax(np.abs(scales.d.astype(np.float32)))), 5] ^= np.uint8(len(LEVELS[type_name]) // 2)
    return {"tensors": {name: pack(type_name, scales, codes)}}


def flipped_later(file: GgufFile) -> Planted:
    """The lowest bit of one byte, after the digests were written."""
    data = rows(file, "blk.1.ffn_up.weight")
    data[3, 40] ^= 1
    return {"tensors": {"blk.1.ffn_up.weight": data}, "honest": False}


def digest_left_out(file: GgufFile) -> Planted:
    """A changed tensor, and the list of digests without its own."""
    digests = list(file.metadata[DIGESTS_KEY])  # type: ignore[arg-type]
    changes = flipped_later(file)
    del digests[list(file.tensors).index("blk.1.ffn_up.weight")]
    return {**changes, "metadata": {DIGESTS_KEY: array("u64", digests)}}


def forged_solver(file: GgufFile) -> Planted:
    """Two exchanged tensors, and the mark that excuses weights that lie far from their source."""
    return {**exchanged("blk.1.ffn_up", "blk.1.ffn_gate")(file), "metadata": {SOLVER_KEY: text(SOLVED)}}


def called_sparse(file: GgufFile) -> Planted:
    """The marks of a sparse file on a dense one."""
    told = Sparsity("2:4", "sparsegpt").to_text()
    return {"metadata": {SOLVER_KEY: text(SOLVED), SPARSITY_KEY: text(told)}}


def not_permuted(file: GgufFile) -> Planted:
    """q and k with the rows of each head in the checkpoint's order."""
    head = int(file.metadata["llama.attention.key_length"])  # type: ignore[call-overload]
    names = [name for name in file.tensors if "attn_q." in name or "attn_k." in name]
    return {"tensors": {name: gguf_tensors._deinterleave(rows(file, name), head) for name in names}}


def untied(file: GgufFile) -> Planted:
    """A head of its own in a file whose checkpoint has none: the embedding's rows, moved by one."""
    data = np.roll(rows(file, "token_embd.weight"), 1, axis=0)
    return {"tensors": {"output.weight": data}, "alike": {"output.weight": "token_embd.weight"}}


def cut(with_embedding: bool) -> Plant:
    """A vocabulary of 500 of 512 tokens."""

    def plant(file: GgufFile) -> Planted:
        lists = (("tokens", "str"), ("scores", "f32"), ("token_type", "i32"))
        keys = {f"tokenizer.ggml.{key}": kind for key, kind in lists}
        metadata = {key: array(kind, list(file.metadata[key])[:500]) for key, kind in keys.items()}  # type: ignore[arg-type]
        if not with_embedding:
            return {"metadata": metadata}
        name = "token_embd.weight"
        metadata[key_of(file, "vocab_size")] = u32(500)
        width = file.tensors[name].shape[1]
        return {"metadata": metadata, "tensors": {name: rows(file, name)[:500]}, "shapes": {name: (500, width)}}

    return plant


def swapped(first: int, second: int) -> Callable[[list[Any]], list[Any]]:
    """Two items of a list in each other's place."""

    def change(items: list[Any]) -> list[Any]:
        items[first], items[second] = items[second], items[first]
        return items

    return change


def experts_exchanged(data: np.ndarray) -> np.ndarray:
    """The first two of four experts, u8[4 * rows, row bytes]."""
    return data.reshape(4, -1)[[1, 0, 2, 3]]


def louder_padding(data: np.ndarray) -> np.ndarray:
    """The last row, which no token has, a copy of a real one whose scales are doubled four times."""
    data[-1] = data[100]
    blocks = data[-1].reshape(-1, BLOCKS["Q8_0"].bytes)
    blocks[:, :2] = (blocks[:, :2].copy().view("<f2") * np.float16(16)).view(np.uint8)
    return data


def zeroed_row(data: np.ndarray) -> np.ndarray:
    data[7] = 0
    return data


def not_a_number(data: np.ndarray) -> np.ndarray:
    """The scale of the first block, a float16, is NaN."""
    data[0, 0:2] = [0x00, 0x7E]
    return data


def infinite(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[0, 3] = np.inf
    return values


def caught(*names: str) -> frozenset[str]:
    return frozenset(names)


UP = "blk.1.ffn_up.weight"
FAULTS: tuple[Fault, ...] = (
    # Weights.
    Fault("one flipped bit of a nibble", "four bits", flipped_nibble, caught("bytes.steps")),
    Fault("a bit flipped after the export", "four bits", flipped_later, caught("bytes.digests")),
    Fault("a changed tensor whose digest is left out", "four bits", digest_left_out, caught("bytes.digests")),
    Fault("one NaN scale", "four bits", changed(UP, not_a_number), caught("bytes.finite", "bytes.error")),
    Fault("one infinite weight", "four bits", floats("blk.1.ffn_norm", infinite), caught("bytes.finite")),
    Fault("a row of zeros", "four bits", changed(UP, zeroed_row), caught("bytes.steps")),
    Fault("minimums shifted by half", "four bits", scaled("ffn_up", 1.5, "offset"), caught("bytes.error")),
    Fault("Q8_0 scales 1 % too large", "eight bits", scaled("weight", 1.01), caught("bytes.gain")),
    Fault("up and gate exchanged", "four bits", exchanged("blk.1.ffn_up", "blk.1.ffn_gate"),
          caught("bytes.error", "bytes.steps")),
    Fault("two layers exchanged", "eight bits", exchanged("blk.1.", "blk.2."), caught("bytes.error", "quality.kl")),
    Fault("q and k exchanged", "llama", exchanged("blk.0.attn_q.", "blk.0.attn_k."), caught("bytes.error")),
    Fault("q and k not permuted", "llama", not_permuted, caught("bytes.error", "bytes.steps")),
    Fault("norm gains without their 1", "window", floats("norm", lambda gains: gains - 1), caught("bytes.error")),
    Fault("the scale of the embedding dropped", "window", scaled("token_embd", 128**-0.5),
          caught("bytes.error", "bytes.gain")),
    Fault("two experts exchanged", "experts", changed("blk.0.ffn_gate_exps", experts_exchanged),
          caught("bytes.error")),
    Fault("the router's rows exchanged", "experts", floats("blk.0.ffn_gate_inp", lambda rows: rows[[1, 0, 2, 3]]),
          caught("bytes.error")),
    Fault("a tied head untied wrongly", "eight bits", untied, caught("bytes.tensors")),
    Fault("a head that is left out", "llama", lambda _: {"tensors": {"output.weight": None}},
          caught("bytes.tensors")),
    Fault("a padding row that wins", "padded", changed("output.weight", louder_padding),
          caught("bytes.steps", "quality.kl")),
    Fault("a solver's mark on exchanged tensors", "four bits", forged_solver, caught("bytes.error")),
    Fault("a dense file that is called sparse", "eight bits", called_sparse, caught("bytes.sparsity")),
    Fault("four bits named as eight", "four bits", lambda _: {"metadata": {"general.file_type": u32(7)}},
          caught("bytes.type")),
    Fault("four bits for a user who asks for eight's quality", "four bits", lambda _: {}, caught("quality.kl"),
          limits={"max_kl": 0.005}),
    # Numbers of the architecture.
    Fault("a rope scaling that is dropped", "yarn",
          lambda file: {"metadata": {key: None for key in file.metadata if ".rope.scaling." in key}},
          caught("bytes.numbers", "conversion.kl")),
    Fault("rope factors that are dropped", "llama", lambda _: {"tensors": {"rope_freqs.weight": None}},
          caught("bytes.tensors")),
    Fault("rope factors of 1", "llama", floats("rope_freqs", np.ones_like), caught("bytes.steps", "conversion.kl")),
    Fault("a rope base 1 % too large", "eight bits", number("rope.freq_base", lambda base: base * 1.01),
          caught("bytes.numbers", "conversion.kl")),
    Fault("half of each head rotated", "eight bits", number("rope.dimension_count", lambda count: count // 2),
          caught("bytes.numbers", "runtime.loads")),
    Fault("an epsilon ten times too large", "eight bits", number("layer_norm_rms_epsilon", lambda eps: eps * 10),
          caught("bytes.numbers", "conversion.kl")),
    Fault("a sliding window one too short", "window", number("attention.sliding_window", lambda size: size - 1),
          caught("bytes.numbers", "conversion.window")),
    Fault("a sliding window one too long", "window", number("attention.sliding_window", lambda size: size + 1),
          caught("bytes.numbers", "conversion.window")),
    Fault("sliding and full layers exchanged", "window",
          number("sliding_window_pattern", lambda pattern: tuple(not sliding for sliding in pattern)),
          caught("bytes.numbers", "conversion.window")),
    Fault("a softcap of the logits that the model has not", "window", added("final_logit_softcapping", f32(5.0)),
          caught("bytes.numbers", "conversion.kl")),
    Fault("another attention scale", "llama", added("attention.scale", f32(0.5)), caught("bytes.numbers")),
    Fault("one expert of two", "experts", number("expert_used_count", lambda count: count - 1),
          caught("bytes.numbers", "conversion.kl")),
    Fault("another number of heads", "eight bits", number("attention.head_count", lambda count: count * 2),
          caught("bytes.numbers", "runtime.loads")),
    Fault("another number of key heads", "eight bits", number("attention.head_count_kv", lambda count: count * 2),
          caught("bytes.numbers", "runtime.loads")),
    Fault("a context four times too long", "eight bits", number("context_length", lambda length: length * 4),
          caught("bytes.numbers")),
    # Tokens.
    Fault("another BOS", "eight bits", says(bos_token_id=u32(5)), caught("tokens.bos")),
    Fault("no BOS", "eight bits", says(add_bos_token=flag(False)), caught("tokens.bos")),
    Fault("a BOS that the tokenizer does not add", "merges", says(add_bos_token=flag(True), bos_token_id=u32(0)),
          caught("tokens.bos")),
    Fault("an EOS after every text", "eight bits", says(add_eos_token=flag(True)), caught("tokens.bos")),
    Fault("another EOS", "eight bits", says(eos_token_id=u32(7)), caught("tokens.ends")),
    Fault("a second end token that does not end", "two ends", lambda _: {}, caught("tokens.ends")),
    Fault("two tokens exchanged", "eight bits", listed("tokens", "str", swapped(300, 400)), caught("tokens.ids")),
    Fault("scores in reverse", "eight bits", listed("scores", "f32", lambda scores: scores[::-1]),
          caught("tokens.ids")),
    Fault("a space before every text", "eight bits",
          lambda file: {"metadata": {"tokenizer.ggml.add_space_prefix":
                                     flag(not file.metadata["tokenizer.ggml.add_space_prefix"])}},
          caught("tokens.ids")),
    Fault("a vocabulary cut short", "eight bits", cut(with_embedding=False), caught("runtime.loads")),
    Fault("a vocabulary cut short with its embedding", "eight bits", cut(with_embedding=True),
          caught("bytes.tensors", "tokens.vocabulary")),
    Fault("merges that are missing", "merges", listed("merges", "str", lambda _: None), caught("runtime.loads")),
    Fault("merges in reverse", "merges", listed("merges", "str", lambda merges: merges[::-1]), caught("tokens.ids")),
    Fault("another pre-tokenizer", "merges", says(pre=text("gpt-2")), caught("tokens.ids")),
    # Chat template.
    Fault("a template without generation prompt", "chat", template(lambda it: it.replace(PROMPT, "")),
          caught("template.embedded")),
    Fault("other whitespace in the template", "chat", template(lambda it: it.replace("\n", " ")),
          caught("template.embedded")),
    Fault("no template", "chat", template(lambda _: None), caught("template.embedded")),
    Fault("a second BOS by the template", "chat", template(lambda it: "{{ bos_token }}{{ bos_token }}" + it),
          caught("template.embedded")),
    Fault("a template that the checkpoint has not", "eight bits", template(lambda _: CHAT_TEMPLATE),
          caught("template.embedded")),
)  # fmt: skip
