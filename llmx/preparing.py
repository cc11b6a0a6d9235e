"""Thinking an export through before anything is written: `llmx plan`, and the first half of `llmx export`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx import preflight, rebuilding
from llmx.errors import UsageError
from llmx.memory import parse_limit
from llmx.validating import available_cores, check_threads

if TYPE_CHECKING:
    from llmx.exporters.manifest_reader import Manifest
    from llmx.exporters.quantization import Quantization, Wishes
    from llmx.exporters.target import Exporter, Format
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.quant.recipe import Recipe
    from llmx.validate.case import Limits

# What only some formats take: field of the request, and of Asked -> its option.
FORMAT_OPTIONS = {
    "tensor_types": "--tensor-type",
    "imatrix": "--imatrix",
    "split_max_size": "--split-max-size",
    "dialect": "--dialect",
    "layout": "--layout",
    "tp": "--tp",
    "pp": "--pp",
    "kv_cache": "--kv-cache",
    "builder": "--builder",
    "max_batch": "--max-batch",
    "max_input": "--max-input",
    "max_length": "--max-length",
    "timing_cache": "--timing-cache",
    "refit": "--refit",
    "portable": "--portable",
    "profiles": "--profiles",
    "wide_head": "--wide-head",
    "optimization_level": "--optimization-level",
    "ort": "--ort",
    "target_size": "--target-size",
    "target_bpw": "--target-bpw",
}


SPARSE_TYPE, NONE = "F16", "none"  # the type of a sparse export that names none: pruning alone


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Everything `llmx export` can be told. `output` is a folder, or a file for one-file formats.

    method, effort: None takes the recipe's, or auto and balanced. dialect, layout: None takes the format's first one.
    tp, pp: GPUs that share every layer, and stages, that a checkpoint is dealt to. kv_cache: what keys and values are
    cached as, "fp8" or "int8".
    builder, timing_cache, refit, portable, optimization_level: how an engine is built, None as its builder does it.
    profiles: 1 for all lengths, 2 for prompts and single tokens. wide_head: whether logits are computed in float32.
    max_batch, max_input, max_length: sequences, new positions, and positions in all that an engine takes at most.
    ort: whether an .ort file, made of the artifact and not part of it, is written beside it.
    output: None takes the current folder, or one in it that is named after the artifact where that is a folder.
    max_memory: bytes that making and rerunning the artifact may take, as "4GB"; None takes what the machine has.
    resume: go on with what the same export left when it was stopped. sparsity: the pattern of zeros, "2:4" or "50%";
    None takes the recipe's; without a type the weights that are left stay floats.
    from_manifest: a manifest that says all that shapes the bytes; model may then be empty where the manifest names a
    hub id.
    """

    model: str
    format: str = "gguf"
    bits: int | None = None
    type_name: str | None = None
    dialect: str | None = None
    layout: str | None = None
    tp: int | None = None
    pp: int | None = None
    kv_cache: str | None = None
    builder: str | None = None
    max_batch: int | None = None
    max_input: int | None = None
    max_length: int | None = None
    timing_cache: Path | None = None
    refit: bool | None = None
    portable: bool | None = None
    profiles: int | None = None
    wide_head: bool | None = None
    optimization_level: int | None = None
    ort: bool | None = None
    revision: str | None = None
    method: str | None = None
    effort: str | None = None
    sparsity: str | None = None
    recipe: str | None = None
    calibration: Path | None = None
    calibration_tokens: int | None = None
    statistics: Path | None = None
    device: str = "auto"
    target_size: str | None = None
    target_bpw: float | None = None
    imatrix: Path | None = None
    tensor_types: Sequence[str] = ()
    split_max_size: str | None = None
    output: Path | None = None
    threads: int = 0
    max_memory: str | None = None
    validate: bool = True
    force: bool = False
    resume: bool = False
    text: Path | None = None
    limits: Limits | None = None
    positions: int | None = None
    from_manifest: Path | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request thought through: nothing has been written yet.

    threads: as many as memory allows. limit: bytes of memory, None without one. shelved: activations are kept on disk.
    """

    request: ExportRequest
    format: Format
    model: Model
    exporter: Exporter
    quantization: Quantization
    threads: int
    limit: int | None = None
    shelved: bool = False

    def described(self) -> dict[str, Any]:
        """The plan as plain data, with what was decided of quantizing."""
        told = self.exporter.plan.to_json()
        told["notes"] = [*told["notes"], *self.quantization.notes]
        told["quantization"] = self.quantization.to_json()
        told["peak_memory_bytes"] = preflight.peak(self)
        told["needs"] = preflight.needs(self)
        return told


def plan(request: ExportRequest) -> Prepared:
    """What `export` would do: every tensor's type, the exact sizes, the fall-backs. Only a budget reads weights."""
    return prepare(*rebuilding.as_it_was(request))


