"""The exporter from checkpoint to bytes: exact, deterministic, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmx import api
from llmx.errors import IntegrityError, LlmxError, UnsupportedError, UsageError
from llmx.exporters.gguf_tensors import restore
from llmx.formats.ggml_decode import decode
from llmx.formats.gguf import read_gguf, read_gguf_set
from llmx.formats.imatrix import write_imatrix
from llmx.formats.safetensors import open_safetensors, write_safetensors
from llmx.models.model import open_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def export(model: Path, output: Path, **options: object) -> Path:
    request = api.ExportRequest(str(model), output=output, validate=False, method="rtn", **options)  # type: ignore[arg-type]
    return api.export(request).artifact


def stored(model: Path) -> Tensors:
    file = open_safetensors(model / "model.safetensors")
    return {n: (t.dtype, t.shape, file.bytes(n).tobytes()) for n, t in file.tensors.items()}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "model"))


def damage(model: Path, change: Callable[[Tensors], object]) -> None:
    tensors = stored(model)
    change(tensors)
    entries = [(n, dtype, shape, [data]) for n, (dtype, shape, data) in tensors.items()]
    write_safetensors(model / "model.safetensors", entries)


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def test_one_and_two_threads_write_the_same_bytes(tmp_path: Path) -> None:
    one = export(EXAMPLE, tmp_path / "one.gguf", threads=1)
    two = export(EXAMPLE, tmp_path / "two.gguf", threads=2)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "IQ4_XS"])
def test_the_planned_size_is_the_written_size(tmp_path: Path, type_name: str) -> None:
    request = api.ExportRequest(str(EXAMPLE), type_name=type_name, output=tmp_path, validate=False, method="rtn")
    planned = api.plan(request).exporter.plan
    result = api.export(request)
    assert result.artifact.name == planned.files[0].name
    assert result.artifact.stat().st_size == planned.nbytes == result.nbytes


def test_bfloat16_kept_as_bfloat16_passes_through_bit_for_bit(tmp_path: Path) -> None:
    file = read_gguf(export(EXAMPLE, tmp_path / "b.gguf", type_name="BF16"))
    source = stored(EXAMPLE)
    assert file.bytes("blk.0.ffn_down.weight").tobytes() == source["model.layers.0.mlp.down_proj.weight"][2]


def test_an_f32_file_restores_the_checkpoint_exactly(tmp_path: Path) -> None:
    file = read_gguf(export(EXAMPLE, tmp_path / "f.gguf", type_name="F32"))
    export_plan = api.plan(api.ExportRequest(str(EXAMPLE), type_name="F32")).exporter.export
    model = open_model(EXAMPLE)
    for name, thunk in restore(file, model, export_plan.entries).items():
        expected = model.checkpoint.bytes(name).view(np.uint16).astype(np.uint32) << 16
        assert np.array_equal(thunk().reshape(-1), expected.view(np.float32)), name


def test_a_split_set_holds_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    whole = read_gguf(export(EXAMPLE, tmp_path / "whole.gguf", type_name="Q8_0"))
    first = export(EXAMPLE, tmp_path / "set.gguf", type_name="Q8_0", split_max_size="1MB")
    assert first.name.startswith("set-00001-of-0000")
    parts = read_gguf_set(first)
    assert len(parts.paths) > 1
    assert all(np.array_equal(whole.bytes(n), parts.bytes(n)) for n in whole.tensors)


def test_importance_of_the_same_model_changes_the_bytes_and_of_another_is_refused(tmp_path: Path) -> None:
    plain = read_gguf(export(EXAMPLE, tmp_path / "plain.gguf"))
    name = "blk.0.ffn_up.weight"
    weights = np.linspace(0.01, 4, plain.tensors[name].shape[-1], dtype=np.float32)[None]
    for columns, path in ((weights, tmp_path / "good.gguf"), (weights[:, :128], tmp_path / "bad.gguf")):
        write_imatrix(path, {name: columns}, {name: np.ones(1)}, datasets=["x"], chunk_count=1, chunk_size=1)
    lit = read_gguf(export(EXAMPLE, tmp_path / "lit.gguf", imatrix=tmp_path / "good.gguf"))
    assert not np.array_equal(plain.bytes(name), lit.bytes(name))
    assert np.array_equal(plain.bytes("blk.1.ffn_up.weight"), lit.bytes("blk.1.ffn_up.weight"))
    with pytest.raises(IntegrityError, match="another model"):
        export(EXAMPLE, tmp_path / "no.gguf", imatrix=tmp_path / "bad.gguf")


def test_the_digests_are_of_the_stored_bytes(tmp_path: Path) -> None:
    import hashlib

    file = read_gguf(export(EXAMPLE, tmp_path / "d.gguf"))
    digests = file.metadata["llmx.tensor_digests"]
    assert isinstance(digests, list)
    for name, digest in zip(file.tensors, digests, strict=True):
        assert int.from_bytes(hashlib.sha256(file.bytes(name)).digest()[:8], "little") == digest


def _bits(tensors: Tensors, name: str, index: int, value: int) -> None:
    dtype, shape, data = tensors[name]
    bits = np.frombuffer(data, np.uint16).copy()
    bits[index] = value
    tensors[name] = (dtype, shape, bits.tobytes())


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "type_name", "error", "named"),
    [
        (lambda t: _bits(t, UP, 700, 0x7FC0), "Q4_K_M", IntegrityError, "layers.1.up.weight"),
        (lambda t: _bits(t, UP, 5, 0x7F80), "F32", IntegrityError, "layers.1.up.weight"),
        (lambda t: _bits(t, UP, 5, 0x4800), "F16", IntegrityError, "F16"),
        (lambda t: t.pop(UP), "Q4_K_M", IntegrityError, UP),
        (lambda t: t.update({"model.extra": t[UP]}), "Q4_K_M", IntegrityError, "model.extra"),
        (lambda t: t.update({UP: (t[UP][0], t[UP][1][::-1], t[UP][2])}), "Q4_K_M", IntegrityError, UP),
    ],
    ids=["nan", "infinity", "f16-overflow", "missing", "left-over", "shape"],
)
def test_broken_weights_are_refused_before_anything_is_written(
    copy: Path, tmp_path: Path, change: Callable[[Tensors], object], type_name: str, error: type[LlmxError], named: str
) -> None:
    damage(copy, change)
    with pytest.raises(error, match=named):
        export(copy, tmp_path / "out", type_name=type_name)
    assert nothing_left(tmp_path / "out")


def test_a_value_beyond_f16_is_no_offence_in_bfloat16(copy: Path, tmp_path: Path) -> None:
    damage(copy, lambda t: _bits(t, UP, 5, 0x4800))
    assert export(copy, tmp_path / "out", type_name="BF16").is_file()


def test_a_cut_shard_is_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        export(copy, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_an_unknown_architecture_is_unsupported(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba9"}))
    with pytest.raises(UnsupportedError, match="mamba9"):
        export(copy, tmp_path / "out")


def test_a_template_that_does_not_parse_is_refused_with_its_line(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content \n{% endfor %}")
    with pytest.raises(IntegrityError, match="template"):
        export(copy, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_an_existing_target_needs_force_and_stays_untouched(tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="--force"):
        export(EXAMPLE, target)
    assert target.read_bytes() == b"mine"
    assert export(EXAMPLE, target, force=True) == target
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_target_on_its_source_is_refused_even_with_force(copy: Path) -> None:
    link = copy / "weights.gguf"
    link.symlink_to(copy / "model.safetensors")
    before = (copy / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="source"):
        export(copy, link, force=True)
    assert (copy / "model.safetensors").read_bytes() == before


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmx.exporters import gguf

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_encode_rows", broken)
    with pytest.raises(LlmxError, match="disk is full") as raised:
        export(EXAMPLE, tmp_path / "out")
    assert raised.value.exit_code == 5
    assert nothing_left(tmp_path / "out")


def test_a_checkpoint_rewritten_during_the_run_is_noticed(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmx.exporters import gguf

    write = gguf.write

    def touched(*arguments: object) -> object:
        digests = write(*arguments)  # type: ignore[arg-type]
        (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes() + b" ")
        return digests

    monkeypatch.setattr(gguf, "write", touched)
    with pytest.raises(IntegrityError, match="changed"):
        export(copy, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_too_small_a_disk_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LlmxError, match="free") as raised:
        export(EXAMPLE, tmp_path / "out")
    assert raised.value.exit_code == 5


def test_a_tensor_may_get_a_type_of_its_own(tmp_path: Path) -> None:
    file = read_gguf(export(EXAMPLE, tmp_path / "t.gguf", tensor_types=["ffn_down=Q8_0"]))
    assert {t.type_name for n, t in file.tensors.items() if "ffn_down" in n} == {"Q8_0"}
    name = "blk.0.ffn_down.weight"
    rows = file.bytes(name).reshape(file.tensors[name].shape[0], -1)
    expected = open_model(EXAMPLE).weight("layers.0.down.weight").read()
    assert np.abs(decode("Q8_0", rows) - expected).max() < 0.01 * np.abs(expected).max()


def test_the_name_follows_the_fields_convention_and_the_model_card_travels(tmp_path: Path) -> None:
    model = Path(shutil.copytree(EXAMPLE, tmp_path / "Tiny-Qwen3-3M-Instruct-v1.2"))
    (model / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a, b]\nbase_model: Qwen/Qwen3-0.6B\n---\n")
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "eos_token_id": 2}))
    planned = api.plan(api.ExportRequest(str(model))).exporter.export
    assert planned.plan.files[0].name == "Tiny-Qwen3-3M-Instruct-v1.2-Q4_K_M.gguf"
    told = {key: value.value for key, value in planned.metadata.items()}
    assert told["general.finetune"] == "Instruct"
    assert told["general.license"] == "apache-2.0"
    assert told["general.tags"] == ("a", "b")
    assert told["general.base_model.0.repo_url"].endswith("/Qwen/Qwen3-0.6B")  # type: ignore[union-attr]
    assert told["general.sampling.temp"] == 0.7


def test_a_model_card_that_cannot_be_read_is_said_in_the_plan(copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: [apache: }\n---\n")
    notes = api.plan(api.ExportRequest(str(copy))).exporter.plan.notes
    assert any("README.md" in note for note in notes)
