"""A tokenizer as the `tokenizer.*` metadata of a GGUF file.

    kind        tokenizer.ggml.model   how llama.cpp tokenizes
    byte_bpe    gpt2                   `pre` splits words, then merges by rank over GPT-2's byte alphabet
    spm_bpe     llama                  merges neighbours whose joined piece has the highest score; bytes for the rest
    unigram     t5                     the most likely pieces by score, after SentencePiece's character map

Source: llama.cpp b11549, src/llama-vocab.cpp. What it takes for granted when a key is missing matters as much as the
keys: a gpt2 vocabulary without an eos id ends generation at token 11, so ids are always written.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.gguf import Value, array, flag, text, u32
from llmx.models.tokenizer import Tokenizer
from llmx.models.vocabulary import BYTE, CONTROL, UNUSED

MODELS = {"byte_bpe": "gpt2", "spm_bpe": "llama", "unigram": "t5"}
LOWEST_SCORE = -1e9  # a padding row is never part of the best tokenization
ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "sep": "seperator_token_id",  # spelled so in the specification
    "mask": "mask_token_id",
}
# Tokens that end generation by their text alone, whatever the metadata says.
ENDS_BY_TEXT = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    )
)
# Beside all of these tokens, that one does not end generation.
NO_END_BESIDE = (
    (frozenset(("<|return|>", "<|call|>")), "<|end|>"),
    (frozenset(("<|return|>", "<|calls|>")), "<|end|>"),
    (frozenset(("<|call|>", "<|flush|>")), "<|end|>"),
    (frozenset(("<|calls|>", "<|flush|>")), "<|end|>"),
    (frozenset(("<|tool_response>",)), "</s>"),
)
PHI3 = re.compile("phi-?3", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The keys that make every end token end generation. uncovered: end tokens that llama.cpp cannot be told of."""

    eos: int
    eot: int | None
    eom: int | None
    uncovered: tuple[int, ...]


def end_tokens(tokenizer: Tokenizer) -> EndTokens:
    """Returns which end token goes under which key: those that llama.cpp knows by their text need none.

    Raises: UnsupportedError when the tokenizer names no end token.
    """
    if not tokenizer.end_ids:
        raise UnsupportedError(
            "no token of this tokenizer is known to end a text", fix="name eos_token in tokenizer_config.json"
        )
    names = frozenset(token for token in tokenizer.tokens if token in ENDS_BY_TEXT)
    silenced = {name for beside, name in NO_END_BESIDE if beside <= names}
    eos = tokenizer.end_ids[0]
    lost = [id for id in tokenizer.end_ids if tokenizer.tokens[id] in silenced]
    named = [id for id in tokenizer.end_ids[1:] if tokenizer.tokens[id] not in ENDS_BY_TEXT]
    eot, eom, *more = (*named, None, None) if len(named) < 2 else named
    return EndTokens(eos, eot, eom, tuple(id for id in (*more, *lost) if id is not None))


def vocabulary_rows(tokenizer: Tokenizer, rows: int, cut_padding: bool = False) -> int:
    """Returns how many embedding rows the artifact has: `rows`, or only those with a token.

    Raises: IntegrityError when tokens that a text can produce have no row.
    """
    past = [id for id in range(rows, len(tokenizer.tokens)) if tokenizer.types[id] not in (CONTROL, UNUSED)]
    past += [id for id in {*tokenizer.special.values(), *tokenizer.end_ids} if id >= rows and id not in past]
    if past:
        raise IntegrityError(
            f"the tokenizer has {len(tokenizer.tokens)} tokens but the embedding {rows} rows",
            problems=[f"token {id} {tokenizer.tokens[id]!r} has no row" for id in sorted(past)[:20]],
            fix="take the tokenizer that belongs to this checkpoint",
        )
    return min(rows, len(tokenizer.tokens)) if cut_padding else rows


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Value]:
    """Returns the `tokenizer.*` metadata for a vocabulary of `rows` tokens; rows without a token become `[PAD12]`.

    Special tokens past the last row are left out: they cannot be used with this embedding (limits() names them).

    Raises: IntegrityError as vocabulary_rows; UnsupportedError for what llama.cpp has no way to express.
    """
    vocabulary_rows(tokenizer, rows)
    _check_bytes(tokenizer)
    names = _names(tokenizer, rows)
    padding = max(rows - len(tokenizer.tokens), 0)
    metadata = {
        "tokenizer.ggml.model": text(MODELS[tokenizer.kind]),
        "tokenizer.ggml.pre": text(tokenizer.pre),
        "tokenizer.ggml.tokens": array("str", names),
        "tokenizer.ggml.token_type": array("i32", [*tokenizer.types[:rows], *[UNUSED] * padding]),
    }
    if tokenizer.scores:
        metadata["tokenizer.ggml.scores"] = array("f32", [*tokenizer.scores[:rows], *[LOWEST_SCORE] * padding])
    if tokenizer.kind == "byte_bpe":
        metadata["tokenizer.ggml.merges"] = array("str", [" ".join(pair) for pair in tokenizer.merges])
    else:
        metadata["tokenizer.ggml.add_space_prefix"] = flag(tokenizer.add_space_prefix)
    if tokenizer.kind == "unigram":
        metadata["tokenizer.ggml.remove_extra_whitespaces"] = flag(tokenizer.remove_extra_whitespaces)
        if tokenizer.charsmap:
            metadata["tokenizer.ggml.precompiled_charsmap"] = array("u8", list(tokenizer.charsmap))
    return metadata | _special(tokenizer) | _templates(tokenizer)


