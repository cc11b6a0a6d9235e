"""What can go wrong around an export does: each fault has its error and exit code, and nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmx.errors import IntegrityError
from llmx.exporters import ledger
from llmx.exporters.artifact import file_sha256
from llmx.exporters.ledger import Ledger
from llmx.exporters.workplace import folder_of
from llmx.exporting import export
from llmx.preparing import ExportRequest

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
FORMATS = {"gguf": "Q8_0", "onnx": "int4", "trtllm": "W4A16"}
NAMES = {"gguf": "m.gguf", "onnx": "m", "trtllm": "m"}


def command(source: Path, target: Path, *more: str, format_: str = "gguf") -> list[str]:
    given = ["export", str(source), "--format", format_, "--type", FORMATS[format_], "--method", "rtn", "--no-validate"]
    given += ["--effort", "fast"]
    return [sys.executable, "-m", "llmx.cli", *given, "--threads", "1", "-o", str(target), *more]


def request(source: Path, target: Path, format_: str = "gguf", **changed: object) -> ExportRequest:
    given = {"type_name": FORMATS[format_], "method": "rtn", "effort": "fast", "validate": False, **changed}
    return ExportRequest(str(source), format=format_, output=target, threads=1, **given)  # type: ignore[arg-type]


def run(command: list[str], limits: tuple[tuple[int, int], ...] = ()) -> subprocess.CompletedProcess[str]:
    """limits: (what of resource.RLIMIT_…, how much)."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing on is an error (EFBIG), not a signal
        for which, most in limits:
            resource.setrlimit(which, (most, most))

    return subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limited)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint that may be harmed."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "source"))


def at_tensor(number: int, harm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `harm` when so many tensors are written."""
    done, seen = Ledger.done, []

    def harming(self: Ledger, *given: object) -> None:
        done(self, *given)  # type: ignore[arg-type]
        seen.append(1)
        if len(seen) == number:
            harm()  # type: ignore[operator]

    monkeypatch.setattr(ledger, "BATCH_BYTES", 1)
    monkeypatch.setattr(Ledger, "done", harming)


def left(folder: Path) -> list[str]:
    """What an export that failed left under names of an artifact."""
    return sorted(
        path.name for path in folder.iterdir() if path.name not in {"source", ".m.partial", ".m.gguf.partial"}
    )


@pytest.mark.parametrize("format_", FORMATS)
def test_a_shard_that_is_cut_while_it_is_read_is_told(
    format_: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = next(source.glob("*.safetensors"))
    at_tensor(2, lambda: os.truncate(shard, 1 << 16), monkeypatch)
    with pytest.raises(IntegrityError, match="was cut while it was read") as told:
        export(request(source, tmp_path / NAMES[format_], format_))
    assert told.value.exit_code == 6 and str(shard) in str(told.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("how", ["in its place", "beside it"])
def test_a_shard_that_is_rewritten_while_it_is_read_is_told(
    how: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy under another name that takes the shard's, with the shard's size and time, is another file, too."""
    shard = next(source.glob("*.safetensors"))
    before = shard.stat()

    def rewrite() -> None:
        if how == "in its place":
            with shard.open("r+b") as stream:
                stream.seek(-4, os.SEEK_END)
                stream.write(b"\x11\x22\x33\x44")
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        else:
            other = shard.with_name("other")
            other.write_bytes(shard.read_bytes()[:-4] + b"\x11\x22\x33\x44")
            os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
            other.replace(shard)

    at_tensor(2, rewrite, monkeypatch)
    with pytest.raises(IntegrityError, match="changed while it was being read"):
        export(request(source, tmp_path / "m.gguf"))
    assert left(tmp_path) == []


@pytest.mark.parametrize("format_", FORMATS)
def test_a_file_that_may_not_grow_is_told_and_the_export_goes_on_once_it_may(format_: str, tmp_path: Path) -> None:
    folder, target = tmp_path / "m", tmp_path / "m" / NAMES[format_]
    folder.mkdir()
    failed = run(command(EXAMPLE, target, format_=format_), ((resource.RLIMIT_FSIZE, 300_000),))
    assert failed.returncode == 5, failed.stderr
    assert "the system lets no file grow this large" in failed.stderr and "fix: " in failed.stderr
    assert left(folder) == []
    more = ["--resume"] if list(folder.iterdir()) else []
    assert run(command(EXAMPLE, target, *more, format_=format_)).returncode == 0
    export(request(EXAMPLE, tmp_path / "whole" / NAMES[format_], format_))
    assert made_by(folder) == made_by(tmp_path / "whole")


def made_by(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all files but the report, which tells times."""
    return {path.name: file_sha256(path) for path in folder.rglob("*") if path.is_file() and "report" not in path.name}


def on_a_disk(script: str, options: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell's script with a file system of its own at `place`, which goes with it."""
    place.mkdir()
    mount = f"mount -t tmpfs -o {options} none {place} || exit 99"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount}\n{script}"], check=False, capture_output=True, text=True
    )
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip(f"this system mounts nothing: {done.stderr.strip()}")
    return done


