"""What calibrating and solving take, estimated from the model's shapes: memory, disk, time.

memory   libraries + activations of every batch, unless they are kept on disk + the worst matrix: its moments with the
         activations at work, or its moments with a factor and its weights in every form that a solver has
disk     rows that are solved, until they are in the artifact; activations that are kept there; statistics
time     the forward passes, in proportion to weights times tokens, and solving, weights times columns
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llmx.models.architecture import Architecture, TensorSpec

# Libraries: torch and the compiled solvers. Bytes, measured on models of 0.3 to 4.4 B weights.
LIBRARIES = 700 << 20
PER_CHANNEL = 24  # a token and channel of a layer's widest tensors, float and quantized
PER_SOLVED_WEIGHT = 16
PER_MOMENT, PER_FACTOR = 16, 40  # an entry of in x in: two sets of moments, and a factor being made in float64
PER_RESIDUAL = 8  # an entry of out x in, of matrices that write the residual stream
PER_SCORE = 12  # an attention score of a batch at work
SECONDS_PER_WORK = 1.5e-10  # on one core, per weight and token: 150 CPU seconds for 42 M weights and 24,832 tokens
# On one core, per weight and token, and per weight and column. Those 150 seconds are about 90 and 60; one layer and the
# head of 4.4 B weights took about 400 on `fast`. What `best` takes is an estimate.
FORWARD_SECONDS = 9e-11
SOLVING_SECONDS = {"fast": 4e-10, "balanced": 2e-9, "best": 3.5e-9}
BATCH_TOKENS = 2048  # as quant.inputs, whose import takes torch
TABLES = ("embedding", "position_embedding")  # rounded some rows at a time, unless they are the head too
WRITES_RESIDUAL = ("o", "down", "expert_down")
SHARING = {"k": "q", "v": "q", "up": "gate", "expert_up": "expert_gate"}  # matrices that have one input


@dataclass(frozen=True, slots=True)
class CalibrationNeeds:
    """Of one model on so many tokens, in sequences of that length. effort: how hard is solved."""

    architecture: Architecture
    tokens: int
    length: int
    effort: str = "balanced"

    def memory(self, threads: int, *, shelved: bool) -> int:
        """Peak bytes. shelved: activations are kept on disk."""
        a = self.architecture
        channels = a.hidden + self._wide()
        scores = PER_SCORE * a.heads * min(self.tokens, BATCH_TOKENS) * self.length
        at_work = threads * (scores + PER_CHANNEL * min(self.tokens, BATCH_TOKENS) * channels)
        # A mixture of experts holds its layer in any case.
        held = PER_CHANNEL * self.tokens * channels if a.experts or not shelved else 0
        return LIBRARIES + held + max(self._worst(spec, at_work) for spec in self._matrices())

    def shelf_bytes(self) -> int:
        """Of the files with activations: a layer's input, its residual stream before and after, float and quantized."""
        return 2 * 4 * self.tokens * (4 * self.architecture.hidden + self._wide())

    def statistics_bytes(self) -> int:
        """Of a --statistics folder: the moments of every input."""
        seen: set[tuple[int | None, str]] = set()
        total = 0
        for spec in self._matrices():
            key = spec.layer, SHARING.get(spec.role, spec.role)
            if key not in seen:
                seen.add(key)
                total += (spec.shape[0] if len(spec.shape) == 3 else 1) * _moments(spec)
        return total

    def seconds(self, threads: int) -> float:
        """Of calibrating and solving, about."""
        parameters = sum(prod(spec.shape) for spec in self.architecture.tensors)
        solved = [spec for spec in self._matrices() if spec.role not in TABLES or self.architecture.tied]
        columns = sum(prod(spec.shape) * spec.shape[-1] for spec in solved)
        solving = SOLVING_SECONDS[self.effort] * columns
        return (FORWARD_SECONDS * parameters * self.tokens + solving) / threads

    def _wide(self) -> int:
        a = self.architecture
        return max(a.intermediate, a.experts_used * a.expert_intermediate)

    def _matrices(self) -> list[TensorSpec]:
        return [spec for spec in self.architecture.tensors if spec.part == "weight" and len(spec.shape) > 1]

    def _worst(self, spec: TensorSpec, at_work: int) -> int:
        """Bytes of gathering a matrix's moments, or of solving it: of one expert's, where there are some."""
        rows, columns = spec.shape[-2:]
        solving = PER_SOLVED_WEIGHT * rows * columns
        if spec.role in TABLES and not self.architecture.tied:
            return solving
        return _moments(spec) + max(at_work, solving + PER_FACTOR * columns * columns)


def _moments(spec: TensorSpec) -> int:
    rows, columns = spec.shape[-2:]
    return columns * (PER_MOMENT * columns + (PER_RESIDUAL * rows if spec.role in WRITES_RESIDUAL else 0))
