"""The folder that an export works in: locked, gone after a failure, kept with its steps after a stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmx.errors import CheckFailed, ResourceError, UsageError
from llmx.exporters import journal
from llmx.exporters.workplace import Workplace, folder_of, workplace

KEY = {"checkpoint": "abc", "type": "Q4_K_M"}


def one_step(place: Workplace) -> None:
    path = place.kept / "rows"
    path.write_bytes(b"rows")
    place.journal.record({"solved a": {"sha256": "12", "seconds": 0.5}}, [path])


def stopped(target: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), workplace([target], target, KEY) as place:
        one_step(place)
        raise error


def test_files_have_the_names_of_their_targets_and_the_folder_goes_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with workplace([target], target, KEY) as place:
        place.files[0].write_bytes(b"GGUF")
        place.files[0].replace(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ResourceError("full"), OSError("EIO")])
def test_a_stop_leaves_its_steps_and_the_next_run_finds_them(error: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    stopped(target, error)
    assert error.__notes__ == [f"1 steps of it are kept in {folder_of(target)}: the same command with --resume goes on"]
    with workplace([target], target, KEY, resume=True) as place:
        assert place.journal.facts("solved a") == {"sha256": "12", "seconds": 0.5}
        assert place.journal.facts("solved b") is None
        assert (place.kept / "rows").read_bytes() == b"rows"
    assert not folder_of(target).exists()


def test_a_stop_before_any_step_and_a_failure_leave_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(KeyboardInterrupt), workplace([target], target, KEY):
        raise KeyboardInterrupt
    stopped(target, CheckFailed("no"))
    assert list(tmp_path.iterdir()) == []


def test_without_resume_an_export_starts_anew(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    stopped(target, KeyboardInterrupt())
    with workplace([target], target, KEY) as place:
        assert len(place.journal) == 0
        assert list(place.kept.iterdir()) == []


def test_another_export_is_not_gone_on_with_and_the_stopped_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    stopped(target, KeyboardInterrupt())
    with (
        pytest.raises(UsageError, match="other bytes\n  - type differs"),
        workplace([target], target, {**KEY, "type": "Q8_0"}, resume=True),
    ):
        pass
    with workplace([target], target, KEY, resume=True) as place:
        assert len(place.journal) == 1


@pytest.mark.parametrize("left", [None, b"", b'{"journal": 1, "ke', b"no json\n", b"[]\n"])
def test_where_there_is_nothing_to_go_on_with_an_export_starts(left: bytes | None, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    if left is not None:
        folder_of(target).mkdir()
        (folder_of(target) / journal.NAME).write_bytes(left)
    with workplace([target], target, KEY, resume=True) as place:
        assert len(place.journal) == 0
        one_step(place)
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_is_a_step_that_did_not_happen(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    stopped(target, KeyboardInterrupt())
    path = folder_of(target) / journal.NAME
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:length])
        assert len(journal.go_on(folder_of(target), KEY)) == 0
    path.write_bytes(whole + whole[whole.index(b"\n") + 1 :][:-5])
    found = journal.go_on(folder_of(target), KEY)
    found.record({"solved b": {}})
    assert len(journal.go_on(folder_of(target), KEY)) == 2


def test_a_second_export_of_the_same_target_is_told_in_this_process_and_in_another(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    other = (
        "import sys; from pathlib import Path; from llmx.exporters.workplace import workplace\n"
        "with workplace([Path(sys.argv[1])], Path(sys.argv[1]), {}): pass"
    )
    with workplace([target], target, KEY) as place:
        place.files[0].write_bytes(b"mine")
        with pytest.raises(UsageError, match="another export"), workplace([target], target, KEY):
            pass
        run = subprocess.run([sys.executable, "-c", other, str(target)], capture_output=True, text=True, check=False)
        assert "another export is writing the same artifact" in run.stderr
        assert place.files[0].read_bytes() == b"mine"
    subprocess.run([sys.executable, "-c", other, str(target)], check=True)


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    dying = (
        "import os, signal, sys; from pathlib import Path; from llmx.exporters.workplace import workplace\n"
        "with workplace([Path(sys.argv[1])], Path(sys.argv[1]), {'checkpoint': 'abc', 'type': 'Q4_K_M'}) as place:\n"
        "    place.journal.record({'solved a': {}}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", dying, str(target)], check=False)
    with workplace([target], target, KEY, resume=True) as place:
        assert place.journal.facts("solved a") == {}


def test_a_link_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "model.gguf", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder_of(target).symlink_to(elsewhere)
    with pytest.raises(UsageError, match="symbolic link"), workplace([target], target, KEY):
        pass
