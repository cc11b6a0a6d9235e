"""The tokenizer files that a GGUF vocabulary stands for: gguf_vocab.py read backwards.

tokenizer.json is made of rules that do what llama.cpp does with the vocabulary; tokenizer_config.json has roles and
templates, generation_config.json the ids that end a text.

Source: llama.cpp b11549, src/llama-vocab.cpp, also for what a missing key means.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError
from llmx.exporters.gguf_vocab import ENDS_BY_TEXT, LOWEST_SCORE, MODELS, NO_END_BESIDE, ROLE_KEYS
from llmx.formats.gguf import GgufFile
from llmx.models.pretokenizers import DIGIT, DIGITS, GPT2, KEEPS_SPACES, RULES, Pre
from llmx.models.vocabulary import CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# Names of pre-tokenizers that split, and take whole words, as the one that stands for them in RULES.
SAME_RULES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), "qwen2"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais"), "gpt-2"),
    **dict.fromkeys(("command-r", "refact", "codeshell"), "starcoder"),
    "smaug-bpe": "dbrx",
}
ADDS_BOS = ("llama-bpe", "tekken")  # where the file does not say
# Ids of a SentencePiece vocabulary whose file names none.
USUAL_IDS = {"bos": 1, "eos": 2, "unk": 0}

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Words:
    """A file's vocabulary, its parts of one length. Index = id."""

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    keys: Mapping[str, Any]

    def told(self, key: str, default: Any = None) -> Any:
        return self.keys.get(PREFIX + key, default)

    @property
    def roles(self) -> dict[str, int]:
        """Special tokens by role: bos, eos, unk, pad, sep, mask."""
        usual = USUAL_IDS if self.kind == "spm_bpe" else {}
        found = {role: self.told(key, usual.get(role)) for role, key in ROLE_KEYS.items()}
        return {role: id for role, id in found.items() if id is not None}

    @property
    def pre(self) -> str:
        """The pre-tokenizer's name in RULES."""
        name = str(self.told("pre", "default"))
        return SAME_RULES.get(name, name)

    @property
    def adds(self) -> tuple[int | None, int | None]:
        """What is put before and after a text."""
        usual = (self.kind == "spm_bpe" or (self.kind == "byte_bpe" and self.pre in ADDS_BOS), self.kind == "unigram")
        wants = (self.told("add_bos_token", usual[0]), self.told("add_eos_token", usual[1]))
        before, after = (
            self.roles.get(role) if want else None for role, want in zip(("bos", "eos"), wants, strict=True)
        )
        return before, after


def tokenizer_files(file: GgufFile) -> dict[str, Document]:
    """tokenizer.json, tokenizer_config.json and generation_config.json by their names.

    Raises: UnsupportedError for a vocabulary or a pre-tokenizer that is not known; IntegrityError for one that
    contradicts itself.
    """
    words = _words(file)
    special = {f"{role}_token": words.tokens[id] for role, id in words.roles.items()}
    templates = {key.removeprefix(TEMPLATE): text for key, text in words.keys.items() if key.startswith(TEMPLATE)}
    named = [{"name": name[1:] or "default", "template": text} for name, text in templates.items() if name != "s"]
    listed: Any = named[0]["template"] if [entry["name"] for entry in named] == ["default"] else named
    ids = {f"{role}_token_id": id for role, id in words.roles.items() if role in ("bos", "pad")}
    return {
        "tokenizer.json": KINDS[words.kind](words),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": words.pre not in KEEPS_SPACES.values(),
            "add_bos_token": words.adds[0] is not None,
            "add_eos_token": words.adds[1] is not None,
            **special,
            **({"chat_template": listed} if named else {}),
        },
        "generation_config.json": {"eos_token_id": ending(words)} | ids,
    }


def ending(words: Words) -> list[int]:
    """Every id that ends generation in llama.cpp: the named ones, then those that it knows by their text."""
    names = frozenset(words.tokens)
    silenced = {name for beside, name in NO_END_BESIDE if beside <= names}
    told = [words.roles.get("eos"), words.told("eot_token_id"), words.told("eom_token_id")]
    by_text = [id for id, token in enumerate(words.tokens) if token in ENDS_BY_TEXT and token not in silenced]
    return list(dict.fromkeys(id for id in (*told, *by_text) if id is not None))


def _words(file: GgufFile) -> Words:
    keys, where = file.metadata, file.paths[0]
    kinds = {name: kind for kind, name in MODELS.items()}
    model = keys.get(f"{PREFIX}model")
    if model not in kinds:
        what = f"a vocabulary of the kind {model!r} cannot be read back"
        raise UnsupportedError(what, where=where, fix=f"known kinds: {', '.join(kinds)}")
    tokens = _list(keys, "tokens")
    words = Words(
        kinds[str(model)],
        tokens,
        _list(keys, "token_type") or [NORMAL] * len(tokens),
        _list(keys, "scores") or [0.0] * len(tokens),
        keys,
    )
    problems = []
    if len(set(tokens)) != len(tokens) or not tokens:
        problems.append(f"of {len(tokens)} tokens, {len(set(tokens))} are different")
    problems += [
        f"{len(part)} of {len(tokens)} tokens have a type or a score"
        for part in (words.types, words.scores)
        if len(part) != len(tokens)
    ]
    ids = {**words.roles, "eot": words.told("eot_token_id"), "eom": words.told("eom_token_id")}
    problems += [
        f"{role}: id {id!r} is none of a token"
        for role, id in ids.items()
        if id is not None and not (isinstance(id, int) and 0 <= id < len(tokens))
    ]
    if problems:
        raise IntegrityError("the vocabulary contradicts itself", where=where, problems=problems)
    return words


