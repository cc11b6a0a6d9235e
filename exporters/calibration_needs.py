"""What calibrating and solving take, estimated from the model's shapes: memory, disk, time.

memory   libraries + activations (of every batch, or of those at work where they are kept on disk)
         + the worst matrix: moments and factors in² · 60, its weights in every form that a solver has them in
disk     rows that are solved, until they are in the artifact; activations that are kept there; statistics
time     in proportion to weights times tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from llmx.models.architecture import Architecture, TensorSpec

# Libraries: torch and the compiled solvers. Bytes, measured on models of 0.3 to 4.4 B weights.
LIBRARIES = 500 << 20
PER_CHANNEL = 24  # a token and channel of a layer's widest tensors, float and quantized
PER_SOLVED_WEIGHT = 16
PER_MOMENT = 60  # an entry of in x in: two sets of moments in float32, a factor being made in float64
PER_RESIDUAL = 8  # an entry of out x in, of matrices that write the residual stream
PER_SCORE = 12  # an attention score of a batch at work
SECONDS_PER_WORK = 1.5e-10  # on one core, per weight and token: 150 CPU seconds for 42 M weights and 24,832 tokens
BATCH_TOKENS = 2048  # as quant.inputs, whose import takes torch
WRITES_RESIDUAL = ("o", "down", "expert_down")
SHARING = {"k": "q", "v": "q", "up": "gate", "expert_up": "expert_gate"}  # matrices that have one input


@dataclass(frozen=True, slots=True)
class CalibrationNeeds:
    """Of one model on so many tokens, in sequences of that length."""

    architecture: Architecture
    tokens: int
    length: int

    def memory(self, threads: int, *, shelved: bool) -> int:
        """Peak bytes. shelved: activations are kept on disk."""
        return LIBRARIES + self._activations(threads, shelved=shelved) + max(map(self._solving, self._matrices()))

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
                total += (spec.shape[0] if len(spec.shape) == 3 else 1) * _moments(spec, 16)
        return total

    def seconds(self, threads: int) -> float:
        """Of calibrating and solving, about."""
        parameters = sum(prod(spec.shape) for spec in self.architecture.tensors)
        return parameters * self.tokens * SECONDS_PER_WORK / threads

    def _activations(self, threads: int, *, shelved: bool) -> int:
        a = self.architecture
        channels = a.hidden + self._wide()
        scores = PER_SCORE * a.heads * min(self.tokens, BATCH_TOKENS) * self.length
        at_work = threads * (scores + PER_CHANNEL * min(self.tokens, BATCH_TOKENS) * channels)
        held = PER_CHANNEL * self.tokens * channels
        return at_work + (held if a.experts or not shelved else 0)  # a mixture of experts holds its layer in any case

    def _wide(self) -> int:
        a = self.architecture
        return max(a.intermediate, a.experts_used * a.expert_intermediate)

    def _matrices(self) -> list[TensorSpec]:
        return [spec for spec in self.architecture.tensors if spec.part == "weight" and len(spec.shape) > 1]

    def _solving(self, spec: TensorSpec) -> int:
        """Bytes of solving a matrix, or one expert's."""
        rows, columns = spec.shape[-2:]
        table = spec.role == "position_embedding" or (spec.role == "embedding" and not self.architecture.tied)
        return PER_SOLVED_WEIGHT * rows * columns + (0 if table else _moments(spec, PER_MOMENT))


def _moments(spec: TensorSpec, each: int) -> int:
    rows, columns = spec.shape[-2:]
    return columns * (each * columns + (PER_RESIDUAL * rows if spec.role in WRITES_RESIDUAL else 0))
