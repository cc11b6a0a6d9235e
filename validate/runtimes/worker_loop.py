"""The worker's side of the pipe: answer frames until the input closes. Shared by all runtimes' workers."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llmx.errors import LlmxError
from llmx.validate.runtimes.frames import read_frame, write_frame

Answer = tuple[dict[str, Any], np.ndarray | None]


def answer_frames(commands: Mapping[str, Callable[..., Answer]]) -> None:
    """Call the command each frame names with the frame's other entries; an LlmxError becomes an answer."""
    _keep_quiet()
    # Native code may print: the answers get a descriptor of their own, and file 1 becomes standard error.
    with os.fdopen(os.dup(1), "wb") as output, os.fdopen(os.dup(0), "rb") as questions:
        os.dup2(2, 1)
        while True:
            try:
                question, _ = read_frame(questions)
            except EOFError:
                return
            answer, block = _answer(commands, question)
            try:
                write_frame(output, answer, block)
            except BrokenPipeError:
                return


def _answer(commands: Mapping[str, Callable[..., Answer]], question: dict[str, Any]) -> Answer:
    try:
        return commands[question.pop("command")](**question)
    except LlmxError as error:
        problem = {"what": error.what, "where": error.where, "fix": error.fix, "problems": list(error.problems)}
        return {"error": {"kind": type(error).__name__, **problem}}, None


def _keep_quiet() -> None:
    # An interrupt from the keyboard reaches the whole group; whoever asked decides what ends when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        # A crash must not write gigabytes of weights to a core file.
        resource = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
