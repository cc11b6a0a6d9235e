"""Fuzzes the readers of untrusted files: of any bytes, only the project's own errors may come out, within a second.

    python bench/fuzz.py gguf --runs 100000
    for reader in $(python bench/fuzz.py --list); do python bench/fuzz.py $reader || break; done

atheris (libFuzzer) mutates the files of tests/corpus/READER and what it finds on the way, led by the lines that they
reach. A crash, a run that computes for over a second or takes over 256 MB of memory ends it with an exit code that is
not 0, and the bytes are left in the current folder: they belong into tests/corpus/READER, which a test reads. Chat
templates run in a process of their own, with limits of its own, where no lines are seen.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["llmx."]):
    from llmx.errors import LlmxError
    from llmx.exporters.manifest_reader import read_manifest
    from llmx.exporters.recipe_file import read_recipe
    from llmx.exporters.statistics_folder import read_statistics
    from llmx.formats.gguf_reader import read_gguf
    from llmx.formats.imatrix import read_imatrix
    from llmx.formats.onnx_reader import read_onnx
    from llmx.formats.safetensors import open_safetensors
    from llmx.formats.tensorrt import read_config
    from llmx.models.calibration_text import read_calibration
    from llmx.models.chat_template import render
    from llmx.models.checkpoint import open_checkpoint
    from llmx.models.model import open_model
    from llmx.models.tokenizer import open_tokenizer
    from llmx.validate.gate_file import read_gate
    from llmx.validate.record import Record
    from llmx.validate.trtllm_opening import open_trtllm

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
MESSAGES = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"})
COMPANIONS = CORPUS / "beside"  # what else lies in a folder, sound
SECONDS, MEGABYTES = 1, 256
HANG_SECONDS = 30  # by the clock, which other processes share
LONGEST = 1 << 16  # bytes of an input


@dataclass(frozen=True, slots=True)
class Reader:
    """file: the name that the bytes get. read: what is called with its path. beside: what else lies in the folder.
    json: where in the bytes a JSON text begins, whose values are mutated too; None for no such."""

    file: str
    read: Callable[[Path], object]
    beside: tuple[Path, ...] = ()
    json: int | None = None


def _rendered(path: Path) -> str:
    template = path.read_text(encoding="utf-8", errors="replace")
    return render(template, MESSAGES, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


def _recorded(path: Path) -> None:
    with Record(path) as record:
        for _ in record.chunks():
            pass


def _opened(path: Path) -> None:
    """A folder of TensorRT-LLM, and the values of its first weights."""
    found = open_trtllm(path.parent)
    for held in list(found.tensors.values())[:4]:
        held.parts.weight.floats()


def _of(name: str) -> tuple[Path, ...]:
    return tuple(sorted((COMPANIONS / name).iterdir()))


READERS: dict[str, Reader] = {
    "gguf": Reader("model.gguf", read_gguf),
    "safetensors": Reader("model.safetensors", open_safetensors, json=8),
    "index": Reader("model.safetensors.index.json", lambda path: open_checkpoint(path.parent), _of("index"), 0),
    "config": Reader("config.json", lambda path: open_model(path.parent), (EXAMPLE / "model.safetensors",), 0),
    "onnx": Reader("model.onnx", read_onnx),
    "tokenizer": Reader(
        "tokenizer.json", lambda path: open_tokenizer(path.parent), (EXAMPLE / "tokenizer_config.json",), 0
    ),
    "sentencepiece": Reader("tokenizer.model", lambda path: open_tokenizer(path.parent)),
    "tokenizer-config": Reader(
        "tokenizer_config.json", lambda path: open_tokenizer(path.parent), (EXAMPLE / "tokenizer.json",), 0
    ),
    "template": Reader("chat_template.jinja", _rendered),
    "imatrix": Reader("imatrix.gguf", read_imatrix),
    "legacy-imatrix": Reader("imatrix.dat", read_imatrix),
    "recipe": Reader("recipe.yaml", read_recipe),
    "gate": Reader("gate.yaml", read_gate),
    "manifest": Reader("model.manifest.json", read_manifest, json=0),
    "calibration": Reader("chats.jsonl", read_calibration, json=0),
    "engine": Reader("config.json", lambda path: read_config(path.parent), json=0),
    "trtllm-config": Reader("config.json", _opened, _of("trtllm-config"), 0),
    "trtllm-ranks": Reader("config.json", _opened, _of("trtllm-ranks"), 0),
    "trtllm-weights": Reader("model.safetensors", _opened, _of("trtllm-weights"), 8),
    "statistics": Reader("layers.0.down.safetensors", read_statistics, json=8),
    "record": Reader("a.reference", _recorded, json=12),
}


def mutated(data: bytes, start: int, chance: random.Random) -> bytes | None:
    """The bytes with one value of their JSON text, which begins at start, removed, doubled or made hostile; None where
    there is none. In front of a text that is not at the beginning stands its length: u64 in a safetensors file, u32
    behind the magic of a record."""
    width = {0: 0, 8: 8, 12: 4}[start]
    try:
        end = start + int.from_bytes(data[start - width : start], "little") if start else len(data)
        document = json.loads(data[start:end])
    except (ValueError, RecursionError):
        return None
    places = [(document, key) for document in _containers(document) for key in _keys(document)]
    if not places:
        return None
    container, key = chance.choice(places)
    chance.choice(CHANGES)(container, key, chance)
    try:
        text = json.dumps(document).encode()
    except RecursionError:  # of the fuzzer's own nesting
        return None
    return data[: start - width] + (len(text).to_bytes(width, "little") if start else b"") + text + data[end:]


def _containers(value: Any) -> list[Any]:
    found = [value] if isinstance(value, dict | list) else []
    for container in found:  # grows as it goes
        found += [one for one in (container[key] for key in _keys(container)) if isinstance(one, dict | list)]
    return found


def _keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def _replace(container: Any, key: Any, chance: random.Random) -> None:
    container[key] = chance.choice(HOSTILE)


def _remove(container: Any, key: Any, chance: random.Random) -> None:
    del container[key]


def _double(container: Any, key: Any, chance: random.Random) -> None:
    if isinstance(container, list):
        container.insert(key, container[key])
    else:
        container[f"{key}{chance.choice(('.', '2', '/', ''))}"] = container[key]


def _exchange(container: Any, key: Any, chance: random.Random) -> None:
    other = chance.choice(_keys(container))
    container[key], container[other] = container[other], container[key]


CHANGES = (_replace, _replace, _remove, _double, _exchange)
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 1e308, float("nan"), 0.5, "", "../x", "/etc/passwd",
    "\0", "\ud800", "a" * 5000, "9" * 5000, [], {}, [[]], [None], [0] * 1000, {"a": {"a": {"a": {}}}},
    json.loads("[" * 500 + "]" * 500),
)  # fmt: skip


class TooMuchError(Exception):
    """A run that took more time or memory than it may."""


def prepared(reader: Reader, folder: Path) -> Callable[[bytes], None]:
    """What is done with bytes, in a folder of their own: one run, that may end in an error of ours."""
    path = folder / "read" / reader.file
    path.parent.mkdir()
    for beside in reader.beside:
        shutil.copy(beside, path.parent)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            reader.read(path)
        except LlmxError:
            return

    return run


def bounded(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The same, and an error where it computes for more than SECONDS or the peak memory grows by MEGABYTES."""
    before = _peak()

    def watched(data: bytes) -> None:
        started = time.process_time()
        run(data)
        if (seconds := time.process_time() - started) > SECONDS:
            raise TooMuchError(f"{seconds:.2f} s of computing")
        if (grown := _peak() - before) > MEGABYTES:
            raise TooMuchError(f"{grown:.0f} MB of memory")

    return watched


