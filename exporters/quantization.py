"""How an export quantizes: a recipe, a calibration text where a method needs one, and what was decided for the user.

`auto` calibrates where that takes minutes on this machine, and says so where it does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import UnsupportedError, UsageError
from llmx.exporters.assignment import Assignment
from llmx.exporters.calibration_needs import SECONDS_PER_WORK
from llmx.exporters.encoding import SOLVABLE
from llmx.exporters.format_types import FormatTypes
from llmx.exporters.gguf_metadata import SCALED, SOLVED
from llmx.exporters.recipe_file import find_recipe
from llmx.exporters.sparsity import MAGNITUDE, Sparsity, note_of, problems_of, sparsity_of
from llmx.models.calibration_text import CalibrationText, read_calibration, sequences
from llmx.models.model import Model
from llmx.quant.protocol import EFFORTS
from llmx.quant.recipe import CalibrationSettings, Recipe, Resolved, Tensor, idle_rules, resolve
from llmx.quant.sparsity import NONE, find_pattern

if TYPE_CHECKING:
    from llmx.exporters.statistics_folder import StatisticsFolder
    from llmx.quant.calibrate import Calibration

METHODS = ("auto", "rtn", "awq", "gptq", "sparsegpt", "wanda", "magnitude")
DEVICES = ("auto", "cpu", "cuda")
LENGTH = 256
SHORTEST = 16  # tokens of a sequence: with fewer, most of what a model sees is its beginning
HELD_OUT_EVERY = 10  # sequences: a tenth judges what the others fitted
# More tokens cost time in proportion to the model: about this many weights times tokens, within these bounds.
WORK = 5.5e12
FEWEST_TOKENS, MOST_TOKENS = 24_576, 131_072
# Up to which work `auto` calibrates: ten minutes on two cores, whatever cores there are, because the same command makes
# the same bytes on any of them.
AUTO_WORK = 8e12
EIGHT_BITS = 8.0  # from here on rounding costs nothing that a calibration could win back
FLOAT_BITS = 16.0


@dataclass(frozen=True, slots=True)
class Quantization:
    """recipe: what was asked for, spelt out. text: None where nothing is calibrated. notes: for the user.

    inputs_only: what is calibrated are the scales of inputs; weights are rounded, as without a text. sparsity: what is
    pruned, None where nothing is.
    """

    recipe: Recipe
    resolved: Mapping[str, Resolved]
    text: CalibrationText | None = None
    tokens: int = 0
    length: int = LENGTH
    device: str = "cpu"
    statistics: Path | None = None
    notes: tuple[str, ...] = ()
    inputs_only: bool = False
    sparsity: Sparsity | None = None

    @property
    def rounds(self) -> bool:
        """Whether every tensor is just rounded to the nearest, sparse ones after their smallest weights have gone."""
        return _rounds(self.resolved)

    @property
    def prunes_only(self) -> bool:
        """Whether the smallest weights of sparse matrices go, and nothing is solved."""
        return self.sparsity is not None and (self.text is None or self.inputs_only)

    @property
    def calibrated(self) -> bool:
        return self.text is not None

    @property
    def solver(self) -> str | None:
        """What the artifact says of how its weights were changed; None where they are rounded."""
        if self.text is None or self.inputs_only:
            return None if self.sparsity is None else SOLVED
        return SCALED if any(got.transform is not None for got in self.resolved.values()) else SOLVED

    def to_json(self) -> dict[str, Any]:
        """The resolved copy for the report."""
        calibration = None
        if self.text is not None:
            calibration = {
                "text": self.text.name,
                "sha256": self.text.sha256,
                "tokens": self.tokens,
                "length": self.length,
                "held_out": f"every {HELD_OUT_EVERY}th sequence",
            }
        return {"recipe": self.recipe.to_json(), "calibration": calibration, "device": self.device}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user said of quantizing; None leaves it to the recipe or to us."""

    recipe: str | None = None
    method: str | None = None
    effort: str | None = None
    calibration: Path | None = None
    tokens: int | None = None
    statistics: Path | None = None
    device: str = "auto"
    importance: bool = False  # an importance matrix is given
    sparsity: str | None = None
    calibrate: bool | None = None  # what an earlier export did, whatever `auto` would decide here