OWN_DISK = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a file system of its own takes root and unshare"
)


@OWN_DISK
@pytest.mark.parametrize("format_", FORMATS)
def test_a_disk_that_gets_full_is_told_and_the_export_goes_on_once_there_is_room(format_: str, tmp_path: Path) -> None:
    disk, filling = tmp_path / "disk", tmp_path / "filling.py"
    filling.write_text(
        "import sys; from pathlib import Path; from llmx import cli; from llmx.exporters import ledger\n"
        "ledger.BATCH_BYTES, done, seen = 1, ledger.Ledger.done, []\n"
        "def filling(self, *given):\n"
        "    done(self, *given)\n"
        "    seen.append(1)\n"
        "    if len(seen) == 3:\n"
        f"        with open({str(disk / 'filler')!r}, 'wb', buffering=0) as stream:\n"
        "            try:\n"
        "                while True: stream.write(bytes(4096))\n"
        "            except OSError: pass\n"
        "ledger.Ledger.done = filling\n"
        "cli.main()\n"
    )
    given = command(EXAMPLE, disk / NAMES[format_], format_=format_)
    script = (
        f"{given[0]} {filling} {' '.join(given[3:])}; echo code $?; ls -A {disk}; rm {disk}/filler\n"
        f"{' '.join(given)} --resume; echo code $?; cp -r {disk} {tmp_path}/made"
    )
    done = on_a_disk(script, "size=24m", disk)
    assert "code 5" in done.stdout, done.stderr
    assert "the disk is full" in done.stderr and "with --resume goes on" in done.stderr
    assert done.stdout.split("code 5\n")[1].startswith(f".{NAMES[format_]}.partial\nfiller\n"), done.stdout
    assert "code 0" in done.stdout, done.stderr
    export(request(EXAMPLE, tmp_path / "whole" / NAMES[format_], format_))
    assert made_by(tmp_path / "made") == made_by(tmp_path / "whole")


@OWN_DISK
def test_a_disk_that_is_too_small_is_told_before_the_start(tmp_path: Path) -> None:
    given = " ".join(command(EXAMPLE, tmp_path / "disk" / "m.gguf"))
    done = on_a_disk(f"{given}; echo code $?; ls -A {tmp_path / 'disk'}", "size=200k", tmp_path / "disk")
    assert done.stdout == "code 5\n" and "free" in done.stderr, done.stderr


@OWN_DISK
def test_a_target_that_is_read_only_is_told(tmp_path: Path) -> None:
    given = " ".join(command(EXAMPLE, tmp_path / "disk" / "m.gguf"))
    done = on_a_disk(f"{given}; echo code $?", "ro,size=64m", tmp_path / "disk")
    assert done.stdout == "code 2\n" and "cannot be written to" in done.stderr, done.stderr


def test_a_folder_that_goes_while_it_is_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "there" / "m.gguf"
    at_tensor(2, lambda: shutil.rmtree(tmp_path / "there"), monkeypatch)
    with pytest.raises(IntegrityError, match="No such file"):
        export(request(EXAMPLE, target))
    assert not target.exists()


