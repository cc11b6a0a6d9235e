"""The artifact's own tokenizer, in its own runtime, against the Hugging Face tokenizer; and the chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from llmx.errors import LlmxError
from llmx.models.chat_template import render
from llmx.validate.case import Case
from llmx.validate.corpus import CORPUS
from llmx.validate.kinds import kind_of
from llmx.validate.oracle import Tokens, end_ids
from llmx.validate.report import Check, at_most, not_applicable, not_run
from llmx.validate.runtimes import Session

TEXT_CHARACTERS = 32_000  # of the evaluation text; the corpus covers the rest
SHOWN = 4
ORIGIN = "the Hugging Face tokenizer of the checkpoint"
PROBE = "Hello world"


def check_tokens(case: Case, session: Session) -> Iterator[Check]:
    """Yields tokens.ids, .bos, .ends and .vocabulary."""
    yield _ids(case, session)
    yield _bos(case.tokens, session)
    yield _ends(case, session)
    yield _vocabulary(case, session)


def _ids(case: Case, session: Session) -> Check:
    added = list(case.tokens.added.values())
    around = [f"a{token}b" for token in added] + [f" {token} " for token in added]
    texts = [*CORPUS, *added, *around, case.text[:TEXT_CHARACTERS]]
    wrong = [text for text in texts if _differs(case.tokens, session, text)]
    shown = "; ".join(_difference(case.tokens, session, text) for text in wrong[:SHOWN])
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    detail = f"{len(texts)} texts: the corpus, {len(added)} special and added tokens, the evaluation text"
    return at_most("tokens.ids", len(wrong), 0, "texts", ORIGIN, detail=shown + more if wrong else detail)


def _differs(tokens: Tokens, session: Session, text: str) -> bool:
    return tokens.encode(text, False) != session.tokenize(text, add_special=False, parse_special=True)


def _difference(tokens: Tokens, session: Session, text: str) -> str:
    """Says where two tokenizations part: a few ids around the first difference."""
    wanted, found = tokens.encode(text, False), session.tokenize(text, add_special=False, parse_special=True)
    pairs = enumerate(zip(wanted, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(found)))
    return f"{text[:40]!r} at id {at}: Hugging Face {wanted[at : at + 4]}, artifact {found[at : at + 4]}"


def _bos(tokens: Tokens, session: Session) -> Check:
    """Exactly one BOS where the checkpoint adds one, none where it adds none; and what EOS it adds."""
    wanted = tokens.encode(PROBE, True)
    found = session.tokenize(PROBE, add_special=True, parse_special=True)
    problems = []
    if wanted != found:
        problems.append(f"{PROBE!r} with special tokens: Hugging Face {wanted[:6]}, artifact {found[:6]}")
    bos = session.special()["bos"]
    if tokens.bos is not None and bos != tokens.bos:
        problems.append(f"BOS is {bos}, expected {tokens.bos}")
    count = found.count(tokens.bos) if tokens.bos is not None else 0
    if count > 1:
        problems.append(f"{count} BOS tokens")
    detail = "; ".join(problems) or f"{count} BOS, id {tokens.bos}"
    return at_most("tokens.bos", len(problems), 0, "problems", ORIGIN, detail=detail)


def _ends(case: Case, session: Session) -> Check:
    wanted = end_ids(case.model.checkpoint.generation_config, case.tokens)
    ending = session.special()["end_of_generation"]
    assert isinstance(ending, (set, frozenset)), "the protocol of a session"
    missing = sorted(wanted - ending)
    eos = session.special()["eos"]
    problems = [f"token {token} does not end generation" for token in missing]
    if case.tokens.eos is not None and eos != case.tokens.eos and eos not in wanted:
        problems.append(f"EOS is {eos}, expected {case.tokens.eos}")
    detail = "; ".join(problems) or f"{len(wanted)} end tokens: {sorted(wanted)}"
    origin = "generation_config.json and the tokenizer's EOS"
    return at_most("tokens.ends", len(problems), 0, "problems", origin, detail=detail)


def _vocabulary(case: Case, session: Session) -> Check:
    """The model's rows; the rows of padding past the tokenizer's last id may be left out."""
    model, tokenizer = case.model.architecture.vocab, max(case.tokens.size, 1)
    allowed = {model, tokenizer} if tokenizer < model else {model}
    detail = f"{model} rows in the checkpoint, {tokenizer} tokens in its tokenizer"
    return Check(
        "tokens.vocabulary",
        session.vocab in allowed,
        session.vocab,
        model,
        "tokens",
        "config.json's vocab_size",
        detail,
    )


Conversation = tuple[str, Sequence[Mapping[str, str]], bool]  # name, messages, with generation prompt


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_ASK = _message("user", "What is the capital of France?")
_ANSWER = _message("assistant", "Paris.")
CONVERSATIONS: tuple[Conversation, ...] = (
    ("system and user", (_message("system", "You answer in one word."), _ASK), True),
    ("user only", (_ASK,), True),
    ("several turns", (_ASK, _ANSWER, _message("user", "And of Italy?")), True),
    ("without generation prompt", (_ASK, _ANSWER), False),
    ("a user without generation prompt", (_ASK,), False),
    ("unicode and whitespace", (_message("user", "  Grüße,\t世界 🌍\n\n\n  zwei  Zeilen  \n"),), True),
)


def check_template(case: Case, session: Session) -> Iterator[Check]:
    """Yields template.embedded (the template in the file) and template.runtime (the runtime's own rendering)."""
    names = ("template.embedded", "template.runtime")
    stored = kind_of(case.file).template(case.file)
    if not case.tokens.has_template:
        if stored is None:
            yield from (not_applicable(name, "the checkpoint has no chat template") for name in names)
        else:
            yield Check(names[0], False, detail="the file has a chat template, the checkpoint has none")
        return
    if not isinstance(stored, str):
        yield Check(names[0], False, detail="the checkpoint has a chat template, the file has none")
        yield not_applicable(names[1], "the file has no chat template")
        return
    yield _embedded(case, session, stored)
    yield _rendered_by_runtime(case, session)


def _embedded(case: Case, session: Session, template: str) -> Check:
    special = case.tokens.special_texts

    def ours(messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        return render(template, [dict(message) for message in messages], add_generation_prompt=prompt, **special)

    return _conversations("template.embedded", case, session, ours, add_special=False)


def _rendered_by_runtime(case: Case, session: Session) -> Check:
    reason = session.template_unavailable()
    if reason is not None:
        return not_run("template.runtime", reason, required=False)

    def theirs(messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
        return session.render(messages, prompt) or ""

    return _conversations("template.runtime", case, session, theirs, add_special=True)


Renderer = Callable[[Sequence[Mapping[str, str]], bool], str]


def _conversations(name: str, case: Case, session: Session, renderer: Renderer, add_special: bool) -> Check:
    """Six conversations rendered both ways, compared as ids.

    add_special: the runtime leaves a BOS out of the text and adds it to the ids, also where the template has none; so
    one BOS at the beginning is not compared then (tokens.bos judges it).
    """
    wrong, ran = [], 0

    def compared(ids: list[int]) -> list[int]:
        return ids[1:] if add_special and ids[:1] == [case.tokens.bos] else ids

    for shape, messages, prompt in CONVERSATIONS:
        wanted = _attempt(case.tokens.render, messages, prompt)
        if wanted is None:
            continue  # the template itself refuses this shape, a system message for one
        ran += 1
        found = _attempt(renderer, messages, prompt)
        ids = None if found is None else session.tokenize(found, add_special=add_special, parse_special=True)
        if ids is None or compared(ids) != compared(case.tokens.encode(wanted, False)):
            wrong.append(f"{shape}: {_first_difference(wanted, found or '')}")
    if ran == 0:
        return not_run(name, "the template refuses every conversation")
    detail = "; ".join(wrong) or f"{ran} conversations; the template refuses {len(CONVERSATIONS) - ran}"
    return at_most(
        name, len(wrong), 0, "conversations", "transformers' apply_chat_template, compared as ids", detail=detail
    )


def _attempt(renderer: Renderer, messages: Sequence[Mapping[str, str]], prompt: bool) -> str | None:
    from jinja2 import TemplateError

    try:
        return renderer(messages, prompt)
    except (TemplateError, LlmxError):
        return None


def _first_difference(wanted: str, found: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
    return f"at character {at}, expected {wanted[at : at + 30]!r}, found {found[at : at + 30]!r}"
