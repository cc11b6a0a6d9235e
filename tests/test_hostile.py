"""Files made to do harm, each met by the command that meets it: refused by name, quickly, in little memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done
from hostile_artifacts import ARTIFACTS, engine_with, manifest, statistics
from hostile_case import inspected, planned
from hostile_checkpoints import CHECKPOINTS, rendered
from hostile_gguf import build, info

ROWS = {row.name: row for row in (*CHECKPOINTS, *ARTIFACTS)}
SECONDS, MEGABYTES = 1.0, 256
STATUS = Path("/proc/self/status")


def test_the_table_has_at_least_75_files_of_every_kind() -> None:
    groups = {name.split(":")[0] for name in ROWS}
    assert len(ROWS) >= 75 and len(ROWS) == len(CHECKPOINTS) + len(ARTIFACTS)
    assert groups >= {
        "config", "safetensors", "index", "tokenizer", "SentencePiece", "template", "pickle", "link",
        "GGUF", "importance matrix", "engine", "TensorRT-LLM", "manifest", "record", "statistics",
    }  # fmt: skip


SOUND: dict[str, tuple[Callable[[Path], tuple[object, ...]], int]] = {
    "a checkpoint": (planned(), 0),
    "a template": (planned(chat_template__jinja="{{ messages[0].content }}"), 0),
    "a GGUF file": (inspected("model.gguf", build((), (info(),))), 0),
    "an engine": (engine_with(), 0),
    "a manifest without its artifact": (manifest(lambda told: None), 2),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_the_table_damages_is_sound_before(name: str, tmp_path: Path, here: Callable[..., Done]) -> None:
    make, code = SOUND[name]
    done = here(*make(tmp_path))
    assert done.code == code, done.stderr


@pytest.mark.parametrize("name", ROWS)
def test_a_hostile_file_is_refused_by_its_name_quickly_and_in_little_memory(
    name: str, tmp_path: Path, here: Callable[..., Done], warm: None
) -> None:
    row = ROWS[name]
    command = row.make(tmp_path)
    before, started = measured_from_here(), time.process_time()
    done = here(*command)
    seconds, grown = time.process_time() - started, peak() - before
    assert done.code == row.exit_code, (done.code, done.stdout, done.stderr)
    assert row.says in done.stderr
    assert "Traceback" not in done.stderr and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stderr)
    assert seconds < SECONDS, f"{seconds:.2f} s of computing"
    assert grown < MEGABYTES, f"{grown} MB"
    assert not list(tmp_path.glob("**/canary"))


def measured_from_here() -> int:
    """The memory held now, in MB; `peak` tells the largest from now on. 0 where the system does not count it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status("VmRSS")


def peak() -> int:
    """MB; 0 where the system does not count it."""
    return _status("VmHWM") if STATUS.is_file() else 0


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())[1]) >> 10  # type: ignore[index]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One run of each command, so that what they import counts as nobody's time and memory."""
    import contextlib
    import io
    import sys

    from llmx import cli

    makes = [make for make, _ in SOUND.values()] + [rendered("{{ missing() }}"), statistics("{")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        for make in makes:
            command = make(tmp_path_factory.mktemp("warm"))
            patch.setattr(sys, "argv", ["llmx", *map(str, command)])
            with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
                cli.main()
