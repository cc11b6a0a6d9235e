"""The memory of this process, of its workers and of this machine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from llmx.errors import ResourceError

Given = ParamSpec("Given")
Result = TypeVar("Result")
EVERY = 0.25  # seconds between two looks at the workers
VALIDATION_BASE = 700 << 20  # torch, transformers and a runtime
REFERENCE_BYTES = 4  # a weight of the reference, in float32
EMULATED = "trtllm"  # is run as another float32 model, made in the scratch folder


def parse_limit(size: str | None) -> int | None:
    """Bytes of --max-memory. Raises: UsageError for what is no size."""
    from llmx.formats.gguf import parse_size

    return None if size is None else parse_size(size)


def free_bytes() -> int:
    """What this machine has left for a process."""
    import psutil

    return psutil.virtual_memory().available


def peak_rss_bytes() -> int:
    """The largest resident memory: of the watched work with its workers, else of this process since it began."""
    watch = _watch.get()
    return _own_peak() if watch is None else watch.peak()


def watched(work: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same function, in which peak_rss_bytes() is its own, that of processes it starts included."""

    @wraps(work)
    def watching(*given: Given.args, **named: Given.kwargs) -> Result:
        if _watch.get() is not None:  # inside of another: that one's peak counts
            return work(*given, **named)
        with _Watch() as watch:
            token = _watch.set(watch)
            try:
                return work(*given, **named)
            finally:
                _watch.reset(token)

    return watching


def validation_memory(format_: str, parameters: int, nbytes: int) -> int:
    """Bytes of rerunning an artifact of so many bytes beside its float32 reference."""
    run = REFERENCE_BYTES * parameters if format_ == EMULATED else nbytes
    return VALIDATION_BASE + REFERENCE_BYTES * parameters + run


def require_validation(format_: str, parameters: int, nbytes: int, limit: int | None) -> None:
    """Raises: ResourceError where a limit is given that rerunning the artifact would not keep."""
    needed = validation_memory(format_, parameters, nbytes)
    if limit is not None and needed > limit:
        raise ResourceError(
            f"validation holds a float32 reference and the artifact: about {in_words(needed)}, and --max-memory is "
            f"{in_words(limit)}",
            fix=f"--max-memory {as_option(needed)}",
        )


def in_words(nbytes: int) -> str:
    """ "1.5 GB", "300 MB"."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.0f} MB"


def as_option(nbytes: int) -> str:
    """As --max-memory takes it, never less than that."""
    return f"{-(-nbytes // 10**8) / 10:.1f}GB" if nbytes >= 1e9 else f"{-(-nbytes // 10**6)}MB"


def _own_peak() -> int:
    """The largest resident set this process ever had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024
    # What getrusage tells began before the program was loaded: with that of the process that started it.
    status = Path("/proc/self/status")
    told = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")] if status.exists() else []
    return int(told[0].split()[1]) * 1024 if told else peak


class _Watch:
    """Looks at this process and its workers now and then. The kernel itself keeps this process's own peak."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._before, self._seen = _own_peak(), 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="memory", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._over.set()
        self._thread.join()

    def peak(self) -> int:
        """Bytes, so far."""
        self._look()
        own = _own_peak()
        return max(self._seen, own if own > self._before else 0)

    def _look_on(self) -> None:
        while not self._over.wait(EVERY):
            self._look()

    def _look(self) -> None:
        import psutil

        total = self._process.memory_info().rss
        for worker in self._process.children(recursive=True):
            try:
                total += worker.memory_info().rss
            except psutil.Error:  # it has ended
                continue
        self._seen = max(self._seen, total)


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)
