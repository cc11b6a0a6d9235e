"""A TensorRT-LLM checkpoint on transformers, in float32: its own configuration, tokenizer and decoded weights.

It is an emulation, and says so: TensorRT-LLM's kernels run on NVIDIA's processors alone. What the folder rounds while
it runs (the inputs of its matrices, its keys and values) is rounded here the same way, see emulation.py. So what it
tells is what the numbers in the folder cost; it tells no speed, and not whether TensorRT-LLM takes the folder.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import psutil

from llmx.errors import CheckFailed, ResourceError, UnsupportedError, UsageError
from llmx.validate.oracle import quiet, torch_threads
from llmx.validate.runtimes import Speed
from llmx.validate.runtimes.huggingface_text import FolderText
from llmx.validate.runtimes.worker_process import check_sizes
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_opening import open_trtllm

if TYPE_CHECKING:
    import torch

NAME = "transformers"
NO_SPEED = "an emulation on the processor tells no speed of TensorRT-LLM"
FLOAT_BYTES = 4


class TransformersCpu:
    """transformers on the processor."""

    name = NAME
    # What `exact` leaves out is rounded alike in every run: a loss, which the quality tells, and no noise.
    fixed = frozenset({"exact"})

    def unavailable(self) -> str | None:
        """Return None: llmx itself needs transformers and torch."""
        return None

    def open(
        self, artifact: Path, *, threads: int, context: int, exact: bool = False, batch: int | None = None
    ) -> TransformersSession:
        """Decode the folder's weights to float32, load them, and return the session.

        exact: nothing is rounded while it runs. batch: positions run at once at most, all where it is None.
        Raises: IntegrityError for a broken folder; UnsupportedError for what transformers cannot load; ResourceError
        where the float32 weights do not fit into memory or onto the disk.
        """
        check_sizes(threads, context, batch)
        found = open_trtllm(artifact)
        needed, available = FLOAT_BYTES * found.weights, psutil.virtual_memory().available
        if needed > available:
            raise ResourceError(f"the weights in float32 take {needed} bytes of memory; {available} are available")
        return TransformersSession(found, threads, context, exact=exact, batch=batch)


class TransformersSession:
    """One folder, one sequence at a time; see `Session`."""

    def __init__(self, artifact: TrtllmArtifact, threads: int, context: int, *, exact: bool, batch: int | None) -> None:
        from llmx.validate.runtimes import trtllm_model

        self._folder, self._threads, self._context = artifact.folder.path, threads, context
        self._batch = min(batch or context, context)
        with quiet(), TemporaryDirectory(prefix="llmx-floats-") as floats:
            source = trtllm_model.write_floats(artifact, Path(floats))
            self._model: Any = trtllm_model.load(Path(floats), self._folder)
        self._run = trtllm_model.Rounded.of(source, self._model, exact=exact)
        self._text_reader: FolderText | None = None
        self._tokens: list[int] = []
        self._cache: Any = None
        self.vocab = int(self._model.get_output_embeddings().weight.shape[0])
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (NAME, "torch"))
        self.build = f"{versions}, float32: an emulation of {self._run.told}, not TensorRT-LLM's kernels"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def logits(self, tokens: Sequence[int], decode_from: int | None = None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks of a new sequence; positions from decode_from on run one at a time."""
        self._check_fits(len(tokens))
        self._start()
        first = len(tokens) if decode_from is None else decode_from
        cuts = [*range(0, first, self._batch), *range(first, len(tokens) + 1)]
        for start, stop in itertools.pairwise(cuts):
            yield self._step(tokens[start:stop])

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count greedy ids; one that ends generation is the last."""
        ends = self.special()["end_of_generation"]
        assert isinstance(ends, frozenset)
        made: list[int] = []
        row = self.extend(tokens)
        while len(made) < count:
            made.append(int(row.argmax()))
            if made[-1] in ends or len(made) == count:
                break
            row = self._step(made[-1:])[-1]
        return made

    def extend(self, tokens: Sequence[int], keep: int = 0) -> np.ndarray:
        """Return f32[V], the logits after the first keep positions of the last sequence and tokens."""
        if not tokens or not 0 <= keep <= len(self._tokens):
            raise UsageError(f"{len(tokens)} tokens cannot follow {keep} of {len(self._tokens)} positions")
        self._check_fits(keep + len(tokens))
        if keep and keep == len(self._tokens):
            return self._step(tokens)[-1]
        before = self._tokens[:keep]
        self._start()
        # A sliding layer forgets, so going back is running again.
        return self._step([*before, *tokens])[-1]

    def speed(self, prefill: int, decode: int) -> Speed:
        """Raises: UnsupportedError: there is none worth telling."""
        raise UnsupportedError(NO_SPEED)

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of text."""
        return self._text().tokenize(text, add_special, parse_special)

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id; a special token gives its name."""
        return self._text().piece(token)

    def special(self) -> Mapping[str, object]:
        """Return bos: int | None, eos: int | None, add_bos: bool, end_of_generation: frozenset[int]."""
        return self._text().special()

    def render(self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True) -> str | None:
        """Return the conversation in the folder's chat template, or None where it has none."""
        return self._text().render(messages, add_generation_prompt)

    def template_unavailable(self) -> str | None:
        """Return why `render` gives None, or None."""
        return self._text().template_unavailable()

    def close(self) -> None:
        """Let go of the weights. May be called twice."""
        self._model = self._cache = None

    def _text(self) -> FolderText:
        if self._text_reader is None:
            self._text_reader = FolderText(self._folder)
        return self._text_reader

    def _start(self) -> None:
        self._tokens, self._cache = [], self._run.cache(self._model)

    def _step(self, tokens: Sequence[int]) -> np.ndarray:
        """f32[new, V]: run new positions over the cache, which then holds them as well."""
        import torch

        ids = torch.tensor([list(tokens)])
        with quiet(), torch.inference_mode(), torch_threads(self._threads), self._run.rounding():
            made = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._tokens += tokens
        return self._rows(made.logits)

    def _rows(self, logits: torch.Tensor) -> np.ndarray:
        if logits.shape[-1] != self.vocab:
            raise CheckFailed(f"the model gives {logits.shape[-1]} logits for {self.vocab} tokens")
        return logits[0].float().numpy()

    def _check_fits(self, length: int) -> None:
        if length > self._context:
            raise UsageError(f"{length} tokens do not fit the context of {self._context} that was asked for")
