"""llama.cpp as a runtime: every call crosses to a worker process, so that an abort there is an error here."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from llmx.errors import CheckFailed, RuntimeMissing, UsageError
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.llamacpp_library import BACKENDS, Backend, available_backend, why_unavailable
from llmx.validate.runtimes.worker_process import ANSWER_SECONDS, ArtifactWorker, WorkerProcess, check_sizes

WORKER = "llmx.validate.runtimes.llamacpp_worker"
RENDERER = "llmx.validate.runtimes.llamacpp_template"
# Without it, an abort starts a debugger, where there is one, and prints pages of stack.
ENVIRONMENT = {"GGML_NO_BACKTRACE": "1"}


class LlamaCpp:
    """llama.cpp from the first package that has it: xllamacpp, else llama-cpp-python. Runs on the processor only."""

    name = "llama.cpp"

    def __init__(self, *, backend: str | None = None, answer_seconds: float = ANSWER_SECONDS) -> None:
        """backend: a name of BACKENDS instead of the first that is there. answer_seconds: the worker's time limit."""
        if backend is not None and backend not in BACKENDS:
            raise UsageError(f"no package is called {backend!r}", fix=f"choose one of: {', '.join(BACKENDS)}")
        self._wanted = None if backend is None else BACKENDS[backend]
        self._answer_seconds = answer_seconds

    def unavailable(self) -> str | None:
        """Return why llama.cpp cannot run here, each package with its reason, or None."""
        return why_unavailable() if self._wanted is None else self._wanted.unavailable()

    def open(
        self, artifact: Path, *, threads: int, context: int, exact: bool = False, batch: int | None = None
    ) -> LlamaCppSession:
        """Load a GGUF file (the first one of a split set) and return the session.

        exact: float32 key-value cache, flash attention off. A float32 file then agrees with transformers to 5e-5.
        batch: positions run at once at most, 128 where it is None.
        Raises RuntimeMissing; UsageError; IntegrityError with llama.cpp's own words, also where it aborts.
        """
        backend = self._wanted or available_backend()
        reason = self.unavailable()
        if backend is None or reason is not None:
            fix = "pip install 'llmx[llamacpp]'"
            raise RuntimeMissing(f"llama.cpp is not available: {reason}", fix=fix)
        artifact = Path(artifact).absolute()
        if not artifact.is_file():
            raise UsageError("there is no such file", where=artifact)
        check_sizes(threads, context, batch)
        options = {"threads": threads, "context": context, "exact": exact, "batch": batch}
        return LlamaCppSession(backend, artifact, self._answer_seconds, options)


class LlamaCppSession:
    """One loaded GGUF file; see `Session`. Not to be shared between threads."""

    def __init__(self, backend: Backend, artifact: Path, answer_seconds: float, options: Mapping[str, Any]) -> None:
        self._backend, self._artifact, self._answer_seconds = backend, artifact, answer_seconds
        self._renderer: WorkerProcess | None = None
        self._worker = ArtifactWorker(
            WORKER,
            artifact,
            label=self._label,
            timeout=answer_seconds,
            environment=ENVIRONMENT,
            backend=backend.name,
            **options,
        )
        answer = self._worker.about
        self.build: str = answer["build"]
        self.vocab: int = answer["vocab"]
        self._has_template: bool = answer["has_template"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process_id(self) -> int:
        """Return the worker's process id."""
        return self._worker.process_id

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of text. Raises UsageError for a text that is no Unicode (a lone surrogate)."""
        return self._worker.tokenize(text, add_special, parse_special)

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id; a special token gives its name."""
        return self._worker.piece(token)

    def special(self) -> dict[str, Any]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        return self._worker.special()

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks (t up to 128), fresh arrays, that cover every position in order.

        decode_from: positions from it on run one at a time through the key-value cache. One sequence at a time:
        asking for another ends this one, and fetching from it then raises UsageError.
        """
        return self._worker.logits(tokens, decode_from)

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count greedy ids; an end-of-generation id ends them and is the last."""
        return self._worker.generate(tokens, count)

    def extend(self, tokens: Sequence[int], keep: int = 0) -> np.ndarray:
        """Return f32[V], the logits after the first keep positions of the last extended sequence and tokens.

        Raises CheckFailed where the cache of a sliding window has no way back to position keep.
        """
        return self._worker.extend(tokens, keep)

    def speed(self, prefill: int, decode: int) -> Speed:
        """Return the speed with llama.cpp's usual settings (float16 cache, batches of 512), whatever `exact` says.

        peak_rss_bytes is the worker's since it started: for the model's own need, ask a session that ran nothing else.
        """
        return self._worker.speed(prefill, decode)

    def template_unavailable(self) -> str | None:
        """Return why `render` gives None, or None where llama.cpp's own template engine can be asked."""
        if not self._has_template:
            return "the file carries no chat template"
        if not self._backend.renders_templates:
            return f"{self._backend.name} gives no way to llama.cpp's template engine"
        if not hasattr(socket, "AF_UNIX"):
            return "llama.cpp's template engine is reached by a Unix socket, which this system does not have"
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str | None:
        """Return the conversation rendered by llama.cpp's jinja engine, or None where `template_unavailable`.

        llama.cpp leaves out a leading BOS where the file has add_bos, because tokenizing adds it: compare ids of
        tokenize(text, add_special=True). Raises CheckFailed where the template cannot be used.
        """
        if self.template_unavailable() is not None:
            return None
        if self._renderer is None:
            self._renderer = self._start_renderer()
        asked = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        answer, _ = self._renderer.ask("render", where=self._artifact, **asked)
        return answer["text"]

    def close(self) -> None:
        """Stop the worker processes. May be called twice."""
        self._worker.close()
        if self._renderer is not None:
            self._renderer.close()

    @property
    def _label(self) -> str:
        return f"llama.cpp ({self._backend.name})"

    def _start_renderer(self) -> WorkerProcess:
        # 0700, so nobody else can connect. A socket's path is limited to some 100 bytes, whatever TMPDIR says.
        short = None if len(tempfile.gettempdir()) < 60 else "/tmp"
        folder = Path(tempfile.mkdtemp(prefix="llmx-", dir=short))
        renderer = WorkerProcess(
            RENDERER,
            label="llama.cpp's server",
            timeout=self._answer_seconds,
            environment=ENVIRONMENT,
            folder=folder,
        )
        try:
            address = str(folder / "template.sock")
            renderer.ask("open", where=self._artifact, artifact=str(self._artifact), address=address)
        except CheckFailed as error:
            problems = (*error.problems, *renderer.last_words())
            raise CheckFailed(
                error.what, where=error.where, fix=error.fix, problems=tuple(dict.fromkeys(problems))
            ) from None
        except BaseException:
            renderer.close()
            raise
        return renderer
