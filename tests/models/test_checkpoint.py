"""Opening a checkpoint: folders and hub ids, shards and their index, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmx.errors import IntegrityError, LlmxError, ResourceError, UnsupportedError, UsageError
from llmx.formats.safetensors import write_safetensors
from llmx.models.checkpoint import open_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def _shard(path: Path, *names: str) -> None:
    write_safetensors(path, [(name, "F32", (2, 2), [np.full(4, ord(name[0]), np.float32).tobytes()]) for name in names])


def _index(folder: Path, **weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _shard(tmp_path / SHARDS[0], "a", "b")
    _shard(tmp_path / SHARDS[1], "c")
    _index(tmp_path, a=SHARDS[0], b=SHARDS[0], c=SHARDS[1])
    return tmp_path


def test_tensors_of_all_shards_are_found_and_read(sharded: Path) -> None:
    (sharded / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(sharded)
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.tensors["c"].dtype == "F32" and checkpoint.tensors["c"].shape == (2, 2)
    assert checkpoint.bytes("c", 0, 4).view(np.float32).tolist() == [float(ord("c"))]
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.generation_config["eos_token_id"] == [1, 2]
    assert [path.name for path in checkpoint.files] == list(SHARDS)
    assert checkpoint.nbytes == 48
    assert checkpoint.source.id == str(sharded) and checkpoint.source.revision is None
    checkpoint.release("c")
    checkpoint.check_unchanged()


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    _shard(tmp_path / "model.safetensors", "a")
    _index(tmp_path, z="stale.safetensors")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["a"]


def test_a_changed_shard_is_noticed_by_name(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    _shard(sharded / SHARDS[1], "c", "d")
    with pytest.raises(IntegrityError, match=SHARDS[1]) as caught:
        checkpoint.check_unchanged()
    assert caught.value.problems == (SHARDS[1],)


def _break_everything(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    data = (folder / SHARDS[0]).read_bytes()
    (folder / SHARDS[0]).write_bytes(data[:-4])


def _name_absent_tensors(folder: Path) -> None:
    _index(folder, a=SHARDS[0], b=SHARDS[0], c=SHARDS[1], x=SHARDS[0], y=SHARDS[1])


def _store_twice(folder: Path) -> None:
    _shard(folder / SHARDS[1], "c", "a")


BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a missing shard and a cut one": (
        _break_everything,
        [f"{SHARDS[1]} is missing", f"{SHARDS[0]}: 'b' ends at byte", "the file is cut"],
    ),
    "tensors that their shard lacks": (_name_absent_tensors, [f"x is not in {SHARDS[0]}", f"y is not in {SHARDS[1]}"]),
    "a tensor in two shards": (_store_twice, [f"a is stored in {SHARDS[0]} and again in {SHARDS[1]}"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_shards_that_do_not_match_their_index_are_all_named(name: str, sharded: Path) -> None:
    spoil, messages = BROKEN[name]
    spoil(sharded)
    with pytest.raises(IntegrityError) as caught:
        open_checkpoint(sharded)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        "",
        5,
        "a\0.safetensors",
    ],
)
def test_an_index_that_names_other_places_is_refused(shard: object, sharded: Path) -> None:
    _index(sharded, a=SHARDS[0], b=shard)
    with pytest.raises(IntegrityError, match="plain names of shards"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[", '{"weight_map": {"a": 1, "a": 2}}']
)
def test_a_broken_index_is_refused(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(IntegrityError):
        open_checkpoint(sharded)


def test_shards_without_an_index_are_refused_by_name(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(IntegrityError, match=SHARDS[0]):
        open_checkpoint(sharded)


def _touch(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).write_text("{}") for name in names] and None


FOLDERS: dict[str, tuple[Callable[[Path], None], type[LlmxError], str]] = {
    "an empty folder": (_touch(), UsageError, "no config.json"),
    "pickle files only": (_touch("config.json", "pytorch_model.bin"), IntegrityError, "can run any code"),
    "an old .pt file": (_touch("config.json", "weights.pt"), IntegrityError, "save_pretrained"),
    "an adapter": (_touch("adapter_config.json", "adapter_model.safetensors"), UnsupportedError, "Merge it"),
    "no weights": (_touch("config.json"), UnsupportedError, "no \\*.safetensors"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_a_usable_checkpoint_is_refused_with_a_fix(name: str, tmp_path: Path) -> None:
    fill, error, message = FOLDERS[name]
    fill(tmp_path)
    with pytest.raises(error, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.fix is not None


def test_a_broken_config_is_refused(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(IntegrityError, match="given twice"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("model", ["./absent", "/absent/folder", "a/b/c", "~absent/x", "", "owner/na me"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        open_checkpoint(model)


def test_a_file_is_no_model(sharded: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        open_checkpoint(sharded / "config.json")


def test_a_revision_of_a_local_folder_is_refused(sharded: Path) -> None:
    with pytest.raises(UsageError, match="revision"):
        open_checkpoint(sharded, revision="main")


def test_a_hub_id_is_downloaded_without_pickles_and_code(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(model: str, **options: object) -> str:
        asked.update(model=model, **options)
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = open_checkpoint("owner/name", revision="v1")
    assert asked["model"] == "owner/name" and asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    assert checkpoint.source.id == "owner/name" and checkpoint.source.revision == sharded.name


def test_a_hub_id_that_cannot_be_reached_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ResourceError, match="local cache") as caught:
        open_checkpoint("owner/name", revision="v1")
    assert caught.value.where == "owner/name at v1"


def test_a_hub_id_in_the_local_cache_opens_offline(
    sharded: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    cache, commit = tmp_path_factory.mktemp("cache"), "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(sharded, target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    checkpoint = open_checkpoint("owner/name")
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert checkpoint.source.revision == commit
