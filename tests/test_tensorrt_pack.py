"""bench/tensorrt_pack.py: what is packed here comes out there, and what was damaged on the way does not."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tensorrt_pack

SCRIPT = Path(tensorrt_pack.__file__)
LIBRARY = "libcudnn.so.8"
needs_gcc = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("readelf")), reason="needs gcc and readelf")


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(bytes(range(256)) * 40 + sys.executable.encode() * 300)
    return folder


@pytest.fixture(params=["xz", "zstd"])
def packed(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    """A checkpoint in pieces of 128 bytes."""
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path / "pieces"
    options = ["--xz"] if request.param == "xz" else []
    done = run("pack", folder, "--model", model, "--piece-mib", "0.000123", *options)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_checkpoint_comes_out_as_it_was_packed(packed: Path, model: Path, tmp_path: Path) -> None:
    pieces = sorted(packed.glob("model-checkpoint.[0-9]*"))
    assert len(pieces) > 2
    assert {piece.stat().st_size for piece in pieces[:-1]} == {128}
    there = tmp_path / "there"
    for path in sorted(packed.iterdir()):
        assert run("take", path, "--into", there).returncode == 0
    done = run("unpack", there, tmp_path / "root")
    assert done.returncode == 0, done.stderr
    root = tmp_path / "root" / "models" / "checkpoint"
    for name in ("config.json", "deep/weights"):
        assert (root / name).read_bytes() == (model / name).read_bytes()


def test_packing_the_same_again_gives_the_same_pieces(packed: Path, model: Path, tmp_path: Path) -> None:
    manifest = json.loads((packed / "model-checkpoint.json").read_text())
    options = ["--xz"] if manifest["compression"] == "xz" else []
    assert run("pack", tmp_path / "again", "--model", model, "--piece-mib", "0.000123", *options).returncode == 0
    assert json.loads((tmp_path / "again" / "model-checkpoint.json").read_text()) == manifest


def test_a_damaged_piece_is_named_when_it_is_taken_and_when_it_is_unpacked(packed: Path, tmp_path: Path) -> None:
    piece = packed / "model-checkpoint.001"
    data = bytearray(piece.read_bytes())
    data[7] ^= 1
    piece.write_bytes(data)
    there = tmp_path / "there"
    assert run("take", packed / "model-checkpoint.json", "--into", there).returncode == 0
    taken = run("take", piece, "--into", there)
    assert taken.returncode == 1
    assert "model-checkpoint.001" in taken.stderr
    unpacked = run("unpack", packed, tmp_path / "root")
    assert unpacked.returncode == 1
    assert "model-checkpoint.001: its bytes changed on the way" in unpacked.stderr
    assert not (tmp_path / "root").exists()


def test_missing_and_short_pieces_are_all_named(packed: Path, tmp_path: Path) -> None:
    (packed / "model-checkpoint.000").unlink()
    short = packed / "model-checkpoint.002"
    short.write_bytes(short.read_bytes()[:5])
    told = run("unpack", packed, tmp_path / "root").stderr
    assert "model-checkpoint.000: missing" in told
    assert "model-checkpoint.002: 5 bytes, not 128" in told


def test_what_cannot_be_packed_is_said_at_once(tmp_path: Path) -> None:
    done = run("pack", tmp_path / "out", "--model", tmp_path / "nowhere", "--tensorrt", tmp_path / "no.whl")
    assert done.returncode == 1
    for words in ("nowhere does not exist", "no.whl does not exist", "--tensorrt needs --python"):
        assert words in done.stderr
    assert "nothing to pack" in run("pack", tmp_path / "out").stderr
    assert "holds no archive" in run("unpack", tmp_path, tmp_path / "root").stderr
    assert not (tmp_path / "out").exists()


def plugins(folder: Path) -> Path:
    """A library that needs two versioned functions of LIBRARY, as TensorRT's plugins do."""
    (folder / "cudnn.c").write_text(
        "int cudnnCreate(void) { return 0; }\nint cudnnGetErrorString(void) { return 0; }\n"
    )
    (folder / "versions").write_text(f"{LIBRARY} {{ global: *; }};\n")
    (folder / "plugin.c").write_text(
        "int cudnnCreate(void); const char *cudnnGetErrorString(int);\n"
        "int create(void) { return cudnnCreate(); } const char *words(void) { return cudnnGetErrorString(1); }\n"
    )
    shared = ["gcc", "-shared", "-fPIC", "-o"]
    flags = [f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script,{folder / 'versions'}"]
    subprocess.run([*shared, folder / LIBRARY, folder / "cudnn.c", *flags], check=True)
    made = folder / "libnvinfer_plugin.so.8"
    rpath = f"-Wl,-rpath,$ORIGIN/{tensorrt_pack.STAND_INS[LIBRARY]}"
    subprocess.run([*shared, made, folder / "plugin.c", folder / LIBRARY, rpath], check=True)
    (folder / LIBRARY).unlink()
    return made


@needs_gcc
def test_stand_ins_let_a_library_load_and_every_call_fail(tmp_path: Path) -> None:
    library = plugins(tmp_path)
    # In a process of its own: the loader remembers which folders were not there.
    loading = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"]
    assert LIBRARY in subprocess.run(loading, capture_output=True, text=True, check=False).stderr
    tensorrt_pack.stand_ins(library, tmp_path)
    loaded = ctypes.CDLL(str(library))
    loaded.words.restype = ctypes.c_char_p
    assert loaded.create() == 1
    assert loaded.words() == b"libcudnn.so.8 is a stand-in"


@needs_gcc
def test_tensorrt_is_packed_with_its_python_and_says_what_to_set(tmp_path: Path) -> None:
    """The prefix is a toy: enough files to see that each lands where the launcher looks for it."""
    prefix = tmp_path / "prefix"
    for name in ("bin/python3.10", "lib/libpython3.10.so.1.0", "lib/python3.10/os.py", "lib/python3.10/test/big.py"):
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).write_text(f'#!/bin/sh\necho "{name} $LD_LIBRARY_PATH"\n')
        (prefix / name).chmod(0o755)
    wheel = tmp_path / "tensorrt-8.6.0-cp310-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(plugins(tmp_path), "tensorrt/libnvinfer_plugin.so.8")
    done = run("pack", tmp_path / "out", "--tensorrt", wheel, "--python", prefix, "--xz")
    assert done.returncode == 0, done.stderr
    root = tmp_path / "root"
    told = run("unpack", tmp_path / "out", root)
    assert told.stdout == f"export LLMX_TENSORRT_PYTHON={root}/bin/python\n", told.stderr
    said = subprocess.run([root / "bin" / "python"], capture_output=True, text=True, check=True, env={"PATH": "/bin"})
    assert said.stdout == f"bin/python3.10 {root}/python/lib\n"
    assert (root / "site" / "nvidia" / "cudnn" / "lib" / LIBRARY).exists()
    assert not (root / "python" / "lib" / "python3.10" / "test").exists()
    assert run("pack", tmp_path / "out", "--tensorrt", wheel, "--python", tmp_path).returncode == 1
