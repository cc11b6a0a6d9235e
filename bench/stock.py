"""llama.cpp's own tools, run in one place as its users run them, each as a process of its own with its costs.

    --quantize llama-quantize         the quantizer,
    --stock-python PYTHON             or an interpreter that has llama-cpp-python (source only: minutes to compile)
    --convert convert_hf_to_gguf.py   the converter; --convert-python has gguf, torch and transformers
    --llama-imatrix llama-imatrix     measures importance; otherwise `llmx calibrate` does, for both sides

One unpacked source package of llama-cpp-python has them all: vendor/llama.cpp. What is not given is "not run".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmx import api
from llmx.formats.imatrix import read_imatrix

IMPORTANCE_CHUNK = 256  # tokens

# Run between the bench and the tool: a process counts the peak memory of the one that started it as its own until it
# has outgrown it, and this one is small. The tool sees the first `cores` cores and a disk that owes nothing.
_LAUNCHER = """
import json, os, sys, time
log, cores, *command = sys.argv[1:]
if int(cores) and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
os.sync()
out = os.open(log, os.O_WRONLY)
started = time.monotonic()
actions = [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
_, status, used = os.wait4(os.posix_spawnp(command[0], command, os.environ, file_actions=actions), 0)
wall = time.monotonic() - started
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, peak / 1e6]))
"""

# Arguments: source, target, name of the type, threads, file of importance ("" for none), file for [wall s, CPU s].
# Only the call is timed, not the interpreter's start: the library is compared, not the binding.
_QUANTIZE = """
import ctypes, json, sys, time
import llama_cpp, numpy
source, target, type_name, threads, importance, told = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.nthread = int(threads)
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_" + ("ALL_" if type_name == "F32" else "MOSTLY_") + type_name)
if importance:
    arrays = dict(numpy.load(importance))
    floats = ctypes.POINTER(ctypes.c_float)
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last, without a name, ends it
    for entry, (name, values) in zip(entries, arrays.items()):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(floats), values.size
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
wall, cpu = time.monotonic(), time.process_time()
code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
with open(told, "w") as file:
    json.dump([time.monotonic() - wall, time.process_time() - cpu], file)
sys.exit(code)
"""


class NotRun(Exception):
    """A tool is not here or failed; says why in one line."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of wall time, seconds of all cores together, and the largest resident set in MB."""

    wall: float
    cpu: float
    peak: float

    def then(self, other: Cost) -> Cost:
        """Returns the cost of one after the other."""
        return Cost(self.wall + other.wall, self.cpu + other.cpu, max(self.peak, other.peak))


