"""Chat templates: found in a model's folder, checked to parse, and rendered as Hugging Face does, in a sandbox.

A template is a stranger's program. It runs in jinja2's ImmutableSandboxedEnvironment (no attribute that leads to
Python's insides, nothing changed), for at most SECONDS, to at most CHARACTERS; large repetitions are refused.
Extensions are those of Hugging Face: break and continue, the generation block, tojson, raise_exception, strftime_now.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from llmx.errors import IntegrityError

SECONDS = 5.0
CHARACTERS = 4_000_000
TEMPLATE_BYTES = 2_000_000
DEFAULT = "default"
WIDE_FORMAT = re.compile(r"\d{5}")


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the folder's templates by name; "default" is the one used when none is named. Each has been parsed.

    chat_template.jinja and additional_chat_templates/*.jinja come before tokenizer_config.json's chat_template, a
    string or a list of {"name", "template"}.

    Raises: IntegrityError naming the line that does not parse.
    """
    found: dict[str, tuple[str, object]] = {}
    for name, text in _listed(config.get("chat_template"), folder):
        found[name] = text, folder / "tokenizer_config.json"
    for path in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if path.is_file():
            name = DEFAULT if path.parent == folder else path.stem
            found[name] = _read(path), path
    for text, where in found.values():
        check_template(text, where)
    return {name: text for name, (text, _) in sorted(found.items())}


def _listed(value: object, folder: Path) -> list[tuple[str, str]]:
    if value is None:
        return []
    entries = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value
    where = folder / "tokenizer_config.json"
    if not isinstance(entries, list):
        raise IntegrityError("chat_template is neither a text nor a list of named texts", where=where)
    pairs: list[tuple[str, str]] = []
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise IntegrityError("an entry of chat_template lacks its name or its template", where=where)
        pairs.append((name, template))
    return pairs


def _read(path: Path) -> str:
    if path.stat().st_size > TEMPLATE_BYTES:
        raise IntegrityError(f"a chat template larger than {TEMPLATE_BYTES} bytes is refused", where=path)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError("the chat template is not UTF-8", where=path) from error


def check_template(template: str, where: object = None) -> None:
    """Parses a template.

    Raises: IntegrityError with the line that is wrong.
    """
    try:
        _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        line = (template.splitlines() or [""])[min(error.lineno, len(template.splitlines())) - 1]
        raise IntegrityError(
            f"the chat template does not parse: line {error.lineno}: {error.message}",
            problems=[line.strip()[:200]],
            where=where,
        ) from error


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **names: Any) -> str:
    """Returns the text of a conversation. names: what else the template may use (bos_token, eos_token, tools, ...).

    Raises: IntegrityError when the template fails, refuses the messages, or runs too long.
    """
    variables = {"messages": messages, "tools": None, "documents": None, **names}
    try:
        with _deadline(SECONDS):
            parts, size = [], 0
            compiled = _environment().from_string(template)
            for part in compiled.generate(add_generation_prompt=add_generation_prompt, **variables):
                size += len(part)
                if size > CHARACTERS:
                    raise TemplateLimitError(f"more than {CHARACTERS} characters")
                parts.append(part)
    except (jinja2.TemplateError, TemplateLimitError) as error:
        raise IntegrityError(f"the chat template cannot render this conversation: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError, ArithmeticError) as error:
        raise IntegrityError(f"the chat template fails with {type(error).__name__}: {error}") from error
    return "".join(parts)


class TemplateLimitError(Exception):
    """A template took too long, or made too much."""


class _deadline:  # noqa: N801 - used as a statement
    """Stops Python code of this thread after some seconds; the tracing function sees every line that runs."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if time.monotonic() > self._end:
            raise TemplateLimitError(f"more than {SECONDS:g} seconds")
        return self._trace


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's words for training; here its body is the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Hugging Face's sandbox that also refuses to repeat texts without bound."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and not _repeats_little(left, right):
            raise TemplateLimitError("a repetition makes more than fits")
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise TemplateLimitError(f"the exponent {right}")
        if operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
            raise TemplateLimitError("a format that pads without bound")
        return super().call_binop(context, operator, left, right)


def _repeats_little(left: Any, right: Any) -> bool:
    for part, count in ((left, right), (right, left)):
        if isinstance(part, str | bytes | list | tuple) and isinstance(count, int):
            return len(part) * max(count, 0) <= CHARACTERS
    return True


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