def chosen_recipe(wishes: Wishes, type_name: str | None) -> Recipe:
    """The recipe asked for, with what the command line says over it.

    type_name: of --type or --bits, or the format's own; None only where the recipe says it. Raises: UsageError for an
    unknown recipe, method or effort, or two types.
    """
    if wishes.recipe is not None:
        recipe = find_recipe(wishes.recipe)
    else:
        assert type_name is not None, "without a recipe there is a type"
        recipe = Recipe("command line", type_name)
    if wishes.recipe is not None and type_name is not None and type_name != recipe.type:
        raise UsageError(
            f"the recipe makes {recipe.type}, --type or --bits asks for {type_name}", fix="give one of them"
        )
    for what, name, choices in (("method", wishes.method, METHODS), ("effort", wishes.effort, EFFORTS)):
        if name is not None and name not in choices:
            raise UsageError(f"there is no {what} {name!r}", fix=f"choose one of {', '.join(choices)}")
    changed: dict[str, Any] = {}
    if wishes.method is not None and (wishes.method != "auto" or wishes.recipe is None):
        changed["method"] = wishes.method
    if wishes.effort is not None:
        changed["effort"] = wishes.effort
    if wishes.sparsity is not None:
        changed["sparsity"] = None if wishes.sparsity == NONE else find_pattern(wishes.sparsity).name
    return replace(recipe, **changed)


def quantization(
    model: Model, wishes: Wishes, recipe: Recipe, base: str, threads: int, types: FormatTypes
) -> Quantization:
    """Decide what each tensor gets and what is read for it. base: the mix's base type. types: those of the format.

    Raises: UsageError for wishes that contradict each other, UnsupportedError for types that the format does not have,
    and what read_calibration raises.
    """
    specs = [spec for spec in model.architecture.tensors if spec.part == "weight"]
    layers = model.architecture.layers
    tensors: list[Tensor] = [(spec.name, spec.role, spec.layer, layers) for spec in specs]
    resolved = {got.name: _spelt(got, types) for got in resolve(recipe, tensors)}
    _check(wishes, recipe, resolved, types)
    idle = idle_rules(recipe, resolved.values())
    if idle:
        raise UsageError(
            "rules of the recipe fit no tensor of this model",
            problems=[f"rules[{number}]: {recipe.rules[number].to_json()}" for number in idle],
            fix="mend or remove them",
        )
    unknown = {got.type for got in resolved.values() if got.type and types.find(got.type) is None}
    if unknown:
        raise UnsupportedError(
            f"rules of the recipe name no types of {types.name} tensors: {', '.join(sorted(unknown))}",
            fix=f"one of {types.choices}",
        )
    parameters = sum(model.weight(spec.name).rows * model.weight(spec.name).cols for spec in specs)
    settings = recipe.calibration or CalibrationSettings(default_tokens(parameters), LENGTH)
    if settings.length < SHORTEST:
        raise UsageError(f"calibration.length is {settings.length}; sequences have at least {SHORTEST} tokens")
    tokens = wishes.tokens or settings.tokens
    length = min(settings.length, model.architecture.context_length)
    note = _why_not(wishes, resolved, _fewest_bits(resolved, base, types), parameters * tokens, threads)
    said = sparsity_of(resolved, model.architecture)
    notes = () if said is None else (note_of(said, resolved, model),)
    made = Quantization(recipe, resolved, None, tokens, length, statistics=wishes.statistics, sparsity=said)
    if note is not None:
        return replace(made, notes=(*notes, note) if note else notes)
    return replace(made, notes=notes, text=read_calibration(wishes.calibration), device=_device(wishes.device))


def to_measure(model: Model, wishes: Wishes) -> Quantization:
    """A calibration that only measures inputs. Raises: UsageError, and what read_calibration raises."""
    if problems := _impossible(wishes):
        raise UsageError("nothing can be measured so", problems=problems)
    parameters = sum(weight.rows * weight.cols for weight in model.weights())
    tokens = wishes.tokens or default_tokens(parameters)
    length = min(LENGTH, model.architecture.context_length)
    text = read_calibration(wishes.calibration)
    return Quantization(Recipe("measure", "F32"), {}, text, tokens, length, _device(wishes.device))


def default_tokens(parameters: int) -> int:
    """How many calibration tokens a model of this size gets."""
    return int(min(max(WORK / parameters, FEWEST_TOKENS), MOST_TOKENS))


def _wanting(resolved: Mapping[str, Resolved]) -> list[str]:
    """Methods that some tensor is given and that cannot do without a calibration."""
    solved = sorted({got.method for got in resolved.values() if got.method in ("gptq", "sparsegpt", "wanda")})
    scaled = sorted({got.transform for got in resolved.values() if got.transform is not None})
    return [*solved, *scaled]


def _rounds(resolved: Mapping[str, Resolved]) -> bool:
    """Whether every tensor is just rounded to the nearest, sparse ones after their smallest weights have gone."""
    return all(got.method in ("rtn", MAGNITUDE) and got.transform is None for got in resolved.values())


def _spelt(got: Resolved, types: FormatTypes) -> Resolved:
    """With its type as the format spells it, where the format has it."""
    return got if got.type is None else replace(got, type=types.find(got.type) or got.type)


def _fewest_bits(resolved: Mapping[str, Resolved], base: str, types: FormatTypes) -> float:
    return min(types.bits(name) for name in (base, *(got.type for got in resolved.values() if got.type)))


