"""ONNX as a format of `llmx export`: from options and a recipe to a planned export of a folder."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import RuntimeMissing, UnsupportedError, UsageError
from llmx.exporters.gguf_general import identify
from llmx.exporters.onnx_genai import NO_TOKENIZER, REQUIRED
from llmx.exporters.target import Asked, WrittenTensor
from llmx.formats.onnx import FLOATS, MODEL_NAME
from llmx.models.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from llmx.exporters.onnx import OnnxExport, OnnxOptions
    from llmx.exporters.plan import Plan
    from llmx.exporters.quantization import Quantization
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.models.tokenizer import Tokenizer
    from llmx.quant.recipe import Recipe

SUFFIX = ".onnx"
FOLDER_SUFFIX = "-onnx"
PACKAGES = {"onnx": "onnx", "onnx_ir": "onnx-ir"}  # module -> package
DIALECT = "ort"
DATA_FILE = 1  # the number of the file that holds all tensors, in the plan
BY_BITS = {16: "F16", 32: "F32"}


class OnnxFormat:
    """A folder that onnxruntime and onnxruntime-genai load."""

    name = "onnx"
    takes = frozenset({"dialect"})
    is_folder = True
    libraries = ("onnx", "onnx-ir")

    def named_type(self, bits: int | None, type_name: str | None) -> str | None:
        if type_name is not None:
            return _known(type_name, UsageError)
        if bits is None:
            return None
        if bits not in BY_BITS:
            raise UsageError(f"there is no {bits}-bit size class", fix=f"choose one of {', '.join(map(str, BY_BITS))}")
        return BY_BITS[bits]

    def default_type(self) -> str:
        return "F16"

    def draft(self, recipe: Recipe, asked: Asked) -> OnnxDraft:
        missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise RuntimeMissing(
                f"writing ONNX needs the packages {' and '.join(missing)}", fix="pip install 'llmx[onnx]'"
            )
        from llmx.exporters.onnx import DIALECTS, OnnxOptions

        dialect = asked.dialect or DIALECT
        if dialect not in DIALECTS:
            raise UsageError(f"there is no dialect {dialect!r}", fix=f"choose one of {', '.join(sorted(DIALECTS))}")
        return OnnxDraft(OnnxOptions(_known(recipe.type, UnsupportedError), dialect))


def _known(name: str, error: type[UsageError | UnsupportedError]) -> str:
    if name.upper() not in FLOATS:
        raise error(f"{name} is no type of ONNX files", fix=f"for ONNX choose one of {', '.join(FLOATS)}")
    return name.upper()


@dataclass(frozen=True, slots=True)
class OnnxDraft:
    """The options that need no model."""

    options: OnnxOptions

    @property
    def type_name(self) -> str:
        return self.options.type_name

    @property
    def base(self) -> str:
        return self.options.type_name

    def planned(self, model: Model, decided: Quantization, threads: int) -> OnnxTarget:
        from llmx.exporters.onnx import prepare

        folder = model.checkpoint.folder
        tokenizer = open_tokenizer(folder) if (folder / REQUIRED).is_file() else None
        export = prepare(model, self.options, tokenizer)
        if tokenizer is None:
            export = replace(export, plan=replace(export.plan, notes=(*export.plan.notes, NO_TOKENIZER)))
        return OnnxTarget(export, tokenizer)


@dataclass(frozen=True, slots=True)
class OnnxTarget:
    """An Exporter over a planned ONNX export."""

    export: OnnxExport
    tokenizer: Tokenizer | None

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
        return {}

    def within(self, nbytes: int | None, bits: float | None, text: CalibrationText | None, threads: int) -> OnnxTarget:
        raise UnsupportedError("ONNX types are not chosen by size yet", fix="leave out --target-size and --target-bpw")

    def with_model(self, model: Model) -> OnnxTarget:
        """Recorded anew: the graph's weights are thunks of the model."""
        from llmx.exporters.onnx import prepare

        return replace(self, export=prepare(model, self.export.options, self.tokenizer))

    def write(self, targets: Sequence[Path], rows: Mapping[str, npt.NDArray[np.uint8]] | None) -> list[WrittenTensor]:
        from llmx.exporters.onnx import write

        digests = write(self.export, targets, rows)
        return [
            WrittenTensor(one.name, one.shape, one.type_name, one.nbytes, DATA_FILE, offset, digest)
            for one, offset, digest in zip(self.export.stored, self.export.offsets, digests, strict=True)
        ]

    def manifest_options(self) -> Mapping[str, Any]:
        return {"split_max_bytes": None, "dialect": self.export.options.dialect}
