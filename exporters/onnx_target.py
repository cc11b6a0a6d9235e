"""ONNX as a format of `llmx export`: from options and a recipe to a planned export of a folder."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import RuntimeMissing, UsageError
from llmx.exporters import format_types
from llmx.exporters.encoding import GROUP_ENCODINGS
from llmx.exporters.gguf_general import identify
from llmx.exporters.onnx_genai import NO_TOKENIZER, REQUIRED
from llmx.exporters.onnx_imports import import_ir
from llmx.exporters.onnx_mobile import check_convertible
from llmx.exporters.onnx_repack import TAKEN, TakenOver, source_notes, taking_over
from llmx.exporters.onnx_types import BY_BITS, OnnxMix, find_mix, planned_scales, planned_types, wanted_types
from llmx.exporters.target import Asked, WrittenTensor
from llmx.formats.onnx import MODEL_NAME
from llmx.models.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from llmx.exporters.journal import Journal
    from llmx.exporters.onnx import OnnxExport
    from llmx.exporters.plan import Plan
    from llmx.exporters.quantization import Quantization
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.models.tokenizer import Tokenizer
    from llmx.quant.activations import Rounding
    from llmx.quant.calibrate import Calibration
    from llmx.quant.recipe import Recipe, Transform

SUFFIX = ".onnx"
FOLDER_SUFFIX = "-onnx"
PACKAGES = {"onnx": "onnx", "onnx_ir": "onnx-ir"}  # module -> package
DIALECT = "ort"
DEFAULT_BITS = 4
SHOWN = 4
DATA_FILE = 1  # the number of the file that holds all tensors, in the plan


def require_packages(why: str) -> None:
    """Have what records graphs imported. Raises: RuntimeMissing, which begins with `why`, naming what is not here."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise RuntimeMissing(f"{why} the packages {' and '.join(missing)}", fix="pip install 'llmx[onnx]'")
    import_ir()


class OnnxFormat:
    """A folder that onnxruntime and onnxruntime-genai load."""

    name = "onnx"
    types = format_types.ONNX
    takes = frozenset({"dialect", "ort", "target_size", "target_bpw"})
    is_folder = True
    kept_type = TAKEN
    libraries = ("onnx", "onnx-ir")

    def named_type(self, bits: int | None, type_name: str | None) -> str | None:
        return format_types.named_mix(bits, type_name, _mix, BY_BITS)

    def default_type(self) -> str:
        return BY_BITS[DEFAULT_BITS]

    def draft(self, recipe: Recipe, asked: Asked) -> OnnxDraft:
        require_packages("writing ONNX needs")
        from llmx.exporters.onnx import DIALECTS

        dialect = asked.dialect or DIALECT
        if dialect not in DIALECTS:
            raise UsageError(f"there is no dialect {dialect!r}", fix=f"choose one of {', '.join(sorted(DIALECTS))}")
        return OnnxDraft(_mix(recipe.type), dialect, ort=bool(asked.ort))


def _mix(name: str) -> OnnxMix:
    return OnnxMix(TAKEN, "F32") if name.upper() == TAKEN else find_mix(name)


