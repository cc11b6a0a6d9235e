"""The config.json that a GGUF file's metadata stands for: gguf_metadata.py read backwards.

What llama.cpp computes decides, not what the checkpoint once said: where its graph has no sliding window, the config
has none. Source: llama.cpp b11549, src/llama-model.cpp and src/models, for what a missing key means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmx.errors import IntegrityError, UnsupportedError
from llmx.formats.ggml_decode import decode
from llmx.formats.gguf import GgufFile
from llmx.models.architecture import Rope
from llmx.models.rope import inverse_frequencies

ARCHITECTURE_KEY = "general.architecture"
THETA = 10_000.0  # llama.cpp's, where the file names none
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
DIVISORS, LONG, SHORT = ROPE_TENSORS

# Keys of an architecture that change nothing here: said by a tensor's shape, or by the family.
IGNORED = frozenset(
    (
        *("vocab_size", "attention.value_length", "tensor_data_layout", "use_parallel_residual", "attention.causal"),
        *("rope.scaling.finetuned", "leading_dense_block_count", "attention.sliding_window"),
    )
)


@dataclass(frozen=True, slots=True)
class Told:
    """A file's keys without the architecture's name before them, and its tensors."""

    file: GgufFile
    arch: str

    @property
    def keys(self) -> dict[str, Any]:
        start = f"{self.arch}."
        found = self.file.metadata.items()
        return {key.removeprefix(start): value for key, value in found if key.startswith(start)}

    def get(self, key: str, default: Any = None) -> Any:
        """The value; a number of 32 bits as the shortest decimal that is rounded to it."""
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def count(self, key: str, default: int | None = None) -> int:
        """A number of something. Raises: IntegrityError where it is missing or no positive integer.

        A number for each layer, where all are equal, is that number. Raises: UnsupportedError where they differ.
        """
        value = self.get(key, default)
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                what = f"{self.arch}.{key} differs between layers, which no family here has"
                raise UnsupportedError(what, where=self.file.paths[0])
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise IntegrityError(f"{self.arch}.{key} is {value!r}; a count is expected", where=self.file.paths[0])
        return value

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def values(self, tensor: str) -> list[float]:
        """A table of floats."""
        kind = self.file.tensors[tensor].type_name
        return [float(value) for value in decode(kind, self.file.bytes(tensor).reshape(1, -1))[0]]

    @property
    def head_dim(self) -> int:
        hidden, heads = self.count("embedding_length"), self.count("attention.head_count")
        return self.count("attention.key_length", hidden // heads)


Settings = Callable[[Told], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ConfigRule:
    """How one architecture of llama.cpp is told as a config.json.

    counts: the config's key -> the file's. fixed: what its graph takes for granted. more: what takes a thought.
    known: further keys of the file that `more` reads.
    """

    model_type: str
    class_name: str
    counts: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: Settings = lambda told: {}
    known: tuple[str, ...] = ()


_COUNTS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
}
_EPSILON = "attention.layer_norm_rms_epsilon"
_SCALING = ("type", "factor", "original_context_length", "attn_factor")
_ROPE = ("rope.dimension_count", "rope.freq_base", *(f"rope.scaling.{key}" for key in _SCALING))
_COMMON = (*_ROPE, _EPSILON, "attention.key_length")


def _usual(told: Told) -> dict[str, Any]:
    """What all but GPT-2 have."""
    return {
        "rms_norm_eps": told.get(_EPSILON),
        "head_dim": told.head_dim,
        "rope_parameters": rope_parameters(told),
    }


def _llama(told: Told) -> dict[str, Any]:
    return {
        **_usual(told),
        "attention_bias": told.has("blk.0.attn_q.bias"),
        "mlp_bias": told.has("blk.0.ffn_up.bias"),
    }


def _mixtral(told: Told) -> dict[str, Any]:
    return {
        **_usual(told),
        "num_local_experts": told.count("expert_count"),
        "num_experts_per_tok": told.count("expert_used_count"),
        "sliding_window": None,
    }


def _qwen3moe(told: Told) -> dict[str, Any]:
    return {
        **_usual(told),
        "num_experts": told.count("expert_count"),
        "num_experts_per_tok": told.count("expert_used_count"),
        "moe_intermediate_size": told.count("expert_feed_forward_length"),
    }


def _phi3(told: Told) -> dict[str, Any]:
    part = told.count("rope.dimension_count", told.head_dim) / told.head_dim
    original = told.get("rope.scaling.original_context_length")
    stated = {} if original is None else {"original_max_position_embeddings": original}
    return {
        "rms_norm_eps": told.get(_EPSILON),
        "rope_parameters": {**rope_parameters(told), "partial_rotary_factor": part},
        "sliding_window": None,
        **stated,
    }


def _gemma3(told: Told) -> dict[str, Any]:
    layers = told.count("block_count")
    window = told.get("attention.sliding_window") or None
    pattern = told.get("attention.sliding_window_pattern", 6)  # every so many layers is full
    slides = pattern if isinstance(pattern, list) else [bool((n + 1) % pattern) for n in range(layers)]
    kinds = ["sliding_attention" if slide and window else "full_attention" for slide in slides]
    width = told.count("embedding_length") // told.count("attention.head_count")
    local = {"rope_type": "default", "rope_theta": told.get("rope.freq_base_swa", THETA)}
    return {
        "rms_norm_eps": told.get(_EPSILON),
        "head_dim": told.head_dim,
        "query_pre_attn_scalar": width if layers == 62 else told.head_dim,  # llama.cpp tells the 27B model so
        "rope_parameters": {"full_attention": rope_parameters(told), "sliding_attention": local},
        "layer_types": kinds,
        **({"sliding_window": window} if window else {}),
    }


def _gpt2(told: Told) -> dict[str, Any]:
    return {"layer_norm_epsilon": told.get("attention.layer_norm_epsilon")}


_NO_WINDOW = {"use_sliding_window": False, "hidden_act": "silu"}
_LLAMA = ConfigRule("llama", "LlamaForCausalLM", _COUNTS, {"hidden_act": "silu"}, _llama, _COMMON)
_MIXTRAL = ConfigRule(
    "mixtral",
    "MixtralForCausalLM",
    _COUNTS,
    {"hidden_act": "silu"},
    _mixtral,
    (*_COMMON, "expert_count", "expert_used_count", "expert_feed_forward_length"),
)
RULES: Mapping[str, ConfigRule] = {
    "llama": _LLAMA,
    "qwen2": ConfigRule("qwen2", "Qwen2ForCausalLM", _COUNTS, _NO_WINDOW, _usual, _COMMON),
    "qwen3": ConfigRule("qwen3", "Qwen3ForCausalLM", _COUNTS, {**_NO_WINDOW, "attention_bias": False}, _usual, _COMMON),
    "qwen3moe": ConfigRule(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _COUNTS,
        {**_NO_WINDOW, "attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
        _qwen3moe,
        (*_COMMON, "expert_count", "expert_used_count", "expert_feed_forward_length"),
    ),
    "gemma3": ConfigRule(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _COUNTS,
        {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        _gemma3,
        (*_COMMON, "attention.sliding_window_pattern", "rope.freq_base_swa"),
    ),
    "phi3": ConfigRule("phi3", "Phi3ForCausalLM", _COUNTS, {"hidden_act": "silu"}, _phi3, _COMMON),
    "gpt2": ConfigRule(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "n_layer": "block_count",
            "n_embd": "embedding_length",
            "n_head": "attention.head_count",
            "n_inner": "feed_forward_length",
            "n_positions": "context_length",
        },
        {"activation_function": "gelu_new"},
        _gpt2,
        ("attention.layer_norm_epsilon", "attention.head_count_kv", "attention.key_length"),
    ),
}


def config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the checkpoint that this file computes like.

    Raises: UnsupportedError for an architecture that is not known, and naming every key that nothing accounts for;
    IntegrityError for a number that is missing or impossible.
    """
    arch = file.metadata.get(ARCHITECTURE_KEY)
    if arch not in RULES:
        what = f"a GGUF file of the architecture {arch!r} cannot be read back as a model"
        raise UnsupportedError(what, where=file.paths[0], fix=f"known architectures: {', '.join(RULES)}")
    told = Told(file, str(arch))
    rule = _MIXTRAL if arch == "llama" and told.get("expert_count") else RULES[str(arch)]
    known = {*rule.counts.values(), *rule.known, *IGNORED}
    if left := sorted(key for key, value in told.keys.items() if key not in known and value):
        problems = [f"{arch}.{key}: {told.keys[key]!r}" for key in left]
        raise UnsupportedError(
            "this file asks for what llmx does not implement", where=file.paths[0], problems=problems
        )
    if not told.has("token_embd.weight"):
        raise IntegrityError("token_embd.weight is missing", where=file.paths[0])
    same = {"attention.head_count_kv": "attention.head_count"}  # where a key is missing, it equals that one
    return {
        "model_type": rule.model_type,
        "architectures": [rule.class_name],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": not told.has("output.weight"),
        **{name: told.count(key if key in told.keys else same.get(key, key)) for name, key in rule.counts.items()},
        **rule.fixed,
        **rule.more(told),
    }