def limits(tokenizer: Tokenizer, rows: int) -> tuple[str, ...]:
    """Returns, in words, where llama.cpp will treat a text otherwise than Hugging Face; empty when nowhere."""
    left_out = [repr(token) for token in tokenizer.tokens[rows:] if token is not None]
    uncovered = [repr(tokenizer.tokens[id]) for id in end_tokens(tokenizer).uncovered]
    found = list(tokenizer.differences)
    if left_out:
        found.append(f"special tokens without an embedding row are left out: {', '.join(left_out[:10])}")
    if uncovered:
        found.append(f"end tokens that llama.cpp cannot be told of: {', '.join(uncovered)}")
    return tuple(found)


def model_name(tokenizer: Tokenizer, name: str) -> str:
    """Returns a general.name that does not change the tokenizer.

    In a model called phi-3 or phi3, llama.cpp swallows the whitespace after special tokens, as the real one does; a
    tokenizer without that rule must not be called so.
    """
    return name if tokenizer.strips_right else PHI3.sub("Phi 3", name)


def _names(tokenizer: Tokenizer, rows: int) -> list[str]:
    """Returns a unique name for every row: llama.cpp ends the process on two equal ones."""
    taken = {token for token in tokenizer.tokens[:rows] if token is not None}
    names: list[str] = []
    for id in range(rows):
        token = tokenizer.tokens[id] if id < len(tokenizer.tokens) else None
        if token is None:
            token = f"[PAD{id}]"
            while token in taken:
                token = f"[{token}]"
        names.append(token)
    # llama.cpp reads a name up to its first NUL.
    cut = Counter(name.partition("\0")[0] for name in names if "\0" in name)
    clashes = [name for name in cut if name and (cut[name] > 1 or name in taken)]
    if clashes:
        raise UnsupportedError("tokens with a NUL character differ only after it", problems=[*map(repr, clashes)])
    return names


def _check_bytes(tokenizer: Tokenizer) -> None:
    count = tokenizer.types.count(BYTE)
    if tokenizer.kind == "spm_bpe" and count != 256:
        raise UnsupportedError(
            f"this SentencePiece BPE has {count} of the 256 byte tokens; llama.cpp stops at characters it cannot spell"
        )


def _special(tokenizer: Tokenizer) -> dict[str, Value]:
    ends = end_tokens(tokenizer)
    # Without a bos of its own llama.cpp would take token 11 or 1 for it.
    bos = tokenizer.special.get("bos", ends.eos)
    roles = {**tokenizer.special, "bos": bos, "eos": tokenizer.special.get("eos", ends.eos)}
    ids = {ROLE_KEYS[role]: id for role, id in roles.items() if role in ROLE_KEYS}
    ids |= {key: id for key, id in (("eot_token_id", ends.eot), ("eom_token_id", ends.eom)) if id is not None}
    metadata = {f"tokenizer.ggml.{key}": u32(id) for key, id in sorted(ids.items())}
    metadata["tokenizer.ggml.add_bos_token"] = flag(tokenizer.add_bos)
    metadata["tokenizer.ggml.add_eos_token"] = flag(tokenizer.add_eos)
    return metadata


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    named = {name: template for name, template in tokenizer.templates.items() if name != "default"}
    metadata = {f"tokenizer.chat_template.{name}": text(template) for name, template in named.items()}
    if named:
        metadata["tokenizer.chat_templates"] = array("str", sorted(named))
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = text(tokenizer.chat_template)
    return metadata
