"""Manifests and the commands that look at a finished artifact: verify, sign, diff, chat, and export --from-manifest."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Done
from jsonschema import Draft202012Validator

from llmx.exporters.manifest import json_schema
from llmx.validate.runtimes import find_runtime
from llmx.validate.sample_text import SAMPLE_TEXT

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tiny-qwen3"
ROUNDED = ("--method", "rtn", "--no-validate", "--threads", 1)
SPLIT = ("--split-max-size", "700KB", "--tensor-type", "attn_v=Q8_0")
SOLVED = ("--method", "gptq", "--effort", "fast", "--calibration-tokens", 2048, "--device", "cpu", "--no-validate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one.gguf and a set split-*.gguf, rounded, each with its manifest."""
    from llmx import api

    folder = tmp_path_factory.mktemp("made")
    common: dict[str, Any] = {"method": "rtn", "validate": False, "threads": 1}
    api.export(api.ExportRequest(str(EXAMPLE), bits=4, output=folder / "one.gguf", **common))
    split = {"split_max_size": SPLIT[1], "tensor_types": (SPLIT[3],)}
    api.export(api.ExportRequest(str(EXAMPLE), bits=4, output=folder / "split.gguf", **split, **common))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copied"))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("split-*.gguf"))
    assert len(found) > 2
    return found


def tensor_of(manifest: Path, name: str) -> dict[str, Any]:
    return next(tensor for tensor in json.loads(manifest.read_text())["tensors"] if tensor["name"] == name)


# The manifest.


def test_a_manifest_keeps_to_its_schema_and_holds_no_path(made: Path) -> None:
    Draft202012Validator.check_schema(json_schema())
    for name in ("one", "split"):
        text = (made / f"{name}.manifest.json").read_text()
        assert list(Draft202012Validator(json_schema()).iter_errors(json.loads(text))) == []
        assert str(EXAMPLE.parent) not in text and str(made) not in text


def test_the_manifest_is_listed_in_the_result(tmp_path: Path, here: Callable[..., Done]) -> None:
    done = here("export", EXAMPLE, *ROUNDED, "-o", tmp_path / "a.gguf", "--json")
    assert Path(done.told["manifest"]) == tmp_path / "a.manifest.json"
    assert (tmp_path / "a.manifest.json").is_file()