def _list(keys: Mapping[str, Any], key: str) -> list[Any]:
    value = keys.get(PREFIX + key)
    return value if isinstance(value, list) else []


def _document(words: Words, model: Document, **rules: Document | None) -> Document:
    """tokenizer.json with the added tokens and what is put around a text."""
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": id, "content": token, "special": kinds[kind], **flags}
        for id, (token, kind) in enumerate(zip(words.tokens, words.types, strict=True))
        if kind in kinds
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _around(words),
        **rules,
        "model": model,
    }


def _around(words: Words) -> Document | None:
    """The post-processor that puts the beginning and the end token around a text."""
    if words.adds == (None, None):
        return None
    before, after = ([] if id is None else [words.tokens[id]] for id in words.adds)

    def parts(name: str, number: int) -> list[Document]:
        def special(token: str) -> Document:
            return {"SpecialToken": {"id": token, "type_id": number}}

        return [*map(special, before), {"Sequence": {"id": name, "type_id": number}}, *map(special, after)]

    ids = {words.tokens[id]: id for id in words.adds if id is not None}
    return {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": [*parts("A", 0), *parts("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in ids.items()},
    }


def _used(words: Words) -> dict[str, int]:
    """Token -> id of all that a text can become; rows of padding are none."""
    return {token: id for id, token in enumerate(words.tokens) if words.types[id] != UNUSED}


def _byte_bpe(words: Words) -> Document:
    steps, pre = _rule(words)
    merges = [merge.split(" ") for merge in _list(words.keys, "merges")]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise IntegrityError("a merge joins two tokens", problems=[" ".join(merge) for merge in wrong[:20]])
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.ignores_merges,
        "vocab": _used(words),
        "merges": merges,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return _document(words, model, pre_tokenizer=_splitting(steps), decoder=decoder)


def _rule(words: Words) -> tuple[tuple[str, ...], Pre]:
    """The steps of the pre-tokenizer with this name, and its record."""
    spellings = {kept: name for name, kept in KEEPS_SPACES.items()}
    name = spellings.get(words.pre, words.pre)
    found = next(((steps, pre) for steps, pres in RULES.items() for pre in pres if pre.name == name), None)
    if found is None:
        known = sorted({pre.name for pres in RULES.values() for pre in pres} | set(SAME_RULES) | set(spellings))
        raise UnsupportedError(
            f"the pre-tokenizer {name!r} of this vocabulary is not known", fix=f"known: {', '.join(known)}"
        )
    return found


def _splitting(steps: Sequence[str]) -> Document:
    """The pre-tokenizer of these steps; the last one but for GPT-2's own splits nothing and spells bytes."""
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    known: dict[str, Document] = {
        GPT2: {**bytes_only, "use_regex": True},
        DIGIT: {"type": "Digits", "individual_digits": True},
        DIGITS: {"type": "Digits", "individual_digits": False},
        "punctuation contiguous": {"type": "Punctuation", "behavior": "Contiguous"},
    }
    split = [
        known.get(step) or {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in steps
    ]
    return {"type": "Sequence", "pretokenizers": [*split, *([] if GPT2 in steps else [bytes_only])]}


def _spaces(words: Words) -> tuple[Document, Document]:
    """The normalizer and the decoder of a SentencePiece vocabulary that merges."""
    prefix = bool(words.told("add_space_prefix", True))
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
    return {"type": "Sequence", "normalizers": [*before, escape]}, {"type": "Sequence", "decoders": decoders}


def _spm_bpe(words: Words) -> Document:
    """Merges by rank do what llama.cpp does by score: of two neighbours that join to a piece, the best piece first."""
    normal = {
        token: words.scores[id]
        for id, token in enumerate(words.tokens)
        if words.types[id] == NORMAL and words.scores[id] > LOWEST_SCORE
    }
    vocab = _used(words)
    pieces = sorted(normal, key=lambda token: (-normal[token], vocab[token]))
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    unknown = words.roles.get("unk")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else words.tokens[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    normalizer, decoder = _spaces(words)
    return _document(words, model, normalizer=normalizer, decoder=decoder)


def _unigram(words: Words) -> Document:
    mapped = _list(words.keys, "precompiled_charsmap")
    steps: list[Document] = []
    if mapped:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(mapped)).decode()})
    if words.told("remove_extra_whitespaces", False):
        steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if words.told("add_space_prefix", True) else "never"
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    pairs = [[token, score] for token, score in zip(words.tokens, words.scores, strict=True)]
    model = {"type": "Unigram", "unk_id": words.roles.get("unk"), "byte_fallback": False, "vocab": pairs}
    normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
    return _document(words, model, normalizer=normalizer, pre_tokenizer=spaces, decoder=spaces)


KINDS: Mapping[str, Callable[[Words], Document]] = {"byte_bpe": _byte_bpe, "spm_bpe": _spm_bpe, "unigram": _unigram}
