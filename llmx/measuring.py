"""Measuring the inputs of matrices without changing one: `llmx calibrate`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.validating import available_cores, check_threads


@dataclass(frozen=True, slots=True)
class CalibrateRequest:
    """Everything `llmx calibrate` can be told."""

    model: str
    output: Path
    calibration: Path | None = None
    calibration_tokens: int | None = None
    revision: str | None = None
    threads: int = 0
    device: str = "auto"
    force: bool = False


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """The importance matrix that was written. silent: experts that no token reached, by tensor."""

    path: Path
    entries: int
    tokens: int
    text: str
    silent: dict[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The object `llmx calibrate --json` prints."""
        return {
            "imatrix": str(self.path),
            "entries": self.entries,
            "tokens": self.tokens,
            "text": self.text,
            "silent_experts": self.silent,
            "seconds": round(self.seconds, 3),
        }


def calibrate(request: CalibrateRequest) -> CalibrateResult:
    """Run the model over a text and write an importance matrix that llama-quantize and `llmx export --imatrix` read.

    Raises: UsageError when the file exists, and what the steps raise.
    """
    from llmx.exporters import artifact, quantization
    from llmx.exporters.gguf_families import gguf_family
    from llmx.exporters.gguf_tensors import entries
    from llmx.exporters.importance import measure_importance
    from llmx.formats.imatrix import write_imatrix
    from llmx.models.model import open_model

    started = time.monotonic()
    check_threads(request.threads)
    artifact.check_targets([request.output], (), request.force)
    model = open_model(request.model, request.revision)
    wishes = quantization.Wishes(
        calibration=request.calibration,
        tokens=request.calibration_tokens,
        device=request.device,
    )
    threads = request.threads or available_cores()
    wanted = quantization.to_measure(model, wishes)
    calibration, _ = quantization.calibration_of(model, wanted, {})
    layout = entries(model.architecture, gguf_family(model.architecture), model.architecture.vocab)
    sums, counts = measure_importance(model, layout, calibration, threads)
    artifact.make_folder(request.output.parent)
    assert wanted.text is not None, "a text or the built-in corpus is read"
    chunks = sum(len(batch.tokens) for batch in calibration.batches)
    length = calibration.batches[0].tokens.shape[1]
    write_imatrix(request.output, sums, counts, datasets=[wanted.text.name], chunk_count=chunks, chunk_size=length)
    silent = {name: int((found == 0).sum()) for name, found in counts.items() if (found == 0).any()}
    spent = time.monotonic() - started
    return CalibrateResult(request.output, len(sums), chunks * length, wanted.text.name, silent, spent)