@pytest.mark.parametrize("options", [(*ROUNDED, *SPLIT), SOLVED], ids=["rounded", "solved"])
def test_an_artifact_is_rebuilt_from_its_manifest_byte_for_byte(
    options: tuple[object, ...], tmp_path: Path, here: Callable[..., Done]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT)
    given = ("--calibration", text) if options == SOLVED else ()
    first = here("export", EXAMPLE, *options, *given, "-o", tmp_path / "first", "--json")
    assert first.code == 0, first.stderr
    elsewhere = shutil.copytree(EXAMPLE, tmp_path / "called otherwise")
    again = ("--from-manifest", first.told["manifest"], "--no-validate", "-o", tmp_path / "again", "--json")
    second = here("export", elsewhere, *again, *given)
    assert second.code == 0, second.stderr
    for file in [*(file["name"] for file in first.told["files"]), Path(first.told["manifest"]).name]:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_a_rebuild_refuses_another_checkpoint_and_what_the_manifest_says(
    made: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    other = Path(shutil.copytree(EXAMPLE, tmp_path / "tiny-qwen3"))
    (other / "README.md").write_text("another model card")
    flip(other / "model.safetensors", 3_000_001)
    again = ("--from-manifest", made / "one.manifest.json", "--no-validate", "-o", tmp_path / "out")
    done = here("export", other, *again, "--json")
    assert done.code == 6, done.stderr
    assert done.told["error"]["problems"] == ["README.md is there now", "model.safetensors has other bytes"]
    said = here("export", EXAMPLE, *again, "--bits", 4, "--device", "cpu")
    assert said.code == 2 and "--bits" in said.stderr and "--device" in said.stderr
    nowhere = here("export", *again)
    assert nowhere.code == 2 and "tiny-qwen3" in nowhere.stderr
    text = here("export", EXAMPLE, *again, "--calibration", EXAMPLE / "config.json")
    assert text.code == 2 and "made without --calibration" in text.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_rebuild_that_gives_other_bytes_fails_and_leaves_nothing(
    made: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    told = json.loads((made / "one.manifest.json").read_text())
    told["files"][0]["sha256"] = "0" * 64
    told["tensors"][3]["sha256"] = "1" * 64
    told["libraries"]["numpy"] = "0.1"
    path = tmp_path / "changed.manifest.json"
    path.write_text(json.dumps(told))
    done = here("export", EXAMPLE, "--from-manifest", path, "--no-validate", "-o", tmp_path / "out", "--json")
    assert done.code == 4
    problems = done.told["error"]["problems"]
    assert problems[0] == f"{told['tensors'][3]['name']} has other bytes"
    assert len(problems) == 2 and "numpy was 0.1" in problems[1]
    assert not list((tmp_path / "out").glob("*"))


# verify.


def test_sound_artifacts_verify_by_any_of_their_files(made: Path, here: Callable[..., Done]) -> None:
    for path in (made / "one.gguf", made / "one.manifest.json", shards(made)[1], made / "split.manifest.json"):
        done = here("verify", path, "--json")
        assert done.code == 0, (path, done.stdout)
        assert done.told["passed"] is True and done.told["tensors"] > 40


def test_a_flipped_bit_names_its_tensor_and_a_changed_header_the_metadata(
    copied: Path, here: Callable[..., Done]
) -> None:
    place = tensor_of(copied / "one.manifest.json", "blk.1.attn_k.weight")
    flip(copied / "one.gguf", place["offset"] + place["bytes"] - 1)
    done = here("verify", copied / "one.gguf", "--json")
    assert done.code == 6
    [found] = done.told["differences"]
    assert (found["kind"], found["file"], found["tensor"]) == ("tensor", "one.gguf", "blk.1.attn_k.weight")
    flip(copied / "one.gguf", place["offset"] + place["bytes"] - 1)
    data = (copied / "one.gguf").read_bytes()
    (copied / "one.gguf").write_bytes(data.replace(b"tiny", b"tinY", 1))
    done = here("verify", copied / "one.gguf", "--json")
    assert done.code == 6 and [d["kind"] for d in done.told["differences"]] == ["rest"]


def test_a_longer_header_does_not_make_every_tensor_changed(
    made: Path, copied: Path, here: Callable[..., Done]
) -> None:
    from llmx.formats.gguf import TensorInfo, Value, layout, read_gguf

    file = read_gguf(made / "one.gguf")
    values = {k: Value(file.types[k], tuple(v) if isinstance(v, list) else v) for k, v in file.metadata.items()}
    values["general.description"] = Value("str", "somebody was here " * 20)
    placed = layout(values, [TensorInfo(t.name, t.type_name, t.shape) for t in file.tensors.values()])
    with (copied / "one.gguf").open("wb") as out:
        out.truncate(placed.size)
        out.write(placed.header)
        for name, place in placed.placements.items():
            out.seek(place.offset)
            out.write(file.bytes(name).data)
    done = here("verify", copied / "one.gguf", "--json")
    assert done.code == 6 and [d["kind"] for d in done.told["differences"]] == ["size", "rest"]


def test_exchanged_cut_renamed_and_missing_files_are_told_apart(copied: Path, here: Callable[..., Done]) -> None:
    _, one, two, *_ = shards(copied)
    for source, target in ((one, copied / "x"), (two, one), (copied / "x", two)):
        source.rename(target)
    kinds = [d["kind"] for d in here("verify", copied / "split.manifest.json", "--json").told["differences"]]
    assert kinds == ["exchanged", "exchanged"]
    for source, target in ((one, copied / "x"), (two, one), (copied / "x", two)):
        source.rename(target)
    one.write_bytes(one.read_bytes()[:-1000])
    cut = here("verify", copied / "split.manifest.json", "--json")
    assert cut.code == 6 and cut.told["differences"][0]["kind"] == "size"
    assert cut.told["differences"][-1]["kind"] == "tensor"
    one.unlink()
    two.rename(copied / "renamed.gguf")
    lost = here("verify", copied / "split.manifest.json")
    assert lost.code == 6 and f"{one.name}: is not there" in lost.stdout and "renamed.gguf" in lost.stdout
    (copied / "renamed.gguf").unlink()
    assert here("verify", copied / "split.manifest.json").code == 2


def test_a_single_file_may_be_called_otherwise_where_the_manifest_is_named(
    copied: Path, here: Callable[..., Done]
) -> None:
    (copied / "one.gguf").rename(copied / "mine.gguf")
    alone = here("verify", copied / "mine.gguf")
    assert alone.code == 2 and "--manifest" in alone.stderr
    assert here("verify", copied / "mine.gguf", "--manifest", copied / "one.manifest.json").code == 0
    other = here("verify", copied / "mine.gguf", "--manifest", copied / "split.manifest.json")
    assert other.code == 2 and "no file of this manifest" in other.stderr
    assert here("verify", copied / "missing.gguf").code == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "llmx.manifest/9"}, "no manifest"),
        ({"files": []}, "files"),
        ({"files": [{"name": "../one.gguf", "bytes": 1, "sha256": "0" * 64}]}, "plain name"),
        ({"recipe": 3, "importance": {}}, "importance"),
        ({"tensors": [{"name": "a", "file": "one.gguf", "offset": 9**15, "bytes": 1, "sha256": "0" * 64}]}, "behind"),
    ],
)
def test_a_broken_or_hostile_manifest_exits_6(
    change: dict[str, Any], words: str, copied: Path, here: Callable[..., Done]
) -> None:
    path = copied / "one.manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    done = here("verify", copied / "one.gguf")
    assert done.code == 6 and words in done.stderr


