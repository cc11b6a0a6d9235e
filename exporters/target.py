"""What llmx exports to: the formats by name, and what an export of any of them can do. Nothing here imports one.

Format ── a recipe and options ── Draft ── a model ── Exporter ── check, solve, write
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmx.errors import UsageError
from llmx.registry import declared_names, found

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llmx.exporters.format_types import FormatTypes
    from llmx.exporters.journal import Journal
    from llmx.exporters.plan import Plan
    from llmx.exporters.quantization import Quantization
    from llmx.models.calibration_text import CalibrationText
    from llmx.models.model import Model
    from llmx.quant.activations import Rounding
    from llmx.quant.calibrate import Calibration
    from llmx.quant.recipe import Recipe, Transform

ENTRY_POINTS = "llmx.exporters"

# name -> "module:callable without arguments that gives a Format". Third parties add to it by the entry points above.
EXPORTERS: dict[str, str] = {
    "gguf": "llmx.exporters.gguf_target:GgufFormat",
    "onnx": "llmx.exporters.onnx_target:OnnxFormat",
    "trtllm": "llmx.exporters.trtllm_target:TrtllmFormat",
    "tensorrt": "llmx.exporters.tensorrt_target:TensorRtFormat",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user said of the artifact; None where nothing. Each format takes some of it (`Format.takes`)."""

    tensor_types: Sequence[str] = ()
    imatrix: Path | None = None
    split_max_size: str | None = None
    dialect: str | None = None
    layout: str | None = None
    tp: int | None = None
    pp: int | None = None
    kv_cache: str | None = None
    ort: bool | None = None
    target_size: str | None = None
    target_bpw: float | None = None
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


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """One tensor as a file of the artifact holds it; a quantized matrix may be several.

    shape: as numpy has it. file: its number in the plan. offset: of its first byte there. sha256: of its bytes.
    file, offset: None where a builder was given these bytes, and the artifact does not say where it has them.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    file: int | None
    offset: int | None
    sha256: str


class Exporter(Protocol):
    """A planned export of one model: nothing of it is written yet."""

    @property
    def plan(self) -> Plan: ...

    @property
    def model(self) -> Model: ...

    def targets(self, output: Path | None) -> list[Path]:
        """The final paths, in the plan's order, for what -o says (None: nothing). The first is the file to load.

        Raises: UsageError for an output that the artifact cannot have.
        """
        ...

    def check_weights(self) -> None:
        """Look at every weight once. Raises: IntegrityError naming each that cannot be exported."""
        ...

    def types_to_solve(self) -> Mapping[str, str]:
        """Canonical name -> how its rows are kept, of every matrix that is quantized."""
        ...

    def within(self, nbytes: int | None, bits: float | None, text: CalibrationText | None, threads: int) -> Exporter:
        """Planned anew, with types that fit into nbytes of files, or into so many bits per weight.

        Raises: UsageError where nothing is that small.
        """
        ...

    def static_inputs(self) -> Mapping[str, Rounding]:
        """Canonical name -> how that matrix's inputs are rounded; what is missing there is not rounded, or by row."""
        ...

    def calibrated(self, model: Model, calibration: Calibration, threads: int) -> Exporter:
        """The same export of changed weights, with whatever it has to know of their inputs."""
        ...

    def write(
        self,
        targets: Sequence[Path],
        rows: Mapping[str, npt.NDArray[np.uint8]] | None,
        journal: Journal | None = None,
    ) -> list[WrittenTensor]:
        """Write every file and return what was written, in the order of the files.

        rows: solved before, canonical name -> u8[rows, row bytes]; what is missing there is rounded on the way.
        journal: of an export that is gone on with where it was stopped; a format may do without.
        """
        ...

    def manifest_options(self) -> Mapping[str, Any]:
        """What of the format's own options shapes the bytes, for the manifest's `options`."""
        ...

    def derive(self, artifact: Path) -> Path | None:
        """Make of the published artifact what was asked for beside it; None where nothing was."""
        ...

    def derived(self, artifact: Path) -> Sequence[Path]:
        """What may have been made of an artifact that stood here, and is of no use once that is replaced."""
        ...


class Draft(Protocol):
    """What is made, before the model is opened. base: the type whose bits the most weights have.

    measures_inputs: there is no such export without a calibration. transform: what channels are scaled by where the
    method is left to us and something is calibrated; None for nothing.
    """

    @property
    def type_name(self) -> str: ...

    @property
    def base(self) -> str: ...

    @property
    def measures_inputs(self) -> bool: ...

    @property
    def transform(self) -> Transform | None: ...

    def planned(self, model: Model, decided: Quantization, threads: int) -> Exporter:
        """Plan the export of a model. Raises: UnsupportedError, IntegrityError, UsageError as the format needs."""
        ...


class Format(Protocol):
    """A kind of artifact.

    types: those that its tensors can have. takes: the names of the fields of Asked that mean something for it.
    is_folder: the artifact is a whole folder. kept_type: the mix that keeps what a GGUF file has; None where the format
    cannot hold it. libraries: of those whose arithmetic or writing reaches the bytes, the packages that only this
    format uses.
    """

    name: str
    types: FormatTypes
    takes: frozenset[str]
    is_folder: bool
    kept_type: str | None
    libraries: tuple[str, ...]

    def named_type(self, bits: int | None, type_name: str | None) -> str | None:
        """The mix that --bits or --type names, as it is spelt; None for neither. Raises: UsageError, with all names."""
        ...

    def default_type(self) -> str:
        """The mix of an export that names none."""
        ...

    def draft(self, recipe: Recipe, asked: Asked) -> Draft:
        """Raises: UnsupportedError for a type that the format lacks, UsageError for options that cannot be."""
        ...


def format_names() -> list[str]:
    """Every known format's name: ours, then those that installed packages declare."""
    return [*EXPORTERS, *sorted(declared_names(ENTRY_POINTS) - EXPORTERS.keys())]


def find_format(name: str) -> Format:
    """Import and return the format of that name. Raises: UsageError, with the names there are."""
    known = found(name, EXPORTERS, ENTRY_POINTS)
    if known is None:
        raise UsageError(f"there is no format {name!r}", fix=f"choose one of {', '.join(format_names())}")
    return known
