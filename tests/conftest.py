"""Small tokenizers of every kind, trained here on a small text."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import Done

# Before numpy and torch are imported: threads of theirs that spin beside other tests' take longer than one alone.
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

from llmx import cli  # noqa: E402
from llmx.models.pretokenizers import QWEN2  # noqa: E402
from llmx.validate.corpus import CORPUS  # noqa: E402
from llmx.validate.report import Report, json_schema  # noqa: E402

STORY = """Once upon a time there was a little girl named Lily. She loved to play outside in the big garden.
One day, she saw a red ball and said: "I want to play with it!" Her mom smiled and said that she could.
They don't know what's in the box, but they'll open it together at 10:30 on 12 May 1984.
Größe, naïve café, 我想在这里工作, съешь же ещё этих мягких булок, 🦙🚀."""
TEXTS = [*STORY.split("\n"), *STORY.split(". "), *(text for text in CORPUS if text.strip())]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_bpe() -> dict[str, Any]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(QWEN2 + r"|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool>"])
    return json.loads(tokenizer.to_str())


def _sentencepiece(kind: str) -> bytes:
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(TEXTS),
        model_writer=writer,
        vocab_size=700,
        model_type=kind,
        byte_fallback=kind == "bpe",
        hard_vocab_limit=False,
        character_coverage=0.98,
        normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
        remove_extra_whitespaces=kind != "bpe",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        num_threads=1,
    )
    return writer.getvalue()


def _spaces(*before: dict[str, Any]) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {"type": "Sequence", "normalizers": [*before, replace]}


def _template(before: str | None, after: str | None, ids: dict[str, int]) -> dict[str, Any]:
    named = [{"SpecialToken": {"id": name, "type_id": 0}} if name else None for name in (before, after)]
    parts = [part for part in (named[0], {"Sequence": {"id": "A", "type_id": 0}}, named[1]) if part]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (before, after) if name}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts * 2, "special_tokens": special}


def _pieces(data: bytes) -> tuple[Any, list[str]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    return processor, [processor.id_to_piece(id) for id in range(processor.get_piece_size())]


def _added(id: int, content: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": special, **flags}


def _spm_bpe() -> dict[str, Any]:
    """The SentencePiece model as Hugging Face converts it: every pair of pieces that joins to a piece is a merge."""
    processor, pieces = _pieces(_sentencepiece("bpe"))
    ids = {piece: id for id, piece in enumerate(pieces)}
    normal = [id for id in range(len(pieces)) if not processor.is_byte(id) and id > 3]
    normal.sort(key=lambda id: -processor.get_score(id))
    pairs = [
        (pieces[id][:cut], pieces[id][cut:])
        for id in normal
        for cut in range(1, len(pieces[id]))
        if pieces[id][:cut] in ids and pieces[id][cut:] in ids
    ]
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, "vocab": ids}
    names = ((0, "<unk>", True), (1, "<s>", True), (2, "</s>", True), (3, "<tool>", False))
    return {
        "version": "1.0",
        "added_tokens": [_added(*name) for name in names],
        "normalizer": _spaces({"type": "Prepend", "prepend": "▁"}),
        "pre_tokenizer": None,
        "post_processor": _template("<s>", None, ids),
        "model": {**model, "merges": [list(pair) for pair in pairs]},
    }


def _unigram() -> dict[str, Any]:
    from llmx.models.sentencepiece_model import read_model

    data = _sentencepiece("unigram")
    processor, pieces = _pieces(data)
    charsmap = read_model(data, "test").charsmap or b""
    scores = [[piece, 0.0 if id < 4 else processor.get_score(id)] for id, piece in enumerate(pieces)]
    joined = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    mapped = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    cut = {"type": "Strip", "strip_left": False, "strip_right": True}
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    names = ((0, "<unk>", True), (1, "<s>", True), (2, "</s>", True), (3, "<tool>", False))
    return {
        "version": "1.0",
        "added_tokens": [_added(*name) for name in names],
        "normalizer": {"type": "Sequence", "normalizers": [mapped, cut, joined]},
        "pre_tokenizer": spaces,
        "post_processor": _template(None, "</s>", {"</s>": 2}),
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": scores},
    }


CHATML = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": TEMPLATE}
USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
KINDS: dict[str, tuple[str, Callable[[], dict[str, Any] | bytes], dict[str, Any]]] = {
    "byte_bpe": ("tokenizer.json", _byte_bpe, CHATML),
    "spm_bpe": ("tokenizer.json", _spm_bpe, USUAL),
    "unigram": ("tokenizer.json", _unigram, USUAL),
    "sentencepiece_bpe": ("tokenizer.model", lambda: _sentencepiece("bpe"), USUAL),
    "sentencepiece_unigram": ("tokenizer.model", lambda: _sentencepiece("unigram"), USUAL),
}


@pytest.fixture(scope="session")
def tokenizer_files() -> Callable[[str], dict[str, Any]]:
    """tokenizer_files(kind): file name -> JSON object or bytes, trained once."""
    made: dict[str, str | bytes] = {}

    def run(kind: str) -> dict[str, Any]:
        name, build, config = KINDS[kind]
        if kind not in made:
            content = build()
            made[kind] = content if isinstance(content, bytes) else json.dumps(content)
        content = made[kind]
        return {
            name: content if isinstance(content, bytes) else json.loads(content),
            "tokenizer_config.json": dict(config),
        }

    return run


@pytest.fixture
def tokenizer_folder(tmp_path: Path, tokenizer_files: Callable[[str], dict[str, Any]]) -> Callable[..., Path]:
    """tokenizer_folder(kind, **{file name: changed content}): a folder with the files, and others added or changed."""

    def run(kind: str, **files: Any) -> Path:
        for name, content in {**tokenizer_files(kind), **files}.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / name).write_bytes(data)
        return tmp_path

    return run


@pytest.fixture(scope="session", autouse=True)
def every_report_of_a_validation_keeps_to_the_schema(request: pytest.FixtureRequest) -> Iterator[None]:
    """A key that the schema does not describe fails the test that made it. Reports without settings are made up."""
    if request.config.getoption("markexpr") == "gpu" and find_spec("jsonschema") is None:
        yield  # a machine with a GPU has what was carried to it; everywhere else the reports are checked
        return
    from jsonschema import Draft202012Validator

    checker, make = Draft202012Validator(json_schema()), Report.__init__

    def checked(self: Report, *values: Any, **named: Any) -> None:
        make(self, *values, **named)
        if "settings" in self.facts:
            checker.validate(self.to_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "__init__", checked)
        yield


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """here(arguments): the command run in this process, which has imported everything already."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["llmx", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code
        shown = capsys.readouterr()
        assert code is None or isinstance(code, int)
        return Done(code or 0, shown.out, shown.err)

    yield run
    signal.signal(signal.SIGTERM, handler)
