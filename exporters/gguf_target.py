"""GGUF as a format of `llmx export`: from options and a recipe to a planned export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmx.exporters import format_types, gguf, gguf_types, quantization
from llmx.exporters.target import Asked, WrittenTensor
from llmx.formats.gguf import parse_size, shard_name
from llmx.formats.imatrix import read_imatrix
from llmx.models.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmx.exporters.journal import Journal
    from llmx.exporters.plan import Plan
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.models.tokenizer import Tokenizer
    from llmx.quant.activations import Rounding
    from llmx.quant.calibrate import Calibration
    from llmx.quant.recipe import Recipe, Transform

SUFFIX = ".gguf"


class GgufFormat:
    """Files that llama.cpp loads."""

    name = "gguf"
    types = format_types.GGUF
    takes = frozenset({"tensor_types", "imatrix", "split_max_size", "target_size", "target_bpw"})
    is_folder = False
    kept_type = None
    libraries = ()

    def named_type(self, bits: int | None, type_name: str | None) -> str | None:
        if type_name is not None:
            return gguf_types.file_type(type_name).name
        return None if bits is None else gguf_types.file_type_of_bits(bits).name

    def default_type(self) -> str:
        return "Q4_K_M"

    def draft(self, recipe: Recipe, asked: Asked) -> GgufDraft:
        chosen = gguf_types.recipe_type(recipe.type)
        options = gguf.GgufOptions(
            file_type=chosen,
            overrides=gguf_types.parse_overrides(asked.tensor_types),
            importance=None if asked.imatrix is None else read_imatrix(asked.imatrix),
            split_max_bytes=None if asked.split_max_size is None else parse_size(asked.split_max_size),
            effort=recipe.effort,
        )
        return GgufDraft(options)


@dataclass(frozen=True, slots=True)
class GgufDraft:
    """The options that need no model."""

    options: gguf.GgufOptions

    @property
    def type_name(self) -> str:
        return self.options.file_type.name

    @property
    def base(self) -> str:
        return self.options.file_type.base

    @property
    def measures_inputs(self) -> bool:
        return False

    @property
    def transform(self) -> Transform | None:
        return None

    def planned(self, model: Model, decided: quantization.Quantization, threads: int) -> GgufTarget:
        types = {name: got.type.upper() for name, got in decided.resolved.items() if got.type is not None}
        sparsity = None if decided.sparsity is None else decided.sparsity.to_text()
        options = replace(self.options, types=types, solver=decided.solver, sparsity=sparsity, threads=threads)
        tokenizer = open_tokenizer(model.checkpoint.folder)
        return GgufTarget(gguf.prepare(model, tokenizer, options), tokenizer)


@dataclass(frozen=True, slots=True)
class GgufTarget:
    """An Exporter over a planned GGUF export."""

    export: gguf.GgufExport
    tokenizer: Tokenizer

    @property
    def plan(self) -> Plan:
        return self.export.plan

    @property
    def model(self) -> Model:
        return self.export.model

    def targets(self, output: Path | None) -> list[Path]:
        """In the folder `output`, or the file `output` itself."""
        names, output = [file.name for file in self.plan.files], output or Path()
        if output.suffix != SUFFIX:
            return [output / name for name in names]
        if len(names) == 1:
            return [output]
        return [output.with_name(shard_name(output.stem, number, len(names))) for number in range(len(names))]

    def check_weights(self) -> None:
        gguf.check_weights(self.export)

    def types_to_solve(self) -> Mapping[str, str]:
        return gguf.canonical_types(self.export)

    def within(self, nbytes: int | None, bits: float | None, text: CalibrationText | None, threads: int) -> GgufTarget:
        from llmx.exporters.budget import Budget
        from llmx.exporters.gguf_budget import within_budget

        planned = within_budget(self.export, self.tokenizer, Budget(nbytes, bits), text, threads)
        return replace(self, export=planned)

    def static_inputs(self) -> Mapping[str, Rounding]:
        return {}

    def calibrated(self, model: Model, calibration: Calibration, threads: int) -> GgufTarget:
        return replace(self, export=replace(self.export, model=model))

    def write(
        self,
        targets: Sequence[Path],
        rows: Mapping[str, npt.NDArray[np.uint8]] | None,
        journal: Journal | None = None,
    ) -> list[WrittenTensor]:
        digests = gguf.write(self.export, targets, rows, journal)
        places = {
            name: (number, place.offset)
            for number, shard in enumerate(self.export.layouts)
            for name, place in shard.placements.items()
        }
        return [
            WrittenTensor(step.name, step.shape, step.type_name, step.nbytes, *places[step.name], digest)
            for step, digest in zip(self.plan.steps, digests, strict=True)
        ]

    def manifest_options(self) -> Mapping[str, Any]:
        return {"split_max_bytes": self.export.options.split_max_bytes}

    def derive(self, artifact: Path) -> Path | None:
        return None

    def derived(self, artifact: Path) -> Sequence[Path]:
        return ()
