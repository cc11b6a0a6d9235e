"""A program of its own that parses and renders chat templates: what a stranger's template can do, it can do here only.

It needs jinja2 and the standard library. A question is a line of JSON on the standard input, an answer one on the
standard output:

    {"template": "…"}                                      parse    {}
    {"template": "…", "variables": {…}}                    render   {"text": "…"}
                                                           refused  {"error": "…"}, {"error": "…", "line": 3}

The template runs in jinja2's ImmutableSandboxedEnvironment (no attribute that leads to Python's insides, nothing
changed). The process itself may use MEMORY, put no byte into a file and, but for root's, start no other; more than
SECONDS of its CPU for a question end it, whatever it is doing then.

Extensions are those of Hugging Face: break and continue, the generation block, tojson, raise_exception, strftime_now.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 0.8  # of CPU; the largest known templates take hundredths
MEMORY = 256 << 20  # of address space, the interpreter's 40 MB among them
CHARACTERS = 4_000_000  # of a rendered conversation


def main() -> None:
    """Answer the questions of the standard input until it ends."""
    _confine()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        answer = _answer(json.loads(line))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _confine() -> None:
    """Bound what this process may take. A limit that the system does not know is left out."""
    import resource

    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)  # which ends the process
    none = {"RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
    for name, most in {**none, "RLIMIT_AS": MEMORY, "RLIMIT_NOFILE": 16}.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (most, most))


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        compiled = _compiled(question["template"])
        if "variables" not in question:
            return {}
        return {"text": _rendered(compiled, question["variables"])}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message or "", "line": error.lineno}
    except MemoryError:
        return {"error": f"more than {MEMORY >> 20} MB of memory"}
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - a stranger's program, whose errors are answers
        return {"error": f"{type(error).__name__}: {error}"}


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _rendered(compiled: jinja2.Template, variables: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in compiled.generate(**variables):
        size += len(part)
        if size > CHARACTERS:
            raise jinja2.TemplateError(f"more than {CHARACTERS} characters")
        parts.append(part)
    return "".join(parts)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's words for training; here its body is the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    # Not optimized: constants would be computed when it is parsed.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
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


if __name__ == "__main__":
    main()
