"""TensorRT-LLM checkpoints as a format of `llmx export`: from options and a recipe to a planned export of a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import UnsupportedError, UsageError
from llmx.exporters import format_types
from llmx.exporters.gguf_general import identify
from llmx.exporters.target import Asked, WrittenTensor
from llmx.exporters.trtllm_types import BY_BITS, TYPES, TrtllmMix, find_mix, planned_types
from llmx.formats.gguf import parse_size
from llmx.formats.trtllm import CONFIG_NAME, HF, LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from llmx.exporters.journal import Journal
    from llmx.exporters.plan import Plan
    from llmx.exporters.quantization import Quantization
    from llmx.exporters.trtllm import TrtllmExport
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.quant.activations import Kind, Rounding
    from llmx.quant.calibrate import Calibration
    from llmx.quant.recipe import Recipe, Transform

FOLDER_SUFFIX = "-trtllm"
CACHES: Mapping[str, Kind] = {"FP8": "fp8", "INT8": "int8"}  # quant_algo of a cache -> how its codes are rounded


class TrtllmFormat:
    """A folder that TensorRT-LLM loads, or its trtllm-build."""

    name = "trtllm"
    types = TYPES
    takes = frozenset({"split_max_size", "layout", "tp", "pp", "kv_cache"})
    is_folder = True
    kept_type = None
    libraries = ()

    def named_type(self, bits: int | None, type_name: str | None) -> str | None:
        return format_types.named_mix(bits, type_name, find_mix, BY_BITS)

    def default_type(self) -> str:
        return BY_BITS[4]

    def draft(self, recipe: Recipe, asked: Asked) -> TrtllmDraft:
        layout, cache = asked.layout or HF, None if asked.kv_cache is None else asked.kv_cache.upper()
        if layout not in LAYOUTS:
            raise UsageError(f"there is no layout {layout!r}", fix=f"choose one of {', '.join(LAYOUTS)}")
        if cache is not None and cache not in CACHES:
            fix = f"choose one of {', '.join(name.lower() for name in CACHES)}"
            raise UsageError(f"a cache cannot be kept as {asked.kv_cache!r}", fix=fix)
        if layout == HF and (asked.tp, asked.pp) != (None, None):
            raise UsageError("--tp and --pp deal a model to ranks; loaders of this layout do it", fix="--layout ranks")
        if layout != HF and asked.split_max_size is not None:
            raise UsageError("a rank has one file: --split-max-size is for --layout hf")
        mix = find_mix(recipe.type)
        if layout != HF and mix.algorithm == "W8A16":
            raise UnsupportedError(
                "per-rank files hold W8A16 weights in the order of one GPU generation's kernels",
                fix="--layout hf, whose loader orders them, or --type W4A16, W8A8_SQ or FP8",
            )
        split = None if asked.split_max_size is None else parse_size(asked.split_max_size)
        return TrtllmDraft(mix, layout, asked.tp or 1, asked.pp or 1, cache, split)


@dataclass(frozen=True, slots=True)
class TrtllmDraft:
    """The options that need no model."""

    mix: TrtllmMix
    layout: str
    tp: int
    pp: int
    cache: str | None
    split_max_bytes: int | None

    @property
    def type_name(self) -> str:
        return self.mix.name

    @property
    def base(self) -> str:
        return self.mix.base

    @property
    def measures_inputs(self) -> bool:
        return self.mix.inputs is not None or self.cache is not None

    @property
    def transform(self) -> Transform | None:
        return self.mix.transform

    def planned(self, model: Model, decided: Quantization, threads: int) -> TrtllmTarget:
        from llmx.exporters.trtllm import TrtllmOptions, prepare
        from llmx.exporters.trtllm_ranks import Mesh

        ruled = {name: got.type for name, got in decided.resolved.items() if got.type is not None}
        types = planned_types(model.architecture, self.mix, ruled)
        if self.layout != HF and self.mix.inputs == "int8" and model.architecture.experts:
            raise UnsupportedError(
                "TensorRT-LLM's own layers have no experts with 8-bit inputs", fix="--type FP8 or W4A16, or --layout hf"
            )
        options = TrtllmOptions(
            mix=self.mix,
            types=types,
            layout=self.layout,
            mesh=Mesh(self.tp, self.pp),
            cache=self.cache,
            split_max_bytes=self.split_max_bytes,
            inputs=dict.fromkeys(types.encodings, 1.0) if self.mix.inputs is not None else {},
            cache_scales=_unit_caches(model) if self.cache is not None else {},
            effort=decided.recipe.effort,
            solver=decided.solver,
            sparsity=None if decided.sparsity is None else decided.sparsity.to_text(),
            threads=threads,
        )
        return TrtllmTarget(prepare(model, options))


def _unit_caches(model: Model) -> dict[str, float]:
    """Scales in the place of those to be measured: a plan has the bytes that the real export will have."""
    return {f"layers.{layer}.{part}": 1.0 for layer in range(model.architecture.layers) for part in "kv"}


@dataclass(frozen=True, slots=True)
class TrtllmTarget:
    """An Exporter over a planned export."""

    export: TrtllmExport

    @property
    def plan(self) -> Plan:
        return self.export.plan

    @property
    def model(self) -> Model:
        return self.export.model

    def targets(self, output: Path | None) -> list[Path]:
        """In the folder `output`, or where nothing is said in a new one that is named after the model and its type."""
        if output is None:
            output = Path(identify(self.model, 0).file_stem(self.plan.type_name) + FOLDER_SUFFIX)
        elif output.name == CONFIG_NAME:
            output = output.parent
        return [output / file.name for file in self.plan.files]

    def check_weights(self) -> None:
        from llmx.exporters.trtllm import check_weights

        check_weights(self.export)

    def types_to_solve(self) -> Mapping[str, str]:
        return self.export.options.types.encodings

    def within(
        self, nbytes: int | None, bits: float | None, text: CalibrationText | None, threads: int
    ) -> TrtllmTarget:
        raise UsageError("the matrices of a TensorRT-LLM checkpoint have one type: there is no size to aim at")

    def static_inputs(self) -> Mapping[str, Rounding]:
        inputs = self.export.options.mix.inputs
        return {} if inputs is None else dict.fromkeys(self.export.options.types.encodings, inputs)

    def calibrated(self, model: Model, calibration: Calibration, threads: int) -> TrtllmTarget:
        """Planned anew, with the measured scales."""
        from llmx.exporters.onnx_activations import input_scales, kv_scales
        from llmx.exporters.trtllm import prepare
        from llmx.quant.workers import workers

        options = self.export.options
        with workers(threads) as pool:
            if options.mix.inputs is not None:
                found = input_scales(model, calibration, pool, options.mix.inputs, list(options.types.encodings))
                options = replace(options, inputs={name: one.scale for name, one in found.items()})
            if options.cache is not None:
                options = replace(options, cache_scales=kv_scales(model, calibration, pool, CACHES[options.cache]))
        return replace(self, export=prepare(model, options))

    def write(
        self,
        targets: Sequence[Path],
        rows: Mapping[str, npt.NDArray[np.uint8]] | None,
        journal: Journal | None = None,
    ) -> list[WrittenTensor]:
        from llmx.exporters.trtllm import write

        digests = write(self.export, targets, rows, journal)
        made = zip(self.export.contents.tensors, self.export.labels(), self.export.offsets(), digests, strict=True)
        first = self.export.first_file
        return [
            WrittenTensor(label, one.shape, one.dtype, one.nbytes, first + one.file, offset, digest)
            for one, label, offset, digest in made
        ]

    def manifest_options(self) -> Mapping[str, Any]:
        options = self.export.options
        return {
            "split_max_bytes": options.split_max_bytes,
            "layout": options.layout,
            "tp": None if options.layout == HF else options.mesh.tp,
            "pp": None if options.layout == HF else options.mesh.pp,
            "kv_cache": options.cache,
        }

    def derive(self, artifact: Path) -> Path | None:
        return None

    def derived(self, artifact: Path) -> Sequence[Path]:
        return ()
