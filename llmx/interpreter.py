"""Modules of ours in a process of another Python: TensorRT 8 has no package for the Pythons that llmx runs on.

What is run so must be clean for CPython 3.10 and import nothing but the standard library, numpy and what it is for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TENSORRT_PYTHON = "LLMX_TENSORRT_PYTHON"
# What is set for this Python and would mislead another.
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
# Only the package llmx is made known: the folder that it lies in may hold numpy for this Python. `-c` puts the current
# folder on the path, where a file `json.py` must not be run; -P, which forbids that, came with 3.11.
_BOOTSTRAP = """
import sys
sys.path[:] = [place for place in sys.path if place]
import importlib.util, os, runpy
folder, module = sys.argv[1:3]
spec = importlib.util.spec_from_file_location(
    "llmx", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
)
sys.modules["llmx"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["llmx"])
del sys.argv[1:3]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def tensorrt_python() -> str | None:
    """Returns the Python that TensorRT is installed for, as the environment names it; None for this one."""
    return os.environ.get(TENSORRT_PYTHON) or None


def python_command(module: str, python: str | None = None) -> list[str]:
    """Returns the command that runs a module of llmx as a program. python: another interpreter's path."""
    if python is None:
        return [sys.executable, "-P", "-m", module]
    return [python, "-c", _BOOTSTRAP, str(Path(__file__).parent), module]


def python_environment(python: str | None, more: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for that command: this one's, without what is only for this Python, and more."""
    hidden = () if python is None else _OURS
    return {name: value for name, value in os.environ.items() if name not in hidden} | dict(more)
