"""A TensorRT engine that runs, inside the worker process: logits of positions, over a cache that stays on the device.

    two buffers    step n: past = A, present = B    step n + 1: past = B, present = A
    in place       past = present = A: the engine writes the new positions into what it reads

`start` says how many positions count, so that going back to an earlier one is to begin there: what lies behind is
overwritten, and never seen meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmx.errors import CheckFailed, ResourceError, UsageError
from llmx.validate.runtimes.memory import peak_rss_bytes
from llmx.validate.runtimes.tensorrt_decoding import DeviceDecoder
from llmx.validate.runtimes.tensorrt_engine import (
    LOGITS,
    PARTS,
    START,
    TOKENS,
    Bounds,
    Engine,
    opened,
    past,
    present,
)

BLOCK = 512  # positions run at once where nobody says otherwise, and the engine takes so many
IN_PLACE, TWO_BUFFERS = "in place", "two buffers"
TRIALS = 5  # of a timing; the median counts


@dataclass(frozen=True, slots=True)
class Lane:
    """An execution context on one profile. shapes: what it was told last; telling it again would set it up anew."""

    bounds: Bounds
    context: Any
    shapes: dict[str, tuple[int, ...]]


class LoadedEngine:
    """One engine, one sequence at a time. Addresses are of the device; rows of logits come back as f32."""

    def __init__(self, trt: Any, device: Any, path: Path, *, cache: str, context: int, batch: int | None) -> None:
        """cache: IN_PLACE or TWO_BUFFERS. context: positions of a sequence. batch: positions at once, None for BLOCK.

        Raises UsageError for a context that the engine was not built for, IntegrityError for no such engine.
        """
        started, self._free = time.monotonic(), device.free_bytes()
        self.device, self._path, self._in_place = device, path, cache == IN_PLACE
        self.engine: Engine = opened(trt, path)
        self._profiles, self._capacity = _fitting(self.engine.profiles, context)
        most = max(bounds.positions[1] for bounds in self._profiles)
        self.context, self._batch = context, min(batch or BLOCK, context, most)
        self.width = self.engine.vocabulary
        self._keys = [(layer, part) for layer in range(self.engine.layers) for part in PARTS]
        self._lanes: dict[int, Lane] = {}
        self._addresses = self._allocated()
        self.turn = 0  # which of the two buffers is the past
        self._done: list[int] = []
        device.wait()
        self._load_seconds = time.monotonic() - started
        self.build = f"{self.engine.library}, {device.name}, CUDA {device.driver}, cache {cache}"

    def logits(self, tokens: Sequence[int], decode_from: int | None) -> Iterator[np.ndarray]:
        """Yield f32[t, V] blocks of a new sequence: whole batches up to decode_from, then one position at a time."""
        self._check_fits(len(tokens))
        self._done = []
        first = len(tokens) if decode_from is None else decode_from
        cuts = [*range(0, first, self._batch), *range(first, len(tokens) + 1)]
        for start, stop in itertools.pairwise(cuts):
            yield self._step(tokens[start:stop], rows=stop - start)

    def generate(self, tokens: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
        """Return up to count greedy ids; one of ends is the last."""
        self._check_fits(len(tokens) + count)
        made: list[int] = []
        row = self.extend(tokens, 0)[0]
        while len(made) < count:
            made.append(int(row.argmax()))
            if made[-1] in ends or len(made) == count:
                break
            row = self._step(made[-1:], rows=1)[0]
        return made

    def extend(self, tokens: Sequence[int], keep: int) -> np.ndarray:
        """Return f32[1, V]: the logits after tokens behind the first keep positions of what was run last."""
        if not tokens or not 0 <= keep <= len(self._done):
            raise UsageError(f"{len(tokens)} tokens cannot follow {keep} of {len(self._done)} positions")
        self._check_fits(keep + len(tokens))
        self._done = self._done[:keep]
        starts = range(0, len(tokens), self._batch)
        return [self._step(tokens[start : start + self._batch], rows=1) for start in starts][-1]

    def speed(self, prefill: int, decode: int) -> dict[str, Any]:
        """Return the figures of Speed for made-up tokens: medians of TRIALS, after a run that warms everything.

        Prefill and decode are timed by the device's own clock; the first token with all that the host does for it.
        """
        self._check_fits(prefill + decode)
        tokens = [index % self.width for index in range(prefill)]
        plain = self.generate(tokens, decode)
        firsts = [self._first_seconds(tokens) for _ in range(TRIALS)]
        prefills = [self._prefill_seconds(tokens) for _ in range(TRIALS)]
        decoder = DeviceDecoder(self)
        decodes = [self._decode_seconds(decoder, tokens, plain[0], decode) for _ in range(TRIALS)]
        how = f"{decoder.how}; {_equal(plain[1:], decoder.made(prefill, decode))}"
        used = max(self._free - self.device.free_bytes(), 0)
        decoder.close()
        return {
            "prefill_tokens_per_second": prefill / float(np.median(prefills)),
            "decode_tokens_per_second": decode / float(np.median(decodes)),
            "time_to_first_token_seconds": float(np.median(firsts)),
            "load_seconds": self._load_seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": used,
            "how": how,
        }

    def address(self, name: str) -> int:
        """Return where an input or output lies now; of the cache it changes with every step on two buffers."""
        return self._addresses[name]

    def send(self, tokens: Sequence[int], start: int) -> None:
        """Put tokens and their first position where the engine reads them."""
        for name, values in ((TOKENS, tokens), (START, [start])):
            self.device.upload(self._addresses[name], np.array(values, self.engine.tensors[name].dtype))

    def execute(self, count: int) -> None:
        """Send one run over count new positions to the stream. Raises CheckFailed with TensorRT's words."""
        lane = self._lane(count)
        for name, shape in self._shapes(count).items():
            if lane.shapes.get(name) != shape:
                self._must(lane.context.set_input_shape(name, shape), f"{name} of the shape {list(shape)}")
                lane.shapes[name] = shape
        for name, address in self._bound().items():
            self._must(lane.context.set_tensor_address(name, address), f"an address for {name}")
        self._must(lane.context.execute_async_v3(self.device.stream), f"a run over {count} positions")
        self.turn = (self.turn + 1) % self.turns

    @property
    def turns(self) -> int:
        """Return after how many steps everything lies at the same addresses again."""
        return 1 if self._in_place else 2

    def _step(self, tokens: Sequence[int], *, rows: int) -> np.ndarray:
        """Run new positions over the cache, which then holds them as well; f32[rows, V] of the last of them."""
        count = len(tokens)
        self.send(tokens, len(self._done))
        self.execute(count)
        logits = self.engine.tensors[LOGITS]
        first = self._addresses[LOGITS] + (count - rows) * self.width * np.dtype(logits.dtype).itemsize
        found = self.device.download(first, (rows, self.width), logits.dtype)
        self._done = [*self._done, *tokens]
        return found

    def _first_seconds(self, tokens: Sequence[int]) -> float:
        """From the prompt's ids to the first new one, with all that the host does for it."""
        started = time.monotonic()
        self.extend(tokens, 0)[0].argmax()
        return time.monotonic() - started

    def _prefill_seconds(self, tokens: Sequence[int]) -> float:
        """Of the device, without copies to and from it."""
        seconds = 0.0
        for start in range(0, len(tokens), self._batch):
            block = tokens[start : start + self._batch]
            self.send(block, start)
            seconds += self.device.seconds(lambda: self.execute(len(block)))  # noqa: B023 - called at once
        return seconds

    def _decode_seconds(self, decoder: DeviceDecoder, tokens: Sequence[int], first: int, count: int) -> float:
        self.extend(tokens, 0)
        return decoder.seconds(first, len(tokens), count)

    def _lane(self, count: int) -> Lane:
        """The context whose profile is the narrowest for so many positions."""
        fitting = [one for one in self._profiles if one.positions[0] <= count <= one.positions[1]]
        if not fitting:
            raise CheckFailed(f"no profile of the engine takes {count} positions at once", where=self._path)
        bounds = min(fitting, key=lambda one: one.positions[1])
        if bounds.number not in self._lanes:
            context = self.engine.handle.create_execution_context()
            if context is None:  # it is refused for nothing else
                what = "the GPU's memory has no room for what the engine computes in between"
                raise ResourceError(what, where=self._path, problems=self.engine.log.lines)
            if len(self.engine.profiles) > 1:
                self._must(
                    context.set_optimization_profile_async(bounds.number, self.device.stream),
                    f"profile {bounds.number}",
                )
                self.device.wait()
            self._lanes[bounds.number] = Lane(bounds, context, {})
        return self._lanes[bounds.number]

    def _shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        return {TOKENS: (1, count), START: (1,), **{past(*key): self._cache_shape(past(*key)) for key in self._keys}}

    def _cache_shape(self, name: str) -> tuple[int, ...]:
        _, heads, _, size = self.engine.tensors[name].shape
        return (1, heads, self._capacity, size)

    def _bound(self) -> dict[str, int]:
        """Every input and output -> its address in the next run."""
        found = {name: self._addresses[name] for name in (TOKENS, START, LOGITS)}
        for key in self._keys:
            both = self._addresses[past(*key)], self._addresses[present(*key)]
            found[past(*key)], found[present(*key)] = both if self.turn == 0 else both[::-1]
        return found

    def _allocated(self) -> dict[str, int]:
        """Everything that the engine reads and writes, for the largest block; the cache is of zeros, for what was
        never written takes part in sums with a weight of zero."""
        sizes = {
            TOKENS: (self._batch,),
            START: (1,),
            LOGITS: (self._batch, self.width),
            **{name: self._cache_shape(past(*key)) for key in self._keys for name in (past(*key), present(*key))},
        }
        shared = {present(*key): past(*key) for key in self._keys} if self._in_place else {}
        found = {
            name: self.device.allocate(int(np.prod(shape)) * np.dtype(self.engine.tensors[name].dtype).itemsize)
            for name, shape in sizes.items()
            if name not in shared
        }
        return {**found, **{name: found[other] for name, other in shared.items()}}

    def _must(self, given: Any, what: str) -> None:
        if not given:
            raise CheckFailed(f"TensorRT refuses {what}", where=self._path, problems=self.engine.log.lines)

    def _check_fits(self, length: int) -> None:
        if length > self.context:
            raise UsageError(f"{length} tokens do not fit the context of {self.context} that was asked for")


def _fitting(profiles: Sequence[Bounds], context: int) -> tuple[list[Bounds], int]:
    """The profiles for sequences of so many positions, and the cache's capacity, which is no less than they take."""
    most = max(bounds.capacity[1] for bounds in profiles)
    if context > most:
        what = f"the engine was built for sequences of up to {most} tokens; {context} were asked for"
        raise UsageError(what, fix="ask for fewer, or build the engine with a larger --max-length")
    fitting = [bounds for bounds in profiles if context <= bounds.capacity[1]]
    return fitting, max(context, *(bounds.capacity[0] for bounds in fitting))


def _equal(plain: Sequence[int], made: Sequence[int]) -> str:
    """How far the ids of the timed loop are those of the plain one; raises CheckFailed where not even the first is."""
    count = min(len(plain), len(made))
    same = sum(a == b for a, b in zip(plain, made, strict=False))
    if count and plain[0] != made[0]:
        raise CheckFailed(f"decoding on the device gave the id {made[0]}, a plain step {plain[0]}")
    return f"{same} of {count} ids as in plain steps"
