"""Faults of TensorRT-LLM folders as data: what is planted into which sound one, which checks must fail, the exit code.

A fault changes the files of a folder: its configurations, the stored bytes of a tensor, or which files there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

CHECK_FAILED, INTEGRITY = 4, 6
Plant = Callable[[Path], None]
Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrtllmSubject:
    """A sound folder. model: a key of fault_table.SUBJECTS. options: of the export. proven: with its manifest."""

    model: str
    type_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    proven: bool = False


@dataclass(frozen=True, slots=True)
class TrtllmFault:
    """One row. caught_by: checks that must fail, all of them; none where the folder is refused before any check."""

    name: str
    subject: str
    plant: Plant
    caught_by: frozenset[str] = frozenset()
    exit_code: int = CHECK_FAILED


RANKS = {"layout": "ranks", "tp": 2}
SUBJECTS: dict[str, TrtllmSubject] = {
    "four bits": TrtllmSubject("chat", "W4A16", {"method": "rtn"}),
    "four bits, proven": TrtllmSubject("chat", "W4A16", {"method": "rtn"}, proven=True),
    "eight bits, in files": TrtllmSubject("chat", "W8A16", {"method": "rtn", "split_max_size": "1MB"}),
    "FP8": TrtllmSubject("chat", "FP8", {"method": "rtn", "kv_cache": "fp8", "calibration_tokens": 2048}),
    "two ranks": TrtllmSubject("chat", "W4A16", {"method": "rtn", **RANKS}),
}


# Ways to plant.


def tensor(name: str, kind: str, change: Callable[[np.ndarray], np.ndarray], file: str = "model.safetensors") -> Plant:
    """Other bytes of the stored tensor, seen as an array of its shape and that numpy type."""

    def plant(folder: Path) -> None:
        from llmx.formats.safetensors import open_safetensors

        found = open_safetensors(folder / file).tensors[name]
        data = np.memmap(folder / file, np.uint8, "r+")
        place = data[found.offset : found.offset + found.nbytes]
        values = change(np.frombuffer(place.tobytes(), kind).reshape(found.shape).copy())
        place[:] = np.ascontiguousarray(values, kind).reshape(-1).view(np.uint8)
        data.flush()

    return plant


def stored(change: Callable[[dict[str, np.ndarray]], None], file: str = "model.safetensors") -> Plant:
    """Other tensors in a file of weights without FP8, which numpy does not have."""

    def plant(folder: Path) -> None:
        held = load_file(folder / file)
        change(held)
        save_file(held, folder / file, {"format": "pt"})

    return plant


def without(name: str) -> Plant:
    """A file of weights lacks a tensor: its header is rewritten and its bytes are cut out."""

    def plant(folder: Path) -> None:
        from llmx.formats.safetensors import open_safetensors, write_safetensors

        path = folder / "model.safetensors"
        file = open_safetensors(path)
        kept = [(key, t.dtype, t.shape, [file.bytes(key).tobytes()]) for key, t in file.tensors.items() if key != name]
        assert len(kept) < len(file.tensors), name
        write_safetensors(path, kept, file.metadata)

    return plant


def beside(name: str, change: Callable[[Config], None]) -> Plant:
    """Another JSON file in the folder."""

    def plant(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        change(told)
        (folder / name).write_text(json.dumps(told))

    return plant


def both(change: Callable[[Config], None]) -> Plant:
    """The same change in both configurations of the quantization."""

    def plant(folder: Path) -> None:
        beside("hf_quant_config.json", lambda told: change(told["quantization"]))(folder)
        beside("config.json", lambda told: change(told["quantization_config"]))(folder)

    return plant


def removed(name: str) -> Plant:
    def plant(folder: Path) -> None:
        (folder / name).unlink()

    return plant


def at(place: tuple[int, ...], change: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """One value of many."""

    def changed(values: np.ndarray) -> np.ndarray:
        values[place] = change(values[place])
        return values

    return changed


# Faults of their own.

O_PROJ, RANK = "model.layers.1.self_attn.o_proj", "transformer.layers.1"


def other_rows(values: np.ndarray) -> np.ndarray:
    """Both rows of every byte in each other's place."""
    return (values >> 4) | (values << 4)


def other_heads(values: np.ndarray) -> np.ndarray:
    """Of 128 rows of q, 64 of k and 64 of v, two a byte, the last two in each other's place."""
    return np.concatenate([values[:64], values[96:], values[64:96]])


def uneven(values: np.ndarray) -> np.ndarray:
    """Factors of which every other one is two."""
    values[1::2] = 2
    return values


def exchanged(first: str, second: str, files: tuple[str, ...]) -> Plant:
    """Two modules of one shape in each other's place, with their scales."""

    def change(held: dict[str, np.ndarray]) -> None:
        for name in [name for name in held if name.startswith(f"{first}.")]:
            other = second + name.removeprefix(first)
            held[name], held[other] = held[other], held[name]

    def plant(folder: Path) -> None:
        for file in files:
            stored(change, file)(folder)

    return plant


