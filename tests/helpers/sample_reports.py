"""Reports as a validation leaves them, with every curve and table filled, sound and failed; made without a model."""

from __future__ import annotations

import math
import random
from typing import Any

from llmx.validate.report import Check, Report, at_most, not_applicable, not_run, reported

FACTS: dict[str, Any] = {
    "artifact": {"name": "tiny-Q4_K_M.gguf", "bytes": 2_270_000, "bits_per_weight": 5.0123},
    "reference": {"id": "org/tiny", "revision": "0123abc", "kind": "transformers, float32, eager attention"},
    "runtime": {"name": "llama.cpp", "build": "xllamacpp 2026.10.11549, CPU: AVX2"},
    "settings": {"positions": 512, "chunk": 256, "threads": 2, "text": "built-in sample", "text_sha256": "ab" * 32},
}
CHECKS = (
    at_most("bytes.tensors", 0, 0, "tensors", "the architecture's own tensors", detail="46 tensors"),
    at_most("tokens.ids", 0, 0, "texts", "the Hugging Face tokenizer of the checkpoint", detail="61 texts"),
    at_most("quality.kl", 0.0183, 0.15, "nats", "each type's limit", detail="mean KL(transformers f32 ‖ artifact)"),
    reported("quality.same_top1", 0.9414, "share", "635 positions"),
    reported("quality.ppl_ratio", 1.0123, "ratio"),
    reported("speed.decode", 801.5, "tokens/s", "2 threads, 256 tokens in, 32 out"),
    not_applicable("template.embedded", "the checkpoint has no chat template"),
    not_run("template.runtime", "no way to its engine", required=False),
)
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "norm")


def details(positions: int = 700, layers: int = 6, name: str = "blk") -> dict[str, Any]:
    """Every curve and table of a report; `name` begins the names of its tensors."""
    dice = random.Random(0)
    tensors = [
        {
            "name": f"{name}.{layer}.{role}.weight",
            "type": "F32" if role == "norm" else "Q4_K",
            "bytes": 1_000 if role == "norm" else 36_000,
            "layer": layer,
            "role": role,
            "rms": 0.0 if role == "norm" else dice.uniform(0.06, 0.09),
            "expected": 0.0 if role == "norm" else 0.07,
        }
        for layer in range(layers)
        for role in ROLES
    ]
    embedding = {"name": f"{name}.embedding", "type": "Q6_K", "bytes": 400_000, "layer": None, "role": "embedding"}
    return {
        "kl_by_position": [{"position": i, "kl": 10 ** dice.gauss(-2.5, 0.7)} for i in range(positions)],
        "kl_quantiles": {"0.5": 0.004, "0.9": 0.04, "0.99": 0.2, "0.999": 0.8},
        "speed": {"prefill_tokens_per_second": 9000.5, "decode_tokens_per_second": 801.5, "peak_rss_bytes": 98_000_000},
        "tensors": [{**embedding, "rms": 0.018, "expected": None}, *tensors],
    }


def sound(**changes: Any) -> dict[str, Any]:
    """A report that passed, with other details where they are given."""
    return Report(CHECKS, FACTS, {**details(), **changes}).to_dict()


def failed(name: str = "blk.3.down.weight") -> dict[str, Any]:
    """A report of a file whose one tensor is damaged, which also lacks its runtime's speed."""
    checks = (
        *CHECKS[:2],
        at_most("quality.kl", math.inf, 0.15, "nats", "each type's limit", detail=f"{name}: broken"),
        Check("bytes.finite", False, 3, 0, "values", "a weight is a number", f"{name}: 3 values"),
        not_run("speed.decode", "the runtime refuses the artifact"),
    )
    blame = {
        "layer": 3,
        "tensor": name,
        "reason": f"{name} holds values that are no numbers",
        "suspects": [{"tensor": name, "score": math.inf, "reason": "3 values are NaN"}],
        "layers": [{"layer": layer, "error": 1e-6 if layer < 3 else 0.4} for layer in range(6)],
    }
    return Report(checks, FACTS, {**details(), "blame": blame}).to_dict()
