"""Real artifacts of small trained checkpoints, and a way to damage them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from small_llama import SMALL_LLAMA
from stock_types import random_checkpoint

from llmx import api
from llmx.exporters.gguf import GgufOptions, prepare, write
from llmx.exporters.gguf_metadata import DIGESTS_KEY
from llmx.exporters.gguf_types import file_type
from llmx.formats.gguf import GgufFile, TensorInfo, Value, array, layout, read_gguf, read_gguf_set
from llmx.models.model import open_model
from llmx.models.tokenizer import open_tokenizer
from llmx.validate.case import Case, Limits, Settings
from llmx.validate.gguf_kind import tensor_digest
from llmx.validate.oracle import Tokens
from llmx.validate.runtimes import Runtime, find_runtime
from llmx.validate.sample_text import SAMPLE_TEXT

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "models"
EXAMPLES = ROOT / "examples"
QUICK = Settings(positions=128, chunk=64, threads=1)


def checkpoint(name: str) -> Path:
    """A trained checkpoint: from the repository, or from the folder of test models where that is there."""
    for folder in (EXAMPLES / name, SHARED / name):
        if folder.is_dir():
            return folder
    pytest.skip(f"the test model {name} is not here")


def export_gguf(model: Path, type_name: str, target: Path) -> Path:
    opened = open_model(model)
    options = GgufOptions(file_type(type_name), threads=1)
    write(prepare(opened, open_tokenizer(model), options), [target])
    return target


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """(model name, type) -> (a sound artifact, its checkpoint); each is made once."""
    folder = tmp_path_factory.mktemp("artifacts")

    def made(name: str, type_name: str) -> tuple[Path, Path]:
        model = checkpoint(name)
        target = folder / f"{name}-{type_name}.gguf"
        return (target if target.exists() else export_gguf(model, type_name, target)), model

    return made


@pytest.fixture(scope="session")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """(model name or "random llama", method) -> (a sound 4-bit artifact, its checkpoint); each is made once."""
    folder = tmp_path_factory.mktemp("solved")
    text = folder / "text.txt"
    text.write_text(SAMPLE_TEXT)

    def made(name: str, method: str) -> tuple[Path, Path]:
        model = folder / "model" if name == "random llama" else checkpoint(name)
        if not model.is_dir():
            random_checkpoint(model, SMALL_LLAMA)
        target = folder / f"{name}-{method}.gguf"
        if not target.exists():
            request = api.ExportRequest(
                str(model),
                type_name="Q4_K_M",
                method=method,
                effort="fast",
                calibration=text,
                calibration_tokens=4096,
                output=target,
                validate=False,
            )
            api.export(request)
        return target, model

    return made


@pytest.fixture(scope="session")
def llama_cpp() -> Runtime:
    runtime = find_runtime("llama.cpp")
    if (reason := runtime.unavailable()) is not None:
        pytest.skip(f"llama.cpp is not here: {reason}")
    return runtime


@pytest.fixture
def case_of(tmp_path: Path) -> Callable[..., Case]:
    def made(artifact: Path, model: Path, runtime: Runtime | None = None, **changes: object) -> Case:
        scratch = tmp_path / f"scratch-{artifact.stem}"
        scratch.mkdir(exist_ok=True)
        fields = {
            "artifact": artifact,
            "file": read_gguf_set(artifact),
            "model": open_model(model),
            "tokens": Tokens(model),
            "runtime": runtime,
            "text": SAMPLE_TEXT,
            "limits": Limits(),
            "settings": QUICK,
            "scratch": scratch,
        }
        return Case(**{**fields, **changes})  # type: ignore[arg-type]

    return made


def values_of(file: GgufFile) -> dict[str, Value]:
    """A file's metadata as the writer takes it."""
    return {
        key: Value(file.types[key], tuple(value) if isinstance(value, list) else value)
        for key, value in file.metadata.items()
    }


def _rewrite(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, Value | None] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    alike: Mapping[str, str] | None = None,
    honest: bool = True,
) -> Path:
    """A copy of a GGUF file with other metadata or tensor bytes; None removes one.

    alike: an added tensor -> the one whose type and shape it has.

    honest: its digests are those of the new bytes, as if an exporter had made the mistake; otherwise they are the old
    ones, as if the file had been damaged later.
    """
    file = read_gguf(source)
    values = {key: value for key, value in {**values_of(file), **(metadata or {})}.items() if value is not None}
    data = {name: file.bytes(name) for name in file.tensors}
    data |= tensors or {}  # type: ignore[arg-type]
    kept = {name: content for name, content in data.items() if content is not None}
    models = {name: file.tensors[(alike or {}).get(name, name)] for name in kept}
    infos = [TensorInfo(name, it.type_name, (shapes or {}).get(name, it.shape)) for name, it in models.items()]
    plan = layout(values, infos)
    with target.open("wb") as out:
        out.truncate(plan.size)
        out.write(plan.header)
        for name, place in plan.placements.items():
            out.seek(place.offset)
            out.write(np.ascontiguousarray(kept[name]).data)
    if honest and DIGESTS_KEY in values:
        made = read_gguf(target)
        digests = array("u64", [tensor_digest(made, name) for name in made.tensors])
        changed = target.with_suffix(".digested")
        _rewrite(target, changed, metadata={DIGESTS_KEY: digests}, honest=False)
        shutil.move(changed, target)
    return target


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Path]:
    return _rewrite


@pytest.fixture(scope="session")
def export() -> Callable[[Path, str, Path], Path]:
    return export_gguf


@pytest.fixture(scope="session")
def checkpoint_of() -> Callable[[str], Path]:
    return checkpoint
