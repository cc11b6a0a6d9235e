"""`compiled`: numba's njit as every kernel here wants it, with a cache that notices a change in any kernel.

Numba keys the cache of a function by that function's own file, so a kernel would go on running the old code of a helper
that it calls from another file. Here the cache lies in a folder named after the state of all the files of this package.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config

_numba: Any = config  # its settings are made at run time, out of a type checker's sight


def _stamp() -> str:
    """A short name for the state (names, sizes, times of change) of this package's files."""
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(__file__).parent.glob("*.py")]
    return hashlib.sha256(repr(sorted(state)).encode()).hexdigest()[:16]


def _folder() -> str:
    base = _numba.CACHE_DIR or os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return str(Path(base).expanduser() / "llmx" / f"kernels-{_stamp()}")


_FOLDER = _folder()


def compiled(kernel: Callable[..., Any]) -> Any:
    """The kernel, compiled at its first call (seconds, then cached on disk) and run without the GIL.

    Division by zero gives infinity, as in C. No fast-math: the results must not depend on the machine.
    """
    before = _numba.CACHE_DIR
    _numba.CACHE_DIR = _FOLDER  # read by numba when the decorator runs, and only then
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(kernel)
    finally:
        _numba.CACHE_DIR = before
