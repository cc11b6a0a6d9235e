"""The progress bar: seen only where someone watches, and only after a while."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmx.progress import Progress, stages, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal() -> None:
    stream = Terminal()
    with Progress(2_000_000, "Writing [x]", delay=0, stream=stream) as progress:
        progress.advance(1_000_000)
        progress.advance(1_000_000)
    assert "Writing [x]" in stream.getvalue() and "MB" in stream.getvalue()


@pytest.mark.parametrize(
    ("stream", "options"),
    [(io.StringIO(), {"delay": 0}), (Terminal(), {"delay": 0, "enabled": False}), (Terminal(), {})],
    ids=["no terminal", "not wanted", "too short"],
)
def test_nothing_is_drawn_otherwise(stream: io.StringIO, options: dict) -> None:
    with Progress(10, "Quiet", stream=stream, **options) as progress:
        progress.advance(10)
    assert stream.getvalue() == ""
    assert progress.done_bytes == 10


def test_nothing_is_drawn_after_the_work_has_ended() -> None:
    stream = Terminal()
    with Progress(10, "Ended", delay=0, stream=stream) as progress:
        pass
    progress.advance(10)
    assert stream.getvalue() == ""


def test_threads_may_advance_together() -> None:
    with Progress(8000, "Threads", delay=0, stream=Terminal()) as progress, ThreadPoolExecutor(4) as pool:
        list(pool.map(progress.advance, [1] * 8000))
    assert progress.done_bytes == 8000


def test_an_error_inside_leaves_the_terminal_as_it_was() -> None:
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), Progress(10, "Fails", delay=0, stream=stream) as progress:
        progress.advance(1)
        1 / 0  # noqa: B018
    assert "\x1b[?25l" not in stream.getvalue() or "\x1b[?25h" in stream.getvalue()


def test_unwatched_work_does_not_import_rich() -> None:
    code = "import sys; from llmx.progress import track; p = track(9, 'x'); p.advance(9); print('rich' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout.strip(), found.stderr) == ("False", "")


def test_track_is_a_bar_on_stderr() -> None:
    with track(5, "Five", enabled=False) as progress:
        progress.advance(5)
    assert (progress.total_bytes, progress.label, progress.done_bytes) == (5, "Five", 5)


def test_stages_are_named_on_a_terminal_and_nowhere_else() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with stages("validating", stream=stream) as stage:
            stage("tokens")
    assert "validating" in terminal.getvalue()
    assert file.getvalue() == ""
