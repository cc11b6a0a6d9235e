"""tokenizer.json (Hugging Face's `tokenizers` library) to a neutral Vocabulary; nothing of it is run.

model            BPE or Unigram: pieces with ids, and merges or scores
added_tokens     matched before anything else; special ones are control tokens
normalizer       text to text: what SentencePiece does to spaces, Unicode normal forms
pre_tokenizer    text to words
post_processor   what stands before and after: the beginning and the end token
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError
from llmx.models.pretokenizers import Rule, classify, flatten
from llmx.models.space_rules import NORMAL_FORMS, SpaceRules, space_rules
from llmx.models.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Kind,
    Vocabulary,
    added_token,
)

MAX_IDS = 2**20  # four times the largest vocabulary known
LOWEST_SCORE = -1e9  # for pieces that no merge makes
SHOWN = 20  # problems listed at most
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
SPLIT_RULE = "words are tokenized apart, but pieces reach over a word's end"


@dataclass(frozen=True, slots=True)
class _Parsed:
    """The parts of one tokenizer.json, checked."""

    document: Rule
    model: Rule
    added: tuple[AddedToken, ...]
    tokens: tuple[str | None, ...]
    where: object
    cleans_spaces: bool


def read_vocabulary(document: Mapping[str, Any], where: object, cleans_spaces: bool) -> Vocabulary:
    """Returns the vocabulary of a parsed tokenizer.json.

    cleans_spaces: the tokenizer deletes spaces before punctuation when it decodes.
    Raises: IntegrityError for contradictions (every one listed), UnsupportedError for rules that are not known.
    """
    try:
        return _read(document, where, cleans_spaces)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        # A part is of another JSON type than the format has it: there are too many places to ask at each.
        raise IntegrityError(f"tokenizer.json does not have its format's structure: {error!r}", where=where) from error


def _read(document: Mapping[str, Any], where: object, cleans_spaces: bool) -> Vocabulary:
    model = document.get("model")
    if not isinstance(model, Mapping):
        raise IntegrityError("tokenizer.json has no model", where=where)
    name = model.get("type") or ("Unigram" if isinstance(model.get("vocab"), list) else "BPE")
    kind = MODELS.get(str(name))
    if kind is None:
        raise UnsupportedError(f"the tokenizer model {name!r} is not known; known are {sorted(MODELS)}", where=where)
    pieces, build = kind
    added = _added_tokens(document.get("added_tokens") or (), where)
    tokens = place(pieces(model.get("vocab"), where), added, where)
    return build(_Parsed(document, model, added, tokens, where, cleans_spaces))


def _added_tokens(entries: Iterable[Any], where: object) -> tuple[AddedToken, ...]:
    result, problems = [], []
    for entry in entries:
        id, content = entry.get("id"), entry.get("content")
        if not isinstance(id, int) or not _is_id(id) or not isinstance(content, str):
            problems.append(f"added token {content!r} with id {id!r}")
            continue
        result.append(added_token(id, content, entry))
    if problems:
        raise IntegrityError("added tokens need a text and a possible id", problems=problems[:SHOWN], where=where)
    return tuple(result)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_IDS


def _bpe_pieces(vocab: object, where: object) -> Iterable[tuple[object, object]]:
    if not isinstance(vocab, Mapping):
        raise IntegrityError("a BPE vocabulary must be an object of pieces and ids", where=where)
    return vocab.items()


def _unigram_pieces(vocab: object, where: object) -> Iterable[tuple[object, object]]:
    if not isinstance(vocab, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in vocab):
        raise IntegrityError("a Unigram vocabulary must be a list of pieces and scores", where=where)
    return ((entry[0], id) for id, entry in enumerate(vocab))


def place(
    pieces: Iterable[tuple[object, object]], added: Iterable[AddedToken], where: object
) -> tuple[str | None, ...]:
    """Returns tokens by id from (piece, id) pairs and added tokens; None where no token has the id.

    Raises: IntegrityError listing impossible ids, texts that are no text, and ids or texts given twice.
    """
    ids: dict[str, int] = {}
    names: dict[int, str] = {}
    problems: list[str] = []
    for text, id in (*pieces, *((token.content, token.id) for token in added)):
        if not isinstance(text, str) or not isinstance(id, int) or not _is_id(id):
            problems.append(f"{text!r} with id {id!r}: not a text with an id from 0 to {MAX_IDS - 1}")
        elif ids.setdefault(text, id) != id:
            problems.append(f"{text!r} has two ids, {ids[text]} and {id}")
        elif names.setdefault(id, text) != text:
            problems.append(f"id {id} has two tokens, {names[id]!r} and {text!r}")
        if len(problems) >= SHOWN:
            break
    if not problems and not _is_unicode("".join(ids)):
        problems = [f"{text!r} is no Unicode text" for text in ids if not _is_unicode(text)][:SHOWN]
    if problems or not names:
        raise IntegrityError("the vocabulary contradicts itself", problems=problems or ["it is empty"], where=where)
    size = max(names) + 1
    if size > 2 * len(names) + 1024:
        raise IntegrityError(f"the vocabulary names {len(names)} tokens but ids up to {size - 1}", where=where)
    return tuple(names.get(id) for id in range(size))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False
    return True


def with_added(types: list[int], added: Sequence[AddedToken]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the types with those of the added tokens, and what a GGUF vocabulary cannot say about them."""
    for token in added:
        if types[token.id] not in (UNKNOWN, BYTE):
            types[token.id] = CONTROL if token.special else USER_DEFINED
    odd = {
        "swallow whitespace beside them": [token for token in added if token.strips_left or token.strips_right],
        "match whole words only": [token for token in added if token.whole_word],
    }
    return tuple(types), tuple(
        f"added tokens that {what}: {', '.join(token.content for token in tokens[:5])} ({len(tokens)} in all)"
        for what, tokens in odd.items()
        if tokens
    )


