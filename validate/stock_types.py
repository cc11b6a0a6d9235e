"""What the runtime's own mixes of types would take for the same checkpoint: sizes by their rules, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from llmx.exporters.gguf import GgufOptions, planned_steps
from llmx.exporters.gguf_families import gguf_family
from llmx.exporters.gguf_tensors import Entry
from llmx.exporters.gguf_types import file_type
from llmx.models.architecture import Architecture

SHOWN = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
ORIGIN = "llama.cpp's rules for the mix; not run"


def stock_types(architecture: Architecture, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Returns, for each of SHOWN, its name, the bytes of its tensors and their bits per weight."""
    family = gguf_family(architecture)
    found = []
    for name in SHOWN:
        steps = list(planned_steps(architecture, family, entries, GgufOptions(file_type(name), threads=1)))
        nbytes, weights = sum(step.nbytes for step in steps), sum(prod(step.shape) for step in steps)
        bits = round(8 * nbytes / weights, 4)
        found.append({"type": name, "bits_per_weight": bits, "bytes": nbytes, "origin": ORIGIN})
    return found