# Signatures.


def keys(folder: Path) -> tuple[Path, Path]:
    cryptography = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = cryptography.Encoding.PEM
    private = key.private_bytes(pem, cryptography.PrivateFormat.PKCS8, cryptography.NoEncryption())
    public = key.public_key().public_bytes(pem, cryptography.PublicFormat.SubjectPublicKeyInfo)
    folder.mkdir()
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pub").write_bytes(public)
    return folder / "key.pem", folder / "key.pub"


def test_a_signature_holds_until_the_manifest_or_the_key_is_another(copied: Path, here: Callable[..., Done]) -> None:
    pytest.importorskip("model_signing", reason="the extra `sign` is not installed")
    key, public = keys(copied / "keys")
    done = here("sign", copied / "one.gguf", "--key", key, "--json")
    assert done.code == 0, done.stderr
    assert Path(done.told["signature"]).name == "one.manifest.json.sig"
    assert here("sign", copied / "one.gguf", "--key", key).code == 2
    assert here("sign", copied / "one.gguf", "--key", key, "--force").code == 0
    checked = here("verify", copied / "one.gguf", "--public-key", public, "--json")
    assert checked.code == 0 and checked.told["signed"] is True
    _, stranger = keys(copied / "other keys")
    assert here("verify", copied / "one.gguf", "--public-key", stranger).code == 6
    assert here("sign", copied / "one.gguf", "--key", public, "-o", copied / "s.sig").code == 2
    text = (copied / "one.manifest.json").read_text()
    (copied / "one.manifest.json").write_text(text.replace('"Q4_K_M"', '"Q4_K_S"', 1))
    changed = here("verify", copied / "one.gguf", "--public-key", public)
    assert changed.code == 6 and "signature does not hold" in changed.stderr
    (copied / "broken.sig").write_text("{")
    broken = here("verify", copied / "one.gguf", "--public-key", public, "--signature", copied / "broken.sig")
    assert broken.code == 6