def strips_right(added: Iterable[AddedToken]) -> tuple[int, ...]:
    """Returns the ids of added tokens that swallow the whitespace after them."""
    return tuple(sorted(token.id for token in added if token.strips_right))


def _merges(parsed: _Parsed) -> tuple[tuple[str, str], ...]:
    """Returns merges as pairs: newer files hold pairs, older ones "left right" in one string."""
    known, problems = parsed.model["vocab"], []
    merges: list[tuple[str, str]] = []
    for rank, entry in enumerate(parsed.model.get("merges") or ()):
        pair: Any = entry.split(" ") if isinstance(entry, str) else entry
        try:
            left, right = pair
            fine = left in known and right in known and left + right in known
        except (TypeError, ValueError):
            fine, left, right = False, "", ""
        if fine:
            merges.append((left, right))
        elif len(problems) < SHOWN:
            problems.append(f"merge {rank}: {entry!r} is no pair of tokens that join to a token")
    if problems:
        raise IntegrityError("the merges contradict the vocabulary", problems=problems, where=parsed.where)
    return tuple(merges)


def _bpe(parsed: _Parsed) -> Vocabulary:
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    odd = [key for key in options if parsed.model.get(key)]
    if odd:
        raise UnsupportedError("this BPE uses options that are not known", problems=odd, where=parsed.where)
    rules = flatten(parsed.document.get("pre_tokenizer"), "pretokenizers")
    on_bytes = any(rule.get("type") == "ByteLevel" for rule in rules)
    return _spm_bpe(parsed) if _has_bytes(parsed) and not on_bytes else _byte_bpe(parsed)


def _byte_bpe(parsed: _Parsed) -> Vocabulary:
    pre, notes = classify(
        parsed.document.get("pre_tokenizer"), bool(parsed.model.get("ignore_merges")), parsed.cleans_spaces
    )
    forms = [str(rule.get("type")) for rule in flatten(parsed.document.get("normalizer"), "normalizers")]
    unknown = [form for form in forms if form not in NORMAL_FORMS]
    if unknown:
        raise UnsupportedError("byte-level BPE with normalizers not known", problems=unknown, where=parsed.where)
    types, more = with_added([UNUSED if token is None else NORMAL for token in parsed.tokens], parsed.added)
    return Vocabulary(
        kind="byte_bpe",
        tokens=parsed.tokens,
        types=types,
        scores=(),
        merges=_merges(parsed),
        pre=pre,
        unknown=None,
        adds=_adds(parsed),
        normalization=forms[-1] if forms else None,
        strips_right=strips_right(parsed.added),
        differences=(*notes, *_normal_form(forms[-1] if forms else None), *more),
    )


def _spm_bpe(parsed: _Parsed) -> Vocabulary:
    """BPE over characters with byte fallback: llama.cpp merges the pair whose piece has the highest score.

    A piece's score is minus the rank of its best merge, so the order of merging is the same.
    """
    rules = space_rules(parsed.document, parsed.where)
    _check_words(parsed, rules)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(parsed)):
        ranks.setdefault(left + right, rank)
    scores = [float(-ranks[token]) if token in ranks else LOWEST_SCORE for token in map(str, parsed.tokens)]
    unknown = _unknown(parsed, parsed.model.get("unk_token"))
    notes = list(rules.differences)
    if rules.charsmap or rules.joins:
        notes.append("SentencePiece's character map and joined spaces: llama.cpp applies neither to BPE")
    if parsed.model.get("ignore_merges"):
        notes.append("ignore_merges: llama.cpp's SentencePiece BPE always merges")
    return _sentencepiece_like("spm_bpe", parsed, replace(rules, differences=tuple(notes)), scores, unknown)