def test_the_clock_may_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(request(EXAMPLE, tmp_path / "whole.gguf"))
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 2e9 - 1e7 * next(jumps))
    result = export(request(EXAMPLE, tmp_path / "m.gguf"))
    assert file_sha256(result.artifact) == file_sha256(tmp_path / "whole.gguf")
    assert 0 <= result.seconds < 600


def test_too_little_memory_is_told(tmp_path: Path) -> None:
    """An address space that the interpreter and its libraries fit into, and no weights."""
    code = (
        "import resource, sys\n"
        "from llmx import cli\n"
        "import llmx.exporting, llmx.preparing, llmx.exporters.gguf_target, llmx.quant.grid\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20),) * 2)\n"
        "cli.main()\n"
    )
    failed = run([sys.executable, "-c", code, *command(EXAMPLE, tmp_path / "m.gguf")[3:]])
    assert failed.returncode == 5, failed.stderr
    assert "memory" in failed.stderr and "fix: " in failed.stderr and "Traceback" not in failed.stderr
    assert left(tmp_path) == []


def test_asked_to_stop_it_leaves_nothing_under_the_final_name_and_goes_on(tmp_path: Path) -> None:
    code = (
        "import os, signal; from llmx import cli; from llmx.exporters import ledger\n"
        "ledger.BATCH_BYTES = 1\n"
        "done = ledger.Ledger.done\n"
        "def stopping(self, *given):\n"
        "    done(self, *given)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "ledger.Ledger.done = stopping\n"
        "cli.main()\n"
    )
    target = tmp_path / "m.gguf"
    stopped = run([sys.executable, "-c", code, *command(EXAMPLE, target)[3:]])
    assert stopped.returncode == 143 and left(tmp_path) == []
    assert folder_of(target).exists()
    assert run(command(EXAMPLE, target, "--resume")).returncode == 0
    export(request(EXAMPLE, tmp_path / "whole.gguf"))
    assert file_sha256(target) == file_sha256(tmp_path / "whole.gguf")


@pytest.mark.parametrize("moved", [1, 2])
def test_an_export_that_is_killed_while_its_files_get_their_names_goes_on(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest has its name and the artifact not yet; or both have, and the report is missing."""
    code = (
        "import os, signal, sys; from pathlib import Path; from llmx import cli\n"
        "replace, seen = Path.replace, []\n"
        "def killing(self, target):\n"
        "    replace(self, target)\n"
        "    seen.append(1)\n"
        f"    if len(seen) == {moved}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.replace = killing\n"
        "cli.main()\n"
    )
    target = tmp_path / "m.gguf"
    killed = run([sys.executable, "-c", code, *command(EXAMPLE, target)[3:]])
    assert killed.returncode == -signal.SIGKILL
    assert target.exists() == (moved == 2)
    again = run(command(EXAMPLE, target, "--resume"))
    assert again.returncode == 0, again.stderr
    assert left(tmp_path) == ["m.gguf", "m.manifest.json", "report.html", "report.json"]
    told = json.loads((tmp_path / "m.manifest.json").read_text())
    assert told["files"][0]["sha256"] == file_sha256(target)


def test_a_file_that_took_the_name_of_a_killed_export_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmx.publishing.publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(request(EXAMPLE, target))
    target.write_bytes(b"mine")
    failed = run(command(EXAMPLE, target, "--resume"))
    assert failed.returncode == 2 and "exists already" in failed.stderr
    assert target.read_bytes() == b"mine"


def test_a_report_that_cannot_be_written_is_told_and_written_with_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    target = tmp_path / "m.gguf"
    failed = run(command(EXAMPLE, target))
    assert failed.returncode == 6 and "error: " in failed.stderr and "Traceback" not in failed.stderr
    whole = file_sha256(target)
    (tmp_path / "report.json").rmdir()
    assert run(command(EXAMPLE, target, "--resume")).returncode == 0
    assert file_sha256(target) == whole
    assert left(tmp_path) == ["m.gguf", "m.manifest.json", "report.html", "report.json"]
