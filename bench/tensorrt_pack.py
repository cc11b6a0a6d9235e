"""Packs what a GPU machine without a network needs for TensorRT 8.6 into pieces small enough to carry, and unpacks it.

    python bench/tensorrt_pack.py pack FOLDER --tensorrt WHEEL --python PREFIX --wheel WHEEL … [--model CHECKPOINT …]
    python bench/tensorrt_pack.py take PIECE … --into FOLDER      there, as the pieces arrive: digests are checked
    python bench/tensorrt_pack.py unpack FOLDER ROOT              there, once all are: prints the environment to set

TensorRT 8.6 runs on CPython 3.10 alone, so that goes along, with what --wheel gives it: numpy and
nvidia-cuda-runtime-cu12. Its plugin library wants cuBLAS and cuDNN, a gigabyte that no transformer's engine calls:
stand-ins whose every function reports failure let it load. Wheels for the Python that is there already come with
--here. TensorRT's own files travel as they are. Needs gcc, readelf, ldd and zstd (or xz with --xz) here, and there
Python alone: zstd goes along.

    FOLDER                                          ROOT
    ├── NAME.json   digests of archive and pieces   ├── python/   CPython 3.10 and its shared libraries
    ├── NAME.000 …  the archive, cut                ├── site/     what the wheels hold, and the stand-ins
    └── zstd        reads the archives there        ├── models/   checkpoints ├── wheels/  of --here
                                                    └── bin/python            what LLMX_TENSORRT_PYTHON names
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

READ = 1 << 20
# Names of CPython's library that an engine's worker never imports; most of it by size.
LEFT_OUT = ("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages", "__pycache__")
EXTENSIONS_LEFT_OUT = (
    "_tkinter",
    "nis",
    "_curses",
    "readline",
    "_sqlite3",
    "_ssl",
    "_hashlib",
    "_dbm",
    "_gdbm",
    "_test",
)
# Libraries of every Linux with glibc; theirs must be the machine's own.
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|dl|rt|util|pthread|gcc_s|stdc\+\+)\.so|ld-linux|linux-vdso|libpython")
STAND_INS = {
    "libcublas.so.12": "nvidia/cublas/lib",
    "libcublasLt.so.12": "nvidia/cublas/lib",
    "libcudnn.so.8": "nvidia/cudnn/lib",
}
COMPRESSORS = {
    "zstd": ("zstd", "-q", "-{level}", "--long=31", "-T{threads}", "-c"),
    "xz": ("xz", "-{level}", "-T{threads}", "-c"),
}
LEVELS = {"zstd": 12, "xz": 6}  # zstd beyond 12 takes ten times as long for 2 % less
LAUNCHER = """#!/bin/sh
root=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
export LD_LIBRARY_PATH="$root/python/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$root/python/bin/python3.10" "$@"
"""


@dataclass(frozen=True)
class Packing:
    """How archives are compressed and cut."""

    folder: Path
    piece_bytes: int
    compression: str
    level: int
    threads: int


# ------------------------------------------------------------------------------------------------------------ packing


def cpython(prefix: Path, target: Path) -> None:
    """Lays a CPython 3.10 out in target, without tests and tools, beside the libraries that its extensions need."""
    program, library = prefix / "bin" / "python3.10", prefix / "lib" / "python3.10"
    missing = [str(path) for path in (program, library / "os.py") if not path.exists()]
    if missing:
        sys.exit(f"no CPython 3.10 in {prefix}: {', '.join(missing)} not found; --python takes its prefix")
    (target / "bin").mkdir(parents=True)
    shutil.copy2(program, target / "bin" / "python3.10")
    ignored = shutil.ignore_patterns(*LEFT_OUT, "config-3.10*", *(f"{name}*.so" for name in EXTENSIONS_LEFT_OUT))
    shutil.copytree(library, target / "lib" / "python3.10", ignore=ignored)
    (target / "lib" / "python3.10" / "site-packages").mkdir()
    # Lines of a .pth are relative to the folder that holds it.
    (target / "lib" / "python3.10" / "site-packages" / "site.pth").write_text("../../../../site\n")
    for path in prefix.glob("lib/libpython3.10.so.1*"):
        shutil.copy2(path, target / "lib" / path.name)
    for path in sorted(set(needed(target / "lib" / "python3.10" / "lib-dynload"))):
        shutil.copy2(path, target / "lib" / path.name)


def needed(folder: Path) -> Iterator[Path]:
    """The libraries outside glibc that the extensions in a folder are linked with."""
    for extension in sorted(folder.glob("*.so")):
        for line in output("ldd", str(extension)).splitlines():
            name, _, rest = line.strip().partition(" => ")
            if rest and not SYSTEM_LIBRARIES.match(name):
                if rest.startswith("not found"):
                    sys.exit(
                        f"{extension.name} needs {name}, which this machine lacks: install it, or leave the module"
                    )
                yield Path(rest.split(" ")[0])


def stand_ins(plugins: Path, site: Path) -> None:
    """Libraries with the symbols and versions that TensorRT's plugins ask of cuBLAS and cuDNN; every call fails."""
    symbols = re.findall(r" UND (\w+)@(lib\S+)", output("readelf", "-W", "--dyn-syms", str(plugins)))
    unknown = sorted({library for _, library in symbols} - STAND_INS.keys())
    if unknown:
        sys.exit(f"{plugins.name} also needs {', '.join(unknown)}: add a row to STAND_INS")
    for library, folder in STAND_INS.items():
        names = sorted(name for name, owner in symbols if owner == library)
        code = [f'const char *{n}(void) {{ return "{library} is a stand-in"; }}' for n in names if n.endswith("String")]
        code += [f"int {n}(void) {{ return 1; }} /* not initialized */" for n in names if not n.endswith("String")]
        target = site / folder / library
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source, versions = Path(scratch) / "stand_in.c", Path(scratch) / "versions"
            source.write_text("\n".join(code) + "\n")
            versions.write_text(f"{library} {{ global: *; }};\n")
            linking = (f"-Wl,-soname,{library}", f"-Wl,--version-script,{versions}")
            output("gcc", "-shared", "-fPIC", "-w", "-o", str(target), str(source), *linking)


