"""Artifacts, and what stands beside them, made to do harm: GGUF sets, ONNX folders, engines, manifests, records."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_case import CORPUS, EXAMPLE, Command, Hostile, inspected, rows
from hostile_checkpoints import archive
from hostile_gguf import OFFENCES, build, info, long, pair, word
from hostile_graphs import onnx_rows
from hostile_imatrix import DAMAGED_GGUF, DAMAGED_LEGACY, gguf_file
from hostile_safetensors import PAIR, safetensors_file

from llmx.formats import tensorrt
from llmx.formats.tensorrt import EngineConfig, Profile
from llmx.validate.record import MAGIC


def of_size(head: bytes, size: int) -> Callable[[Path], Command]:
    """A GGUF file that begins so and has that size, on no disk."""

    def make(folder: Path) -> Command:
        with (folder / "model.gguf").open("wb") as file:
            file.write(head)
            file.truncate(size)
        return "inspect", folder / "model.gguf"

    return make


def shards(*files: tuple[str, int, int]) -> Callable[[Path], Command]:
    """A split set: name, split.no and split.count of each file; the first is inspected."""

    def make(folder: Path) -> Command:
        for name, number, count in files:
            keys = [pair("split.no", 2, struct.pack("<H", number)), pair("split.count", 2, struct.pack("<H", count))]
            keys.append(pair("split.tensors.count", 5, word(2)))
            (folder / name).write_bytes(build(tuple(keys), (info(),)))
        return "inspect", folder / files[0][0]

    return make


FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
GGUF = {
    **{name: (inspected("model.gguf", raw), says) for name, (raw, says) in OFFENCES.items()},
    "an array larger than memory": (of_size(build((pair("k", 9, word(0) + long(2**23)),)), 2**30), "a file may hold"),
    "a text larger than memory": (of_size(build((pair("k", 8, long(2**29)),)), 2**30), "a header may have"),
    "strings larger than memory": (of_size(build((pair("k", 9, word(8) + long(2**23)),)), 2**30), "a file may hold"),
    "a zip archive": (inspected("model.gguf", archive("zip")), "instead of b'GGUF'"),
    "a gzip archive": (inspected("model.gguf", archive("gzip")), "instead of b'GGUF'"),
    "a page of a web server": (inspected("model.gguf", b"<!doctype html>" + bytes(99)), "instead of b'GGUF'"),
    "a shard that is not there": (shards((FIRST, 0, 2)), SECOND),
    "a shard twice": (shards((FIRST, 0, 2), (SECOND, 0, 2)), "split.no is 0 instead of 1"),
    "a shard of another set": (shards((FIRST, 0, 2), (SECOND, 1, 3)), "split.count contradicts the first shard"),
    "a tensor in two shards": (shards((FIRST, 0, 2), (SECOND, 1, 2)), "tensor 't' is in another shard too"),
    "more shards than its name says": (shards((FIRST, 0, 9)), "which the file's name contradicts"),
    "a name with a terminal's commands": (
        inspected("model.gguf", build((), (info("\x1b[2J"), info("\x1b[2J", offset=32)))),
        "the name occurs twice",
    ),
}


def imatrix(write: Callable[[Path], object]) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        write(folder / "imatrix")
        return "plan", EXAMPLE, "--type", "Q4_K_M", "--method", "rtn", "--imatrix", folder / "imatrix"

    return make


IMATRIX = {
    **{
        name: (imatrix(lambda path, tensors=tensors, keys=keys: gguf_file(path, tensors, keys)), says)
        for name, (tensors, keys, says) in DAMAGED_GGUF.items()
    },
    **{
        f"legacy, {name}": (imatrix(lambda path, raw=raw: path.write_bytes(raw)), "importance matrix")
        for name, raw in DAMAGED_LEGACY.items()
    },
    "of another model": (
        imatrix(lambda path: shutil.copy(CORPUS.parent / "golden" / "imatrix.gguf", path)),
        "the importance matrix is of another model",
    ),
}

ENGINE = EngineConfig(
    architecture="qwen3",
    builder="tensorrt",
    builder_version="10.16.1",
    compute_capability=(9, 0),
    type_name="F16",
    floats="F16",
    encodings={"embedding.weight": "F16"},
    parameters=20_000,
    vocab_size=96,
    layers=2,
    kv_heads=2,
    head_dim=8,
    context_length=64,
    max_batch=2,
    max_input=16,
    max_length=64,
    profiles=(Profile("prefill", (1, 1, 2), (1, 8, 16), (1, 32, 64)),),
    cache=tensorrt.IN_PLACE,
    engine_bytes=4,
    sha256=hashlib.sha256(b"ftrt").hexdigest(),
    dialect="trt",
    version="0.1.0",
)


def engine(change: Callable[[dict[str, Any]], object] | bytes, plan: bytes = b"ftrt") -> Callable[[Path], Command]:
    """An engine's folder; what is changed in its config.json, or its bytes."""

    def make(folder: Path) -> Command:
        (folder / tensorrt.ENGINE_NAME).write_bytes(plan)
        told = json.loads(tensorrt.config_bytes(ENGINE))
        if callable(change):
            change(told)
        (folder / "config.json").write_bytes(json.dumps(told).encode() if callable(change) else change)
        return "inspect", folder

    return make


