"""Every fault planted into a sound ONNX folder fails the validation: by the check that is there for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_table import SUBJECTS as MODELS
from fault_table import checkpoint_for
from faults_page import documented, of_table
from onnx_faults import CHECK_FAILED, FAULTS, SUBJECTS, OnnxFault

from llmx.errors import LlmxError
from llmx.models.model import open_model
from llmx.models.tokenizer import open_tokenizer
from llmx.validate import suite
from llmx.validate.case import Settings
from llmx.validate.runtimes import find_runtime
from llmx.validate.suite import validate

pytest.importorskip("onnx", reason="the package onnx is not installed: pip install 'llmx[onnx]'")
REASON = find_runtime("onnxruntime").unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"onnxruntime: {REASON}")
SETTINGS = Settings(positions=64, chunk=64, threads=1)
FLOAT_ROLES = ("router", "position_embedding")
Sound = Callable[[str], tuple[Path, Path]]


def export_onnx(model: Path, type_name: str, dialect: str, folder: Path) -> Path:
    """The folder with every matrix in that encoding, or all in floats."""
    from llmx.exporters.onnx import OnnxOptions, prepare, write

    opened = open_model(model)
    whole = type_name if type_name in ("F32", "F16") else "F32"
    specs = [] if type_name == whole else opened.architecture.tensors
    types = {spec.name: type_name for spec in specs if len(spec.shape) > 1 and spec.role not in FLOAT_ROLES}
    planned = prepare(opened, OnnxOptions(whole, dialect, types=types), open_tokenizer(model))
    folder.mkdir(parents=True)
    write(planned, [folder / file.name for file in planned.plan.files])
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, checkpoint_of, tokenizer_files) -> Sound:
    """sound(name of a subject): (a folder without fault, its checkpoint), made once."""
    root = tmp_path_factory.mktemp("subjects")

    def made(name: str) -> tuple[Path, Path]:
        subject = SUBJECTS[name]
        model, folder = root / f"model {subject.model}", root / name
        if not model.exists():
            checkpoint_for(MODELS[subject.model], model, checkpoint_of("tiny-qwen3"), tokenizer_files)
        if not folder.exists():
            export_onnx(model, subject.type_name, subject.dialect, folder)
        return folder, model

    return made


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[frozenset[str]], None]:
    """Leaves out the checks of other kinds than those of these: a table's worth of whole validations takes long."""

    def run(names: frozenset[str]) -> None:
        kinds = {name.partition(".")[0] for name in names}
        found = tuple(stage for stage in suite.STAGES if kinds & {name.partition(".")[0] for name in stage.names})
        loads = tuple(stage for stage in suite.STAGES if stage.run is suite.check_text)
        monkeypatch.setattr(suite, "STAGES", tuple(dict.fromkeys((*found, *(loads if "runtime" in kinds else ())))))
        monkeypatch.setattr(suite, "BLAMED", frozenset())

    return run


def judged(folder: Path, model: Path) -> tuple[int, dict[str, str]]:
    """The exit code, and the checks that failed or were left out with what they say."""
    report = validate(folder, model, settings=SETTINGS)
    return report.exit_code, {check.name: check.detail for check in (*report.failed, *report.missing)}


def test_the_table_has_every_name_once_and_the_page_has_it() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 30
    assert documented("ONNX folders") == of_table(FAULTS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_the_faults_are_planted_into_passes(subject, sound):
    assert judged(*sound(subject)) == (0, {})


def test_what_is_at_fault_is_named(sound, tmp_path):
    folder, model = sound("four bits")
    faulty = Path(shutil.copytree(folder, tmp_path / "faulty"))
    next(fault for fault in FAULTS if fault.name == "zero points that are one too large").plant(faulty)
    report = validate(faulty, model, settings=SETTINGS)
    assert next(check for check in report.checks if check.name == "blame.tensor").value == "layers.1.o.weight"
    assert report.exit_code == CHECK_FAILED


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_the_check_that_is_there_for_it(fault: OnnxFault, sound, only, tmp_path):
    folder, model = sound(fault.subject)
    faulty = Path(shutil.copytree(folder, tmp_path / "faulty"))
    fault.plant(faulty)
    if fault.exit_code != CHECK_FAILED:
        with pytest.raises(LlmxError) as error:
            judged(faulty, model)
        assert error.value.exit_code == fault.exit_code
        return
    only(fault.caught_by)
    code, failed = judged(faulty, model)
    assert fault.caught_by <= failed.keys(), failed
    assert code == fault.exit_code
