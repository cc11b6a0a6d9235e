"""The fuzzer finds what is planted, and every file of the corpus goes through its reader: findings stay mended."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "corpus"
pytestmark = pytest.mark.skipif(find_spec("atheris") is None, reason="no atheris: pip install 'llmx[fuzz]'")

PLANT = """
import sys
from pathlib import Path
sys.path.insert(0, {bench!r})
import fuzz
from llmx.errors import IntegrityError

kept = []

def faulty(path):
    data = path.read_bytes()
    if len(data) < 2:
        raise IntegrityError("too short")
    {fault}

fuzz.READERS["planted"] = fuzz.Reader("a", faulty)
fuzz.HANG_SECONDS = 20
fuzz.fuzz("planted", {runs}, 1)
"""
FAULTS = {
    # what is planted -> words that the fuzzer tells
    "a crash": ("raise ValueError('planted')", "ValueError: planted"),
    "long work": (
        "import time; end = time.process_time() + 1.5\n    while time.process_time() < end: pass",
        "s of computing",
    ),
    "a hang": ("while True: pass", "timeout"),
    "memory": ("kept.append(bytearray(400 << 20))", "MB of memory"),
    "memory that is handed back": ("bytearray(400 << 20)", "MB of memory"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_its_bytes_are_left(name: str, tmp_path: Path) -> None:
    fault, says = FAULTS[name]
    program = PLANT.format(bench=str(ROOT / "bench"), fault=fault, runs=5000)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode != 0 and says in told, told[-2000:]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("crash-", "timeout-"))], told[-2000:]


@pytest.mark.slow
def test_a_sound_reader_passes(tmp_path: Path) -> None:
    program = PLANT.format(bench=str(ROOT / "bench"), fault="return None", runs=200)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr[-2000:]


def test_every_reader_has_a_sound_file_and_every_file_goes_through_its_reader(tmp_path: Path) -> None:
    import fuzz

    folders = {path.name for path in CORPUS.iterdir()} - {"beside"}
    assert folders == fuzz.READERS.keys()
    for name, reader in fuzz.READERS.items():
        (tmp_path / name).mkdir()
        run = fuzz.bounded(fuzz.prepared(reader, tmp_path / name))
        files = sorted((CORPUS / name).iterdir())
        assert files, name
        for path in files:
            run(path.read_bytes())
    sound = [name for name in fuzz.READERS if _is_read(fuzz, name, tmp_path)]
    assert sound == list(fuzz.READERS)


def _is_read(fuzz: object, name: str, folder: Path) -> bool:
    """Whether a file of the corpus is admitted, so that its reader is met beyond its first lines."""
    from llmx.errors import LlmxError

    reader = fuzz.READERS[name]  # type: ignore[attr-defined]
    path = folder / name / "read" / reader.file
    for seed in (CORPUS / name).iterdir():
        path.write_bytes(seed.read_bytes())
        try:
            reader.read(path)
            return True
        except LlmxError:
            continue
    return False
