"""The memory of this process and of this machine."""

from __future__ import annotations

from llmx.errors import ResourceError


def require_memory(parameters: int) -> None:
    """The proof runs transformers in float32: refuse before the export what cannot be proven after it.

    Raises: ResourceError where less than a float32 model of so many parameters is free.
    """
    import psutil

    needed, available = 4 * parameters, psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"validation holds a float32 reference: {needed / 1e9:,.1f} GB, and {available / 1e9:,.1f} GB are free",
            fix="export with --no-validate, and run `llmx validate` on a larger machine",
        )


def peak_rss_bytes() -> int:
    """The largest resident set this process ever had."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