def rope_parameters(told: Told) -> dict[str, Any]:
    """The rope_parameters of a config: theta and scaling, whether keys or tensors carry it.

    Raises: UnsupportedError for a scaling that is not known.
    """
    theta = {"rope_theta": told.get("rope.freq_base", THETA)}
    if told.has(DIVISORS):
        return theta | _divided(told, theta["rope_theta"])
    kind = told.get("rope.scaling.type", "longrope" if told.has(LONG) else "none")
    if kind not in _KINDS:
        what = f"rope scaling {kind!r} is not known"
        raise UnsupportedError(what, where=told.file.paths[0], fix=f"known: {', '.join(_KINDS)}")
    return theta | _KINDS[kind](told)


def _linear(told: Told) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": told.get("rope.scaling.factor", 1.0)}


def _yarn(told: Told) -> dict[str, Any]:
    """llama.cpp multiplies cos and sin by 1 + 0.1 ln(factor) itself, and by the key's factor besides."""
    factor = told.get("rope.scaling.factor", 1.0)
    built_in = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": told.count(
            "rope.scaling.original_context_length", told.count("context_length")
        ),
        "attention_factor": built_in * told.get("rope.scaling.attn_factor", 1.0),
    }


def _longrope(told: Told) -> dict[str, Any]:
    original = told.count("rope.scaling.original_context_length", told.count("context_length"))
    return {
        "rope_type": "longrope",
        "short_factor": told.values(SHORT),
        "long_factor": told.values(LONG),
        "attention_factor": told.get("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }


_KINDS: Mapping[str, Callable[[Told], dict[str, Any]]] = {
    "none": lambda told: {"rope_type": "default"},
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _divided(told: Told, theta: float) -> dict[str, Any]:
    """Divisors of the frequencies: Llama 3's scaling where they are its, else the same divisors at every length."""
    divisors = told.values(DIVISORS)
    if (found := _llama3(divisors, theta)) is not None and "rope.scaling.attn_factor" not in told.keys:
        return found
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "attention_factor": told.get("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": told.count("context_length"),
    }


def _llama3(divisors: list[float], theta: float) -> dict[str, Any] | None:
    """Llama 3's parameters that give these divisors, or None.

    Between the long waves (divided by the factor) and the short ones (kept) the share of the kept, s, is a line in the
    frequency f:  s = (context · f / 2π − low) / (high − low) = slope · f − start.  The line fixes the ratio of the
    three numbers; low is 1 in every model there is.
    """
    given = np.array(divisors)
    factor = round(float(given.max()), 3)
    plain = inverse_frequencies(Rope(2 * len(given), theta), 1).astype(np.float64)
    between = (given > 1 + 1e-6) & (given < factor - 1e-6)
    if between.sum() < 2:
        return None
    shares = (1 / given[between] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(plain[between], shares, 1)
    if start >= 0:
        return None
    high, context = round(1 - 1 / start, 2), round(-slope / start * 2 * math.pi)
    if high <= 1 or context < 2:
        return None
    rope = Rope(
        2 * len(given), theta, "llama3", factor, original_context=context, low_freq_factor=1.0, high_freq_factor=high
    )
    again = inverse_frequencies(replace(rope, kind="default"), 1) / inverse_frequencies(rope, 1)
    if not np.allclose(again, given, rtol=1e-6):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
