"""`llmx export --format onnx` and `llmx plan`: types, folders that appear whole or not at all, manifests."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Done
from jsonschema import Draft202012Validator

from llmx import api
from llmx.errors import IntegrityError, LlmxError, UsageError
from llmx.exporters.manifest import json_schema
from llmx.exporters.target import EXPORTERS, find_format, format_names
from llmx.validate.sample_text import SAMPLE_TEXT

pytest.importorskip("onnx_ir", reason="the package onnx-ir is not installed: pip install 'llmx[onnx]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
PLAIN = ("--no-validate", "--threads", 1, "--json")
ROUNDED = ("--method", "rtn", *PLAIN)
SOLVED = ("--effort", "fast", "--calibration-tokens", 2048, "--device", "cpu", *PLAIN)
FILES = {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
BESIDE = {"model.manifest.json", "report.json", "report.html"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def export(output: Path, model: Path = EXAMPLE, **options: Any) -> api.ExportResult:
    chosen = {"type_name": "F16", "validate": False, "threads": 1, **options}
    return api.export(api.ExportRequest(str(model), format="onnx", output=output, **chosen))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(SAMPLE_TEXT)
    return path


@pytest.mark.parametrize(
    ("options", "type_name", "types"),
    [
        (("--bits", 32), "F32", {"F32"}),
        (("--bits", 16, "--dialect", "standard"), "F16", {"F16"}),
        (("--bits", 8), "INT8", {"F32", "int8-g32-sym-float32"}),
        ((), "INT4", {"F32", "int4-g32-zp-float32", "int4-g128-zp-float32"}),
        (("--type", "int4_m"), "INT4_M", {"F32", "int4-g32-zp-float32", "int8-g32-sym-float32"}),
        (("--type", "INT4-g128-sym"), "int4-g128-sym", {"F32", "int4-g128-sym"}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_plan_tells_types_and_exact_sizes_without_writing(
    options: tuple[object, ...],
    type_name: str,
    types: set[str],
    here: Callable[..., Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("plan", EXAMPLE, "--format", "onnx", *options, "--method", "rtn", "--json")
    assert done.code == 0, done.stderr
    assert done.told["type"] == type_name
    assert set(done.told["types"]) == types
    assert done.told["bytes"] == sum(file["bytes"] for file in done.told["files"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_an_export_is_the_planned_folder_with_its_manifest_and_report(
    bits: int, dialect: str, tmp_path: Path, here: Callable[..., Done]
) -> None:
    chosen = ("--format", "onnx", "--bits", bits, "--dialect", dialect)
    planned = here("plan", EXAMPLE, *chosen, "--method", "rtn", "--json").told
    done = here("export", EXAMPLE, *chosen, *ROUNDED, "-o", tmp_path / "made")
    assert done.code == 0, done.stderr
    assert Path(done.told["artifact"]) == tmp_path / "made" / "model.onnx"
    assert names(tmp_path / "made") == FILES | BESIDE and names(tmp_path) == {"made"}
    sizes = {file["name"]: file["bytes"] for file in planned["files"]}
    assert {name: (tmp_path / "made" / name).stat().st_size for name in FILES} == sizes
    told = json.loads((tmp_path / "made" / "model.manifest.json").read_text())
    assert list(Draft202012Validator(json_schema()).iter_errors(told)) == []
    assert told["options"]["dialect"] == dialect and told["format"] == "onnx" and "onnx-ir" in told["libraries"]
    assert str(tmp_path) not in json.dumps(told)
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["passed"] is None
    assert [t["sha256"] for t in report["export"]["tensors"]] == [t["sha256"] for t in told["tensors"]]
    for given in ("", "model.onnx", "model.onnx.data", "model.manifest.json"):
        verified = here("verify", tmp_path / "made" / given, "--json")
        assert verified.code == 0 and verified.told["tensors"] == len(told["tensors"])


def test_without_an_output_the_folder_is_named_after_the_model_and_its_type(
    tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("export", EXAMPLE, "--format", "onnx", "--bits", 4, *ROUNDED)
    assert done.code == 0, done.stderr
    assert done.told["artifact"] == "tiny-qwen3-3.3M-INT4-onnx/model.onnx"


def test_solved_and_scaled_weights_say_so_and_differ_from_rounded_ones(
    text: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    import onnx_ir

    data = {}
    for method, word in (("rtn", "solved"), ("gptq", "solved"), ("awq", "solved and scaled")):
        given = ("--format", "onnx", "--method", method, "--calibration", text, "-o", tmp_path / method)
        done = here("export", EXAMPLE, *given, *SOLVED)
        assert done.code == 0, done.stderr
        report = json.loads((tmp_path / method / "report.json").read_text())
        assert len(report["export"]["solved"]) == 1 + 7 * 4
        assert onnx_ir.load(tmp_path / method / "model.onnx").metadata_props["llmx.solver"] == word
        data[method] = (tmp_path / method / "model.onnx.data").read_bytes()
    assert len(set(data.values())) == 3 and len(set(map(len, data.values()))) == 1


def test_rules_of_a_recipe_give_single_matrices_their_types(tmp_path: Path, here: Callable[..., Done]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "type: INT4\nmethod: rtn\nrules:\n- {roles: [down], layers: first 1, type: int8-g32-sym-float32}\n"
    )
    done = here("plan", EXAMPLE, "--format", "onnx", "--recipe", recipe, "--json")
    assert done.code == 0, done.stderr
    types = {tensor["name"]: tensor["type"] for tensor in done.told["tensors"] if tensor["name"].endswith(".codes")}
    assert [name for name, kind in types.items() if kind.startswith("int8")] == ["layers.0.down.weight.codes"]


@pytest.mark.parametrize("options", [("--method", "rtn"), ("--method", "gptq")])
def test_an_artifact_is_rebuilt_from_its_manifest_byte_for_byte(
    options: tuple[str, ...], text: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    given = ("--calibration", text) if "gptq" in options else ()
    how = SOLVED if given else PLAIN
    chosen = ("--format", "onnx", "--dialect", "standard", *options, *how, "-o", tmp_path / "first")
    first = here("export", EXAMPLE, *chosen, *given)
    assert first.code == 0, first.stderr
    elsewhere = shutil.copytree(EXAMPLE, tmp_path / "called otherwise")
    again = ("--from-manifest", first.told["manifest"], "-o", tmp_path / "again", *PLAIN)
    second = here("export", elsewhere, *again, *given)
    assert second.code == 0, second.stderr
    for name in [*FILES, "model.manifest.json"]:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    said = here("export", EXAMPLE, *again, *given, "--dialect", "ort", "--force")
    assert said.code == 2 and "--dialect" in said.stderr


def test_a_changed_byte_of_a_tensor_or_of_the_graph_is_found(tmp_path: Path, here: Callable[..., Done]) -> None:
    export(tmp_path / "made")
    told = json.loads((tmp_path / "made" / "model.manifest.json").read_text())
    tensor = told["tensors"][5]
    with (tmp_path / "made" / "model.onnx.data").open("r+b") as stream:
        stream.seek(tensor["offset"])
        byte = stream.read(1)[0]
        stream.seek(tensor["offset"])
        stream.write(bytes([byte ^ 1]))
    with (tmp_path / "made" / "genai_config.json").open("a") as stream:
        stream.write(" ")
    done = here("verify", tmp_path / "made" / "model.onnx", "--json")
    assert done.code == 6
    found = {(one["file"], one["tensor"]) for one in done.told["differences"]}
    assert ("model.onnx.data", tensor["name"]) in found and ("genai_config.json", None) in found


def test_one_and_two_threads_write_the_same_bytes(tmp_path: Path) -> None:
    for threads in (1, 2):
        export(tmp_path / str(threads), type_name="INT4", method="rtn", threads=threads)
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


# What goes wrong.


def test_an_existing_artifact_needs_force_and_is_replaced_whole(tmp_path: Path) -> None:
    export(tmp_path / "made")
    before = (tmp_path / "made" / "model.onnx.data").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        export(tmp_path / "made", type_name="F32")
    assert (tmp_path / "made" / "model.onnx.data").read_bytes() == before
    export(tmp_path / "made", type_name="F32", force=True)
    assert len((tmp_path / "made" / "model.onnx.data").read_bytes()) > 1.9 * len(before)
    assert names(tmp_path / "made") == FILES | BESIDE and names(tmp_path) == {"made"}


def test_what_only_the_replaced_artifact_had_goes_with_it(tmp_path: Path) -> None:
    model = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    export(tmp_path / "made", model)
    assert "chat_template.jinja" in names(tmp_path / "made")
    (tmp_path / "made" / "notes.txt").write_text("mine")
    export(tmp_path / "made", force=True)
    assert names(tmp_path / "made") == FILES | BESIDE | {"notes.txt"}


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "notes.txt").write_text("mine")
    export(tmp_path / "made")
    assert names(tmp_path / "made") == FILES | BESIDE | {"notes.txt"}


@pytest.mark.parametrize("link", ["", "model.onnx", "model.onnx.data", "tokenizer.json"])
def test_targets_that_are_symbolic_links_are_refused_even_with_force(link: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "made" / link if link else tmp_path / "made"
    place.parent.mkdir(exist_ok=True)
    target = tmp_path / "elsewhere" / "file" if link else tmp_path / "elsewhere"
    if link:
        target.write_text("mine")
    place.symlink_to(target)
    with pytest.raises(UsageError, match="symbolic link"):
        export(tmp_path / "made", force=True)
    assert place.is_symlink()
    assert names(tmp_path / "elsewhere") == ({"file"} if link else set())


def test_a_folder_cannot_take_the_place_of_a_file_or_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("mine")
    with pytest.raises(UsageError, match="a file is in its place"):
        export(tmp_path / "made", force=True)
    model = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    before = names(model)
    with pytest.raises(UsageError, match="overwrite its source"):
        export(model, model, force=True)
    with pytest.raises(UsageError, match=r"model\.onnx"):
        export(tmp_path / "other.onnx")
    assert names(model) == before and names(tmp_path) == {"made", "model"}


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.exporters import onnx

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "write_data", broken)
    with pytest.raises(LlmxError, match="disk is full") as raised:
        export(tmp_path / "made")
    assert raised.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_rewritten_during_the_run_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.exporters import onnx

    model, write = Path(shutil.copytree(EXAMPLE, tmp_path / "model")), onnx.write

    def touched(*arguments: Any) -> object:
        digests = write(*arguments)
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes() + b" ")
        return digests

    monkeypatch.setattr(onnx, "write", touched)
    with pytest.raises(IntegrityError, match="changed"):
        export(tmp_path / "made", model)
    assert names(tmp_path) == {"model"}


def test_an_artifact_that_fails_a_check_has_a_folder_of_that_name(tmp_path: Path, here: Callable[..., Done]) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed: pip install 'llmx[onnx]'")
    chosen = ("--format", "onnx", "--method", "rtn", "--threads", 1, "--max-kl", "1e-9", "-o", tmp_path / "made")
    done = here("export", EXAMPLE, *chosen, "--json")
    assert done.code in (2, 4), done.stderr  # the runtime's floor may lie above such a limit
    assert names(tmp_path) == {"made.failed"}
    assert names(tmp_path / "made.failed") == (FILES | BESIDE) - {"model.manifest.json"}
    assert str(tmp_path / "made.failed") in done.told["error"]["where"]


def test_a_float_graph_passes_every_check_of_its_export(tmp_path: Path, here: Callable[..., Done]) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed: pip install 'llmx[onnx]'")
    given = ("--format", "onnx", "--bits", 32, "--threads", 1, "-o", tmp_path / "made", "--json")
    done = here("export", EXAMPLE, *given)
    assert done.code == 0, done.stderr
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert report["passed"] is True and checks["bytes.digests"]["passed"] is True
    assert checks["conversion.kl"]["value"] < 1e-6
    told = json.loads((tmp_path / "made" / "model.manifest.json").read_text())
    assert told["runtime"]["name"] == "onnxruntime"


@pytest.mark.parametrize(
    ("hidden", "options", "words"),
    [
        ("onnx_ir", ("--no-validate",), "onnx-ir"),
        ("onnxruntime", (), "onnxruntime cannot run here"),
    ],
)
def test_a_missing_package_exits_7_and_says_what_to_install(
    hidden: str, options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    arguments = [
        "llmx",
        "export",
        str(EXAMPLE),
        "--format",
        "onnx",
        "--bits",
        "16",
        "-o",
        str(tmp_path / "out"),
        *options,
    ]
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {hidden!r} else find(name, *a)\n"
        f"sys.modules[{hidden!r}] = None; sys.argv = {arguments!r}\n"
        "from llmx.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert words in done.stderr and "llmx[onnx]" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# The formats there are.


def test_formats_are_found_by_name_and_what_other_packages_declare_is_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    from llmx import registry
    from llmx.exporters import target

    declared = EntryPoints([EntryPoint("other", "llmx.exporters.onnx_target:OnnxFormat", target.ENTRY_POINTS)])
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", declared.select)
    assert format_names() == [*EXPORTERS, "other"]
    assert type(find_format("other")) is type(find_format("onnx"))
    with pytest.raises(UsageError, match=", ".join([*EXPORTERS, "other"])):
        find_format("nothing")


def test_every_format_knows_the_names_of_its_fields() -> None:
    from llmx.preparing import FORMAT_OPTIONS

    for name in EXPORTERS:
        found = find_format(name)
        assert found.name == name and found.takes <= FORMAT_OPTIONS.keys()
        assert found.named_type(None, found.default_type()) == found.default_type()
