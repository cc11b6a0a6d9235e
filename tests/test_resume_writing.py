"""What is in the files of an export that was stopped is not made again, and the bytes are the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from llmx.errors import IntegrityError
from llmx.exporters import gguf, ledger, onnx, trtllm
from llmx.exporters.artifact import file_sha256
from llmx.exporters.ledger import Ledger
from llmx.exporters.workplace import folder_of
from llmx.exporting import export
from llmx.preparing import ExportRequest

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
# the module that writes, options, what is written: a file or a folder
CASES = {
    "gguf": (gguf, {"type_name": "Q8_0"}, "m.gguf"),
    "gguf in shards": (gguf, {"type_name": "Q4_0", "split_max_size": "1M"}, "m.gguf"),
    "onnx": (onnx, {"type_name": "int4"}, "m"),
    "trtllm": (trtllm, {"type_name": "W4A16", "split_max_size": "1M"}, "m"),
    "trtllm in ranks": (trtllm, {"type_name": "F16", "layout": "ranks", "tp": 2, "pp": 2}, "m"),
}


def request(case: str, folder: Path, **changed: object) -> ExportRequest:
    module, options, name = CASES[case]
    given = {"format": module.__name__.rpartition(".")[2], "output": folder / name, "validate": False, **options}
    return ExportRequest(str(EXAMPLE), method="rtn", effort="fast", threads=2, **given, **changed)  # type: ignore[arg-type]


def made_by(folder: Path) -> dict[str, str]:
    """Name -> sha256 of all files but the report, which tells times."""
    return {path.name: file_sha256(path) for path in folder.rglob("*") if path.is_file() and "report" not in path.name}


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ctrl-C after so many tensors, each of which is noted at once. Returned are the names that were written."""
    done, seen = Ledger.done, []

    def stopping(self: Ledger, name: str, *given: object) -> None:
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(name)
        done(self, name, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger, "BATCH_BYTES", 1)
    monkeypatch.setattr(Ledger, "done", stopping)
    return seen


def export_until(count: int, asked: ExportRequest) -> list[str]:
    """Export, and stop after so many tensors: the names that were written."""
    with pytest.MonkeyPatch.context() as patch:
        written = stop_after(count, patch)
        with pytest.raises(KeyboardInterrupt):
            export(asked)
    return written


@pytest.mark.parametrize("case", CASES)
def test_an_export_that_was_stopped_goes_on_behind_the_tensors_that_are_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    with monkeypatch.context() as patch:
        everything = stop_after(-1, patch)
        export(request(case, tmp_path / "whole"))
    before = export_until(3, request(case, tmp_path / "stopped"))
    before += export_until(4, request(case, tmp_path / "stopped", resume=True))
    with monkeypatch.context() as patch:
        rest = stop_after(-1, patch)
        patch.setattr(CASES[case][0], "check_weights", lambda _: pytest.fail("the weights were looked at again"))
        export(request(case, tmp_path / "stopped", resume=True))
    assert made_by(tmp_path / "stopped") == made_by(tmp_path / "whole")
    assert not {name for name in before if before.count(name) > 1}
    # the parts of one matrix belong together: both are written again where only one was noted
    assert len(everything) <= len(before) + len(rest) <= len(everything) + 2
    assert not list(tmp_path.glob("**/.*.partial"))


def test_written_bytes_that_changed_are_not_taken_for_the_tensors(tmp_path: Path) -> None:
    export_until(3, request("gguf", tmp_path))
    folder = folder_of(tmp_path / "m.gguf")
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    place = next(line["facts"] for line in lines if line.get("step", "").startswith("written"))
    with (folder / "files" / "m.gguf").open("r+b") as stream:
        stream.seek(place["offset"])
        byte = stream.read(1)
        stream.seek(place["offset"])
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(IntegrityError, match="have changed"):
        export(request("gguf", tmp_path, resume=True))


def test_tensors_are_noted_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing a large file takes seconds: not after each of its thousand tensors."""
    noted: list[int] = []
    note = Ledger.note
    monkeypatch.setattr(Ledger, "note", lambda self: noted.append(1) or note(self))
    export(request("gguf", tmp_path))
    assert len(noted) <= 2


def test_weights_of_another_day_are_read_again_and_refused_where_they_are_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source)
    asked = {"type_name": "Q8_0", "output": tmp_path / "m.gguf", "validate": False, "threads": 1}
    export_until(3, ExportRequest(str(source), **asked))  # type: ignore[arg-type]
    shard = next(source.glob("*.safetensors"))
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(IntegrityError, match="not those that the export which was stopped has read"):
        export(ExportRequest(str(source), resume=True, **asked))  # type: ignore[arg-type]
