"""Checkpoints made to do harm: configuration, weights, index, tokenizer, template, pickles, links, archives."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_case import Command, Hostile, changed, example, planned, rows, with_values
from hostile_safetensors import HOSTILE, PAIR, safetensors_file

Change = Callable[[dict[str, Any]], object]


def config(**values: object) -> Callable[[Path], Command]:
    return planned(config__json=with_values(**values))


MANY = '{"a": [' + "[]," * (1 << 21) + "0]}"
CONFIG = {
    "no JSON": (planned(config__json="{"), "not valid JSON"),
    "a list": (planned(config__json="[]"), "A JSON object was expected, not list"),
    "empty": (planned(config__json=""), "not valid JSON"),
    "not UTF-8": (planned(config__json=b'{"a": "\xff"}'), "not valid JSON"),
    "a key twice": (planned(config__json='{"a": 1, "a": 2}'), "keys given twice: 'a'"),
    "a number that JSON lacks": (planned(config__json='{"a": Infinity}'), "Infinity is not a JSON number"),
    "brackets nested too deep": (planned(config__json='{"a":' + "[" * 100_000), "recursion"),
    "a number of a million digits": (planned(config__json='{"a": ' + "9" * 1_000_000 + "}"), "digits"),
    "100 MB": (planned(config__json="{" + " " * 100_000_000 + "}"), "bytes is refused; the limit is"),
    "more values than memory holds": (planned(config__json=MANY), "brackets, commas and colons; the limit is"),
    "layers below 0": (config(num_hidden_layers=-1), "num_hidden_layers: a whole number from 1 is expected, not -1"),
    "2147483647 layers": (config(num_hidden_layers=2**31 - 1, layer_types=...), "layers of 0 experts are no model"),
    "more layers than tensors": (config(num_hidden_layers=4000, layer_types=...), "is missing (needed for layers.4"),
    "a width of 2147483647": (config(hidden_size=2**31 - 1), "[512, 2147483647] is expected"),
    "a vocabulary of 2147483647": (config(vocab_size=2**31 - 1), "[2147483647, 256] is expected"),
    "a width beyond all integers": (config(hidden_size=10**400), "hidden_size: a whole number from 1 is expected"),
    "a width that is a text": (config(hidden_size="256"), "hidden_size: a whole number from 1 is expected"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads: a whole number from 1 is expected, not 0"),
    "a text of a million letters": (config(rms_norm_eps="x" * 1_000_000), "rms_norm_eps: a number above 0 is expected"),
    "no eps": (config(rms_norm_eps=0), "rms_norm_eps: a number above 0 is expected, not 0"),
}


def weights(header: Any, data: bytes = bytes(22)) -> Callable[[Path], Command]:
    """The example with a file of weights that has that header."""

    def make(folder: Path) -> Command:
        example(folder, {"model.safetensors": None})
        safetensors_file(folder / "model.safetensors", header, data)
        return "plan", folder

    return make


def weight_bytes(data: bytes) -> Callable[[Path], Command]:
    return planned(model__safetensors=data)


def archive(kind: str) -> bytes:
    """A small archive that holds a file of another folder."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("../../evil.py", "print(1)")
    else:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("../../evil.py"))
    return stream.getvalue() if kind != "gzip" else gzip.compress(stream.getvalue())


SAFETENSORS = {
    **{name: (weights(header), says.replace("\\", "")) for name, (header, says) in HOSTILE.items()},
    "empty": (weight_bytes(b""), "at least 8 bytes"),
    "a header of 100 MB": (weight_bytes(struct.pack("<Q", 100_000_001) + b"{}"), "limit is 100000000"),
    "a header length that wraps around": (weight_bytes(b"\xff" * 8 + b"{}"), "is refused; the limit is"),
    "a header that is cut": (weight_bytes(struct.pack("<Q", 4096) + b"{}"), "The file is cut"),
    "more tensors than memory holds": (
        weight_bytes(struct.pack("<Q", len(MANY)) + MANY.encode()),
        "brackets, commas and colons; the limit is",
    ),
    "a zip archive, as torch saves": (weight_bytes(archive("zip")), "is refused; the limit is"),
    "a gzip archive": (weight_bytes(archive("gzip")), "is refused; the limit is"),
    "a tar archive": (weight_bytes(archive("tar")), "is refused; the limit is"),
    "a pickle": (weight_bytes(pickle.dumps([1, 2, 3])), "is refused; the limit is"),
    "tensors of another model": (weights(PAIR), "is missing (needed for"),
}


