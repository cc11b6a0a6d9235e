"""Small random models of every family, made and run by transformers: what a decoder of ours is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB, CONTEXT = 96, 64

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 5}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 24,
    "rope_theta": 10000.0,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A configuration class and its arguments; `length` goes past every window and original context."""

    family: str
    changes: Mapping[str, Any]
    length: int = 80


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


CASES: dict[str, Case] = {
    "llama": Case("Llama", {}),
    "llama, tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama, all biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head size apart from hidden / heads": Case("Llama", {"head_dim": 16}),
    "llama, one head of keys": Case("Llama", {"num_key_value_heads": 1}),
    "llama, exact gelu": Case("Llama", {"hidden_act": "gelu"}),
    "llama, linear rope": Case("Llama", _rope(rope_type="linear", factor=2.5, rope_theta=5000.0)),
    "llama, dynamic rope past its context": Case("Llama", _rope(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "llama, dynamic rope within its context": Case("Llama", _rope(rope_type="dynamic", factor=2.0), length=40),
    "llama, llama3 rope": Case(
        "Llama",
        {
            "head_dim": 32,
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
                rope_theta=1000.0,
            ),
        },
    ),
    "llama, yarn": Case("Llama", {"head_dim": 32, **_rope(**YARN)}),
    "llama, yarn with every option": Case(
        "Llama",
        {
            "head_dim": 32,
            **_rope(**YARN, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False),
        },
    ),
    "llama, yarn with its attention factor": Case("Llama", _rope(**YARN, attention_factor=1.2)),
    "llama, longrope past its context": Case("Llama", _rope(**LONGROPE)),
    "llama, longrope within its context": Case("Llama", _rope(**LONGROPE, factor=3.0), length=20),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral past its window": Case("Mistral", {"sliding_window": 11}),
    "qwen2": Case("Qwen2", {}),
    "qwen2, its later layers slide": Case(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen2, yarn": Case("Qwen2", {"hidden_size": 64, **_rope(**YARN)}),
    "qwen3": Case("Qwen3", {"head_dim": 16}),
    "qwen3, its later layers slide": Case(
        "Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen3_moe": Case("Qwen3Moe", {"head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True, **EXPERTS}),
    "qwen3_moe, shares as they are": Case("Qwen3Moe", {"moe_intermediate_size": 24, **EXPERTS}),
    "qwen3_moe, one layer dense by name": Case(
        "Qwen3Moe", {"moe_intermediate_size": 24, "mlp_only_layers": [0], **EXPERTS}
    ),
    "qwen3_moe, every other layer sparse": Case(
        "Qwen3Moe", {"moe_intermediate_size": 24, "decoder_sparse_step": 2, **EXPERTS}
    ),
    "qwen3_moe past its window": Case(
        "Qwen3Moe", {"moe_intermediate_size": 24, "use_sliding_window": True, "sliding_window": 9, **EXPERTS}
    ),
    "mixtral": Case("Mixtral", EXPERTS),
    "mixtral past its window": Case("Mixtral", {**EXPERTS, "sliding_window": 9}),
    "gemma3": Case(
        "Gemma3Text",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3, linear rope on its full layers": Case(
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
    ),
    "phi3": Case("Phi3", {}),
    "phi3 past its window": Case("Phi3", {"sliding_window": 9}),
    "phi3, part of a head turned": Case(
        "Phi3", {"hidden_size": 64, **_rope(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75)}
    ),
    "phi3, longrope past its context": Case("Phi3", {"original_max_position_embeddings": 24, **_rope(**LONGROPE)}),
    "phi3, longrope within its context": Case(
        "Phi3", {"original_max_position_embeddings": 24, **_rope(**LONGROPE)}, length=20
    ),
    "gpt2": Case("GPT2", GPT2),
    "gpt2, untied, inner size given": Case("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "gpt2, scores not scaled": Case("GPT2", {**GPT2, "scale_attn_weights": False}),
}


def save(case: Case, folder: Path) -> Any:
    """The transformers model, its random checkpoint saved in `folder`."""
    arguments = dict(case.changes) if case.family == "GPT2" else {**SMALL, **case.changes}
    torch.manual_seed(7)
    suffix = "LMHeadModel" if case.family == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{case.family}Config")(**arguments)
    name = case.family.removesuffix("Text") if case.family == "Gemma3Text" else case.family
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights are so small that mistakes would hide
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(folder)
    return model


def reference_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """f32[tokens, V], the whole sequence at once."""
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def decoded_logits(model: Any, tokens: Sequence[int], decode_from: int) -> np.ndarray:
    """f32[tokens, V], positions from decode_from on one at a time through transformers' own cache."""
    cuts = [0, *range(decode_from, len(tokens) + 1)]
    cache, rows = transformers.DynamicCache(config=model.config), []
    with torch.inference_mode():
        for start, stop in itertools.pairwise(cuts):
            made = model(torch.tensor([list(tokens[start:stop])]), past_key_values=cache, use_cache=True)
            rows.append(made.logits[0].float().numpy())
    return np.concatenate(rows)


def kl(reference: np.ndarray, ours: np.ndarray) -> float:
    """The mean KL divergence, nats, of f32[tokens, V]."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference, ours))
    return float((p.exp() * (p - q)).sum(-1).mean())


def random_tokens(count: int) -> list[int]:
    """The same ids every time."""
    return np.random.default_rng(3).integers(3, VOCAB, count).tolist()
