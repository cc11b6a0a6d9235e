"""What a model is called and where it comes from: file names and `general.*`, by the rules of the gguf package."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmx.formats.gguf import Value, u32
from llmx.models.architecture import Architecture

if TYPE_CHECKING:
    from llmx.models.model import Model

QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class Identity:
    """A model's name in its parts, its `general.*` metadata, and what could not be read of its model card."""

    full: str
    base: str | None
    finetune: str | None
    version: str | None
    size: str
    metadata: dict[str, Value]
    notes: tuple[str, ...]

    def file_stem(self, type_name: str) -> str:
        """Base-Size-FineTune-Version-Type, without the suffix."""
        from gguf.utility import naming_convention

        base = self.base or self.full
        # A base name that ends in its size already says it.
        size = None if self.size.lower() in base.lower().split("-") else self.size
        return naming_convention(self.full, base, self.finetune, self.version, size, type_name)


def identify(model: Model, file_type_id: int) -> Identity:
    """The model's identity from its hub id or folder name, its model card and its generation config."""
    from gguf.metadata import Metadata
    from gguf.utility import size_label

    name = model.checkpoint.source.name
    total, shared, per_expert = _parameters(model.architecture)
    found, notes = _model_card(model, total)
    full, organization, base, finetune, version, size = Metadata.get_model_id_components(name, total)
    found.name, found.basename, found.finetune, found.version = full or name, base, finetune, version
    found.organization = organization or found.organization
    found.size_label = size or size_label(total, shared, per_expert, model.architecture.experts)
    metadata = _values(found)
    metadata["general.quantization_version"] = u32(QUANTIZATION_VERSION)
    metadata["general.file_type"] = u32(file_type_id)
    return Identity(found.name, base, finetune, version, found.size_label, metadata, notes)


def _parameters(a: Architecture) -> tuple[int, int, int]:
    """All parameters, those outside experts, and those of one expert."""
    counts = {t.name: math.prod(t.shape) for t in a.tensors}
    experts = sum(counts[t.name] for t in a.tensors if t.role.startswith("expert_"))
    total = sum(counts.values())
    return total, total - experts, experts // a.experts if a.experts else 0


def _model_card(model: Model, parameters: int) -> tuple[Any, tuple[str, ...]]:
    """The gguf package's record of licence, tags, base models and sampling defaults; empty if it cannot be read."""
    import yaml
    from gguf.metadata import Metadata

    try:
        return Metadata.load(model_path=model.checkpoint.folder, total_params=parameters), ()
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        return Metadata(), (f"the model card (README.md) cannot be read and is left out: {reason}",)


def _values(found: Any) -> dict[str, Value]:
    """The record as typed values: written by the gguf package's own writer, which never opens a file here."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(None, "", use_temp_file=False)
    found.set_gguf_meta_model(writer)
    names = {
        GGUFValueType.STRING: "str",
        GGUFValueType.UINT32: "u32",
        GGUFValueType.INT32: "i32",
        GGUFValueType.FLOAT32: "f32",
    }
    values: dict[str, Value] = {}
    for key, stored in writer.kv_data[0].items():
        if key == "general.architecture":
            continue
        if stored.type == GGUFValueType.ARRAY:
            values[key] = Value("[str]", tuple(map(str, stored.value)))
        else:
            values[key] = Value(names[stored.type], stored.value)
    return {"general.type": Value("str", "model")} | values
