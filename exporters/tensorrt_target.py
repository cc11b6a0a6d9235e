"""TensorRT as a format of `llmx export`: from options and a recipe to a planned engine in a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import RuntimeMissing, UnsupportedError, UsageError
from llmx.exporters import format_types
from llmx.exporters.encoding import ENCODINGS
from llmx.exporters.gguf_general import identify
from llmx.exporters.onnx_target import require_packages
from llmx.exporters.target import Asked, WrittenTensor
from llmx.exporters.tensorrt_build import Builder, Installed, find_builder, installed
from llmx.exporters.tensorrt_types import BY_BITS, TensorRtMix, find_mix, input_roundings, planned_scales, planned_types
from llmx.exporters.tensorrt_types import wanted_types as wanted_by
from llmx.formats.onnx import FLOATS
from llmx.formats.tensorrt import CONFIG_NAME, ENGINE_NAME

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from llmx.exporters.journal import Journal
    from llmx.exporters.plan import Plan
    from llmx.exporters.quantization import Quantization
    from llmx.exporters.tensorrt import EngineOptions, TensorRtExport
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.quant.activations import Rounding
    from llmx.quant.calibrate import Calibration
    from llmx.quant.recipe import Recipe, Transform

FOLDER_SUFFIX = "-tensorrt"
DEFAULT_BITS = 4
LEVELS = range(6)
PROFILE_COUNTS = (1, 2)


class TensorRtFormat:
    """A folder with an engine, for TensorRT and TensorRT-RTX."""

    name = "tensorrt"
    types = format_types.TENSORRT
    takes = frozenset(
        {
            "builder", "max_batch", "max_input", "max_length", "timing_cache", "refit", "portable",
            "optimization_level", "profiles", "wide_head",
        }
    )  # fmt: skip
    is_folder = True
    kept_type = None
    libraries = ("onnx", "onnx-ir")

    def named_type(self, bits: int | None, type_name: str | None) -> str | None:
        return format_types.named_mix(bits, type_name, find_mix, BY_BITS)

    def default_type(self) -> str:
        return BY_BITS[DEFAULT_BITS]

    def draft(self, recipe: Recipe, asked: Asked) -> TensorRtDraft:
        require_packages("an engine is built from a graph, and that needs")
        mix = find_mix(recipe.type, recipe.transform)
        found = installed(asked.builder)
        builder = find_builder(found)
        check_asked(mix, asked, found, builder)
        return TensorRtDraft(mix, asked, found, builder)


def check_asked(mix: TensorRtMix, asked: Asked, found: Installed, builder: Builder) -> None:
    """Raises: UnsupportedError for what the installed builder cannot do, RuntimeMissing for what lacks a GPU,
    UsageError for options that are out of range; before anything is read."""
    known = f"{found.package} {found.version}"
    if mix.name not in builder.types:
        raise UnsupportedError(
            f"{known} builds no {mix.name} engine", fix=f"choose one of {', '.join(builder.types)}, or a newer builder"
        )
    if builder.needs_gpu and found.gpu is None:
        raise RuntimeMissing(
            f"{known} builds engines on a GPU, and none is here",
            fix="build where the engine will run, or without a GPU: --builder tensorrt_rtx",
        )
    if asked.refit and found.gpu is None:
        raise RuntimeMissing(f"{known} builds refittable engines on a GPU, and none is here", fix="leave out --refit")
    if asked.portable and builder.compatibility is None:
        raise UsageError(f"every engine of {known} is portable", fix="leave out --portable")
    if asked.timing_cache is not None and not builder.caches_timings:
        raise UsageError(f"{known} times nothing while it builds", fix="leave out --timing-cache")
    if asked.timing_cache is not None and not asked.timing_cache.resolve().parent.is_dir():
        raise UsageError("the folder of the timing cache is not there", where=asked.timing_cache)
    if asked.optimization_level is not None and asked.optimization_level not in LEVELS:
        raise UsageError(f"--optimization-level is one of {', '.join(map(str, LEVELS))}")
    if asked.profiles is not None and asked.profiles not in PROFILE_COUNTS:
        raise UsageError("--profiles is 1, for all lengths, or 2, for prompts and for single tokens")


@dataclass(frozen=True, slots=True)
class TensorRtDraft:
    """The options that need no model."""

    mix: TensorRtMix
    asked: Asked
    installed: Installed
    builder: Builder

    @property
    def type_name(self) -> str:
        return self.mix.name

    @property
    def base(self) -> str:
        return self.mix.base

    @property
    def measures_inputs(self) -> bool:
        return self.mix.inputs is not None

    @property
    def transform(self) -> Transform | None:
        return None

    def planned(self, model: Model, decided: Quantization, threads: int) -> TensorRtTarget:
        from llmx.exporters import tensorrt
        from llmx.exporters.onnx import OnnxOptions

        asked, architecture = self.asked, model.architecture
        ruled = {name: got.type for name, got in decided.resolved.items() if got.type is not None}
        check_floats(ruled, self.mix)
        types = planned_types(architecture, self.mix, ruled)
        options = OnnxOptions(
            type_name=self.mix.floats,
            types=types,
            wanted=wanted_by(architecture, self.mix, ruled),
            mix=self.mix.name,
            threads=threads,
            effort=decided.recipe.effort,
            solver=decided.solver,
            scales=planned_scales(architecture, self.mix, types),
            wide_head=asked.wide_head,
            sparsity=None if decided.sparsity is None else decided.sparsity.to_text(),
        )
        limits = tensorrt.limits(architecture, asked.max_batch, asked.max_input, asked.max_length)
        chosen = tensorrt.EngineOptions(
            limits,
            refit=bool(asked.refit),
            portable=bool(asked.portable),
            profiles=tensorrt.PROFILES[asked.profiles or (1 if self.builder.compiles_late or limits.input == 1 else 2)],
            level=asked.optimization_level,
            timing_cache=asked.timing_cache,
            sparsity=decided.sparsity,
        )
        return TensorRtTarget(tensorrt.prepare(model, self.mix, options, self.installed, self.builder, chosen))


def check_floats(ruled: Mapping[str, str], mix: TensorRtMix) -> None:
    """Raises: UnsupportedError for rules that keep matrices in another float type than the rest."""
    others = sorted(name for name, kind in ruled.items() if kind in FLOATS and kind != mix.floats)
    if others:
        raise UnsupportedError(
            f"an engine of type {mix.name} has one float type, {mix.floats}",
            problems=[f"{name}: {ruled[name]}" for name in others],
            fix=f"say {mix.floats} in the recipe's rules",
        )


@dataclass(frozen=True, slots=True)
class TensorRtTarget:
    """An Exporter over a planned engine."""

    export: TensorRtExport

    @property
    def plan(self) -> Plan:
        return self.export.plan

    @property
    def model(self) -> Model:
        return self.export.graph.model

    def targets(self, output: Path | None) -> list[Path]:
        """In the folder `output`, or where nothing is said in a new one that is named after the model and its type."""
        if output is None:
            stem = identify(self.model, 0).file_stem(self.plan.type_name)
            output = Path(stem + FOLDER_SUFFIX)
        elif output.name in {ENGINE_NAME, CONFIG_NAME}:
            output = output.parent
        elif output.suffix in {".engine", ".plan"}:
            raise UsageError(
                f"an engine's artifact is a folder, and the engine is called {ENGINE_NAME} there",
                where=output,
                fix=f"-o {output.with_suffix('')}",
            )
        return [output / file.name for file in self.plan.files]

    def check_weights(self) -> None:
        from llmx.exporters.onnx import check_weights

        check_weights(self.export.graph)

    def types_to_solve(self) -> Mapping[str, str]:
        types = self.export.graph.options.types
        return {name: kind for name, kind in types.items() if kind in ENCODINGS and kind not in FLOATS}

    def within(
        self, nbytes: int | None, bits: float | None, text: CalibrationText | None, threads: int
    ) -> TensorRtTarget:
        raise UsageError("the size of an engine cannot be chosen", fix="choose a --type")

    def static_inputs(self) -> Mapping[str, Rounding]:
        return input_roundings(self.model.architecture, self.export.mix, self.export.graph.options.types)

    def calibrated(self, model: Model, calibration: Calibration, threads: int) -> TensorRtTarget:
        """Recorded anew: the graph's weights are thunks of the model, and it holds the measured scales."""
        from llmx.exporters import onnx
        from llmx.exporters.onnx_activations import input_scales
        from llmx.quant.workers import workers

        graph = self.export.graph
        options = graph.options
        if options.scales:
            kind = self.export.mix.inputs
            assert kind is not None, "a mix with scales says how inputs are rounded"
            with workers(threads) as pool:
                options = replace(options, scales=input_scales(model, calibration, pool, kind, options.scales.keys()))
        elif model is self.model:
            return self
        return replace(self, export=replace(self.export, graph=onnx.prepare(model, options)))

    def write(
        self,
        targets: Sequence[Path],
        rows: Mapping[str, npt.NDArray[np.uint8]] | None,
        journal: Journal | None = None,
    ) -> list[WrittenTensor]:
        """The weights are told as the builder was given them: an engine does not say where it has them.

        journal: not used. A build cannot be gone on with, and its graph is written anew for it.
        """
        from llmx.exporters import tensorrt

        digests = tensorrt.write(self.export, targets, rows)
        return [
            WrittenTensor(one.name, one.shape, one.type_name, one.nbytes, None, None, digest)
            for one, digest in zip(self.export.graph.stored, digests, strict=True)
        ]

    def manifest_options(self) -> Mapping[str, Any]:
        options: EngineOptions = self.export.options
        return {
            "split_max_bytes": None,
            "builder": self.export.builder.package,
            "max_batch": options.limits.batch,
            "max_input": options.limits.input,
            "max_length": options.limits.length,
            "refit": options.refit,
            "portable": options.portable,
            "profiles": len(options.profiles),
            "wide_head": self.export.graph.options.wide_head,
            "optimization_level": options.level,
        }

    def derive(self, artifact: Path) -> Path | None:
        return None

    def derived(self, artifact: Path) -> Sequence[Path]:
        return ()
