"""The peak memory of this process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
# ru_maxrss is in bytes there, in KiB everywhere else.
_RUSAGE_UNIT = {"darwin": 1}


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes; file pages mapped by it count.

    Linux's getrusage also counts the parent's peak from before exec, so the memory map's own high-water mark is read.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(importlib.import_module("psutil").Process().memory_info().peak_wset)
    resource = importlib.import_module("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RUSAGE_UNIT.get(sys.platform, 1024)