def _peak() -> float:
    """The largest memory that the process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10 if sys.platform == "linux" else 1 << 20)


def fuzz(name: str, runs: int, seed: int) -> None:
    """Run libFuzzer, which ends the process."""
    reader = READERS[name]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        found = Path(folder, "found")
        found.mkdir()
        once = bounded(prepared(reader, Path(folder)))

        def mutate(data: bytes, longest: int, number: int) -> bytes:
            chance = random.Random(number)
            made = None if reader.json is None or chance.random() < 0.3 else mutated(data, reader.json, chance)
            return atheris.Mutate(data, longest) if made is None or len(made) > longest else made

        corpus = [str(found), *([str(CORPUS / name)] if (CORPUS / name).is_dir() else [])]
        most = int(_peak()) + 2 * MEGABYTES  # what is above MEGABYTES is told with its size, if it comes to an end
        limits = ["-len_control=0", f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={most}", f"-max_len={LONGEST}"]
        given = [sys.argv[0], f"-runs={runs}", f"-seed={seed}", "-print_final_stats=1", *limits, *corpus]
        atheris.Setup(given, once, custom_mutator=mutate)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("reader", nargs="?", choices=READERS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the readers' names")
    chosen = parser.parse_args()
    if chosen.list or chosen.reader is None:
        print("\n".join(READERS))
        return
    fuzz(chosen.reader, chosen.runs, chosen.seed)


if __name__ == "__main__":
    main()
