"""The records a family is made of, and how one is filled in from a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError
from llmx.models.architecture import Activation, Architecture, LayerKind, NormKind, Role, Source, TensorSpec
from llmx.models.config import Setting, read_settings, unknown_keys
from llmx.models.rope_config import RopeRule, read_ropes

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
LAYER_KINDS: dict[str, LayerKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
}
# A config that asks for more is a mistake or an attack. Both are made into records before a tensor is looked for.
MOST_LAYERS = 1 << 13
LARGEST_COUNT = 1 << 18  # layers times experts

# Settings that the architecture takes as they are.
COPIED = (
    *("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "context_length", "tied"),
    *("attention_scale", "experts", "experts_used", "expert_intermediate", "normalize_router", "sparse_layers"),
)

# Endings of classes that are a causal language model (or its body alone, as GPT-2's first checkpoints are).
CLASS_ENDINGS = ("ForCausalLM", "LMHeadModel", "Model")


@dataclass(frozen=True, slots=True)
class TensorRule:
    """Canonical tensors of one role.

    source: the checkpoint's name; {prefix}, {layer} and {expert} are filled in, and {expert} stacks all experts.
    shape: named dims, see `_dims`. after: dims that lie before this slice in a fused tensor; None is no slice.
    when, bias: the fact under which the tensor, and a bias beside it, exists; see `_facts`.
    """

    role: Role
    source: str
    shape: tuple[str, ...]
    when: str = "always"
    bias: str = "never"
    transpose: bool = False
    after: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Redundant:
    """Tensors some checkpoints carry and no model needs: a pattern, why, and the role whose bits they must repeat."""

    pattern: str
    reason: str
    copy_of: Role | None = None
    when: str = "always"


@dataclass(frozen=True, slots=True)
class Family:
    model_type: str
    settings: Mapping[str, Setting]
    tensors: tuple[TensorRule, ...]
    # Parts with several spellings; of each part the one that most of the checkpoint's names have is taken.
    alternatives: tuple[tuple[tuple[TensorRule, ...], ...], ...] = ()
    rope: RopeRule | None = field(default_factory=RopeRule)
    window: Callable[[Mapping[str, Any]], list[LayerKind]] = lambda values: ["full"] * values["layers"]
    listed_windows: bool = False  # layer_types, where given, has the last word; else it may only agree
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # keys with the only values llmx implements
    prefixes: tuple[str, ...] = ("model.", "")
    redundant: tuple[Redundant, ...] = ()
    norm: NormKind = "rms"
    norm_offset: float = 0.0
    gated: bool = True
    scaled_embedding: bool = False  # the embedding is multiplied by sqrt(hidden)


# Keys of any config whose other values would need code that llmx does not have.
FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "use_bidirectional_attention": (False, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "lm_head_bias": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "per_layer_config": (None,),
}


def all_sliding(values: Mapping[str, Any]) -> list[LayerKind]:
    """Every layer has the window, if there is one."""
    kind: LayerKind = "full" if values["sliding_window"] is None else "sliding"
    return [kind] * values["layers"]


def late_sliding(values: Mapping[str, Any]) -> list[LayerKind]:
    """Layers from max_window_layers on have the window, if there is one."""
    kinds = all_sliding(values)
    return ["full" if layer < values["max_window_layers"] else kind for layer, kind in enumerate(kinds)]


def patterned_sliding(values: Mapping[str, Any]) -> list[LayerKind]:
    """Every n-th layer is full, all others slide."""
    pattern = values["sliding_pattern"]
    return ["sliding" if (layer + 1) % pattern else "full" for layer in range(values["layers"])]


def fill_in(family: Family, config: Mapping[str, Any], names: frozenset[str]) -> Architecture:
    """The family's record with this config's numbers.

    Raises: UnsupportedError listing every key that is unknown or asks for what llmx does not implement; IntegrityError
    where one is malformed, or there are too many layers.
    """
    problems: list[str] = []
    values = read_settings(config, family.settings, problems)
    broken = bool(problems)  # a number of layers below 0 is nobody's feature
    _check_size(values)
    _derive(values, problems)
    rope = local_rope = None
    if family.rope is not None:
        rope, local_rope = read_ropes(config, family.rope, values, problems)
    kinds = _layer_kinds(family, values, problems)
    problems += _class_problems(config)
    problems += _unknown(family, config)
    if values["activation"] not in ACTIVATIONS:
        problems.append(f"activation {values['activation']!r} is not one of {', '.join(ACTIVATIONS)}")
    if problems:
        what = "has numbers that no model has" if broken else "asks for what llmx does not implement"
        refusal = IntegrityError if broken else UnsupportedError
        raise refusal(f"This {family.model_type} checkpoint {what}.", where="config.json", problems=problems)
    sliding = "sliding" in kinds
    return Architecture(
        family=family.model_type,
        **{name: values[name] for name in COPIED},
        norm=family.norm,
        norm_eps=float(values["norm_eps"]),
        norm_offset=family.norm_offset,
        activation=ACTIVATIONS[values["activation"]],
        gated=family.gated,
        rope=rope,
        local_rope=local_rope if sliding else None,
        sliding_window=values["sliding_window"] if sliding else None,
        layer_kinds=tuple(kinds),
        embedding_scale=values["hidden"] ** 0.5 if family.scaled_embedding else 1.0,
        tensors=_tensors(family, values, names),
    )


def _check_size(values: Mapping[str, Any]) -> None:
    """Raises: IntegrityError where there are too many layers or experts to make a list of."""
    layers, experts = values["layers"], values.get("experts") or 0
    if layers > MOST_LAYERS or layers * experts > LARGEST_COUNT:
        what = f"{layers} layers of {experts} experts are no model"
        limits = f"at most {MOST_LAYERS} layers, and {LARGEST_COUNT} experts in all, are read"
        raise IntegrityError(f"{what}: {limits}.", where="config.json")


def _derive(values: dict[str, Any], problems: list[str]) -> None:
    """Fill in the values that follow from others, as transformers' configuration classes do."""
    if values.get("kv_heads") is None:
        values["kv_heads"] = values["heads"]
    if values.get("head_dim") is None:
        if values["hidden"] % values["heads"]:
            problems.append(f"hidden size {values['hidden']} is no multiple of {values['heads']} attention heads")
        values["head_dim"] = max(values["hidden"] // values["heads"], 1)
    if values["heads"] % values["kv_heads"]:
        problems.append(f"{values['heads']} attention heads are no multiple of {values['kv_heads']} key-value heads")
    if values["intermediate"] is None:
        values["intermediate"] = 4 * values["hidden"]
    scale = float(values.get("attention_scale_base", values["head_dim"])) ** -0.5
    values["attention_scale"] = scale if values.get("scaled_attention", True) else 1.0
    experts = values.setdefault("experts", 0)
    used = values.setdefault("experts_used", 0)
    if experts == 1:
        problems.append("one expert is no mixture of experts")
    if used > experts:
        problems.append(f"{used} experts a token are more than the {experts} there are")
    values.setdefault("expert_intermediate", values["intermediate"] if experts else 0)
    values.setdefault("normalize_router", experts > 0)
    dense, step = values.get("dense_layers") or (), values.get("sparse_step", 1)
    values["sparse_layers"] = tuple(
        experts > 0 and layer not in dense and (layer + 1) % step == 0 for layer in range(values["layers"])
    )
    for name in ("sliding_window", "layer_types"):
        values.setdefault(name, None)
    if not values.get("use_sliding_window", True):
        values["sliding_window"] = None


def _layer_kinds(family: Family, values: Mapping[str, Any], problems: list[str]) -> list[LayerKind]:
    kinds = family.window(values)
    given = values["layer_types"]
    if given is None:
        return kinds
    unknown = sorted(set(given) - set(LAYER_KINDS))
    if unknown or len(given) != values["layers"]:
        problems.append(
            f"layer_types: {values['layers']} entries from {', '.join(LAYER_KINDS)} are expected, "
            f"not {len(given)}{' with ' + ', '.join(unknown) if unknown else ''}"
        )
        return kinds
    listed: list[LayerKind] = [LAYER_KINDS[name] for name in given]
    if not family.listed_windows and listed != kinds:
        problems.append("layer_types: it disagrees with sliding_window, which is what this family follows")
    if "sliding" in listed and values["sliding_window"] is None:
        problems.append("layer_types: it names sliding layers and there is no sliding_window in use")
    return listed


def _class_problems(config: Mapping[str, Any]) -> list[str]:
    classes = config.get("architectures") or []
    if isinstance(classes, list) and all(isinstance(name, str) and name.endswith(CLASS_ENDINGS) for name in classes):
        return []
    return [f"architectures: {classes!r} is no causal language model (a class ending in {' or '.join(CLASS_ENDINGS)})"]


def _unknown(family: Family, config: Mapping[str, Any]) -> list[str]:
    known = {key for rule in family.settings.values() for key in rule.names}
    known |= family.rope.keys if family.rope is not None else set()
    fixed = {key: allowed for key, allowed in {**FIXED, **family.fixed}.items() if key not in known}
    return unknown_keys(config, known, fixed)


def _tensors(family: Family, values: Mapping[str, Any], names: frozenset[str]) -> tuple[TensorSpec, ...]:
    """Every canonical tensor: the embeddings, layer by layer, the final norm, the head."""
    embedding = next(rule for rule in family.tensors if rule.role == "embedding")
    prefix = next((p for p in family.prefixes if embedding.source.format(prefix=p) in names), family.prefixes[0])
    rules = family.tensors
    for spellings in family.alternatives:
        rules += max(spellings, key=lambda spelling: _hits(spelling, prefix, values, names))  # the first of equals
    facts, dims = _facts(values), _dims(values)
    inside = [rule for rule in rules if "{layer}" in rule.source]
    first = [rule for rule in rules if rule.role in ("embedding", "position_embedding")]
    last = [rule for rule in rules if rule not in inside and rule not in first]
    order: list[tuple[TensorRule, int | None]] = [(rule, None) for rule in first]
    order += [(rule, layer) for layer in range(values["layers"]) for rule in inside]
    order += [(rule, None) for rule in last]
    return tuple(
        spec
        for rule, layer in order
        if _holds(facts[rule.when], layer)
        for spec in _specs(rule, layer, prefix, dims, with_bias=_holds(facts[rule.bias], layer))
    )


def _hits(rules: tuple[TensorRule, ...], prefix: str, values: Mapping[str, Any], names: frozenset[str]) -> int:
    """How many of the checkpoint's names are of this spelling (experts counted once)."""
    layers = range(values["layers"])
    return sum(rule.source.format(prefix=prefix, layer=n, expert=0) in names for rule in rules for n in layers)


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return {
        "vocab": values["vocab"],
        "context": values["context_length"],
        "hidden": values["hidden"],
        "head_dim": values["head_dim"],
        "q": values["heads"] * values["head_dim"],
        "kv": values["kv_heads"] * values["head_dim"],
        "ffn": values["intermediate"],
        "experts": values["experts"],
        "expert_ffn": values["expert_intermediate"],
    }


def _facts(values: Mapping[str, Any]) -> dict[str, bool | tuple[bool, ...]]:
    """What a rule's `when` and `bias` may name; a tuple has one truth a layer."""
    sparse = values["sparse_layers"]
    return {
        "always": True,
        "never": False,
        "tied": values["tied"],
        "untied": not values["tied"],
        "attention_bias": values.get("attention_bias", False),
        "mlp_bias": values.get("mlp_bias", False),
        "sparse": sparse,
        "dense": tuple(not value for value in sparse),
    }


def _holds(fact: bool | tuple[bool, ...], layer: int | None) -> bool:
    return fact[layer] if isinstance(fact, tuple) and layer is not None else bool(fact)


def _specs(
    rule: TensorRule, layer: int | None, prefix: str, dims: Mapping[str, int], with_bias: bool
) -> list[TensorSpec]:
    """The rule's weight and, where there is one, its bias (which is sliced like its weight)."""
    stem = rule.role if layer is None else f"layers.{layer}.{rule.role}"
    shape = tuple(dims[name] for name in rule.shape)
    out = shape[max(len(shape) - 2, 0)]
    experts = range(shape[0]) if "{expert}" in rule.source else (0,)
    names = tuple(rule.source.format(prefix=prefix, layer=layer, expert=expert) for expert in experts)
    start = None if rule.after is None else sum(dims[name] for name in rule.after)
    rows = None if start is None else (start, start + out)
    specs = [TensorSpec(f"{stem}.weight", rule.role, "weight", layer, shape, Source(names, rule.transpose, rows))]
    if with_bias:
        biases = tuple(name.removesuffix("weight") + "bias" for name in names)
        specs.append(TensorSpec(f"{stem}.bias", rule.role, "bias", layer, (out,), Source(biases, False, rows)))
    return specs