def _check(wishes: Wishes, recipe: Recipe, resolved: Mapping[str, Resolved], types: FormatTypes) -> None:
    problems = problems_of(resolved, recipe.sparsity, recipe.method)
    if wishes.importance and (wanting := _wanting(resolved)):
        problems.append(f"--imatrix holds mean squares alone; {' and '.join(wanting)} need whole second moments")
    if wishes.importance and wishes.calibration is not None:
        problems.append("--imatrix and --calibration both say what inputs weigh")
    if wishes.statistics is not None and (wishes.importance or (_rounds(resolved) and wishes.calibration is None)):
        problems.append("--statistics keeps what a calibration gathers, and this export does not calibrate")
    if not types.quantizes_activations and any(got.transform == "smoothquant" for got in resolved.values()):
        problems.append(f"SmoothQuant is for formats that quantize activations; {types.name} does not")
    if {got.transform for got in resolved.values()} >= {"awq", "smoothquant"}:
        problems.append("AWQ and SmoothQuant scale the same channels: a recipe can have one of them")
    problems += _impossible(wishes)
    if problems:
        raise UsageError("these options do not go together", problems=problems)


def _impossible(wishes: Wishes) -> list[str]:
    """What no calibration can do."""
    problems = []
    if wishes.device not in DEVICES:
        problems.append(f"--device is one of {', '.join(DEVICES)}, not {wishes.device!r}")
    if wishes.tokens is not None and wishes.tokens < 1:
        problems.append("--calibration-tokens must be positive")
    return problems


def _device(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device that torch can use here", fix="--device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _why_not(wishes: Wishes, resolved: Mapping[str, Resolved], bits: float, work: float, threads: int) -> str | None:
    """Why nothing is calibrated; "" where nobody would have expected it, None where it is. bits: of the smallest."""
    if wishes.importance or wishes.calibrate is False:
        return ""
    if wishes.calibration is not None or wishes.calibrate or _wanting(resolved):
        return None
    if bits >= FLOAT_BITS or _rounds(resolved):
        return ""
    if bits >= EIGHT_BITS:
        return "8-bit weights are rounded to the nearest: a calibration has nothing to win there"
    seconds = work * SECONDS_PER_WORK / threads
    if work > AUTO_WORK and _device(wishes.device) == "cpu":
        return (
            f"rounded to the nearest: calibrating would take about {seconds / 60:.0f} minutes here "
            "(--method gptq does it, --device cuda is faster)"
        )
    return None


def assignments(quantization: Quantization, types: Mapping[str, str]) -> dict[str, Assignment]:
    """What each tensor to be solved gets. types: canonical name -> encoding.

    A sparse one that no grid takes is solved as float32: the exporter then keeps it as planned.
    """
    found = {
        name: Assignment(
            types[name] if types.get(name) in SOLVABLE else "F32",
            got.method,
            got.transform == "awq",
            got.transform == "smoothquant",
            got.sparsity,
        )
        for name, got in quantization.resolved.items()
        if types.get(name) in SOLVABLE or got.sparsity is not None
    }
    order = {name: number for number, name in enumerate(types)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def calibration_of(
    model: Model, wanted: Quantization, planned: Mapping[str, Assignment], shelf: Path | None = None
) -> tuple[Calibration, StatisticsFolder | None]:
    """The token batches, and the folder that keeps statistics, if one is asked for. planned: what each tensor gets.

    shelf: a folder to keep activations in, None for in memory.

    Raises: what `sequences` and StatisticsFolder raise.
    """
    # Here, not above: rounding needs no torch, whose import takes a second and 150 MB.
    from llmx.exporters.shelf import DiskShelf
    from llmx.exporters.statistics_folder import StatisticsFolder
    from llmx.quant.calibrate import Calibration
    from llmx.quant.inputs import batches

    assert wanted.text is not None, "something is calibrated"
    found = sequences(
        wanted.text,
        model.checkpoint.folder,
        tokens=wanted.tokens,
        length=wanted.length,
        vocab=model.architecture.vocab,
    )
    store = None
    if wanted.statistics is not None:
        identity = {
            "checkpoint": model.checkpoint.identity(),
            "text": wanted.text.sha256,
            "sequences": _digest(found),
            "held_out_every": HELD_OUT_EVERY,
            "effort": wanted.recipe.effort,
            "tensors": {name: _identity(a) for name, a in planned.items()},
        }
        store = StatisticsFolder(wanted.statistics, identity, wanted.device)
    kept = None if shelf is None else DiskShelf(shelf)
    return Calibration(batches(found, HELD_OUT_EVERY, wanted.device), wanted.device, store, kept), store


def _identity(assigned: Assignment) -> list[str | bool]:
    """What of an assignment changes the statistics of later tensors."""
    more = [*(["smoothed"] if assigned.smoothed else []), *([assigned.sparsity] if assigned.sparsity else [])]
    return [assigned.type_name, assigned.method, assigned.scaled, *more]


def _digest(found: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(repr([list(sequence) for sequence in found]).encode()).hexdigest()
