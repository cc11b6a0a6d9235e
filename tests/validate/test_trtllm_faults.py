"""Every fault planted into a sound TensorRT-LLM folder fails the validation: by the check that is there for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_table import SUBJECTS as MODELS
from fault_table import checkpoint_for
from faults_page import documented, of_table
from trtllm_faults import CHECK_FAILED, FAULTS, SUBJECTS, TrtllmFault

from llmx import api
from llmx.errors import LlmxError
from llmx.validate import suite
from llmx.validate.case import Settings
from llmx.validate.suite import validate

SETTINGS = Settings(positions=64, chunk=64, threads=1)
MANIFEST = "config.manifest.json"
Sound = Callable[[str], tuple[Path, Path]]


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
            options = {"format": "trtllm", "output": folder, "validate": False, "threads": 1, **subject.options}
            api.export(api.ExportRequest(str(model), type_name=subject.type_name, **options))
            if not subject.proven:  # else its digests tell every change of bytes
                (folder / MANIFEST).unlink()
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
    assert documented("TensorRT-LLM checkpoints") == of_table(FAULTS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_the_faults_are_planted_into_passes(subject, sound):
    assert judged(*sound(subject)) == (0, {})


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_fails_the_check_that_is_there_for_it(fault: TrtllmFault, sound, only, tmp_path):
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


def test_what_did_not_run_on_its_target_is_said_and_does_not_fail_the_report(sound):
    folder, model = sound("four bits")
    report = validate(folder, model, settings=SETTINGS)
    told = {check.name: check for check in report.checks}
    for name in ("runtime.tensorrt_llm", "speed.decode"):
        assert told[name].status == "not run"
        assert not told[name].required
    assert "emulation" in told["runtime.loads"].detail
    assert report.passed
