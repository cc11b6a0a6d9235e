"""Reading config.json: every key is mapped to a setting, ignored on purpose, or refused.

A key that nothing here knows is an error unless its value is null or empty: it may change what the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

LARGEST_NUMBER = 1e12

ValueKind = Literal["count", "natural", "positive", "flag", "text", "texts", "indices"]


def is_number(value: object) -> bool:
    """True for a JSON number of a sane size (a flag is none): hostile sizes must not overflow later arithmetic."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST_NUMBER < value < LARGEST_NUMBER


VALUE_KINDS: dict[ValueKind, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number from 1", lambda value: type(value) is int and 1 <= value < 1 << 31),
    "natural": ("a whole number from 0", lambda value: type(value) is int and 0 <= value < 1 << 31),
    "positive": ("a number above 0", lambda value: is_number(value) and value > 0),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "text": ("a text", lambda value: isinstance(value, str)),
    "texts": ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)),
    "indices": (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(type(v) is int and v >= 0 for v in value),
    ),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One number or choice of a family. names: its spellings in config.json. default: transformers' own when absent."""

    names: tuple[str, ...]
    kind: ValueKind
    default: Any
    nullable: bool = False


def setting(names: str, kind: ValueKind, default: Any, *, nullable: bool = False) -> Setting:
    """A Setting; `names` are its spellings, apart by spaces."""
    return Setting(tuple(names.split()), kind, default, nullable or default is None)


def with_defaults(settings: Mapping[str, Setting], **defaults: Any) -> dict[str, Setting]:
    """The settings with other defaults; a default of None admits null."""
    changed = {
        name: replace(settings[name], default=value, nullable=settings[name].nullable or value is None)
        for name, value in defaults.items()
    }
    return {**settings, **changed}


def read_settings(config: Mapping[str, Any], settings: Mapping[str, Setting], problems: list[str]) -> dict[str, Any]:
    """Setting name -> value, defaults filled in; what is wrong is appended to `problems`."""
    values: dict[str, Any] = {}
    for name, rule in settings.items():
        given = {key: config[key] for key in rule.names if key in config}
        distinct = {repr(value) for value in given.values() if value is not None}
        if len(distinct) > 1:
            problems.append(f"{' and '.join(given)} are two spellings of one setting and differ")
        present = [value for value in given.values() if value is not None] or list(given.values())
        value = present[0] if present else rule.default
        values[name] = value
        wanted, valid = VALUE_KINDS[rule.kind]
        if not (valid(value) or (value is None and rule.nullable)):
            problems.append(f"{next(iter(given), rule.names[0])}: {wanted} is expected, not {shown(value)}")
            values[name] = rule.default
    return values


def unknown_keys(config: Mapping[str, Any], known: set[str], fixed: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """One line for each key that nothing accounts for, or whose value llmx does not implement."""
    lines = []
    for key, value in config.items():
        if key in fixed:
            if not any(value == allowed and type(value) is type(allowed) for allowed in fixed[key]):
                choices = " or ".join(map(shown, fixed[key]))
                lines.append(f"{key}: {shown(value)} is not supported here (only {choices})")
        elif key not in known and key not in IGNORED and value not in (None, [], {}, ""):
            lines.append(f"{key}: {shown(value)} is a key llmx does not know")
    return sorted(lines)


def shown(value: Any) -> str:
    """The value as JSON, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_IGNORED_FOR: dict[str, str] = {
    "it names the family or the class, or says who made the file": """
        model_type architectures is_decoder auto_map _name_or_path name_or_path transformers_version _commit_hash
        transformers.js_config tokenizer_class unsloth_fixed unsloth_version unsloth_fixed_mistral is_llama_config
        task_specific_params finetuning_task license model_name""",
    "the stored tensors say their own dtype": "torch_dtype dtype",
    "it acts in training only": """
        attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout initializer_range
        router_aux_loss_coef output_router_logits router_jitter_noise neftune_noise_alpha gradient_checkpointing""",
    "it chooses between ways of computing the same numbers": """
        use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_autoset
        experts_implementation _experts_implementation _flash_attn_2_enabled use_flash_attn use_flash_attention_2
        pretraining_tp reorder_and_upcast_attn chunk_size_feed_forward torchscript tf_legacy_loss use_bfloat16
        return_dict output_attentions output_hidden_states return_dict_in_generate output_scores
        tie_last_hidden_states""",
    "it belongs to generation or to the tokenizer, which are read from their own files": """
        bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id prefix
        forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
        do_sample early_stopping max_length min_length num_beams num_beam_groups num_return_sequences
        temperature top_k top_p typical_p epsilon_cutoff eta_cutoff penalty_alpha diversity_penalty
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        exponential_decay_length_penalty remove_invalid_values max_new_tokens""",
    "it describes heads that a causal language model does not have": """
        id2label label2id num_labels problem_type summary_activation summary_first_dropout summary_proj_to_labels
        summary_type summary_use_proj""",
    "transformers ignores it too: another key of the same file holds what is used": """
        n_ctx max_sequence_length model_max_length _sliding_window_pattern""",
}

IGNORED: dict[str, str] = {key: reason for reason, keys in _IGNORED_FOR.items() for key in keys.split()}