def measured(command: list[str], cores: int = 0) -> Cost:
    """Run a command on the first `cores` cores (0: all) and return its cost. Raises: NotRun when it fails."""
    with tempfile.NamedTemporaryFile() as log:
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, log.name, str(cores), *command]
        done = subprocess.run(launcher, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotRun(f"{Path(command[0]).name}: {done.stderr.strip().splitlines()[-1]}")
        code, *numbers = json.loads(done.stdout)
        if code:
            lines = Path(log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise NotRun(f"exit code {code}: {lines[-1].strip() if lines else 'it said nothing'}")
    return Cost(*numbers)


@dataclass(frozen=True, slots=True)
class Stock:
    """Which of llama.cpp's tools are here."""

    binary: str | None = None
    python: str | None = None
    converter: Path | None = None
    converter_python: str = sys.executable
    imatrix: str | None = None

    @property
    def here(self) -> bool:
        """Whether anything can quantize."""
        return bool(self.binary or self.python)

    @property
    def words(self) -> str:
        """The quantizer, for a headline."""
        if self.binary:
            return "llama-quantize"
        return "llama_model_quantize of llama-cpp-python" if self.python else "not run"

    def quantize(
        self, source: Path, target: Path, type_name: str, importance: Path | None = None, threads: int = 2
    ) -> Cost:
        """Quantize a float GGUF file, with the importance matrix of a file. Raises: NotRun."""
        if self.binary:
            matrix = ["--imatrix", str(importance)] if importance else []
            return measured([self.binary, *matrix, str(source), str(target), type_name, str(threads)], threads)
        if not self.python:
            raise NotRun("no --quantize and no --stock-python")
        with tempfile.TemporaryDirectory() as scratch:
            told, arrays = Path(scratch) / "told.json", Path(scratch) / "importance.npz"
            if importance:
                np.savez(arrays, **read_imatrix(importance).entries)  # pyright: ignore[reportArgumentType]
            files = [str(source), str(target), type_name, str(threads), str(arrays) if importance else "", str(told)]
            whole = measured([self.python, "-c", _QUANTIZE, *files], threads)
            return Cost(*json.loads(told.read_text()), peak=whole.peak)

    def convert(self, folder: Path, target: Path, type_name: str, threads: int = 2) -> Cost:
        """Turn a checkpoint folder into a float GGUF file. Raises: NotRun."""
        if not self.converter:
            raise NotRun("no --convert")
        command = [self.converter_python, str(self.converter), str(folder)]
        return measured([*command, "--outtype", type_name.lower(), "--outfile", str(target)], threads)

    def measure_importance(self, source: Path, text: Path, target: Path, tokens: int, threads: int = 2) -> Cost:
        """Write the importance matrix of a float GGUF file on the first `tokens` tokens of a text. Raises: NotRun."""
        if not self.imatrix:
            raise NotRun("no --llama-imatrix")
        size = ["-c", str(IMPORTANCE_CHUNK), "--chunks", str(max(1, tokens // IMPORTANCE_CHUNK))]
        command = [self.imatrix, "-m", str(source), "-f", str(text), "-o", str(target), "--no-ppl"]
        return measured([*command, *size, "-t", str(threads)], threads)


def float_file(stock: Stock, folder: Path, type_name: str, target: Path, threads: int = 2) -> tuple[Cost | None, str]:
    """Write the float GGUF file that stock quantizes: by its own converter, by ours where that one cannot.

    Returns the converter's cost, or None, and who made the file.
    """
    try:
        return stock.convert(folder, target, type_name, threads), "convert_hf_to_gguf.py"
    except NotRun as reason:
        target.unlink(missing_ok=True)
        request = api.ExportRequest(str(folder), type_name=type_name, output=target, validate=False, threads=threads)
        api.export(request)
        return None, f"llmx; convert_hf_to_gguf.py not run: {reason}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a bench the options of this file."""
    tools = parser.add_argument_group("llama.cpp's tools, each not run where not given")
    tools.add_argument("--quantize", type=program, metavar="PROGRAM", help="stock llama-quantize")
    tools.add_argument("--stock-python", type=program, metavar="PROGRAM", help="Python with llama-cpp-python, instead")
    tools.add_argument("--convert", type=Path, metavar="SCRIPT", help="stock convert_hf_to_gguf.py")
    tools.add_argument("--convert-python", type=program, metavar="PROGRAM", default=sys.executable)
    tools.add_argument("--llama-imatrix", type=program, metavar="PROGRAM", help="stock llama-imatrix")


def chosen(options: argparse.Namespace) -> Stock:
    """Returns the tools that the command line names."""
    return Stock(
        binary=options.quantize,
        python=options.stock_python,
        converter=options.convert,
        converter_python=options.convert_python,
        imatrix=options.llama_imatrix,
    )


def program(name: str) -> str:
    """An argument that names a program: its path."""
    found = shutil.which(name)
    if found is None:
        raise argparse.ArgumentTypeError(f"there is no program {name!r}")
    return found


def machine() -> str:
    """Cores, processor and load, for the head of a timing: other people's work makes one worthless."""
    facts = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = re.findall(r"^model name\s*: (.+)$", facts, re.MULTILINE) or [platform.processor() or "unknown processor"]
    load = f"; load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{api.available_cores()} cores of {names[0]}{load}"