def engine_with(**values: object) -> Callable[[Path], Command]:
    return engine(lambda told: told.update(values))


BOUNDS = {"name": "a", "batch": [1, 1, 2], "positions": [1, 8, 16], "capacity": [1, 32, 64]}
ENGINES = {
    "no JSON": (engine(b"{"), "not valid JSON"),
    "100 MB": (engine(b"{" + b" " * 100_000_000 + b"}"), "bytes is refused; the limit is"),
    "cut short": (engine(lambda told: None, plan=b"ftr"), "the engine is cut short: it has 3 bytes"),
    "too long": (engine(lambda told: None, plan=b"ftrt!"), "the engine is too long"),
    "no vocabulary": (engine_with(vocab_size=0), "vocab_size: a positive whole number"),
    "a size beyond all integers": (engine_with(layers=2**80), "layers: a positive whole number"),
    "a builder that does not exist": (engine_with(builder={"package": "os", "version": "1"}), "builder: package (one"),
    "a digest that is none": (engine_with(sha256="0" * 63), "sha256: 64 hexadecimal digits"),
    "no profile": (engine_with(profiles=[]), "profiles: a list of name"),
    "a profile beyond the engine": (
        engine_with(profiles=[BOUNDS | {"capacity": [1, 32, 65]}]),
        "profile a: capacity reaches 65, the engine 64",
    ),
    "bounds in the wrong order": (engine_with(profiles=[BOUNDS | {"batch": [2, 1, 1]}]), "profiles: a list of name"),
    "two profiles of one name": (engine_with(profiles=[BOUNDS, BOUNDS]), "two profiles have one name"),
    "a cache that does not exist": (engine_with(cache="../x"), "cache: one of in place, two buffers"),
    "encodings that are a list": (engine_with(encodings=["F16"]), "encodings: an object"),
}


def trtllm(
    config: dict[str, Any], index: object = None, names: tuple[str, ...] = ("model.safetensors",), header: Any = PAIR
) -> Callable[[Path], Command]:
    """A TensorRT-LLM folder with those files of weights."""

    def make(folder: Path) -> Command:
        (folder / "config.json").write_text(json.dumps(config))
        for name in names:
            safetensors_file(folder / name, header)
        if index is not None:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        return "inspect", folder

    return make


OF_HF = {"model_type": "llama", "quantization_config": {"quant_method": "modelopt", "quant_algo": "W8A16"}}
NO_SCALE = {"a.weight": {"dtype": "I8", "shape": [2, 11], "data_offsets": [0, 22]}}


def of_ranks(**mapping: object) -> dict[str, Any]:
    return {"architecture": "LlamaForCausalLM", "mapping": mapping}


TRTLLM = {
    "an index to another folder": (
        trtllm(OF_HF, {"a": "../x.safetensors"}),
        "'../x.safetensors' is not the plain name",
    ),
    "an index of nothing": (trtllm(OF_HF, {}), "it names no tensor"),
    "an index of other files": (trtllm(OF_HF, {"a": "model.safetensors"}), "b lies in model.safetensors"),
    "a shard that is not there": (trtllm(OF_HF, {"a": "x.safetensors"}), "x.safetensors"),
    "no weights": (trtllm(OF_HF, names=()), "there is no model.safetensors"),
    "a broken header": (trtllm(OF_HF, header={"a": 1}), "exactly dtype, shape and data_offsets"),
    "8 bits without scales": (trtllm(OF_HF, header=NO_SCALE), "a.weight"),
    "a billion ranks": (
        trtllm(of_ranks(world_size=10**9, tp_size=10**9), names=("rank0.safetensors",)),
        "is no number of ranks",
    ),
    "ranks that do not multiply": (
        trtllm(of_ranks(world_size=3, tp_size=2, pp_size=2), names=("rank0.safetensors",)),
        "is no number of ranks",
    ),
    "a rank that is not there": (
        trtllm(of_ranks(world_size=2, tp_size=2), names=("rank0.safetensors",)),
        "1 of 2 ranks are missing",
    ),
    "a rank too many": (
        trtllm(of_ranks(world_size=1), names=("rank0.safetensors", "rank1.safetensors")),
        "more ranks than the 1 of the mapping",
    ),
}


