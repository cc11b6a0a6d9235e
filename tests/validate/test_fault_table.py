"""Every planted fault fails the validation: by the check that is there for it, with the documented exit code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_table import CHECK_FAILED, FAULTS, INTEGRITY, SUBJECTS, Fault, checkpoint_for
from faults_page import documented, of_table

from llmx import api
from llmx.errors import LlmxError
from llmx.formats.gguf import read_gguf
from llmx.validate.case import Limits, Settings
from llmx.validate.runtimes import Runtime, llamacpp
from llmx.validate.runtimes.worker_process import WorkerProcess
from llmx.validate.suite import validate

SETTINGS = Settings(positions=64, chunk=64, threads=1)
Sound = Callable[[str], tuple[Path, Path]]


class ReadyWorkers:
    """Hands out worker processes that were started while others worked, so that nobody waits for their start."""

    def __init__(self) -> None:
        self._waiting: dict[str, WorkerProcess] = {}

    def __call__(self, module: str, **options: Any) -> WorkerProcess:
        if "folder" in options:
            return WorkerProcess(module, **options)
        ready = self._waiting.pop(module, None) or WorkerProcess(module, **options)
        self._waiting[module] = WorkerProcess(module, **options)
        return ready

    def close(self) -> None:
        for worker in self._waiting.values():
            worker.close()


@pytest.fixture(scope="module", autouse=True)
def workers_are_ready() -> Iterator[None]:
    ready = ReadyWorkers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llamacpp, "WorkerProcess", ready)
        yield
    ready.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, checkpoint_of, export, tokenizer_files) -> Sound:
    """sound(name of a subject): (an artifact without fault, its checkpoint), made once."""
    folder = tmp_path_factory.mktemp("subjects")

    def made(name: str) -> tuple[Path, Path]:
        subject = SUBJECTS[name]
        model, artifact = folder / name.replace(" ", "-"), folder / f"{name.replace(' ', '-')}.gguf"
        if not model.exists():
            checkpoint_for(subject, model, checkpoint_of("tiny-qwen3"), tokenizer_files)
        if subject.exported_as is not None:
            return made(subject.exported_as)[0], model
        return (artifact if artifact.exists() else export(model, subject.type_name, artifact)), model

    return made


@pytest.fixture
def planted(sound: Sound, rewrite: Callable[..., Path], tmp_path: Path) -> Callable[[Fault], tuple[Path, Path]]:
    def made(fault: Fault) -> tuple[Path, Path]:
        artifact, model = sound(fault.subject)
        changes = fault.plant(read_gguf(artifact))
        return (rewrite(artifact, tmp_path / "faulty.gguf", **changes) if changes else artifact), model

    return made


def judged(artifact: Path, model: Path, runtime: Runtime, **limits: float) -> tuple[int, dict[str, str]]:
    """The exit code, and the checks that failed with what they say."""
    report = validate(artifact, model, runtime=runtime, settings=SETTINGS, limits=Limits(**limits))
    return report.exit_code, {check.name: check.detail for check in report.failed}


def test_the_table_has_every_name_once() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 30


@pytest.mark.parametrize("subject", sorted(SUBJECTS.keys() - {"two ends"}))
def test_what_the_faults_are_planted_into_passes(subject, sound, llama_cpp):
    assert judged(*sound(subject), llama_cpp) == (0, {})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_the_check_that_is_there_for_it(fault, planted, llama_cpp):
    code, failed = judged(*planted(fault), llama_cpp, **fault.limits)
    assert fault.caught_by <= failed.keys(), failed
    assert code == fault.exit_code


# Files that are no sound container are refused before any check.


@pytest.fixture(scope="module")
def shards(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A sound set of three files or more."""
    folder = tmp_path_factory.mktemp("shards")
    request = api.ExportRequest(
        str(sound("eight bits")[1]),
        type_name="Q8_0",
        method="rtn",
        split_max_size="1MB",
        output=folder,
        validate=False,
        threads=1,
    )
    api.export(request)
    return sorted(folder.glob("*.gguf"))


def shortened(files: list[Path]) -> Path:
    """The last bytes are missing, as after a download that broke off."""
    files[0].write_bytes(files[0].read_bytes()[:-5000])
    return files[0]


def exchanged(files: list[Path]) -> Path:
    """Two shards under each other's name."""
    spare = files[1].with_suffix(".spare")
    files[1].rename(spare)
    files[2].rename(files[1])
    spare.rename(files[2])
    return files[0]


def left_out(files: list[Path]) -> Path:
    """A shard that is not there."""
    files[1].unlink()
    return files[0]


def doubled(files: list[Path]) -> Path:
    """The same shard twice."""
    shutil.copyfile(files[1], files[2])
    return files[0]


def far_too_many(files: list[Path]) -> Path:
    """A count of tensors that would take all memory."""
    data = bytearray(files[0].read_bytes())
    data[8:16] = (2**62).to_bytes(8, "little")
    files[0].write_bytes(data)
    return files[0]


def no_gguf(files: list[Path]) -> Path:
    """Another file under the name."""
    files[0].write_text("<html>Not found</html>")
    return files[0]


DAMAGES: dict[str, Callable[[list[Path]], Path]] = {
    "a truncated file": shortened,
    "two shards exchanged": exchanged,
    "a missing shard": left_out,
    "the same shard twice": doubled,
    "a count that overflows": far_too_many,
    "no GGUF file at all": no_gguf,
}


@pytest.fixture
def damaged(shards: list[Path], tmp_path: Path) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        return DAMAGES[name]([Path(shutil.copyfile(path, tmp_path / path.name)) for path in shards])

    return made


def test_a_sound_set_of_shards_passes(shards, sound, llama_cpp):
    assert len(shards) >= 3
    assert judged(shards[0], sound("eight bits")[1], llama_cpp) == (0, {})


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_file_is_an_integrity_error(name, damaged, sound, llama_cpp):
    with pytest.raises(LlmxError) as error:
        validate(damaged(name), sound("eight bits")[1], runtime=llama_cpp, settings=SETTINGS)
    assert error.value.exit_code == INTEGRITY, error.value


# As a pipeline sees it.


def exit_code_of(artifact: Path, model: Path) -> int:
    command = [sys.executable, "-m", "llmx.cli", "validate", artifact, "--reference", model]
    options = ["--positions", "64", "--threads", "1", "--json"]
    return subprocess.run([*map(str, command), *options], capture_output=True, check=False).returncode


@pytest.mark.parametrize("name", ["one flipped bit of a nibble", "another BOS"])
def test_the_process_ends_with_the_faults_exit_code(name, planted, llama_cpp):
    fault = next(fault for fault in FAULTS if fault.name == name)
    assert exit_code_of(*planted(fault)) == fault.exit_code == CHECK_FAILED


@pytest.mark.parametrize("name", ["a truncated file", "two shards exchanged"])
def test_the_process_ends_with_6_for_a_broken_file(name, damaged, sound):
    assert exit_code_of(damaged(name), sound("eight bits")[1]) == INTEGRITY


# docs/faults.md.


def test_the_page_about_faults_is_the_table() -> None:
    broken = dict.fromkeys(DAMAGES, (frozenset(), INTEGRITY))
    assert documented() == {**of_table(FAULTS), **broken}
