"""tokenizer.model (SentencePiece) to a neutral Vocabulary: a bounded reader of the few protobuf fields that matter.

    ModelProto        1 pieces, repeated        2 trainer_spec             3 normalizer_spec
    SentencePiece     1 piece, text             2 score, f32               3 type: 1 normal 2 unknown 3 control
                                                                                   4 user-defined 5 unused 6 byte
    TrainerSpec       3 model_type: 1 unigram, 2 BPE, 3 word, 4 character  24 treat_whitespace_as_suffix
                      35 byte_fallback          40 unk_id  41 bos_id  42 eos_id  43 pad_id; -1 is none
    NormalizerSpec    2 precompiled_charsmap    3 add_dummy_prefix         4 remove_extra_whitespaces
                      5 escape_whitespaces

On the wire a field is a varint (number << 3 | wire type), then a varint (type 0), 8 bytes (1), a varint length and so
many bytes (2), or 4 bytes (5). Source: sentencepiece_model.proto and the protobuf encoding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmx.errors import IntegrityError, UnsupportedError
from llmx.models.space_rules import SpaceRules, check_charsmap
from llmx.models.tokenizer_json import LOWEST_SCORE, place, strips_right, with_added
from llmx.models.vocabulary import BYTE, UNKNOWN, UNUSED, AddedToken, Kind, Vocabulary

KINDS: dict[int, Kind] = {1: "unigram", 2: "spm_bpe"}
ROLES = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # role -> field, default
MOST_PIECES = 1 << 19  # twice the largest model known
Field = int | float | bytes


def read_model(data: bytes, where: object, added: Sequence[AddedToken] = ()) -> Vocabulary:
    """Returns the vocabulary of a SentencePiece model, with tokens that other files add to it.

    Raises: IntegrityError when the bytes are no such model, UnsupportedError for rules that are not known.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data, where):
        if number == 1:
            if len(pieces) >= MOST_PIECES:
                raise IntegrityError(f"there are too many pieces; the limit is {MOST_PIECES}", where=where)
            pieces.append(_piece(dict(_fields(_bytes(value, where), where)), len(pieces), where))
        elif number == 2:
            trainer = dict(_fields(_bytes(value, where), where))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value, where), where))
    kind = KINDS.get(_whole(trainer.get(3, 1), where))
    problems = [] if kind else [f"model type {trainer.get(3)}"]
    problems += ["treat_whitespace_as_suffix"] * bool(trainer.get(24, 0))
    problems += ["escape_whitespaces is off"] * (not normalizer.get(5, 1))
    if problems or kind is None:
        raise UnsupportedError("this SentencePiece model has rules that are not known", problems=problems, where=where)
    charsmap = _bytes(normalizer.get(2, b""), where)
    roles = {role: _signed(_whole(trainer.get(field, default), where)) for role, (field, default) in ROLES.items()}
    named = {role: id for role, id in roles.items() if 0 <= id < len(pieces)}
    rules = SpaceRules(True, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), charsmap=charsmap or None)
    return replace(_vocabulary(kind, pieces, rules, added, where), roles=named)


def _vocabulary(
    kind: Kind, pieces: list[tuple[str, float, int]], rules: SpaceRules, added: Sequence[AddedToken], where: object
) -> Vocabulary:
    tokens = place(((text, id) for id, (text, _, _) in enumerate(pieces)), added, where)
    types = [type for _, _, type in pieces] + [UNUSED] * (len(tokens) - len(pieces))
    scores = [score for _, score, _ in pieces] + [LOWEST_SCORE] * (len(tokens) - len(pieces))
    all_types, notes = with_added(types, added)
    if kind == "spm_bpe" and (rules.charsmap or rules.joins):
        notes += ("SentencePiece's character map and joined spaces: llama.cpp applies neither to BPE",)
    if kind == "unigram" and BYTE in all_types:
        notes += ("characters without a piece: SentencePiece spells them in bytes, llama.cpp as unknown",)
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=all_types,
        scores=tuple(scores),
        merges=(),
        pre="default",
        unknown=next((id for id, type in enumerate(all_types) if type == UNKNOWN), None),
        adds=None,
        add_space_prefix=rules.prefix,
        remove_extra_whitespaces=rules.joins,
        charsmap=check_charsmap(rules.charsmap) if rules.charsmap else None,
        strips_right=strips_right(added),
        differences=notes,
    )


def _piece(fields: dict[int, Field], id: int, where: object) -> tuple[str, float, int]:
    score, type = fields.get(2, 0.0), _whole(fields.get(3, 1), where)
    try:
        text = _bytes(fields.get(1, b""), where).decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"piece {id} is not UTF-8", where=where) from error
    if not isinstance(score, float) or not math.isfinite(score) or not 1 <= type <= 6:
        raise IntegrityError(f"piece {id} has score {score!r} and type {type}", where=where)
    return text, score, type


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _whole(value: Field, where: object) -> int:
    if not isinstance(value, int):
        raise IntegrityError("this is no SentencePiece model: a whole number was expected", where=where)
    return value


def _bytes(value: Field, where: object) -> bytes:
    if not isinstance(value, bytes):
        raise IntegrityError("this is no SentencePiece model: a message was expected", where=where)
    return value


def _fields(data: bytes, where: object) -> Iterator[tuple[int, Field]]:
    """Yields (field number, value): varints as int, 4-byte values as float, the rest as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, where)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at, where)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise IntegrityError(f"this is no SentencePiece model: wire type {wire} at byte {at}", where=where)
        size, at = _varint(data, at, where) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if size > len(data) - at:
            raise IntegrityError(f"the SentencePiece model is cut: {size} bytes wanted at byte {at}", where=where)
        part = data[at : at + size]
        at += size
        yield number, struct.unpack("<f", part)[0] if wire == 5 else part


def _varint(data: bytes, at: int, where: object) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, at + index + 1
    raise IntegrityError(f"this is no SentencePiece model: a number at byte {at} does not end", where=where)