def index(text: object, *shards: str) -> Callable[[Path], Command]:
    """The example with an index, and shards that all hold the same two tensors."""

    def make(folder: Path) -> Command:
        content = text if isinstance(text, str) else json.dumps({"weight_map": text})
        example(folder, {"model.safetensors": None, "model.safetensors.index.json": content})
        for shard in shards:
            safetensors_file(folder / shard, PAIR)
        return "plan", folder

    return make


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = {
    "another folder": (index({"a": "../x.safetensors"}), "'../x.safetensors'"),
    "an absolute path": (index({"a": "/etc/x.safetensors"}), "not plain names of shards in its own folder"),
    "a folder within": (index({"a": "sub/x.safetensors"}), "not plain names of shards in its own folder"),
    "another system's separator": (index({"a": "..\\x.safetensors"}), "not plain names of shards in its own folder"),
    "a name with a NUL": (index({"a": "x\0.safetensors"}), "not plain names of shards in its own folder"),
    "a pickle as a shard": (index({"a": "pytorch_model.bin"}), "'pytorch_model.bin'"),
    "a number as a shard": (index({"a": 5}), "not plain names of shards in its own folder"),
    "no weights": (index({}), "The index has no weight_map"),
    "no map": (index("{}"), "The index has no weight_map"),
    "a key twice": (index('{"weight_map": {"a": "x", "a": "y"}}'), "keys given twice"),
    "a shard that is not there": (index({"a": ONE, "b": TWO}, ONE), f"{TWO} is missing"),
    "a tensor in two shards": (index({"a": ONE, "b": TWO}, ONE, TWO), f"a is stored in {ONE} and again in {TWO}"),
    "a tensor that no shard has": (index({"a": ONE, "b": ONE, "c": ONE}, ONE), f"c is not in {ONE}"),
}


def tokenizer(change: Change) -> Callable[[Path], Command]:
    return planned(tokenizer__json=changed(change))


def vocabulary(**ids: object) -> Callable[[Path], Command]:
    return tokenizer(lambda told: told["model"]["vocab"].update(ids))


BEYOND = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "a"}}, {"Sequence": {"id": "A"}}],
    "pair": [],
    "special_tokens": {"a": {"id": "a", "ids": [99_999], "tokens": ["a"]}},
}
TOKENIZER = {
    "no JSON": (planned(tokenizer__json="{"), "not valid JSON"),
    "brackets nested too deep": (planned(tokenizer__json='{"a":' * 100_000), "recursion"),
    "more values than memory holds": (
        planned(tokenizer__json='{"a": [' + "0," * (1 << 23) + "0]}"),
        "brackets, commas and colons; the limit is",
    ),
    "no model": (tokenizer(lambda told: told.pop("model")), "tokenizer.json has no model"),
    "an id beyond all vocabularies": (vocabulary(zz=2**60), "'zz' with id 1152921504606846976"),
    "an id below 0": (vocabulary(zz=-1), "'zz' with id -1"),
    "an id that is a flag": (vocabulary(zz=True), "'zz' with id True"),
    "an id that two tokens have": (vocabulary(zz=5), "id 5 has two tokens"),
    "ids with a gap of a million": (vocabulary(zz=1_000_000), "tokens but ids up to 1000000"),
    "half of a surrogate pair": (vocabulary(**{"\ud800": 512}), "is no Unicode text"),
    "a vocabulary that is a list": (tokenizer(lambda told: told["model"].update(vocab=[1])), "must be an object"),
    "a merge of nothing": (
        tokenizer(lambda told: told["model"]["merges"].append(["q", "zzzz"])),
        "is no pair of tokens that join to a token",
    ),
    "an added token below 0": (
        tokenizer(lambda told: told["added_tokens"].append({"id": -5, "content": "x"})),
        "added token 'x' with id -5",
    ),
    "an added token that is a number": (
        tokenizer(lambda told: told["added_tokens"].append(5)),
        "does not have its format's structure",
    ),
    "a post-processor's id that is not there": (
        tokenizer(lambda told: told.update(post_processor=BEYOND)),
        "names ids that do not exist: [99999]",
    ),
    "an end token that is not there": (
        planned(tokenizer_config__json=with_values(eos_token="<nowhere>")),
        "eos_token '<nowhere>' is not in the vocabulary",
    ),
    "an end id that is not there": (
        planned(generation_config__json=with_values(eos_token_id=[10**9])),
        "eos_token_id names ids that do not exist: [1000000000]",
    ),
}


def pieces(data: bytes) -> Callable[[Path], Command]:
    return planned(tokenizer__json=None, tokenizer__model=data)


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    body = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


