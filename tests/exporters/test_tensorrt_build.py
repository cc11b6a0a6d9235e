"""What builds engines: the versions that are known, what each refuses before it starts, and a worker that dies."""

from __future__ import annotations

import ast
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from llmx.errors import IntegrityError, ResourceError, RuntimeMissing, UnsupportedError, UsageError
from llmx.exporters import tensorrt_build, tensorrt_worker
from llmx.exporters.target import Asked
from llmx.exporters.tensorrt_build import BUILDERS, Installed, Request, build, find_builder, installed
from llmx.exporters.tensorrt_target import check_asked
from llmx.exporters.tensorrt_types import MIXES, find_mix
from llmx.interpreter import TENSORRT_PYTHON

H200 = ("NVIDIA H200", (9, 0))


def found(package: str, version: str, gpu: bool = True) -> Installed:
    name, capability = H200 if gpu else (None, None)
    return Installed(package, version, name, capability, "3.11.7")


@pytest.mark.parametrize(
    ("package", "version", "dialect", "strong"),
    [
        ("tensorrt", "8.5.3.1", "plain", False),
        ("tensorrt", "8.6.0", "plain", False),
        ("tensorrt", "10.0.1", "plain", True),
        ("tensorrt", "10.15.1.29", "trt", True),
        ("tensorrt", "11.1.0", "trt", True),
        ("tensorrt_rtx", "1.7.1.116", "trt", True),
    ],
)
def test_each_version_has_its_row(package: str, version: str, dialect: str, strong: bool) -> None:
    builder = find_builder(found(package, version))
    assert (builder.dialect, builder.strong) == (dialect, strong)
    assert set(builder.types) <= set(MIXES)


@pytest.mark.parametrize(("package", "version"), [("tensorrt", "8.4.1"), ("tensorrt", "9.2.0"), ("tensorrt", "12.0")])
def test_unknown_versions_are_refused_with_those_that_are_known(package: str, version: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"(?s){package} {version}.*tensorrt 8\.5 to below 9\.0"):
        find_builder(found(package, version))


def test_no_two_rows_are_of_one_version() -> None:
    for one in BUILDERS:
        for other in BUILDERS:
            assert (
                one is other or one.package != other.package or one.before <= other.since or other.before <= one.since
            )


@pytest.mark.parametrize(
    ("have", "type_name", "asked", "error", "words"),
    [
        (found("tensorrt", "8.6.0"), "W4A16", {}, UnsupportedError, r"8\.6\.0 builds no W4A16 engine"),
        (found("tensorrt", "8.6.0"), "BF16", {}, UnsupportedError, "choose one of F32, F16, W8A16, W8A8"),
        (found("tensorrt", "10.4"), "FP8", {}, UnsupportedError, "a newer builder"),
        (found("tensorrt", "11.0", gpu=False), "F16", {}, RuntimeMissing, "on a GPU, and none is here"),
        (found("tensorrt_rtx", "1.7", gpu=False), "F16", {"refit": True}, RuntimeMissing, "leave out --refit"),
        (found("tensorrt_rtx", "1.7"), "F16", {"portable": True}, UsageError, "is portable"),
        (found("tensorrt_rtx", "1.7"), "F16", {"timing_cache": Path("t")}, UsageError, "times nothing"),
        (found("tensorrt", "8.6"), "F16", {"timing_cache": Path("/not/there/t")}, UsageError, "folder of the timing"),
        (found("tensorrt", "8.6"), "F16", {"optimization_level": 6}, UsageError, "one of 0, 1, 2, 3, 4, 5"),
    ],
)
def test_what_a_builder_cannot_do_is_refused_before_anything_is_read(
    have: Installed, type_name: str, asked: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_asked(find_mix(type_name), Asked(**asked), have, find_builder(have))


def test_what_it_can_do_passes(tmp_path: Path) -> None:
    have = found("tensorrt", "8.6.0")
    asked = Asked(refit=True, portable=True, timing_cache=tmp_path / "timings", optimization_level=5)
    check_asked(find_mix("F16"), asked, have, find_builder(have))


def test_unknown_packages_are_a_mistake_and_absent_ones_are_told_with_their_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError, match="choose one of tensorrt, tensorrt_rtx"):
        installed("tensorflow")
    monkeypatch.setitem(tensorrt_worker.MODULES, "tensorrt", ("no_such_tensorrt",))
    assert tensorrt_worker.look(["tensorrt"])["reasons"] == {"tensorrt": "the package tensorrt is not installed"}
    told = {"package": None, "reasons": {"tensorrt": "the package tensorrt is not installed"}, "python": "3.10"}
    monkeypatch.setattr(tensorrt_build, "_ask", lambda *_: told)
    with pytest.raises(RuntimeMissing, match=r"(?s)the package tensorrt is not installed.*Python 3\.10"):
        installed()


def test_without_a_gpu_the_builder_that_needs_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(question: dict[str, Any], *_: object) -> dict[str, Any]:
        package = question["packages"][0]
        return {"package": package, "version": "10.15", "gpu": None, "reasons": {}, "python": "3.11"}

    monkeypatch.setattr(tensorrt_build, "_ask", look)
    assert installed().package == "tensorrt_rtx"
    assert installed("tensorrt").package == "tensorrt"


def test_a_python_that_cannot_be_started_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TENSORRT_PYTHON, "/no/such/python")
    with pytest.raises(RuntimeMissing, match=rf"(?s){TENSORRT_PYTHON}.*/no/such/python"):
        installed()


def dying(tmp_path: Path, script: str) -> str:
    """The path of a Python that does something else."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nimport os, sys\nsys.stdin.read()\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        (
            "print('plugin not found', file=sys.stderr); sys.exit(3)",
            IntegrityError,
            r"(?s)exit code 3.*plugin not found",
        ),
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", IntegrityError, "signal SIGSEGV"),
        (f"os.kill(os.getpid(), {int(signal.SIGKILL)})", ResourceError, "memory ran out"),
        ("sys.stdout.write('{\"answer\": {'); sys.stdout.flush(); sys.exit(1)", IntegrityError, "exit code 1"),
    ],
)
def test_a_builder_that_dies_is_an_error_with_its_last_words(
    script: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TENSORRT_PYTHON, dying(tmp_path, script))
    with pytest.raises(error, match=words):
        build(BUILDERS[0], Request(tmp_path / "g", tmp_path / "e", ()), lambda step: None)


def test_steps_are_told_on_the_way_and_refusals_keep_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = '{"error": {"kind": "UnsupportedError", "what": "refused", "problems": ["node a (Loop): no"]}}'
    script = f"print('{{\"step\": \"Timing\"}}')\nprint('''{answer}''')"
    monkeypatch.setenv(TENSORRT_PYTHON, dying(tmp_path, script))
    steps: list[str] = []
    with pytest.raises(UnsupportedError, match=r"(?s)refused.*node a \(Loop\)"):
        build(BUILDERS[0], Request(tmp_path / "g", tmp_path / "e", ()), steps.append)
    assert steps == ["Timing"]


def test_the_worker_is_clean_for_the_python_of_tensorrt_8() -> None:
    source = Path(tensorrt_worker.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 10))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    newer = {"tomllib", "wsgiref"}  # came with 3.11, or are not for it
    assert names <= sys.stdlib_module_names and not names & newer
    assert not {"Self", "StrEnum", "ExceptionGroup"} & {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
    }
