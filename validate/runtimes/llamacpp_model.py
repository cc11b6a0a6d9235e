"""A model loaded by llama.cpp, inside the worker process: ids, logits, greedy text and times from its C interface."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import CheckFailed, IntegrityError, ResourceError, UsageError
from llmx.validate.runtimes.llamacpp_library import Library, Value
from llmx.validate.runtimes.memory import peak_rss_bytes

# Positions run at once where every one's logits are wanted: the block [BLOCK, V] is the largest thing in memory
# (77 MB for a vocabulary of 150 000) and does not grow with the text.
BLOCK = 128
# llama.cpp's own physical batch; speed is measured with it.
SPEED_BLOCK = 512
# Float32 key-value cache (ggml type 0), flash attention off.
EXACT: dict[str, Value] = {"type_k": 0, "type_v": 0, "flash_attn_type": 0}
# A list of devices that ends at once: the processor alone, also where a GPU is built in, so that numbers compare.
NO_DEVICES = (ctypes.c_void_p * 1)()
SIZES = ("n_batch", "n_ubatch", "n_threads", "n_threads_batch")


class LoadedModel:
    """One model and its context; `log` is where llama.cpp's warnings and errors are collected."""

    def __init__(
        self, library: Library, log: deque[str], artifact: Path, *, threads: int, context: int, batch: int, exact: bool
    ) -> None:
        """Load artifact. Raises IntegrityError with llama.cpp's words; ResourceError where the context is too large."""
        begin = time.perf_counter()
        self._library, self._log = library, log
        self._length, self._threads, self._batch = context, threads, batch
        self._model = self._load(artifact)
        self._vocab = library.api.llama_model_get_vocab(self._model)
        self.width: int = library.api.llama_vocab_n_tokens(self._vocab)
        self._settings = self._context_settings(context, batch) | (EXACT if exact else {})
        self._context: int | None = self._new_context(self._settings)
        self._extended = 0  # positions in the cache that `extend` may go on from
        self.load_seconds = time.perf_counter() - begin

    @property
    def build(self) -> str:
        """Return the package, the llama.cpp build and the instruction sets it uses."""
        features = (self._library.api.llama_print_system_info() or b"").decode(errors="replace")
        return f"{self._library.build} {' '.join(features.split())}".rstrip(" |")

    @property
    def has_template(self) -> bool:
        """Return whether the file carries a chat template (llama.cpp invents one where it does not)."""
        return self._library.api.llama_model_chat_template(self._model, None) is not None

    # --- text and ids

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the ids of text."""
        data = text.encode()
        room = len(data) + 16
        for _ in range(2):
            ids = (ctypes.c_int32 * room)()
            count = self._library.api.llama_tokenize(
                self._vocab, data, len(data), ids, room, add_special, parse_special
            )
            if count >= 0:
                return ids[:count]
            room = -count  # llama.cpp's way of asking for more
        raise CheckFailed("llama.cpp gives no ids for a text", problems=self._words())

    def piece(self, token: int) -> bytes:
        """Return the bytes of one id."""
        self._check_ids([token])
        room = 64
        for _ in range(2):
            text = ctypes.create_string_buffer(room)
            count = self._library.api.llama_token_to_piece(self._vocab, token, text, room, 0, True)
            if count >= 0:
                return text.raw[:count]
            room = -count
        raise CheckFailed(f"llama.cpp gives no text for token {token}", problems=self._words())

    def special(self) -> dict[str, Any]:
        """Return the special ids (None for llama.cpp's -1) and every end-of-generation id, sorted."""
        api, vocab = self._library.api, self._vocab
        bos, eos = api.llama_vocab_bos(vocab), api.llama_vocab_eos(vocab)
        return {
            "bos": None if bos < 0 else bos,
            "eos": None if eos < 0 else eos,
            "add_bos": bool(api.llama_vocab_get_add_bos(vocab)),
            "end_of_generation": [token for token in range(self.width) if self._ends(token)],
        }

    # --- running

    def logits(self, tokens: Sequence[int], decode_from: int | None) -> Iterator[np.ndarray]:
        """Return an iterator of f32[t, V] blocks, each valid until the next; the checks are made at once."""
        self._check_ids(tokens)
        self._check_room(len(tokens))
        split = len(tokens) if decode_from is None else min(max(decode_from, 0), len(tokens))
        return self._blocks(tokens, split)

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to count greedy ids; an end-of-generation id is the last."""
        self._check_ids(tokens)
        self._check_room(len(tokens) + count)
        if not tokens:
            raise UsageError("there is nothing to continue: the prompt has no tokens")
        if count < 1:
            return []
        context = self._empty_context()
        ids = [self._greedy_after(context, tokens, 0, self._batch)]
        while len(ids) < count and not self._ends(ids[-1]):
            ids.append(self._greedy_after(context, ids[-1:], len(tokens) + len(ids) - 1, self._batch))
        return ids

    def extend(self, tokens: Sequence[int], keep: int) -> np.ndarray:
        """Return f32[1, V], the logits after the first keep positions of the last extended sequence and tokens."""
        self._check_ids(tokens)
        self._check_room(keep + len(tokens))
        if not tokens or not 0 <= keep <= self._extended:
            raise UsageError(f"{len(tokens)} tokens cannot follow position {keep} of {self._extended}")
        context = self._kept_context(keep) if keep else self._empty_context()
        self._extended = 0
        for offset in range(0, len(tokens), self._batch):
            self._decode(context, tokens[offset : offset + self._batch], keep + offset, every=False)
        self._extended = keep + len(tokens)
        return self._rows(context, 1).copy()

    def speed(self, prefill: int, decode: int) -> dict[str, Any]:
        """Return Speed's fields, measured in a context with llama.cpp's usual settings, after a warm-up."""
        if prefill < 1 or decode < 1:
            raise UsageError("speed needs at least one token to read and one to write")
        self._drop_context()
        context = self._new_context(self._context_settings(prefill + decode, SPEED_BLOCK))
        # Any fixed, spread-out ids will do: the arithmetic is the same for all of them.
        prompt = [(7919 * index + 11) % self.width for index in range(prefill)]
        try:
            self._greedy_after(context, prompt[:SPEED_BLOCK], 0, SPEED_BLOCK)
            self._clear(context)
            begin = time.perf_counter()
            token = self._greedy_after(context, prompt, 0, SPEED_BLOCK)
            first = time.perf_counter()
            for position in range(prefill, prefill + decode):
                token = self._greedy_after(context, [token], position, SPEED_BLOCK)
            end = time.perf_counter()
        finally:
            self._library.api.llama_free(context)
        return {
            "prefill_tokens_per_second": prefill / (first - begin),
            "decode_tokens_per_second": decode / (end - first),
            "time_to_first_token_seconds": first - begin,
            "load_seconds": self.load_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    # --- below: llama.cpp call by call

    def _load(self, artifact: Path) -> int:
        settings: dict[str, Value] = {"devices": ctypes.addressof(NO_DEVICES), "n_gpu_layers": 0}
        model = self._library.load_model(artifact, settings)
        if not model:
            raise IntegrityError("llama.cpp does not load this file", where=artifact, problems=self._words())
        return model

    def _context_settings(self, length: int, block: int) -> dict[str, Value]:
        return {
            "n_ctx": length,
            "n_batch": min(block, length),
            "n_ubatch": min(block, length),
            "n_threads": self._threads,
            "n_threads_batch": self._threads,
            "offload_kqv": False,
            "op_offload": False,
        }

    def _new_context(self, settings: Mapping[str, Value]) -> int:
        api = self._library.api
        context = self._library.new_context(self._model, settings)
        if not context:
            fix = "ask for a shorter context"
            raise ResourceError("llama.cpp cannot make a context of this size", problems=self._words(), fix=fix)
        # What was asked for must have arrived: a field at another place would be a silent change of the measurement.
        taken = {name: getattr(api, f"llama_{name}")(context) for name in SIZES}
        wrong = [f"{name} = {value}, not {settings[name]}" for name, value in taken.items() if value != settings[name]]
        if wrong:
            raise CheckFailed("llama.cpp did not take the settings it was given", problems=wrong)
        return context

    def _empty_context(self) -> int:
        self._extended = 0
        if self._context is None:
            self._context = self._new_context(self._settings)
        self._clear(self._context)
        return self._context

    def _kept_context(self, keep: int) -> int:
        assert self._context is not None, "an extended sequence stands in it"
        memory = self._library.api.llama_get_memory(self._context)
        # A cache of a sliding window may have forgotten what must be taken up again.
        if not self._library.api.llama_memory_seq_rm(memory, 0, keep, -1):
            raise CheckFailed("the runtime cannot go back to an earlier position", fix="extend from position 0")
        return self._context

    def _clear(self, context: int) -> None:
        self._library.api.llama_memory_clear(self._library.api.llama_get_memory(context), True)

    def _drop_context(self) -> None:
        self._extended = 0
        if self._context is not None:
            self._library.api.llama_free(self._context)
            self._context = None

    def _blocks(self, tokens: Sequence[int], split: int) -> Iterator[np.ndarray]:
        context = self._empty_context()
        for start in range(0, split, self._batch):
            part = tokens[start : min(start + self._batch, split)]
            self._decode(context, part, start, every=True)
            yield self._rows(context, len(part))
        for start in range(split, len(tokens), BLOCK):
            part = tokens[start : start + BLOCK]
            block = np.empty((len(part), self.width), np.float32)
            for index, token in enumerate(part):
                self._decode(context, [token], start + index, every=True)
                block[index] = self._rows(context, 1)[0]
            yield block

    def _greedy_after(self, context: int, tokens: Sequence[int], start: int, block: int) -> int:
        for offset in range(0, len(tokens), block):
            self._decode(context, tokens[offset : offset + block], start + offset, every=False)
        return int(np.argmax(self._rows(context, 1)[0]))

    def _decode(self, context: int, tokens: Sequence[int], start: int, every: bool) -> None:
        """Run tokens at positions start, start + 1, ...; keep the logits of every one, or of the last."""
        api, count = self._library.api, len(tokens)
        batch = api.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = every or index == count - 1
            code = api.llama_decode(context, batch)
        finally:
            api.llama_batch_free(batch)
        if code:
            where = f"positions {start} to {start + count - 1}"
            raise CheckFailed(f"llama.cpp fails to run the model (code {code})", where=where, problems=self._words())

    def _rows(self, context: int, count: int) -> np.ndarray:
        """Return f32[count, V]: llama.cpp's own memory, overwritten by the next run. Waits for the result."""
        values = self._library.api.llama_get_logits(context)
        if not values:
            raise CheckFailed("llama.cpp gives no logits", problems=self._words())
        return np.ctypeslib.as_array(values, (count, self.width))

    def _ends(self, token: int) -> bool:
        return bool(self._library.api.llama_vocab_is_eog(self._vocab, token))

    def _check_ids(self, tokens: Sequence[int]) -> None:
        # llama.cpp may read past its tables for an id that does not exist.
        wrong = sorted({token for token in tokens if not 0 <= token < self.width})
        if wrong:
            raise UsageError(f"ids outside the vocabulary of {self.width}: {', '.join(map(str, wrong[:8]))}")

    def _check_room(self, count: int) -> None:
        if count > self._length:
            raise UsageError(f"{count} tokens do not fit the context of {self._length} that the session was opened for")

    def _words(self) -> list[str]:
        """Return and forget what llama.cpp said last."""
        lines = list(self._log)[-12:]
        self._log.clear()
        return lines
