"""Code that a checkpoint brings along is never run. What is a user's own, or only unknown, exits with 2 or 3."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Done
from hostile_artifacts import recipe
from hostile_case import Command, Content, example, inspected, planned, with_values
from hostile_checkpoints import Payload, archive, tokenizer
from hostile_gguf import build, info

from llmx.validate.runtimes import find_runtime

CODE = "from pathlib import Path\nPath({canary!r}).touch()\nclass X:\n    pass\n"
NAMES = ("configuration_x", "modeling_x", "tokenization_x", "sitecustomize", "jinja2", "custom_generate/generate")
CLASSES = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{{ cycler.__init__.__globals__.os.popen('touch ' ~ canary) }}"
    "{{ lipsum.__globals__['os'].system('touch ' ~ canary) }}"
)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def brought(folder: Path, canary: Path, template: str) -> Path:
    """The example with code of every kind that some loader would run."""
    folder.mkdir()
    told: dict[str, Content] = {
        "config.json": with_values(auto_map=CLASSES),
        "tokenizer_config.json": with_values(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}),
        "generation_config.json": with_values(custom_generate="custom_generate/generate.py"),
        "chat_template.jinja": template.replace("canary", repr(str(canary))),
    }
    (folder / "custom_generate").mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(CODE.format(canary=str(canary)))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    return example(folder, told)


def test_the_canary_is_written_by_whoever_runs_the_code(canary: Path, tmp_path: Path) -> None:
    folder = brought(tmp_path / "model", canary, TEMPLATE)
    for name in NAMES:
        subprocess.run([sys.executable, folder / f"{name}.py"], check=True)
        canary.unlink()
    pickle.loads((folder / "training_args.bin").read_bytes())
    assert canary.exists()


def test_an_export_and_its_validation_run_no_code_of_the_checkpoint(
    canary: Path, tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = brought(tmp_path / "model", canary, "{% for m in messages %}{{ m.content }}{% endfor %}")
    monkeypatch.chdir(folder)  # where a program that looks in the current folder would find jinja2.py
    validated = find_runtime("llama.cpp").unavailable() is None
    runs = ("--validate", "--positions", 64) if validated else ("--no-validate",)
    done = here("export", ".", "--bits", 8, "--method", "rtn", *runs, "--threads", 1, "-o", tmp_path / "out")
    assert done.code == 0, done.stderr
    assert here("diff", folder, *(tmp_path / "out").glob("*.gguf")).code == 1
    assert not canary.exists()


def test_a_template_that_reaches_out_is_refused_and_reaches_nothing(
    canary: Path, tmp_path: Path, here: Callable[..., Done]
) -> None:
    folder = brought(tmp_path / "model", canary, TEMPLATE)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    done = here("calibrate", folder, "--calibration", chats, "-o", tmp_path / "imatrix.gguf")
    assert done.code == 6 and "chat template" in done.stderr, done.stderr
    assert not canary.exists()


def model_of(name: str, data: bytes) -> Callable[[Path], Command]:
    def make(folder: Path) -> Command:
        (folder / name).write_bytes(data)
        return "plan", folder / name

    return make


CATASTROPHE = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
USAGE, UNSUPPORTED = 2, 3
BY_DESIGN: dict[str, tuple[Callable[[Path], Command], int, str]] = {
    "a recipe with a word that is none": (recipe("kind: Q4_K_M\n"), USAGE, "kind"),
    "a checkpoint in an archive": (model_of("model.zip", archive("zip")), USAGE, "MODEL is a file"),
    "a pickle as a model": (model_of("model.bin", pickle.dumps(1)), USAGE, "MODEL is a file"),
    "an architecture that only its own code knows": (
        planned(config__json=with_values(model_type="x", auto_map=CLASSES)),
        UNSUPPORTED,
        "The architecture 'x' is not supported",
    ),
    "a key that may change the result": (
        planned(config__json=with_values(evil=1)),
        UNSUPPORTED,
        "evil: 1 is a key llmx does not know",
    ),
    "a pattern that never ends": (
        tokenizer(lambda told: told.update(pre_tokenizer=CATASTROPHE)),
        UNSUPPORTED,
        "rules that are not known",
    ),
    "a tensor type that is not known": (
        inspected("model.gguf", build((), (info(kind=4000),))),
        UNSUPPORTED,
        "ggml type 4000 is not known",
    ),
}


@pytest.mark.parametrize("name", BY_DESIGN)
def test_what_is_the_users_own_or_only_unknown_exits_with_2_or_3(
    name: str, tmp_path: Path, here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, code, says = BY_DESIGN[name]
    monkeypatch.chdir(tmp_path)
    done = here(*make(tmp_path))
    assert done.code == code and says in done.stderr, done.stderr
    assert not (tmp_path / "canary").exists()