def output(*command: str) -> str:
    """What a program prints."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed here, and packing needs it")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(command)} failed:\n{error.stderr}")


def unzip(wheels: Iterable[Path], site: Path) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def stage(asked: argparse.Namespace, root: Path) -> Iterator[tuple[str, list[tuple[Path, str]]]]:
    """(name of the archive, what goes into it and where) of everything asked for, laid out in root where need be."""
    if asked.tensorrt:
        site = root / "tensorrt"
        unzip([asked.tensorrt], site)
        yield "tensorrt", [(site, "site")]
        plugins = next(iter(sorted(site.glob("tensorrt/libnvinfer_plugin.so.*"))), None)
        if plugins is None:
            sys.exit(f"{asked.tensorrt} holds no libnvinfer_plugin: is it TensorRT's own wheel?")
        rest = root / "rest"
        stand_ins(plugins, rest / "site")
        cpython(asked.python, rest / "python")
        unzip(asked.wheel, rest / "site")
        launcher = rest / "bin" / "python"
        launcher.parent.mkdir()
        launcher.write_text(LAUNCHER)
        launcher.chmod(0o755)
        yield "python", [(rest, ".")]
    if asked.here:
        yield "wheels", [(wheel, f"wheels/{wheel.name}") for wheel in asked.here]
    for model in asked.model:
        yield f"model-{model.resolve().name}", [(model.resolve(), f"models/{model.resolve().name}")]


def write_tar(sources: Sequence[tuple[Path, str]], stream: BinaryIO) -> None:
    """The same tar for the same files: sorted, without owners and times."""
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT, bufsize=READ) as tar:
        for source, name in sources:
            for path in sorted([source, *source.rglob("*")] if source.is_dir() else [source]):
                inside = Path(name) / path.relative_to(source)
                info = tar.gettarinfo(path, str(inside))
                info.uid = info.gid = info.mtime = 0
                info.uname = info.gname = ""
                if info.isreg():
                    with path.open("rb") as file:
                        tar.addfile(info, file)
                else:
                    tar.addfile(info)


def compressed(sources: Sequence[tuple[Path, str]], packing: Packing) -> Iterator[bytes]:
    """The archive's bytes as the compressor gives them."""
    words = [w.format(level=packing.level, threads=packing.threads) for w in COMPRESSORS[packing.compression]]
    with tempfile.TemporaryFile() as whole:  # the compressor may be far behind: a pipe both ways would want a thread
        try:
            with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=whole) as process:
                write_tar(sources, cast(BinaryIO, process.stdin))
                cast(BinaryIO, process.stdin).close()
        except FileNotFoundError:
            sys.exit(f"{words[0]} is not installed here, and packing needs it")
        if process.returncode:
            sys.exit(f"{' '.join(words)} ended with {process.returncode}")
        whole.seek(0)
        while block := whole.read(READ):
            yield block