@dataclass(frozen=True, slots=True)
class OnnxDraft:
    """The options that need no model."""

    mix: OnnxMix
    dialect: str
    ort: bool  # an .ort file is made of the graph

    @property
    def type_name(self) -> str:
        return self.mix.name

    @property
    def base(self) -> str:
        return self.mix.base

    @property
    def measures_inputs(self) -> bool:
        return self.mix.static

    @property
    def transform(self) -> Transform | None:
        return None

    def planned(self, model: Model, decided: Quantization, threads: int) -> OnnxTarget:
        from llmx.exporters.onnx import OnnxOptions, prepare

        ruled = {name: got.type for name, got in decided.resolved.items() if got.type is not None}
        options = OnnxOptions(
            type_name=self.mix.floats,
            dialect=self.dialect,
            types=planned_types(model.architecture, self.mix, ruled),
            wanted=wanted_types(model.architecture, self.mix, ruled),
            mix=self.mix.name,
            threads=threads,
            effort=decided.recipe.effort,
            solver=decided.solver,
            sparsity=None if decided.sparsity is None else decided.sparsity.to_text(),
            scales=planned_scales(model.architecture, self.mix),
        )
        keeps = self.mix.name == TAKEN
        if keeps and decided.calibrated:
            raise UsageError(
                "the weights of a GGUF file are taken over as they are: there is nothing to calibrate",
                fix="leave out --method and --calibration, or choose a --type",
            )
        if keeps:
            options = taking_over(model, options, ruled)
        folder = model.checkpoint.folder
        tokenizer = open_tokenizer(folder) if (folder / REQUIRED).is_file() else None
        made = OnnxTarget(prepare(model, options, tokenizer), tokenizer, keeps, self.ort, frozenset(ruled))
        if self.ort:
            check_convertible(made.plan.nbytes)
        notes = [NO_TOKENIZER] if tokenizer is None else []
        notes += source_notes(model, options.types, keeps=keeps)
        if decided.calibrated and (ragged := made.ragged()):
            notes.append(
                f"{len(ragged)} matrices whose rows are no whole number of groups are rounded to the nearest: "
                f"{', '.join(ragged[:SHOWN])}{', …' if len(ragged) > SHOWN else ''}"
            )
        plan = replace(made.plan, notes=(*made.plan.notes, *notes))
        return replace(made, export=replace(made.export, plan=plan))


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    """An Exporter over a planned ONNX export. keeps: rows come from a GGUF file as they are.

    ruled: canonical names of the matrices whose types the recipe's rules gave. ort: an .ort file is made of it.
    """

    export: OnnxExport
    tokenizer: Tokenizer | None
    keeps: bool = False
    ort: bool = False
    ruled: frozenset[str] = frozenset()

    @property
    def plan(self) -> Plan:
        return self.export.plan

    @property
    def model(self) -> Model:
        return self.export.model

    def targets(self, output: Path | None) -> list[Path]:
        """In the folder `output`, or where nothing is said in a new one that is named after the model and its type."""
        if output is None:
            stem = identify(self.model, 0).file_stem(self.plan.type_name)
            output = Path(stem + FOLDER_SUFFIX)
        elif output.name == MODEL_NAME:
            output = output.parent
        elif output.suffix == SUFFIX:
            raise UsageError(
                f"an ONNX artifact is a folder, and its graph is called {MODEL_NAME} there",
                where=output,
                fix=f"-o {output.with_suffix('')}",
            )
        return [output / file.name for file in self.plan.files]

    def check_weights(self) -> None:
        from llmx.exporters.onnx import check_weights

        check_weights(self.export)

    def types_to_solve(self) -> Mapping[str, str]:
        """Of whole groups: what solvers need."""
        left = set(self.ragged())
        return {name: kind for name, kind in self._quantized().items() if name not in left}

    def ragged(self) -> list[str]:
        """Quantized matrices whose rows end in a shorter group."""
        cols = {spec.name: spec.shape[-1] for spec in self.model.architecture.tensors}
        return [name for name, kind in self._quantized().items() if not GROUP_ENCODINGS[kind].solvable(cols[name])]

    def _quantized(self) -> dict[str, str]:
        return {name: kind for name, kind in self.export.options.types.items() if kind in GROUP_ENCODINGS}

    def within(self, nbytes: int | None, bits: float | None, text: CalibrationText | None, threads: int) -> OnnxTarget:
        from llmx.exporters.budget import Budget
        from llmx.exporters.onnx_budget import within_budget

        if self.keeps:
            raise UsageError(
                "the weights of a GGUF file are taken over as they are, whatever they take",
                fix="leave out --target-size and --target-bpw, or choose a --type",
            )
        planned = within_budget(self.export, self.tokenizer, Budget(nbytes, bits), text, threads, fixed=self.ruled)
        said = [note for note in self.plan.notes if note not in planned.plan.notes]
        return replace(self, export=replace(planned, plan=replace(planned.plan, notes=(*planned.plan.notes, *said))))

    def static_inputs(self) -> Mapping[str, Rounding]:
        return {name: scale.kind for name, scale in self.export.options.scales.items()}

    def calibrated(self, model: Model, calibration: Calibration, threads: int) -> OnnxTarget:
        """Recorded anew: the graph's weights are thunks of the model, and it holds the measured scales."""
        from llmx.exporters.onnx import prepare
        from llmx.exporters.onnx_activations import input_scales
        from llmx.quant.workers import workers

        options = self.export.options
        if options.scales:
            with workers(threads) as pool:
                options = replace(options, scales=input_scales(model, calibration, pool))
        elif model is self.model:
            return self
        return replace(self, export=prepare(model, options, self.tokenizer))

    def write(
        self,
        targets: Sequence[Path],
        rows: Mapping[str, npt.NDArray[np.uint8]] | None,
        journal: Journal | None = None,
    ) -> list[WrittenTensor]:
        from llmx.exporters.onnx import write

        kept = TakenOver(self.model, self.export.options.types) if self.keeps else rows
        digests = write(self.export, targets, kept, journal)
        return [
            WrittenTensor(one.name, one.shape, one.type_name, one.nbytes, DATA_FILE, offset, digest)
            for one, offset, digest in zip(self.export.stored, self.export.offsets, digests, strict=True)
        ]

    def manifest_options(self) -> Mapping[str, Any]:
        return {"split_max_bytes": None, "dialect": self.export.options.dialect}

    def derive(self, artifact: Path) -> Path | None:
        from llmx.exporters.onnx_mobile import convert

        return convert(artifact) if self.ort else None

    def derived(self, artifact: Path) -> Sequence[Path]:
        from llmx.exporters.onnx_mobile import derived

        return derived(artifact)