def prepare(request: ExportRequest, manifest: Manifest | None) -> Prepared:
    """The opened model, its plan, and how it will be quantized: as asked, or as it was when the manifest was made."""
    from llmx.exporters import quantization
    from llmx.exporters.gguf_model import open_source
    from llmx.exporters.target import Asked, find_format

    target = find_format(request.format)
    _check_request(request, target)
    default = _default_type(request, target)
    threads, limit = request.threads or available_cores(), parse_limit(request.max_memory)
    wishes = _wishes(request, manifest)
    if manifest is None:
        named = target.named_type(request.bits, request.type_name)
        default = default if request.recipe is None else None
        recipe = quantization.chosen_recipe(wishes, named or default)
    else:
        recipe = rebuilding.recipe_of(manifest)
    draft = target.draft(recipe, Asked(**{name: getattr(request, name) for name in FORMAT_OPTIONS}))
    chosen = recipe.method
    if draft.measures_inputs:
        wishes, recipe = _measuring(wishes, recipe, target.types.bits(draft.base), draft.base)
    model = open_source(request.model, request.revision)
    if manifest is not None:
        rebuilding.call_it_as_before(model, manifest)
    decided = quantization.quantization(model, wishes, recipe, draft.base, threads, target.types)
    if chosen == "auto" and decided.calibrated and recipe.transform is None and draft.transform is not None:
        recipe = replace(recipe, transform=draft.transform)
        decided = quantization.quantization(model, wishes, recipe, draft.base, threads, target.types)
    decided = replace(decided, inputs_only=draft.measures_inputs and decided.rounds)
    if decided.inputs_only and request.statistics is not None:
        raise UsageError(
            f"--statistics keeps what weights are solved with, and {draft.type_name} rounds them",
            fix="leave it out, or choose --method gptq",
        )
    read = _as_read(model, decided)
    exporter, threads, shelved = preflight.chosen(
        lambda count: draft.planned(read, decided, count), model, decided, threads, limit
    )
    if request.target_size is not None or request.target_bpw is not None:
        exporter = _within_budget(request, exporter, decided.text, threads)
    _check_sparse(exporter, decided, target)
    solves = decided.calibrated and not decided.inputs_only
    if solves and not quantization.assignments(decided, exporter.types_to_solve()):
        raise UsageError(
            f"a {draft.type_name} file holds no quantized tensor: there is nothing to calibrate",
            fix="leave out --method and --calibration, or choose a smaller type",
        )
    return Prepared(request, target, model, exporter, decided, threads, limit, shelved)


def _as_read(model: Model, decided: Quantization) -> Model:
    """The model as the exporter reads it: sparse already where the smallest weights go and nothing is solved."""
    if not decided.prunes_only:
        return model
    from llmx.exporters.sparsity import pruned_by_magnitude

    return pruned_by_magnitude(model, decided.resolved)


def _check_sparse(exporter: Exporter, decided: Quantization, target: Format) -> None:
    """Raises: UsageError for weights taken over as they are, UnsupportedError for types and shapes without zeros."""
    from llmx.exporters.sparsity import check_sparse

    if decided.sparsity is None:
        return
    if exporter.plan.type_name == target.kept_type:
        raise UsageError("the weights of a GGUF file are taken over as they are", fix="leave out --sparsity, or --type")
    check_sparse(decided.resolved, exporter.types_to_solve(), exporter.model)


def _measuring(wishes: Wishes, recipe: Recipe, bits: float, base: str) -> tuple[Wishes, Recipe]:
    """With a calibration in any case, which is for inputs. Whole numbers of 8 bits gain nothing from being solved; FP8,
    which has four leading bits, does."""
    from llmx.exporters.encoding import FLOAT8_ENCODINGS
    from llmx.exporters.quantization import EIGHT_BITS

    whole = bits >= EIGHT_BITS and base not in FLOAT8_ENCODINGS
    rounds = recipe.method == "auto" and recipe.sparsity is None and whole
    return replace(wishes, calibrate=True), replace(recipe, method="rtn") if rounds else recipe


def _default_type(request: ExportRequest, target: Format) -> str:
    """What an export that names no type makes. Raises: UsageError for a GGUF file and a format that cannot keep it."""
    from llmx.exporters.gguf_model import is_gguf

    if request.sparsity not in (None, NONE):
        return SPARSE_TYPE
    if not is_gguf(request.model):
        return target.default_type()
    if target.kept_type is None:
        raise UsageError(f"a GGUF file cannot be exported to {target.name}", where=request.model, fix="--format onnx")
    return target.kept_type


def _wishes(request: ExportRequest, manifest: Manifest | None) -> Wishes:
    from llmx.exporters.quantization import Wishes

    return Wishes(
        recipe=request.recipe,
        method=request.method,
        effort=request.effort,
        sparsity=request.sparsity,
        calibration=request.calibration,
        tokens=request.calibration_tokens,
        statistics=request.statistics,
        device=request.device,
        importance=request.imatrix is not None,
        calibrate=None if manifest is None else manifest.told["calibration"] is not None,
    )


def _within_budget(request: ExportRequest, exporter: Exporter, text: CalibrationText | None, threads: int) -> Exporter:
    """The export planned anew within --target-size or --target-bpw."""
    from llmx.formats.gguf import parse_size
    from llmx.models.calibration_text import read_calibration

    size = None if request.target_size is None else parse_size(request.target_size)
    text = text or (None if request.calibration is None else read_calibration(request.calibration))
    return exporter.within(size, request.target_bpw, text, threads)


def _check_request(request: ExportRequest, target: Format) -> None:
    if request.bits is not None and request.type_name is not None:
        raise UsageError("--bits and --type both choose the type", fix="give one of them")
    if request.target_size is not None and request.target_bpw is not None:
        raise UsageError("--target-size and --target-bpw both set the size", fix="give one of them")
    if request.target_bpw is not None and not 0 < request.target_bpw < math.inf:
        raise UsageError(f"--target-bpw {request.target_bpw} is no number of bits", fix="for example 4.2")
    strange = [
        option
        for name, option in FORMAT_OPTIONS.items()
        if name not in target.takes and getattr(request, name) not in (None, ())
    ]
    if strange:
        raise UsageError(f"--format {target.name} has no use for these options", problems=strange, fix="leave them out")
    check_threads(request.threads)