def exchanged_files(first: str, second: str) -> Plant:
    """Two files under each other's name."""

    def plant(folder: Path) -> None:
        spare = folder / "spare"
        (folder / first).rename(spare)
        (folder / second).rename(folder / first)
        spare.rename(folder / second)

    return plant


def stray(held: dict[str, np.ndarray]) -> None:
    """A tensor that the model has not."""
    held["model.layers.0.self_attn.extra_proj.weight"] = np.zeros((4, 4), np.float16)


def in_floats(held: dict[str, np.ndarray]) -> None:
    """A matrix of the same values that was never packed."""
    packed, scale = held[f"{O_PROJ}.weight"], held.pop(f"{O_PROJ}.weight_scale")
    codes = np.stack([packed & 15, packed >> 4], 1).reshape(-1, packed.shape[1]).astype(np.int8)
    codes[codes > 7] -= 16
    values = codes * np.repeat(scale, packed.shape[1] // scale.shape[1], axis=1)
    held[f"{O_PROJ}.weight"] = values.astype(np.float16)
    del held[f"{O_PROJ}.pre_quant_scale"]


def shard(number: int) -> Plant:
    """A file of several that is not there."""

    def plant(folder: Path) -> None:
        sorted(folder.glob("model-*.safetensors"))[number].unlink()

    return plant


def elsewhere(told: Config) -> None:
    """The index names a file that lies outside the folder."""
    name = next(iter(told["weight_map"]))
    told["weight_map"][name] = "../model.safetensors"


def misplaced(told: Config) -> None:
    """The index says that a tensor lies in another file."""
    files = sorted(set(told["weight_map"].values()))
    name = next(name for name, file in told["weight_map"].items() if file == files[0])
    told["weight_map"][name] = files[1]


def cut(folder: Path) -> None:
    """The last bytes are missing, as after a download that broke off."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def without_merges(told: Config) -> None:
    """A tokenizer that lost half of its merges."""
    told["model"]["merges"] = told["model"]["merges"][: len(told["model"]["merges"]) // 2]


def _checks(*names: str) -> frozenset[str]:
    return frozenset(names)


TWO = ("rank0.safetensors", "rank1.safetensors")

FAULTS: tuple[TrtllmFault, ...] = (
    TrtllmFault("one flipped high bit of a code", "four bits",
                tensor(f"{O_PROJ}.weight", "u1", at((7, 9), lambda v: v ^ 0x80)), _checks("bytes.steps")),
    TrtllmFault("both rows of a byte exchanged", "four bits", tensor(f"{O_PROJ}.weight", "u1", other_rows),
                _checks("bytes.error", "bytes.steps")),
    TrtllmFault("scales of the group beside", "four bits",
                tensor(f"{O_PROJ}.weight_scale", "<f4", lambda v: np.roll(v, 1, 0)), _checks("bytes.error")),
    TrtllmFault("scales that are twice as large", "four bits", tensor(f"{O_PROJ}.weight_scale", "<f4", lambda v: 2 * v),
                _checks("bytes.error", "bytes.steps")),
    TrtllmFault("a scale that is no number", "four bits",
                tensor(f"{O_PROJ}.weight_scale", "<f4", at((0, 0), lambda v: np.nan)),
                _checks("bytes.scales", "bytes.finite")),
    TrtllmFault("a scale below zero", "four bits", tensor(f"{O_PROJ}.weight_scale", "<f4", at((3, 1), lambda v: -v)),
                _checks("bytes.scales")),
    TrtllmFault("factors of inputs that are not one", "four bits", tensor(f"{O_PROJ}.pre_quant_scale", "<f2", uneven),
                _checks("bytes.error")),
    TrtllmFault("gate and up exchanged", "four bits",
                exchanged("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", ("model.safetensors",)),
                _checks("bytes.error")),
    TrtllmFault("a norm's gain that is 1 % too large", "four bits",
                tensor("model.layers.1.post_attention_layernorm.weight", "<f2", lambda v: v * np.float16(1.01)),
                _checks("bytes.error", "bytes.steps")),
    TrtllmFault("a tensor that the model has not", "four bits", stored(stray),
                _checks("bytes.tensors", "runtime.loads")),
    TrtllmFault("a norm that is left out", "four bits", without("model.layers.1.input_layernorm.weight"),
                _checks("bytes.tensors", "runtime.loads")),
    TrtllmFault("a bit flipped after the export", "four bits, proven",
                tensor(f"{O_PROJ}.weight", "u1", at((7, 9), lambda v: v ^ 0x01)), _checks("bytes.digests")),
    TrtllmFault("another size of groups in one configuration", "four bits",
                beside("hf_quant_config.json", lambda told: told["quantization"].update(group_size=64)),
                _checks("bytes.config")),
    TrtllmFault("another size of groups in both", "four bits", both(lambda told: told.update(group_size=64)),
                _checks("bytes.config")),
    TrtllmFault("another algorithm than the weights have", "four bits",
                both(lambda told: told.update(quant_algo="W8A16")), _checks("bytes.config")),
    TrtllmFault("a quantized matrix that is said to be in floats", "four bits",
                beside("hf_quant_config.json", lambda told: told["quantization"]["exclude_modules"].append(O_PROJ)),
                _checks("bytes.config")),
    TrtllmFault("a matrix in floats that is not said to be", "four bits", stored(in_floats), _checks("bytes.config")),
    TrtllmFault("a scale of FP8 that is 5 % too large", "FP8",
                tensor(f"{O_PROJ}.weight_scale", "<f4", lambda v: v * np.float32(1.05)), _checks("bytes.gain")),
    TrtllmFault("a scale of the keys that is left out", "FP8", without("model.layers.1.self_attn.k_proj.k_scale"),
                _checks("bytes.config", "runtime.loads")),
    TrtllmFault("a scale of the values that is far too small", "FP8",
                tensor("model.layers.1.self_attn.v_proj.v_scale", "<f4", lambda v: v * np.float32(1e-3)),
                _checks("quality.kl")),
    TrtllmFault("a scale of inputs that is left out", "FP8", without(f"{O_PROJ}.input_scale"),
                _checks("bytes.config", "runtime.loads")),
    TrtllmFault("a scale of inputs that is far too small", "FP8",
                tensor(f"{O_PROJ}.input_scale", "<f4", lambda v: v * np.float32(1e-3)), _checks("quality.kl")),
    TrtllmFault("an epsilon 300 times too large", "four bits",
                beside("config.json", lambda told: told.update(rms_norm_eps=told["rms_norm_eps"] * 300)),
                _checks("bytes.numbers", "conversion.kl")),
    TrtllmFault("another rotary base in config.json", "four bits",
                beside("config.json", lambda told: told["rope_parameters"].update(rope_theta=5000.0)),
                _checks("bytes.numbers", "conversion.kl")),
    TrtllmFault("a context that is longer than the model's", "four bits",
                beside("config.json", lambda told: told.update(max_position_embeddings=131072)),
                _checks("bytes.numbers")),
    TrtllmFault("no tokenizer", "four bits", removed("tokenizer.json"), _checks("bytes.files")),
    TrtllmFault("a tokenizer without its later merges", "four bits", beside("tokenizer.json", without_merges),
                _checks("tokens.ids")),
    TrtllmFault("another token that ends generation", "four bits",
                beside("tokenizer_config.json", lambda told: told.update(eos_token="a")), _checks("tokens.ends")),
    TrtllmFault("a chat template of another model", "four bits",
                beside("tokenizer_config.json", lambda told: told.update(chat_template="{{ messages[0]['content'] }}")),
                _checks("template.embedded")),
    TrtllmFault("fc and gate of the ranks exchanged", "two ranks",
                exchanged(f"{RANK}.mlp.fc", f"{RANK}.mlp.gate", TWO), _checks("bytes.error")),
    TrtllmFault("two ranks exchanged", "two ranks", exchanged_files(*TWO), _checks("bytes.error")),
    TrtllmFault("keys of the ranks behind their values", "two ranks",
                tensor(f"{RANK}.attention.qkv.weight", "u1", other_heads, TWO[0]), _checks("bytes.error")),
    TrtllmFault("a norm that differs between ranks", "two ranks",
                tensor("transformer.ln_f.weight", "<f2", lambda v: v * np.float16(2), TWO[1]),
                _checks("bytes.tensors")),
    TrtllmFault("another number of heads in a rank's configuration", "two ranks",
                beside("config.json", lambda told: told.update(num_attention_heads=8)), _checks("bytes.numbers")),
    TrtllmFault("another rotary base of the ranks", "two ranks",
                beside("config.json", lambda told: told.update(rotary_base=5000.0)),
                _checks("bytes.numbers", "conversion.kl")),
    TrtllmFault("fewer ranks than the mapping says", "two ranks", removed("rank1.safetensors"), exit_code=INTEGRITY),
    TrtllmFault("more ranks than the mapping says", "two ranks",
                beside("config.json", lambda told: told["mapping"].update(world_size=1, tp_size=1)),
                exit_code=INTEGRITY),
    TrtllmFault("a file of several that is missing", "eight bits, in files", shard(1), exit_code=INTEGRITY),
    TrtllmFault("an index that leads out of the folder", "eight bits, in files",
                beside("model.safetensors.index.json", elsewhere), exit_code=INTEGRITY),
    TrtllmFault("an index of other files", "eight bits, in files", beside("model.safetensors.index.json", misplaced),
                exit_code=INTEGRITY),
    TrtllmFault("a file of weights that is cut", "four bits", cut, exit_code=INTEGRITY),
    TrtllmFault("scales that are left out", "four bits", without(f"{O_PROJ}.weight_scale"), exit_code=INTEGRITY),
)  # fmt: skip