def test_without_the_signing_package_both_commands_exit_7(
    copied: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("model_signing", "model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, module, None)
    (copied / "key").write_text("a key")
    (copied / "one.manifest.json.sig").write_text("{}")
    for command in (["sign", "--key"], ["verify", "--public-key"]):
        done = here(command[0], copied / "one.gguf", command[1], copied / "key", *["--force"] * (command[0] == "sign"))
        assert done.code == 7 and "llmx[sign]" in done.stderr


# diff.


def test_equal_files_do_not_differ_however_they_are_split(
    made: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    whole = tmp_path / "whole.gguf"
    here("export", EXAMPLE, "--bits", 4, *ROUNDED, *SPLIT[2:], "-o", whole)
    done = here("diff", shards(made)[0], whole, "--json")
    assert done.code == 0, done.stdout
    assert done.told["equal"] is True and all(t["same_bytes"] for t in done.told["tensors"])


def test_a_diff_tells_of_metadata_tokens_template_and_tensors(
    made: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    other = Path(shutil.copytree(EXAMPLE, tmp_path / "tiny-qwen3"))
    config = json.loads((other / "config.json").read_text())
    config["rms_norm_eps"] = 2e-6
    (other / "config.json").write_text(json.dumps(config))
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages[0].content }}\n x"}))
    here("export", other, "--bits", 4, *ROUNDED, "--tensor-type", "blk.1.ffn_up=Q8_0", "-o", tmp_path / "b.gguf")
    done = here("diff", made / "one.gguf", tmp_path / "b.gguf", "--json")
    assert done.code == 1
    keys = {change["key"] for change in done.told["metadata"]}
    assert "qwen3.attention.layer_norm_rms_epsilon" in keys
    assert {change["key"] for change in done.told["tokenizer"]} == {"tokenizer.chat_template"}
    differing = [tensor for tensor in done.told["tensors"] if tensor["same_bytes"] is not True]
    assert [tensor["name"] for tensor in differing] == ["blk.1.ffn_up.weight"]
    assert 0.02 < differing[0]["relative_rms"] < 0.15
    words = here("diff", made / "one.gguf", tmp_path / "b.gguf").stdout
    assert "Q4_K -> Q8_0" in words and "tokenizer.chat_template" in words


def test_a_file_is_compared_with_its_checkpoint(tmp_path: Path, here: Callable[..., Done]) -> None:
    here("export", EXAMPLE, "--type", "BF16", "--no-validate", "-o", tmp_path / "a.gguf")
    done = here("diff", EXAMPLE, tmp_path / "a.gguf", "--json")
    assert done.code == 0, done.stdout
    assert here("diff", EXAMPLE / "config.json", tmp_path / "a.gguf").code == 6


# chat.


@pytest.fixture
def runtime() -> None:
    if (reason := find_runtime("llama.cpp").unavailable()) is not None:
        pytest.skip(f"llama.cpp is not here: {reason}")


CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with a chat template."""
    from llmx import api

    folder = tmp_path_factory.mktemp("talker")
    model = Path(shutil.copytree(EXAMPLE, folder / "model"))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHATML}))
    target = folder / "talker.gguf"
    api.export(api.ExportRequest(str(model), type_name="Q8_0", method="rtn", output=target, validate=False))
    return target


def test_a_chat_has_turns_through_the_template_and_greedy_ones_repeat(
    talker: Path, runtime: None, here: Callable[..., Done]
) -> None:
    options = ("--system", "Be brief.", "--message", "Once upon", "--message", "And then?", "--max-tokens", 12)
    first = here("chat", talker, *options, "--threads", 1, "--json")
    assert first.code == 0, first.stderr
    turns = first.told["turns"]
    assert [turn["message"] for turn in turns] == ["Once upon", "And then?"]
    assert turns[1]["prompt_tokens"] > turns[0]["prompt_tokens"] + turns[0]["tokens"]
    assert all(turn["tokens"] <= 12 and turn["tokens_per_second"] for turn in turns)
    again = here("chat", talker, *options, "--threads", 1)
    assert again.stdout == "".join(f"{turn['answer']}\n" for turn in turns)
    assert "tokens/s" in again.stderr


def test_the_answer_is_what_the_runtime_generates_greedily(talker: Path, runtime: None) -> None:
    from llmx import api

    with find_runtime("llama.cpp").open(talker, threads=1, context=256) as session:
        text = session.render([{"role": "user", "content": "Lily saw a dog."}])
        assert text is not None
        ids = session.generate(session.tokenize(text), 16)
        ends = session.special()["end_of_generation"]
        expected = b"".join(session.piece(token) for token in ids if token not in ends)  # type: ignore[operator]
    shown: list[str] = []
    with api.Chat(api.ChatRequest(talker, max_tokens=16, threads=1)) as chat:
        turn = chat.say("Lily saw a dog.", shown.append)
    assert turn.answer == "".join(shown) == expected.decode(errors="replace")


def test_an_answer_ends_at_every_end_of_generation_token(talker: Path, runtime: None) -> None:
    from llmx import api

    with api.Chat(api.ChatRequest(talker, max_tokens=16, threads=1)) as chat:
        first = chat._choose(chat._after(chat._prompt("Lily saw a dog.")))
        chat._messages.clear()
        chat._ends = frozenset({first})
        turn = chat.say("Lily saw a dog.")
    assert (turn.answer, turn.tokens, turn.stopped) == ("", 1, "ended by itself")


def test_draws_follow_the_seed(talker: Path, runtime: None, here: Callable[..., Done]) -> None:
    options = ("--message", "Once", "--max-tokens", 16, "--temperature", 1.5, "--threads", 1)
    answers = [here("chat", talker, *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_an_interrupt_ends_the_conversation_with_one_line(talker: Path, runtime: None) -> None:
    command = [sys.executable, "-m", "llmx.cli", "chat", str(talker), "--max-tokens", "2", "--threads", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write("Once\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        said = process.stderr.read()
    assert "interrupted" in said and "Traceback" not in said


def test_messages_are_read_from_a_pipe_and_raw_text_needs_no_template(
    made: Path, runtime: None, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = here("chat", made / "one.gguf", "--message", "Hello")
    assert refused.code == 3 and "--raw" in refused.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n\nThe end"))
    done = here("chat", made / "one.gguf", "--raw", "--max-tokens", 4, "--threads", 1, "--json")
    assert done.code == 0, done.stderr
    assert [turn["message"] for turn in done.told["turns"]] == ["Once upon a time", "The end"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "-1"), "0 or more"),
        (("--max-tokens", "0"), "at least 1"),
        (("--seed", "-1"), "negative"),
        (("--raw", "--system", "x"), "no template"),
        (("--threads", "-1"), "negative"),
    ],
)
def test_what_cannot_be_said_exits_2(
    arguments: tuple[str, ...], words: str, made: Path, here: Callable[..., Done]
) -> None:
    done = here("chat", made / "one.gguf", "--message", "x", *arguments)
    assert done.code == 2 and words in done.stderr


def test_a_conversation_that_fills_the_context_says_so(talker: Path, runtime: None, here: Callable[..., Done]) -> None:
    done = here("chat", talker, "--message", "Once upon a time. " * 2000, "--threads", 1)
    assert done.code == 2 and "begin a new one" in done.stderr
