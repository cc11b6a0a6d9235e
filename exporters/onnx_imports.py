"""Importing onnx-ir without sympy, whose import is a fifth of what the export of a small model costs.

onnx-ir asks sympy only for arithmetic on sizes that have names, which no exporter does; whoever asks gets it then.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

SYMPY = "sympy"


class Deferred(ModuleType):
    """Stands for a module until something of it is used."""

    importing = True  # what is only named meanwhile is a function that is looked up when it is called

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system looks whether it is a package
            raise AttributeError(name)

        def called(*given: Any, **named: Any) -> Any:
            return getattr(importlib.import_module(self.__name__), name)(*given, **named)

        return called if self.importing else getattr(importlib.import_module(self.__name__), name)


def import_ir() -> None:
    """Import onnx_ir; later imports of sympy by others find sympy itself."""
    if SYMPY in sys.modules or "onnx_ir" in sys.modules:
        return
    stand_in = sys.modules[SYMPY] = Deferred(SYMPY)
    try:
        importlib.import_module("onnx_ir")
    finally:
        del sys.modules[SYMPY]
        stand_in.importing = False
