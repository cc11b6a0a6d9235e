"""A TensorRT-LLM checkpoint as the checks see it: whole tensors by name, whatever files and parts hold them.

hf, opened            the names of its own files: model.layers.0.self_attn.q_proj.weight
hf, mapped            the canonical names of the checkpoint: layers.0.q.weight; experts under each other,
                      rows of fused matrices cut apart, see trtllm_hf.py
ranks, opened         the names of each rank: rank0.transformer.layers.0.attention.qkv.weight
ranks, mapped         as above, put together from all ranks, see trtllm_ranks.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from llmx.exporters.gguf_metadata import SCALED, SOLVER_KEY
from llmx.validate.trtllm_folder import Folder
from llmx.validate.trtllm_weights import Held

SCALING = ("AWQ", "SQ")  # in the name of an algorithm that scales weights before it rounds them
OURS = "llmx."  # what begins like this in a file's metadata, llmx wrote


@dataclass(frozen=True, slots=True)
class TrtllmArtifact:
    """A folder and its tensors. opened: they under the names of its files.

    cache: the name of a scale of cached keys or values -> its value.
    """

    folder: Folder
    tensors: Mapping[str, Held]
    opened: Mapping[str, Held]
    cache: Mapping[str, float]

    @property
    def format(self) -> str:
        return "trtllm"

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.folder.paths

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What llmx wrote into the files; of another program's folder, that its weights were scaled, if they were."""
        told = self.folder.metadata
        if any(key.startswith(OURS) for key in told):
            return told
        scaled = any(word in (self.folder.quantization.algorithm or "").split("_") for word in SCALING)
        return {**told, SOLVER_KEY: SCALED} if scaled else told

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / self.weights if self.weights else None

    def release(self, name: str) -> None:
        """Hands the tensor's pages back to the system."""
        self.tensors[name].release()