def manifest(change: Callable[[dict[str, Any]], object] | str) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        told = json.loads((CORPUS / "manifest" / "gguf.json").read_text())
        if callable(change):
            change(told)
        (folder / "a.manifest.json").write_text(json.dumps(told) if callable(change) else change)
        return "verify", folder / "a.manifest.json"

    return make


def first(key: str, **values: object) -> Callable[[Path], Command]:
    return manifest(lambda told: told[key][0].update(values))


MANIFESTS = {
    "no JSON": (manifest("["), "not valid JSON"),
    "another schema": (manifest('{"schema": "x"}'), "its schema is 'x'"),
    "a file of another folder": (first("files", name="../../etc/passwd"), "'../../etc/passwd' is not the plain name"),
    "a file with a NUL": (first("files", name="a\0"), "is not the plain name of a file"),
    "no files": (manifest(lambda told: told.update(files=[])), "files: a list of files"),
    "a size below 0": (first("files", bytes=-1), "files: a list of files with name, bytes and sha256"),
    "a digest that is none": (first("files", sha256="x"), "files: a list of files with name, bytes and sha256"),
    "a tensor behind the end": (first("tensors", offset=2**62), "ends behind the end of"),
    "a tensor of no file": (first("tensors", file="b.gguf"), "there is no file 'b.gguf'"),
    "more values than memory holds": (manifest("[" + "[]," * (1 << 21) + "0]"), "brackets, commas and colons"),
}

HEADER = {
    "model": "m", "vocab": 8, "real": 8, "kept": 8, "drawn": 0, "context": 8, "sequences": 1, "chunk": 4, "first": 1,
    "last": 3, "leading": 0, "text_tokens": 4, "characters": 9, "text_sha256": "0", "ids_sha256": "0",
}  # fmt: skip
ROWS = np.zeros(2, [("ids", "<u4", 8), ("log_p", "<f4", 8), ("rest", "<f4", 4)]).tobytes()


def record(data: bytes) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        (folder / "a.reference").write_bytes(data)
        return "compare", CORPUS / "gguf" / "container.gguf", "--reference", folder / "a.reference"

    return make


def record_of(header: dict[str, Any], rows: bytes = ROWS, digest: bytes | None = None) -> Callable[[Path], Command]:
    text = json.dumps(header).encode()
    whole = MAGIC + len(text).to_bytes(4, "little") + text + bytes(16) + rows
    return record(whole + (hashlib.sha256(whole).digest() if digest is None else digest))


RECORDS = {
    "another file": (record(b"something else"), "it does not begin as one"),
    "a header of 4 GB": (record(MAGIC + b"\xff" * 4), "its header claims 4294967295 bytes"),
    "a header that is no JSON": (record(MAGIC + b"\2\0\0\0{["), "its header is no JSON"),
    "other keys": (record_of({}), "its header has other keys"),
    "a size that is a text": (record_of(HEADER | {"vocab": "8"}), "its header has values of other types"),
    "more tokens kept than there are": (record_of(HEADER | {"kept": 9}), "contradict each other"),
    "a billion sequences": (record_of(HEADER | {"sequences": 10**9}), "its header says"),
    "cut": (record_of(HEADER, ROWS[:-4]), "its header says"),
    "changed": (record_of(HEADER, digest=bytes(32)), "the sha256 differs"),
}


def statistics(text: str) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        kept = folder / "kept"
        kept.mkdir()
        (kept / "statistics.json").write_text(text)
        method = ("--method", "gptq", "--calibration-tokens", 2048, "--device", "cpu", "--no-validate")
        return "export", EXAMPLE, *method, "--statistics", kept, "-o", folder / "out"

    return make


STATISTICS = {
    "no JSON": (statistics("{"), "not valid JSON"),
    "more values than memory holds": (statistics("[" + "[]," * (1 << 21) + "0]"), "brackets, commas and colons"),
}


def recipe(text: str) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        (folder / "recipe.yaml").write_text(text)
        return "plan", EXAMPLE, "--recipe", folder / "recipe.yaml"

    return make


RECIPES = {
    "code": (recipe("!!python/object/apply:os.system ['touch canary']"), "could not determine a constructor"),
    "aliases of aliases": (
        recipe("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
        "aliases are not allowed",
    ),
    "no YAML": (recipe("type: [\n"), "the recipe is not plain YAML"),
}


ARTIFACTS: tuple[Hostile, ...] = (
    *rows("GGUF", GGUF),
    *rows("importance matrix", IMATRIX),
    *rows("engine", ENGINES),
    *rows("TensorRT-LLM", TRTLLM),
    *rows("manifest", MANIFESTS),
    *rows("record", RECORDS),
    *rows("statistics", STATISTICS),
    *rows("recipe", RECIPES),
    *onnx_rows(),
)
