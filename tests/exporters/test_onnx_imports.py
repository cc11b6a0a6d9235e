"""onnx-ir without sympy until sympy is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")

PROGRAM = """
import sys
from llmx.exporters.onnx_imports import import_ir
import_ir()
assert "sympy" not in sys.modules
import onnx_ir
assert str(onnx_ir.SymbolicDim("a") + 1 - 1) == "a"
assert str(onnx_ir.SymbolicDim("max(a, 2)") * 2) == "2*Max(2, a)"
import sympy
assert sympy.Integer(3) + 1 == 4 and "sympy.core" in sys.modules
"""


def test_sympy_is_imported_when_a_named_size_is_computed_with_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