def _unigram(parsed: _Parsed) -> Vocabulary:
    rules = space_rules(parsed.document, parsed.where)
    _check_words(parsed, rules)
    given = [entry[1] for entry in parsed.model["vocab"]]
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in given):
        raise IntegrityError("a Unigram score is not a finite number", where=parsed.where)
    scores = [*map(float, given), *[LOWEST_SCORE] * (len(parsed.tokens) - len(given))]
    unknown = parsed.model.get("unk_id")
    if unknown is not None and not (_is_id(unknown) and unknown < len(given)):
        raise IntegrityError(f"unk_id {unknown!r} is not in the vocabulary", where=parsed.where)
    if _has_bytes(parsed):
        note = "characters without a piece: Hugging Face spells them in bytes, llama.cpp as unknown"
        rules = replace(rules, differences=(note, *rules.differences))
    return _sentencepiece_like("unigram", parsed, rules, scores, unknown)


def _has_bytes(parsed: _Parsed) -> bool:
    return bool(parsed.model.get("byte_fallback"))


def _sentencepiece_like(
    kind: Kind, parsed: _Parsed, rules: SpaceRules, scores: list[float], unknown: int | None
) -> Vocabulary:
    types = [UNUSED if token is None else NORMAL for token in parsed.tokens]
    if _has_bytes(parsed):
        for id, token in enumerate(parsed.tokens):
            if token is not None and BYTE_PIECE.fullmatch(token):
                types[id] = BYTE
    if unknown is not None:
        types[unknown] = UNKNOWN
    all_types, more = with_added(types, parsed.added)
    return Vocabulary(
        kind=kind,
        tokens=parsed.tokens,
        types=all_types,
        scores=tuple(scores),
        merges=(),
        pre="default",
        unknown=unknown,
        adds=_adds(parsed),
        add_space_prefix=rules.prefix,
        remove_extra_whitespaces=rules.joins,
        normalization=rules.normalization,
        charsmap=rules.charsmap,
        strips_right=strips_right(parsed.added),
        differences=(*rules.differences, *_normal_form(rules.normalization), *more),
    )


def _unknown(parsed: _Parsed, name: object) -> int | None:
    if name is None:
        # Without one, characters go to bytes and nothing is ever unknown; "<unk>" keeps the type it has elsewhere.
        return parsed.model["vocab"].get("<unk>")
    id = parsed.model["vocab"].get(name)
    if id is None:
        raise IntegrityError(f"the unknown token {name!r} is not in the vocabulary", where=parsed.where)
    return id


def _normal_form(form: str | None) -> tuple[str, ...]:
    return () if form is None else (f"text that is not in Unicode's {form}: Hugging Face normalizes it, llama.cpp not",)


def _check_words(parsed: _Parsed, rules: SpaceRules) -> None:
    added = {token.content for token in parsed.added}
    if rules.words:
        over = [token for token in parsed.tokens if token and SPACE in token[1:] and token not in added]
        if over:
            raise UnsupportedError(SPLIT_RULE, problems=[repr(token) for token in over[:SHOWN]], where=parsed.where)


def _adds(parsed: _Parsed) -> tuple[int | None, int | None] | None:
    """Returns what the post-processor puts (before, after) a text; None when it says nothing about it."""
    adds = None
    for rule in flatten(parsed.document.get("post_processor"), "processors"):
        read = PROCESSORS.get(str(rule.get("type")))
        if read is None:
            raise UnsupportedError(f"the post-processor {rule.get('type')!r} is not known", where=parsed.where)
        adds = read(parsed, rule) or adds
    return adds


def _template(parsed: _Parsed, rule: Rule) -> tuple[int | None, int | None]:
    before: list[int] = []
    after: list[int] = []
    side = before
    for part in rule.get("single") or ():
        if "Sequence" in part:
            side = after
            continue
        name = part.get("SpecialToken", {}).get("id")
        side += (rule.get("special_tokens") or {}).get(name, {}).get("ids") or ()
    if side is before or len(before) > 1 or len(after) > 1:
        raise UnsupportedError(
            f"the post-processor puts {len(before)} tokens before a text and {len(after)} after; "
            "llama.cpp knows one beginning and one end token",
            where=parsed.where,
        )
    wrong = [id for id in (*before, *after) if not _is_id(id) or id >= len(parsed.tokens)]
    if wrong:
        raise IntegrityError(f"the post-processor names ids that do not exist: {wrong}", where=parsed.where)
    return (before[0] if before else None, after[0] if after else None)


def _pair(parsed: _Parsed, rule: Rule) -> tuple[int | None, int | None]:
    return rule["cls"][1], rule["sep"][1]


PROCESSORS = {
    "ByteLevel": lambda parsed, rule: None,  # offsets only
    "TemplateProcessing": _template,
    "BertProcessing": _pair,
    "RobertaProcessing": _pair,
}
# model type -> how its pieces are listed, and what it becomes
MODELS = {"BPE": (_bpe_pieces, _bpe), "Unigram": (_unigram_pieces, _unigram)}
