"""A short conversation with an artifact in its runtime, through its own chat template: `llmx chat`."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from llmx.errors import CheckFailed, UnsupportedError, UsageError
from llmx.validating import RUNTIME_OF_FORMAT, available_cores, check_threads, require_runtime

if TYPE_CHECKING:
    import numpy as np

    from llmx.validate.runtimes import Session

CONTEXT = 4096  # positions, where the model was trained on as many
MAX_TOKENS = 256
ENDED, FULL = "ended by itself", "stopped at --max-tokens"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """temperature: 0 takes the most likely token each time. raw: plain text is continued, without a template."""

    artifact: Path
    system: str | None = None
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    seed: int = 0
    threads: int = 0
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One message and its answer. seconds: from the first token of the answer to the last, so tokens - 1 of them."""

    message: str
    answer: str
    prompt_tokens: int
    tokens: int
    seconds: float
    stopped: str

    @property
    def tokens_per_second(self) -> float | None:
        """None for a single token: nothing was decoded after it."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None

    def to_json(self) -> dict[str, Any]:
        rate = self.tokens_per_second
        return {
            "message": self.message,
            "answer": self.answer,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_second": None if rate is None else round(rate, 2),
            "stopped": self.stopped,
        }


class Chat:
    """A conversation with a loaded artifact. A context manager; leaving it ends the runtime."""

    def __init__(self, request: ChatRequest) -> None:
        """Load the artifact.

        Raises: UsageError for options out of range or a file that is not there, RuntimeMissing, IntegrityError for a
        broken artifact, UnsupportedError without a chat template that can be used.
        """
        import numpy as np

        from llmx.formats.gguf import read_gguf_set
        from llmx.validate.runtimes import find_runtime

        _check(request)
        require_runtime()
        metadata = read_gguf_set(request.artifact).metadata
        trained = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        self._room = min(trained, CONTEXT) if isinstance(trained, int) else CONTEXT
        self._request = request
        self._random = np.random.default_rng(request.seed)
        self._session: Session = find_runtime(RUNTIME_OF_FORMAT["gguf"]).open(
            request.artifact, threads=request.threads or available_cores(), context=self._room
        )
        try:
            self._refuse_without_template()
            self._ends = cast("frozenset[int]", self._session.special()["end_of_generation"])
        except BaseException:
            self._session.close()
            raise
        self._messages = [] if request.system is None else [{"role": "system", "content": request.system}]
        self._cached: list[int] = []
        self.build = self._session.build

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def say(self, message: str, show: Callable[[str], None] = lambda text: None) -> Turn:
        """The answer to a message, after all that was said before. show: is given each piece of text as it comes.

        Raises: UsageError when the conversation has no room left.
        """
        prompt = self._prompt(message)
        room = self._room - len(prompt)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(prompt)} tokens, and {self._room} fit",
                fix="begin a new one, with less text",
            )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        begun, count, stopped, answer = time.perf_counter(), 0, FULL, ""
        for token in self._tokens(prompt, min(self._request.max_tokens, room)):
            if count == 0:
                begun = time.perf_counter()
            count += 1
            if token in self._ends:
                stopped = ENDED
                break
            text = decoder.decode(self._session.piece(token))
            answer += text
            show(text)
        seconds = time.perf_counter() - begun
        rest = decoder.decode(b"", final=True)
        show(rest)
        self._messages.append({"role": "assistant", "content": answer + rest})
        return Turn(message, answer + rest, len(prompt), count, seconds, stopped)

    def _prompt(self, message: str) -> list[int]:
        if self._request.raw:
            return self._session.tokenize(message, parse_special=False)
        self._messages.append({"role": "user", "content": message})
        text = self._session.render(self._messages)
        assert text is not None, "a template that cannot be used was refused"
        return self._session.tokenize(text)

    def _tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Up to count ids after the prompt, of which the cache holds what the turns before have left there."""
        logits = self._after(prompt)
        for number in range(count):
            token = self._choose(logits)
            yield token
            if number + 1 < count and token not in self._ends:
                logits = self._session.extend([token], len(self._cached))
                self._cached.append(token)

    def _after(self, prompt: Sequence[int]) -> np.ndarray:
        """f32[V]: the logits after the prompt."""
        same = 0
        while same < min(len(self._cached), len(prompt) - 1) and self._cached[same] == prompt[same]:
            same += 1
        try:
            logits = self._session.extend(prompt[same:], same)
        except CheckFailed:
            if same == 0:
                raise
            logits = self._session.extend(prompt)  # a sliding window's cache has no way back
        self._cached = list(prompt)
        return logits

    def _choose(self, logits: np.ndarray) -> int:
        import numpy as np

        if np.isnan(logits).any():
            raise CheckFailed("the artifact gives logits that are no numbers", where=self._request.artifact)
        if self._request.temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self._request.temperature
        weights = np.exp(scaled - scaled.max())
        return int(self._random.choice(len(weights), p=weights / weights.sum()))

    def _refuse_without_template(self) -> None:
        reason = self._session.template_unavailable()
        if self._request.raw or reason is None:
            return
        raise UnsupportedError(
            f"there can be no conversation: {reason}",
            where=self._request.artifact,
            fix="--raw continues plain text without a template",
        )


def _check(request: ChatRequest) -> None:
    check_threads(request.threads)
    problems = []
    if not 0 <= request.temperature < float("inf"):
        problems.append(f"--temperature {request.temperature} must be 0 or more")
    if request.seed < 0:
        problems.append("--seed cannot be negative")
    if request.max_tokens < 1:
        problems.append("--max-tokens must be at least 1")
    if request.raw and request.system is not None:
        problems.append("--system is for conversations; --raw has no template that it could stand in")
    if problems:
        raise UsageError("nothing can be said so", problems=problems)
    if not request.artifact.is_file():
        raise UsageError("there is no such artifact", where=request.artifact, fix="give a .gguf file")
