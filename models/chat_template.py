"""Chat templates: found in a model's folder, checked to parse, and rendered as Hugging Face does.

A template is a stranger's program. It is parsed and run in a process of its own, confined in time, memory and files:
see template_sandbox.py.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError
from llmx.interpreter import python_command, python_environment

TEMPLATE_BYTES = 2_000_000
DEFAULT = "default"
ANSWER_SECONDS = 60.0  # for a process that is not let run; its own limit counts what it computes
_SANDBOX = "llmx.models.template_sandbox"


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


def _leads_out(path: Path) -> bool:
    """Whether it is a link to something else than a template: its text would go into every artifact.

    The hub's cache links to files named by their hash, in a folder of its own.
    """
    if not path.is_symlink():
        return False
    target, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs"
    return target.suffix != path.suffix and folder not in target.parents and blobs not in target.parents


def _read(path: Path) -> str:
    if _leads_out(path):
        raise IntegrityError("the chat template is a symbolic link out of the checkpoint", where=path)
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
    answer = _SANDBOXES.ask({"template": template})
    if "error" in answer:
        lines, number = template.splitlines() or [""], answer.get("line")
        place = "" if number is None else f"line {number}: "
        raise IntegrityError(
            f"the chat template does not parse: {place}{answer['error']}",
            problems=[] if number is None else [lines[min(number, len(lines)) - 1].strip()[:200]],
            where=where,
        )


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **names: Any) -> str:
    """Returns the text of a conversation. names: what else the template may use (bos_token, eos_token, tools, ...).

    Raises: IntegrityError when the template fails, refuses the messages, or takes too much time or memory.
    """
    variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    answer = _SANDBOXES.ask({"template": template, "variables": {**variables, **names}})
    if "error" in answer:
        raise IntegrityError(f"the chat template cannot render this conversation: {answer['error']}")
    return answer["text"]


class _Sandboxes:
    """One process of template_sandbox.py, started when it is needed and again when a template ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; an "error" too where the process ended over it."""
        line = json.dumps(question, default=dict) + "\n"
        with self._lock:
            process = self._started()
            late = threading.Timer(ANSWER_SECONDS, process.kill)
            late.daemon = True
            late.start()
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            except BaseException:
                self._stop()  # interrupted between question and answer: the next one would get this one's
                raise
            finally:
                late.cancel()
            if not answer.endswith("\n"):
                self._stop()
                return {"error": "it takes more time or memory than a template may"}
        return json.loads(answer)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                python_command(_SANDBOX, None),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=python_environment(None, {"PYTHONIOENCODING": "utf-8"}),
                text=True,
                encoding="utf-8",
            )
            self._end = weakref.finalize(self, _end, self._process)  # at exit, too
        return self._process

    def _stop(self) -> None:
        self._end()
        self._process = None


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
    process.wait()


_SANDBOXES = _Sandboxes()