SENTENCEPIECE = {
    "empty": (pieces(b""), "it is empty"),
    "a length past the end": (pieces(b"\x0a\xff\xff\xff\xff\x0f"), "the SentencePiece model is cut"),
    "a number that does not end": (pieces(b"\xff" * 64), "does not end"),
    "a wire type that does not exist": (pieces(b"\x0f\x00"), "wire type 7"),
    "a piece that is no message": (pieces(b"\x08\x01"), "a message was expected"),
    "a piece that is not UTF-8": (pieces(piece(b"\xff")), "piece 0 is not UTF-8"),
    "a score that is no number": (pieces(piece(b"a", float("nan"))), "piece 0 has score nan"),
    "a kind that does not exist": (pieces(piece(b"a", 0.0, 9)), "type 9"),
    "a piece twice": (pieces(piece(b"a") * 2), "'a' has two ids, 0 and 1"),
    "more pieces than memory holds": (pieces(b"\x0a\x00" * (3 << 20)), "too many pieces; the limit is"),
}


def template(text: str | bytes) -> Callable[[Path], Command]:
    return planned(chat_template__jinja=text)


def rendered(text: str) -> Callable[[Path], Command]:
    """A template that is met when conversations are calibrated on."""

    def make(folder: Path) -> Command:
        chats = folder / "chats.jsonl"
        chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
        (folder / "model").mkdir()
        model = example(folder / "model", {"chat_template.jinja": text})
        return "calibrate", model, "--calibration", chats, "-o", folder / "imatrix.gguf"

    return make


TEMPLATE = {
    "no template": (template("{% for x in %}"), "line 1"),
    "2 MB": (template("x" * 2_000_001), "larger than 2000000 bytes"),
    "not UTF-8": (template(b"\xff\xfe"), "is not UTF-8"),
    "brackets nested too deep": (template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), "recursion"),
    "blocks nested too deep": (template("{% if a %}" * 300 + "{% endif %}" * 300), "recursion"),
    "more to compile than time": (template("{{ 1 }}" * 280_000), "more time or memory than a template may"),
    "a number as a template": (planned(tokenizer_config__json=with_values(chat_template=[7])), "lacks its name"),
    "reaching for Python": (rendered("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "is unsafe"),
    "reaching for a function's globals": (rendered("{{ raise_exception.__globals__['x'] }}"), "is unsafe"),
    "another file": (rendered("{% include '/etc/passwd' %}"), "no loader"),
    "a gigabyte of spaces": (rendered("{{ 'a' | center(1000000000) }}"), "more than 256 MB of memory"),
    "a text that doubles": (
        rendered("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}"),
        "more than 256 MB of memory",
    ),
    "no end": (
        rendered("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        "more time or memory than a template may",
    ),
}


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def pickled(name: str) -> Callable[[Path], Command]:
    """The example with a pickle instead of weights."""

    def make(folder: Path) -> Command:
        example(folder, {"model.safetensors": None})
        (folder / name).write_bytes(pickle.dumps(Payload(folder / "canary")))
        return "plan", folder

    return make


REFUSED = "opening one can run any code"
PICKLES = {name: (pickled(name), REFUSED) for name in ("pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt")}


def linked(name: str, target: str) -> Callable[[Path], Command]:
    """The example with a symbolic link to something that is no such file."""

    def make(folder: Path) -> Command:
        example(folder, {name: None})
        (folder / name).symlink_to(target)
        return "plan", folder

    return make


def shard_of(make_it: Callable[[Path], object]) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        index({"a": ONE})(folder)
        make_it(folder / ONE)
        return "plan", folder

    return make


LINKS = {
    "weights that are endless": (shard_of(lambda path: path.symlink_to("/dev/zero")), f"{ONE} is missing"),
    "weights that are a pipe": (shard_of(os.mkfifo), f"{ONE} is missing"),
    "weights that are a folder": (shard_of(Path.mkdir), f"{ONE} is missing"),
    "weights that link to themselves": (shard_of(lambda path: path.symlink_to(path.name)), f"{ONE} is missing"),
    "weights that are another file of the system": (
        linked("model.safetensors", "/etc/passwd"),
        "is refused; the limit",
    ),
    "a config that is another file of the system": (linked("config.json", "/etc/passwd"), "not valid JSON"),
    "a tokenizer that is another file of the system": (linked("tokenizer.json", "/etc/passwd"), "not valid JSON"),
    "a template that is another file of the system": (
        linked("chat_template.jinja", "/etc/passwd"),
        "is a symbolic link out of the checkpoint",
    ),
}

CHECKPOINTS: tuple[Hostile, ...] = (
    *rows("config", CONFIG),
    *rows("safetensors", SAFETENSORS),
    *rows("index", INDEX),
    *rows("tokenizer", TOKENIZER),
    *rows("SentencePiece", SENTENCEPIECE),
    *rows("template", TEMPLATE),
    *rows("pickle", PICKLES),
    *rows("link", LINKS),
)
