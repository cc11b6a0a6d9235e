"""A folder's tokenizer as one neutral record: pieces, rules, special tokens, chat templates, and a reference encoder.

tokenizer.json decides where it stands, because it is what Hugging Face runs; tokenizer.model serves where it does not.
    tokenizer.json | tokenizer.model     pieces, merges or scores, rules, added tokens
    tokenizer_config.json                roles (bos, eos, pad, ...), whether they are added, the chat template
    special_tokens_map.json              roles that tokenizer_config.json does not name
    added_tokens.json                    tokens that a tokenizer.model does not hold
    generation_config.json, config.json  ids that end generation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.json_text import parse_object, read_object
from llmx.models import chat_template
from llmx.models.encoding import JsonEncoder, PieceEncoder
from llmx.models.sentencepiece_model import read_model
from llmx.models.tokenizer_json import read_vocabulary
from llmx.models.vocabulary import AddedToken, Encoder, Kind, Vocabulary, added_token

FILE_BYTES = 128 << 20  # four times the largest tokenizer.json known
SIGNS = 1 << 23  # of JSON; a vocabulary of 262,144 with its merges has about 2,100,000
ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
# Where no file names the role, a special token of this name has it.
USUAL_NAMES = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>"),
}


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Everything an exporter or a check needs. Index = id in `tokens`, `types` and `scores`.

    tokens: a token's text (GPT-2's byte alphabet for byte_bpe); None is an id that no token has.
    types: 1 normal 2 unknown 3 control 4 user-defined 5 unused 6 byte.
    special: roles that have an id: bos, eos, unk, pad, sep, cls, mask.
    end_ids: every id that ends generation, the tokenizer's own eos first.
    differences: rules that llama.cpp's tokenizer does not follow, in words; empty for an exact one.
    templates: chat templates by name. strips_right: added tokens that swallow the whitespace after them.
    """

    kind: Kind
    tokens: tuple[str | None, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    pre: str
    special: Mapping[str, int]
    end_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    normalization: str | None
    charsmap: bytes | None
    templates: Mapping[str, str]
    strips_right: tuple[int, ...]
    differences: tuple[str, ...]
    encoder: Encoder | None = field(default=None, repr=False, compare=False)

    @property
    def chat_template(self) -> str | None:
        """Returns the template that is used when none is named."""
        return self.templates.get(chat_template.DEFAULT)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Returns the ids that Hugging Face gives `text`.

        add_special: put bos before and eos after, as the tokenizer does. parse_special: read the names of special
        tokens in the text as these tokens.
        """
        if self.encoder is None:
            raise UnsupportedError("this tokenizer was made without a reference encoder")
        ids = self.encoder.encode(text, parse_special)
        before = [self.special["bos"]] if add_special and self.add_bos else []
        after = [self.special["eos"]] if add_special and self.add_eos else []
        return [*before, *ids, *after]

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **names: Any
    ) -> str | None:
        """Returns a conversation as the default chat template writes it; None without a template.

        names: further variables of the template, such as tools. Raises: IntegrityError when it fails.
        """
        template = self.chat_template
        if template is None:
            return None
        texts = {f"{role}_token": self.tokens[id] for role, id in self.special.items()}
        return chat_template.render(
            template, messages, add_generation_prompt=add_generation_prompt, **{**texts, **names}
        )


def open_tokenizer(folder: Path | str) -> Tokenizer:
    """Returns the tokenizer of a checkpoint's folder.

    Raises: UnsupportedError without a tokenizer file or with rules that are not known; IntegrityError for files that
    are broken, contradict each other, or hold a chat template that does not parse.
    """
    folder = Path(folder)
    config = _optional(folder / "tokenizer_config.json")
    vocabulary, encoder = _vocabulary(folder, config)
    ids = {token: id for id, token in enumerate(vocabulary.tokens) if token is not None}
    models = _optional(folder / "config.json"), _optional(folder / "generation_config.json")
    special, notes = _special(folder, config, vocabulary, ids, models)
    add_bos, add_eos = _adds(config, vocabulary, special)
    if vocabulary.adds is not None:
        # What is really added outranks what the role's name says.
        special |= {role: id for role, id in zip(("bos", "eos"), vocabulary.adds, strict=True) if id is not None}
    return Tokenizer(
        kind=vocabulary.kind,
        tokens=vocabulary.tokens,
        types=vocabulary.types,
        scores=vocabulary.scores,
        merges=vocabulary.merges,
        pre=vocabulary.pre,
        special=special,
        end_ids=_end_ids(folder, special, models, len(vocabulary.tokens)),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=vocabulary.add_space_prefix,
        remove_extra_whitespaces=vocabulary.remove_extra_whitespaces,
        normalization=vocabulary.normalization,
        charsmap=vocabulary.charsmap,
        templates=chat_template.read_templates(folder, config),
        strips_right=vocabulary.strips_right,
        differences=(*vocabulary.differences, *notes),
        encoder=encoder,
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> tuple[Vocabulary, Encoder]:
    cleans_spaces = bool(config.get("clean_up_tokenization_spaces", True))
    path = folder / "tokenizer.json"
    if path.is_file():
        data = _bounded(path)
        vocabulary = read_vocabulary(parse_object(data, path, SIGNS), path, cleans_spaces)
        return vocabulary, JsonEncoder(data.decode("utf-8"), path)
    path = folder / "tokenizer.model"
    if path.is_file():
        data = _bounded(path)
        vocabulary = read_model(data, path, _added_beside(folder, config))
        return vocabulary, PieceEncoder(data, vocabulary)
    raise UnsupportedError(
        "this folder has no tokenizer that is known", where=folder, fix="add tokenizer.json or tokenizer.model"
    )


def _bounded(path: Path) -> bytes:
    size = path.stat().st_size
    if size > FILE_BYTES:
        raise IntegrityError(f"a tokenizer of {size} bytes is refused; the limit is {FILE_BYTES}", where=path)
    return path.read_bytes()


def _added_beside(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    """Returns tokens that stand beside a tokenizer.model; tokenizer_config.json knows more about them than their id."""
    path = folder / "added_tokens.json"
    found = {id: AddedToken(id, text) for text, id in _optional(path).items()}
    for id, entry in (config.get("added_tokens_decoder") or {}).items():
        if not str(id).isdigit() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise IntegrityError(f"added_tokens_decoder: {id!r} is no token", where=folder / "tokenizer_config.json")
        found[int(id)] = added_token(int(id), entry["content"], entry)
    return list(found.values())


def _special(
    folder: Path,
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    ids: Mapping[str, int],
    models: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, int], list[str]]:
    """Returns ids by role: the tokenizer's own files, then a SentencePiece model's fields, then the model's ids."""
    beside = _optional(folder / "special_tokens_map.json")
    special: dict[str, int] = {}
    notes, problems = [], []
    for role in ROLES:
        key = f"{role}_token"
        text = _text(config[key] if key in config else beside.get(key))
        fallback = next((id for model in models for id in _listed(model.get(f"{key}_id"))), -1)
        if text is not None and text in ids:
            special[role] = ids[text]
        elif text is not None and role in ("bos", "eos"):
            problems.append(f"{key} {text!r} is not in the vocabulary")
        elif text is not None:
            notes.append(f"{key} {text!r} is not in the vocabulary and is left out")
        elif key in config:
            continue  # null: the tokenizer says that it has none
        elif role in vocabulary.roles:
            special[role] = vocabulary.roles[role]
        elif isinstance(fallback, int) and 0 <= fallback < len(vocabulary.tokens):
            special[role] = fallback
        else:
            usual = next((ids[name] for name in USUAL_NAMES.get(role, ()) if name in ids), None)
            special |= {} if usual is None else {role: usual}
    if vocabulary.unknown is not None:
        special.setdefault("unk", vocabulary.unknown)
    if problems:
        raise IntegrityError("special tokens are missing", problems=problems, where=folder / "tokenizer_config.json")
    return special, notes


def _listed(value: object) -> list[Any]:
    """Returns one id or a list of them as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _text(value: object) -> str | None:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) and value else None


def _adds(config: Mapping[str, Any], vocabulary: Vocabulary, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Returns whether bos and eos are added: by post-processor, config, or SentencePiece's habit."""
    if vocabulary.adds is not None:
        before, after = vocabulary.adds
        return before is not None, after is not None
    habit = (
        bool(vocabulary.roles) and vocabulary.kind == "spm_bpe",
        bool(vocabulary.roles) and vocabulary.kind == "unigram",
    )
    wanted = (config.get("add_bos_token"), config.get("add_eos_token"))
    bos, eos = (usual if want is None else bool(want) for want, usual in zip(wanted, habit, strict=True))
    return bos and "bos" in special, eos and "eos" in special


def _end_ids(
    folder: Path, special: Mapping[str, int], models: Sequence[Mapping[str, Any]], size: int
) -> tuple[int, ...]:
    config, generation = models
    listed = _listed((generation or config).get("eos_token_id"))
    wrong = [id for id in listed if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < size]
    if wrong:
        where = folder / ("generation_config.json" if generation else "config.json")
        raise IntegrityError(f"eos_token_id names ids that do not exist: {wrong}", where=where)
    own = [special["eos"]] if "eos" in special else []
    return tuple(dict.fromkeys((*own, *listed)))