def cut(name: str, blocks: Iterable[bytes], packing: Packing) -> dict[str, Any]:
    """Writes the pieces of an archive and gives its manifest. Piece n holds bytes n·size to (n + 1)·size of it."""
    whole, nbytes, pieces = hashlib.sha256(), 0, []
    held = bytearray()

    def put() -> None:
        piece = bytes(held[: packing.piece_bytes])
        del held[: packing.piece_bytes]
        path = packing.folder / f"{name}.{len(pieces):03}"
        path.write_bytes(piece)
        pieces.append({"file": path.name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})

    for block in blocks:
        whole.update(block)
        nbytes += len(block)
        held += block
        while len(held) >= packing.piece_bytes:
            put()
    if held or not pieces:
        put()
    digest = whole.hexdigest()
    return {"name": name, "compression": packing.compression, "bytes": nbytes, "sha256": digest, "pieces": pieces}


def pack(asked: argparse.Namespace) -> None:
    """Makes the archives asked for. Those of another call stay: a checkpoint can be packed later and on its own."""
    compression = "xz" if asked.xz else "zstd"
    level = LEVELS[compression] if asked.level is None else asked.level
    packing = Packing(asked.folder, int(asked.piece_mib * (1 << 20)), compression, level, asked.threads)
    problems = [f"{path} does not exist" for path in every_path(asked) if not path.exists()]
    if asked.piece_mib * (1 << 20) < 1:
        problems.append("--piece-mib: a piece holds at least a byte")
    if asked.tensorrt and not asked.python:
        problems.append("--tensorrt needs --python: the prefix of a CPython 3.10")
    if problems or not (asked.tensorrt or asked.here or asked.model):
        sys.exit("\n".join(problems) or "nothing to pack: give --tensorrt, --here or --model")
    packing.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        for name, sources in stage(asked, Path(scratch)):
            for old in packing.folder.glob(f"{name}.[0-9]*"):
                old.unlink()
            manifest = cut(name, compressed(sources, packing), packing)
            (packing.folder / f"{name}.json").write_text(json.dumps(manifest, indent=1) + "\n")
            print(f"{name}: {manifest['bytes'] / 1e6:.1f} MB in {len(manifest['pieces'])} pieces", flush=True)
    if compression == "zstd":
        shutil.copy2(str(shutil.which("zstd")), packing.folder / "zstd")


def every_path(asked: argparse.Namespace) -> list[Path]:
    return [path for path in (asked.tensorrt, asked.python, *asked.wheel, *asked.here, *asked.model) if path]


# ----------------------------------------------------------------------------------------------------------- unpacking


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ):
            digest.update(block)
    return digest.hexdigest()


def take(asked: argparse.Namespace) -> None:
    """Moves what arrived into one folder; a piece that some manifest there or among them names must be whole."""
    asked.into.mkdir(parents=True, exist_ok=True)
    for path in asked.pieces:
        shutil.copy2(path, asked.into / path.name)
    arrived = {path.name for path in asked.pieces}
    problems = [p for m in manifests(asked.into) for p in faults(m, asked.into, lambda name: name in arrived)]
    if problems:
        sys.exit("\n".join(problems))


