"""The TensorRT exporter: the recorded graph, written beside the target, built by TensorRT, and put away again.

forward pass -> [ONNX recorder: dialect trt or plain] -> graph -> [builder, in a worker] -> rank0.engine
                                                               -> config.json, build-report.json, tokenizer files
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from llmx.errors import UsageError
from llmx.exporters import artifact, onnx
from llmx.exporters.onnx import OnnxExport, OnnxOptions
from llmx.exporters.onnx_write import Rows
from llmx.exporters.plan import Plan, PlannedFile, Step
from llmx.exporters.sparsity import Sparsity
from llmx.exporters.tensorrt_build import Builder, Installed, Request, build
from llmx.exporters.tensorrt_types import TensorRtMix
from llmx.formats.onnx import FLOATS, split_name
from llmx.formats.tensorrt import (
    BUILD_REPORT_NAME,
    CONFIG_NAME,
    ENGINE_NAME,
    IN_PLACE,
    TWO_BUFFERS,
    EngineConfig,
    Profile,
    config_bytes,
)
from llmx.models.architecture import Architecture
from llmx.models.model import Model
from llmx.progress import stages

# What a program that runs the engine reads text with: copied as it is, of those that the checkpoint has.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
CACHE_OF_DIALECT = {"trt": IN_PLACE, "plain": TWO_BUFFERS}
MAX_BATCH, MAX_INPUT, MAX_LENGTH = 1, 1024, 4096
# The estimate of an engine: its weights as the graph has them, a little more, and every layer's kernels, more of them
# where it mixes experts. TensorRT-RTX keeps each kernel as its source text: 0.65 to 0.9 MB a layer, measured.
ENGINE_SHARE, ENGINE_PER_LAYER, ENGINE_PER_MIXTURE = 1.03, 3 << 18, 1 << 19
CONFIG_BYTES, REPORT_BYTES = 4096, 4096
GRAPH_FOLDER = ".graph"
# How many -> for what kernels are chosen. An engine of TensorRT 8 has its weights once for each.
PROFILES: Mapping[int, tuple[str, ...]] = {1: ("all",), 2: ("prefill", "decode")}
TWO_OF_FOUR = "2:4"  # the one pattern that GPUs have products for
MEMORY_PER_ENGINE_BYTE, BUILDER_MEMORY = 4, 512 << 20  # of TensorRT-RTX, measured


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The most sequences, new positions of one, and positions in the cache that the engine takes."""

    batch: int
    input: int
    length: int

    def profiles(self, kinds: Sequence[str]) -> tuple[Profile, ...]:
        """Bounds of the open sizes, and those that kernels are chosen for. kinds: PROFILES[count].

        The cache has one capacity, the largest: written in place it cannot have others, and TensorRT 8 dies of them.
        """
        batch, capacity = (1, 1, self.batch), (self.length, self.length, self.length)
        positions = {
            "prefill": (1, -(-self.input // 2), self.input),
            "decode": (1, 1, 1),
            "all": (1, 1, self.input),
        }
        return tuple(Profile(kind, batch, positions[kind], capacity) for kind in kinds)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user chose of the build; see Request. profiles: one of PROFILES.

    sparsity: of the weights; kernels may use it where it is 2:4.
    """

    limits: EngineLimits
    refit: bool = False
    portable: bool = False
    profiles: tuple[str, ...] = PROFILES[1]
    level: int | None = None
    timing_cache: Path | None = None
    sparsity: Sparsity | None = None


@dataclass(frozen=True, slots=True)
class TensorRtExport:
    """A planned engine. graph: the planned ONNX export that it is built from. cache: one of CACHES of the format.

    beside: tokenizer files by name.
    """

    plan: Plan
    graph: OnnxExport
    mix: TensorRtMix
    builder: Builder
    installed: Installed
    options: EngineOptions
    cache: str
    beside: Mapping[str, bytes]

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Of the engine."""
        return self.options.limits.profiles(self.options.profiles)


def limits(architecture: Architecture, batch: int | None, input_: int | None, length: int | None) -> EngineLimits:
    """What was asked, or the defaults for the model's context.

    Raises: UsageError for sizes that are none, a longer input than the cache, or positions that a model of learned
    ones does not have.
    """
    context = architecture.context_length
    length = min(context, MAX_LENGTH) if length is None else length
    found = EngineLimits(
        MAX_BATCH if batch is None else batch,
        min(length, MAX_INPUT) if input_ is None else input_,
        length,
    )
    named = {"--max-batch": found.batch, "--max-input": found.input, "--max-length": found.length}
    problems = [f"{option} is {value}, and the least is 1" for option, value in named.items() if value < 1]
    if found.input > found.length:
        problems.append(f"--max-input {found.input} does not fit a cache of --max-length {found.length}")
    learned = any(spec.role == "position_embedding" for spec in architecture.tensors)
    if learned and found.length > context:
        problems.append(f"--max-length is {found.length}, and the model has learned {context} positions")
    if problems:
        raise UsageError("there is no engine of these sizes", problems=problems)
    return found


def prepare(
    model: Model, mix: TensorRtMix, options: OnnxOptions, found: Installed, builder: Builder, chosen: EngineOptions
) -> TensorRtExport:
    """Record the graph and plan the engine without reading a weight. options: of the graph, dialect left open."""
    cache = CACHE_OF_DIALECT[builder.dialect]
    capacity = chosen.limits.length
    graph = onnx.prepare(model, replace(options, dialect=builder.dialect, capacity=capacity))
    beside = {
        name: (model.checkpoint.folder / name).read_bytes()
        for name in TOKENIZER_FILES
        if (model.checkpoint.folder / name).is_file()
    }
    copies = 1 if builder.compiles_late else len(chosen.profiles)
    estimated = _engine_bytes(model.architecture, copies * graph.plan.files[1].nbytes)
    context = model.architecture.context_length
    notes = [
        f"built by {found.package} {found.version}"
        + (f" for {found.gpu}" if found.gpu is not None else ", without a GPU")
        + ": no other version loads the engine",
        f"the engine takes {chosen.limits.batch} sequences, {chosen.limits.input} positions at once, {capacity} in all",
    ]
    if capacity > context:
        notes.append(f"the model was made for {context} positions: it may compute nonsense behind them")
    plan = Plan(
        format="tensorrt",
        type_name=mix.name,
        steps=tuple(_told(step, options.wanted) for step in graph.plan.steps),
        files=(
            PlannedFile(ENGINE_NAME, estimated, exact=False),
            PlannedFile(CONFIG_NAME, CONFIG_BYTES, exact=False),
            PlannedFile(BUILD_REPORT_NAME, REPORT_BYTES, exact=False),
            *(PlannedFile(name, len(content)) for name, content in beside.items()),
        ),
        notes=(*graph.plan.notes, *notes),
        peak_memory_bytes=max(graph.plan.peak_memory_bytes, BUILDER_MEMORY + MEMORY_PER_ENGINE_BYTE * estimated),
    )
    return TensorRtExport(plan, graph, mix, builder, found, chosen, cache, beside)


def _told(step: Step, wanted: Mapping[str, str]) -> Step:
    """With the encoding that a matrix would have had, where it stays in floats because no group divides its rows."""
    if step.type_name not in FLOATS:
        return step
    had = wanted.get(split_name(step.name)[0][0], step.type_name) if "." in step.name else step.type_name
    return step if had == step.type_name else replace(step, wanted=had)


def _engine_bytes(architecture: Architecture, weights: int) -> int:
    mixtures = sum(architecture.sparse_layers)
    kernels = ENGINE_PER_LAYER * (1 + architecture.layers) + ENGINE_PER_MIXTURE * mixtures
    return int(weights * ENGINE_SHARE) + kernels


def write(export: TensorRtExport, targets: Sequence[Path], rows: Rows | None = None) -> tuple[str, ...]:
    """Build the engine and write all files; the sha256 of each weight that the builder was given.

    targets: a path for each file of the plan. rows: solved before, as for onnx.write. The graph is written beside the
    engine and removed, however the build ends. Raises: ResourceError for a full disk, and what `build` raises.
    """
    engine, config, report, *others = targets
    artifact.check_room(engine.parent, export.graph.plan.nbytes + export.plan.nbytes)
    with _emptied(engine.with_name(GRAPH_FOLDER)) as folder:
        files = [folder / file.name for file in export.graph.plan.files]
        digests = onnx.write(export.graph, files, rows)
        built = _built(export, files[0], engine)
    told = {"builder": export.builder.package, "weights_bytes": export.graph.plan.files[1].nbytes, **built}
    report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for path, content in zip(others, export.beside.values(), strict=True):
        path.write_bytes(content)
    config.write_bytes(config_bytes(_config(export, engine, built)))
    return digests


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """A folder that is empty at the start and gone at the end; what a build that was killed left is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _built(export: TensorRtExport, graph: Path, engine: Path) -> dict[str, Any]:
    options = export.options
    request = Request(
        graph=graph,
        engine=engine,
        shapes=tuple(_shapes(export, profile) for profile in export.profiles),
        flags=_flags(export),
        types=None if export.builder.strong else value_types(graph),
        nodes=tuple(f"{node.op_type} {node.name or node.outputs[0].name}" for node in export.graph.graph.graph),
        timing_cache=options.timing_cache,
        level=options.level,
        portable=options.portable,
    )
    with stages("building the engine") as step:
        return build(export.builder, request, step)


def _shapes(export: TensorRtExport, profile: Profile) -> dict[str, list[list[int]]]:
    """Input -> its least, best and most shapes in a profile."""
    bounds = {"batch": profile.batch, "positions": profile.positions, "capacity": profile.capacity}
    found = {}
    for value in export.graph.graph.graph.inputs:
        assert value.shape is not None, "a declared input has a shape"
        sizes = [size if isinstance(size, int) else bounds[str(size.value)] for size in value.shape]
        found[str(value.name)] = [[s if isinstance(s, int) else s[which] for s in sizes] for which in range(3)]
    return found


def _flags(export: TensorRtExport) -> tuple[str, ...]:
    """Names of builder flags. Weakly typed networks have to be allowed the types that the graph has."""
    options, mix = export.options, export.mix
    weak = [] if export.builder.strong else ["OBEY_PRECISION_CONSTRAINTS"]
    if weak and mix.floats == "F16":
        weak.append("FP16")
    if weak and export.graph.options.scales:  # without products of 8 bits TensorRT 8 would ask for a calibrator
        weak.append("INT8")
    sparse = ["SPARSE_WEIGHTS"] if options.sparsity is not None and options.sparsity.pattern == TWO_OF_FOUR else []
    return (*weak, *sparse, *(["REFIT"] if options.refit else []))


def value_types(graph: Path) -> dict[str, str]:
    """Value -> "F16" or "F32", of every float value that a graph's nodes compute in a type of its own."""
    import onnx as library
    from onnx import shape_inference

    names = {int(library.TensorProto.FLOAT): "F32", int(library.TensorProto.FLOAT16): "F16"}
    model = library.load(graph, load_external_data=False)
    inferred = shape_inference.infer_shapes(model).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    # A product whose inputs are dequantized is one of 8 bits: it is the builder's to say what it is computed in.
    rounded = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[0] in rounded}
    return {name: names[kind] for name, kind in found.items() if kind in names and name not in products}


def _config(export: TensorRtExport, engine: Path, built: Mapping[str, Any]) -> EngineConfig:
    architecture, options, graph = export.graph.model.architecture, export.options, export.graph.options
    found = export.installed.capability
    return EngineConfig(
        architecture=architecture.family,
        builder=export.builder.package,
        builder_version=built["version"],
        compute_capability=found if export.builder.needs_gpu and not options.portable else None,
        type_name=export.mix.name,
        floats=export.mix.floats,
        encodings={spec.name: graph.types.get(spec.name, export.mix.floats) for spec in architecture.tensors},
        parameters=export.plan.parameters,
        vocab_size=architecture.vocab,
        layers=architecture.layers,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        context_length=architecture.context_length,
        max_batch=options.limits.batch,
        max_input=options.limits.input,
        max_length=options.limits.length,
        profiles=export.profiles,
        cache=export.cache,
        engine_bytes=engine.stat().st_size,
        sha256=artifact.file_sha256(engine),
        dialect=export.builder.dialect,
        version=metadata.version("llmx"),
        solver=graph.solver,
        sparsity=graph.sparsity,
        refit=options.refit,
        options={"portable": options.portable, "optimization_level": options.level},
    )
