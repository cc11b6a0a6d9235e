"""What an input or a cached key becomes where a TensorRT-LLM checkpoint rounds it: done by torch, on float32.

    FP8     x -> E4M3(x / s) · s, beyond ±448 · s its end
    INT8    x -> round(x / s) · s, in −128 … 127
    tokens  INT8 or FP8 with s of each token by itself, where a checkpoint holds none

A layer whose inputs are scaled multiplies them before. TensorRT-LLM's kernels add in other orders and types; what they
lose beside this rounding, nothing here shows.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

FLOAT8_LARGEST = 448.0
Rounding = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def round_float8(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """To the nearest E4M3 number of the scale."""
    within = (x / step).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    return within.to(torch.float8_e4m3fn).to(x.dtype) * step


def round_int8(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """To the nearest whole number of steps."""
    return (x / step).round().clamp(-128, 127) * step


ROUNDINGS: Mapping[str, tuple[Rounding, float]] = {
    # as TensorRT-LLM names the type -> the rounding, and what a token's largest value becomes
    "FP8": (round_float8, FLOAT8_LARGEST),
    "INT8": (round_int8, 127.0),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is done to the inputs of a matrix. kind: of ROUNDINGS, None for no rounding. step: None for each token's."""

    factors: torch.Tensor | None
    kind: str | None
    step: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.factors is None else x * self.factors
        if self.kind is None:
            return x
        rounding, largest = ROUNDINGS[self.kind]
        step = self.step
        if step is None:
            step = (x.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        return rounding(x, step)


class RoundedInputs(TorchFunctionMode):
    """Within it, every product with a matrix of the model is given its inputs as the checkpoint rounds them.

    A matrix is known by where it lies in memory, so that one expert of many, which is a view of all, is found too.
    """

    def __init__(self, inputs: Sequence[tuple[torch.Tensor, Inputs]]) -> None:
        super().__init__()
        placed = sorted((matrix.data_ptr(), matrix.nbytes, change) for matrix, change in inputs)
        self._starts = [start for start, _, _ in placed]
        self._placed = placed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and (change := self._found(args[1] if len(args) > 1 else kwargs["weight"])):
            args = (change(args[0]), *args[1:])
        elif func is torch.addmm and (change := self._found(args[2])):  # bias, inputs, matrix: GPT-2's Conv1D
            args = (args[0], change(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _found(self, matrix: torch.Tensor) -> Inputs | None:
        at = matrix.data_ptr()
        index = bisect.bisect_right(self._starts, at) - 1
        if index < 0:
            return None
        start, nbytes, change = self._placed[index]
        return change if at < start + nbytes else None


class RoundedCache(DynamicCache):
    """A key-value cache whose entries are rounded as they are written. steps: of each layer, of keys and values."""

    def __init__(self, config: Any, kind: str, steps: Mapping[int, tuple[float, float]]) -> None:
        super().__init__(config=config)
        self._rounding, self._steps = ROUNDINGS[kind][0], steps

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As DynamicCache.update: all keys and values so far, the new ones rounded."""
        of_keys, of_values = (torch.tensor(step) for step in self._steps[layer_idx])
        keys, values = self._rounding(key_states, of_keys), self._rounding(value_states, of_values)
        return super().update(keys, values, layer_idx, *args, **kwargs)


@contextmanager
def rounded(inputs: Sequence[tuple[torch.Tensor, Inputs]]) -> Iterator[None]:
    """RoundedInputs, where there is anything to round."""
    if not inputs:
        yield
        return
    with RoundedInputs(inputs):
        yield
