"""A progress bar for work counted in bytes: MB/s and time left, on stderr, only where someone is watching."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

DELAY_SECONDS = 2.0  # shorter work needs no bar


class Progress:
    """Bytes done of `total_bytes`, as a context manager; `advance` may be called from any thread.

    Shows nothing unless `enabled`, the stream (stderr by default) is a terminal and `delay` seconds have passed.
    """

    def __init__(
        self,
        total_bytes: int,
        label: str,
        *,
        enabled: bool = True,
        delay: float = DELAY_SECONDS,
        stream: TextIO | None = None,
    ) -> None:
        self.total_bytes, self.label, self.done_bytes = total_bytes, label, 0
        self._stream = sys.stderr if stream is None else stream
        self._watched = enabled and self._stream.isatty()
        self._show_at = time.monotonic() + delay
        self._lock = threading.Lock()
        self._bar: tuple[RichProgress, TaskID] | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._watched = False
            if self._bar is not None:
                self._bar[0].stop()
                self._bar = None

    def advance(self, count: int) -> None:
        """Counts `count` more bytes as done."""
        with self._lock:
            self.done_bytes += count
            if not self._watched or time.monotonic() < self._show_at:
                return
            if self._bar is None:
                self._bar = self._open()
            bar, task = self._bar
            bar.update(task, completed=self.done_bytes)

    def _open(self) -> tuple[RichProgress, TaskID]:
        # rich takes a tenth of a second to import, which quiet work should not pay for.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        label = TextColumn("{task.description}", markup=False)
        bar = Bar(label, *columns, console=Console(file=self._stream), transient=True)
        bar.start()
        return bar, bar.add_task(self.label, total=self.total_bytes)


@contextlib.contextmanager
def stages(label: str, *, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Yields a function that is told the name of each stage as it begins, and shows it where someone is watching."""
    shown = sys.stderr if stream is None else stream
    if not shown.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(file=shown).status(label) as status:
        yield lambda stage: status.update(f"{label}: {stage}")


def track(total_bytes: int, label: str, *, enabled: bool = True) -> Progress:
    """Returns a Progress over `total_bytes`; `enabled=False` (as under --json) keeps it silent."""
    return Progress(total_bytes, label, enabled=enabled)
