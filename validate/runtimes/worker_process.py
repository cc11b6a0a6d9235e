"""A runtime in a process of its own: it may abort on a broken file, and its memory is measured apart from ours."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from llmx.errors import (
    CheckFailed,
    IntegrityError,
    LlmxError,
    ResourceError,
    RuntimeMissing,
    UnsupportedError,
    UsageError,
)
from llmx.interpreter import python_command, python_environment
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.frames import read_frame, write_frame

# What a worker's refusal becomes here. A kind that is not listed is a bug of ours.
ERRORS: dict[str, type[LlmxError]] = {
    kind.__name__: kind
    for kind in (CheckFailed, IntegrityError, ResourceError, RuntimeMissing, UnsupportedError, UsageError)
}
# The longest silence of a worker. A block of 128 positions of a 70 B model takes minutes on two cores.
ANSWER_SECONDS = 1800.0
_KILLED = -9
_KEPT_LINES = 200
_SHOWN_LINES = 12
_LONGEST_LINE = 4096


class WorkerProcess:
    """A module run as a program, asked by frames on its standard input, answering on its standard output.

    Its standard error is drained into a bounded buffer, whose end goes into the error when it dies.
    `folder`, where given, is its own and is removed when it ends.
    """

    def __init__(
        self,
        module: str,
        *,
        label: str,
        timeout: float,
        environment: Mapping[str, str],
        folder: Path | None = None,
        python: str | None = None,
    ) -> None:
        """python: the interpreter to run it, None for this one. Raises RuntimeMissing where it cannot be started."""
        self._label = label
        self._timeout = timeout
        try:
            self._process = subprocess.Popen(
                python_command(module, python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=python_environment(python, environment),
            )
        except OSError as error:
            what = f"the Python that {label} is to run in cannot be started: {error}"
            raise RuntimeMissing(what, where=python or sys.executable) from error
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        stderr = cast(BinaryIO, self._process.stderr)
        self._drain = threading.Thread(target=_drain, args=(stderr, self._lines), daemon=True)
        self._drain.start()
        # A session that nobody closed still leaves no process behind.
        self._end = weakref.finalize(self, _end, self._process, self._drain, folder)

    @property
    def process_id(self) -> int:
        """Return the worker's process id."""
        return self._process.pid

    def ask(
        self, command: str, *, death: type[LlmxError] = CheckFailed, where: object = None, **arguments: Any
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Return the answer and its block of floats.

        Raises the error that the worker names; death, with its last words, where it dies; ResourceError where the
        system killed it; CheckFailed where it answers too late; UsageError after close.
        """
        if not self._end.alive:
            raise UsageError(f"the {self._label} session is closed")
        expired = threading.Event()
        # Without a reference to self: a session must be collected, and its worker ended, also while the timer winds up.
        timer = threading.Timer(self._timeout, _expire, (self._process, expired))
        timer.daemon = True
        timer.start()
        try:
            write_frame(cast(BinaryIO, self._process.stdin), {"command": command, **arguments})
            answer, block = read_frame(cast(BinaryIO, self._process.stdout))
        except (EOFError, OSError):
            raise self._death(command, death, where, late=expired.is_set()) from None
        except BaseException:
            # Interrupted between question and answer: the stream is out of step, so the worker is of no use any more.
            self.close()
            raise
        finally:
            timer.cancel()
        problem = answer.get("error")
        if problem is not None:
            kind = ERRORS.get(problem["kind"], LlmxError)
            raise kind(problem["what"], where=where, fix=problem.get("fix"), problems=problem.get("problems", ()))
        return answer, block

    def last_words(self) -> tuple[str, ...]:
        """Let the worker end by itself, for its log to be complete, and return the last lines it wrote."""
        if self._end.alive:
            with contextlib.suppress(OSError):
                cast(BinaryIO, self._process.stdin).close()
            self._await_exit()
            self.close()
        return tuple(self._lines)[-_SHOWN_LINES:]

    def close(self) -> None:
        """Kill the worker and wait for it. Never raises; may be called twice."""
        self._end()

    def _death(self, command: str, kind: type[LlmxError], where: object, *, late: bool) -> LlmxError:
        code = self._await_exit()
        self.close()
        lines = tuple(self._lines)[-_SHOWN_LINES:]
        if late:
            what = f"{self._label} gave no answer to {command!r} within {self._timeout:g} s and was stopped"
            return CheckFailed(what, where=where, problems=lines)
        what = f"{self._label} died while it was asked to {command!r} ({_exit_text(code)})"
        if code == _KILLED:
            # Nothing in a file does this: the system kills so when memory runs out, or a person did.
            return ResourceError(
                what, where=where, fix="free some memory, or ask for a shorter context", problems=lines
            )
        return kind(what + "; its last lines follow", where=where, problems=lines)

    def _await_exit(self) -> int:
        # The pipe closes a moment before the exit status is there.
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._drain.join(10)
        return self._process.returncode


def plain_ids(tokens: Sequence[int]) -> list[int]:
    """Return the ids as the numbers that a frame takes: numpy's are none."""
    return [int(token) for token in tokens]


def check_sizes(threads: int, context: int, batch: int | None) -> None:
    """Raise UsageError for a session of no threads or no positions."""
    if threads < 1 or context < 1:
        raise UsageError(f"threads = {threads} and context = {context} must both be at least 1")
    if batch is not None and batch < 1:
        raise UsageError(f"batch = {batch} must be at least 1")


class ArtifactWorker:
    """A worker that has opened one artifact: what the sessions of all runtimes ask in the same words.

    about: its answer to "open". Whatever asks for a new sequence ends the one whose logits are being fetched.
    """

    def __init__(
        self,
        module: str,
        artifact: Path,
        *,
        label: str,
        timeout: float = ANSWER_SECONDS,
        environment: Mapping[str, str] | None = None,
        death: type[LlmxError] = CheckFailed,
        python: str | None = None,
        **options: Any,
    ) -> None:
        """options: further entries of the question "open". Raises IntegrityError, also where the worker dies of it.

        death: the error where the worker dies of a later question.
        """
        self._artifact, self._death, self._sequence = artifact, death, 0
        self._process = WorkerProcess(
            module, label=label, timeout=timeout, environment=environment or {}, python=python
        )
        try:
            asked = {"artifact": str(artifact), **options}
            self.about, _ = self._process.ask("open", death=IntegrityError, where=artifact, **asked)
        except BaseException:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        """Return the worker's process id."""
        return self._process.process_id

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a command that leaves the sequence alone."""
        return self._both(command, **arguments)[0]

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of text. Raises UsageError for a text that is no Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text cannot be written as UTF-8: {error}") from error
        return self.ask("tokenize", text=text, add_special=add_special, parse_special=parse_special)["ids"]

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id."""
        return bytes.fromhex(self.ask("piece", token=int(token))["hex"])

    def special(self) -> dict[str, Any]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        answer = self.ask("special")
        return {**answer, "end_of_generation": frozenset(answer["end_of_generation"])}

    def logits(self, tokens: Sequence[int], decode_from: int | None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks, fresh arrays, that cover every position in order.

        Raises UsageError where the session was asked for another sequence in between.
        """
        self._sequence += 1
        mine = self._sequence
        self.ask("logits", tokens=plain_ids(tokens), decode_from=decode_from)
        while True:
            if mine != self._sequence:
                raise UsageError("this sequence ended when the session was asked for another")
            _, block = self._both("next block")
            if block is None:
                return
            yield block

    def generate(self, tokens: Sequence[int], count: int, **further: Any) -> list[int]:
        """Return up to count greedy ids after tokens."""
        self._sequence += 1
        return self.ask("generate", tokens=plain_ids(tokens), count=count, **further)["ids"]

    def extend(self, tokens: Sequence[int], keep: int) -> np.ndarray:
        """Return f32[V]: the logits after the first keep positions of the last extended sequence and tokens."""
        self._sequence += 1
        _, block = self._both("extend", tokens=plain_ids(tokens), keep=keep)
        assert block is not None, "the answer to extend has a block"
        return block[0]

    def speed(self, prefill: int, decode: int) -> Speed:
        """Return the speed. peak_rss_bytes is the worker's since it started."""
        self._sequence += 1
        return Speed(**self.ask("speed", prefill=prefill, decode=decode))

    def close(self) -> None:
        """Stop the worker. May be called twice."""
        self._process.close()

    def _both(self, command: str, **arguments: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        return self._process.ask(command, death=self._death, where=self._artifact, **arguments)


def _expire(process: subprocess.Popen[bytes], expired: threading.Event) -> None:
    expired.set()
    process.kill()


def _drain(stream: BinaryIO, lines: deque[str]) -> None:
    while line := stream.readline(_LONGEST_LINE):
        text = line.decode(errors="replace").rstrip()
        if text:
            lines.append(text)


def _end(process: subprocess.Popen[bytes], drain: threading.Thread, folder: Path | None) -> None:
    process.kill()
    process.wait()
    drain.join(5)
    # A drain still waiting (a child of the worker holds the pipe) owns stderr's lock: closing it would wait as well.
    streams = (process.stdin, process.stdout, None if drain.is_alive() else process.stderr)
    for stream in streams:
        if stream is not None:
            with contextlib.suppress(OSError):  # an unsent question to a process that is gone
                stream.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