def manifests(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def faults(manifest: dict[str, Any], folder: Path, looked_at: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with an archive's pieces."""
    found = []
    for piece in manifest["pieces"]:
        path = folder / piece["file"]
        if not looked_at(path.name):
            continue
        if not path.exists():
            found.append(f"{path}: missing; carry it again")
        elif path.stat().st_size != piece["bytes"]:
            found.append(f"{path}: {path.stat().st_size} bytes, not {piece['bytes']}; carry it again")
        elif file_sha256(path) != piece["sha256"]:
            found.append(f"{path}: its bytes changed on the way (sha256); carry it again")
    return found


class Joined(io.RawIOBase):
    """The pieces of an archive as one stream."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._file is not None or self._paths:
            if self._file is None:
                self._file = self._paths.pop(0).open("rb")
            count = self._file.readinto(buffer)  # type: ignore[attr-defined]  # typeshed: BinaryIO lacks readinto
            if count:
                return count
            self._file.close()
            self._file = None
        return 0


@contextmanager
def opened(manifest: dict[str, Any], folder: Path) -> Iterator[BinaryIO]:
    """The tar that the pieces hold."""
    pieces = Joined([folder / piece["file"] for piece in manifest["pieces"]])
    if manifest["compression"] == "xz":
        with lzma.open(cast(BinaryIO, pieces)) as tar:
            yield cast(BinaryIO, tar)
        return
    program = shutil.which("zstd") or str(folder / "zstd")
    words = ["sh", "-c", 'cat "$@" | "$0" -q -d --long=31 -c', program]
    words += [str(folder / piece["file"]) for piece in manifest["pieces"]]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        yield cast(BinaryIO, process.stdout)
    if process.returncode:
        sys.exit(f"{manifest['name']}: {program} ended with {process.returncode}")


def unpack(asked: argparse.Namespace) -> None:
    found = manifests(asked.folder)
    problems = [problem for manifest in found for problem in faults(manifest, asked.folder)]
    if problems or not found:
        sys.exit("\n".join(problems) or f"{asked.folder} holds no archive: NAME.json beside NAME.000 …")
    asked.root.mkdir(parents=True, exist_ok=True)
    program = asked.folder / "zstd"
    if program.exists():
        program.chmod(0o755)
    for manifest in found:
        with opened(manifest, asked.folder) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=READ) as tar:
            tar.extractall(asked.root, filter="tar")
        print(f"{manifest['name']}: {len(manifest['pieces'])} pieces unpacked", file=sys.stderr, flush=True)
    if (asked.root / "bin" / "python").exists():
        print(f"export LLMX_TENSORRT_PYTHON={asked.root.resolve() / 'bin' / 'python'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make pieces")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--tensorrt", type=Path, help="TensorRT 8.6's own wheel for CPython 3.10")
    packing.add_argument("--python", type=Path, help="prefix of the CPython 3.10 to take along")
    packing.add_argument("--wheel", type=Path, action="append", default=[], help="for that Python; may be repeated")
    packing.add_argument("--here", type=Path, action="append", default=[], help="a wheel for the Python that is there")
    packing.add_argument("--model", type=Path, action="append", default=[], help="a checkpoint; may be repeated")
    packing.add_argument("--piece-mib", type=float, default=48)
    packing.add_argument("--xz", action="store_true", help="xz in place of zstd: larger, and Python reads it by itself")
    packing.add_argument("--level", type=int, help=f"of the compressor; {LEVELS}")
    packing.add_argument("--threads", type=int, default=1)
    packing.add_argument("--scratch", type=Path, help="folder with room for the wheel's files")
    taking = commands.add_parser("take", help="gather pieces that arrived")
    taking.add_argument("pieces", type=Path, nargs="+")
    taking.add_argument("--into", type=Path, required=True)
    unpacking = commands.add_parser("unpack", help="unpack them")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("root", type=Path)
    return parser.parse_args()


COMMANDS = {"pack": pack, "take": take, "unpack": unpack}

if __name__ == "__main__":
    asked = arguments()
    COMMANDS[asked.command](asked)
