"""Does blame name the tensor that was damaged? Random damages of single tensors, one after another.

    python bench/blame.py [MODEL …] [--count 200] [--seed 0] [--types …] [--solved-types …] [--methods rtn,gptq,awq]
                          [--file GGUF=MODEL …]

Every MODEL (default: the checkpoint in examples/) is exported to many types by every method; files of other tools come
with --file. The digests are taken out of the files, so that nothing but the weights can tell. Every kind of damage has
its turn; the method, the file and the tensor are drawn, a vector one time in ten (bench/corruptions.py says which
damages are too small to count and drawn again). Blame has to name the tensor, of two exchanged ones either, and is
given nothing but the file and the checkpoint. Every sound file is asked about, too: there blame must name nothing.

Exit code 1 when fewer than --least (0.95) are named, or a sound file is blamed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from corruptions import DAMAGES, EXCHANGED, Stored, draw

from llmx import api
from llmx.exporters.gguf_metadata import DIGESTS_KEY
from llmx.exporters.gguf_tensors import Entry, read_rows
from llmx.formats.ggml_blocks import row_bytes
from llmx.formats.gguf import GgufFile, TensorInfo, Value, layout, read_gguf
from llmx.models.model import Model, open_model
from llmx.validate.blame import Blame, find_blame
from llmx.validate.case import Case, Limits, Settings
from llmx.validate.checks_bytes import compared_with
from llmx.validate.oracle import Tokens
from llmx.validate.runtimes import find_runtime
from llmx.validate.sample_text import SAMPLE_TEXT

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
TYPES = "F16,Q8_0,Q6_K,Q5_K_M,Q5_0,Q4_K_M,Q4_0,Q4_1,IQ4_XS,Q3_K_M,Q2_K"
SOLVED_TYPES = "Q4_K_M,Q4_0,Q2_K"  # a calibrated export takes a minute, a rounded one a second
CALIBRATION_TOKENS = 8192
VECTORS = 0.1
TRIES = 200  # of a file and a tensor for one kind, before it is given up


@dataclass(frozen=True)
class Base:
    """A sound file without digests, and its checkpoint."""

    name: str
    path: Path
    model: Path

    @property
    def method(self) -> str:
        return self.name.rpartition(" ")[2]


@dataclass(frozen=True)
class Trial:
    """One damage and what blame said."""

    kind: str
    file: str
    tensor: str
    type: str
    named: str | None
    right: bool
    reason: str
    too_small: int  # draws before it that did not move the tensor


def bases(
    models: Sequence[Path], types: Sequence[str], solved: Sequence[str], methods: Sequence[str], folder: Path
) -> Iterator[Base]:
    """Exports every model by every method, rounded to every one of `types`, otherwise to every one of `solved`."""
    for model in models:
        for method in methods:
            for type_name in types if method == "rtn" else solved:
                name = f"{model.name} {type_name} {method}"
                path = folder / f"{name.replace(' ', '-')}.gguf"
                request = api.ExportRequest(
                    str(model),
                    type_name=type_name,
                    method=method,
                    effort="fast",
                    calibration_tokens=None if method == "rtn" else CALIBRATION_TOKENS,
                    output=path,
                    validate=False,
                    force=True,
                )
                if not path.exists():
                    api.export(request)
                    without_digests(path, path)
                yield Base(name, path, model)


def without_digests(source: Path, target: Path) -> None:
    """Writes a copy of a GGUF file without the digests of its tensors."""
    file = read_gguf(source)
    values = {
        key: Value(file.types[key], tuple(value) if isinstance(value, list) else value)
        for key, value in file.metadata.items()
        if key != DIGESTS_KEY
    }
    infos = [TensorInfo(name, tensor.type_name, tensor.shape) for name, tensor in file.tensors.items()]
    plan = layout(values, infos)
    made = target.with_suffix(".part")
    with made.open("wb") as out:
        out.truncate(plan.size)
        out.write(plan.header)
        for name, place in plan.placements.items():
            out.seek(place.offset)
            out.write(file.bytes(name).data)
    made.rename(target)


@cache
def opened(folder: Path) -> tuple[Model, Tokens]:
    return open_model(folder), Tokens(folder)


def case_of(path: Path, folder: Path, scratch: Path) -> Case:
    model, tokens = opened(folder)
    return Case(
        artifact=path,
        file=read_gguf(path),
        model=model,
        tokens=tokens,
        runtime=find_runtime("llama.cpp"),  # blame does not run it
        text=SAMPLE_TEXT,
        limits=Limits(),
        settings=Settings(),
        scratch=scratch,
    )


def stored(file: GgufFile, model: Model, entry: Entry) -> Stored:
    type_name = file.tensors[entry.name].type_name
    data = file.bytes(entry.name).reshape(-1, row_bytes(type_name, entry.columns)).copy()
    return Stored(entry.name, type_name, data, read_rows(model, entry, 0, entry.rows).astype(np.float32))


def trial(rng: np.random.Generator, kind: str, choices: Sequence[Base], folder: Path) -> Trial | None:
    """One damage of that kind in a random file; None where none of many tensors can have it."""
    methods = sorted({base.method for base in choices})
    rejected = 0
    for _ in range(TRIES):
        method = methods[rng.integers(len(methods))]
        some_files = [base for base in choices if base.method == method]
        base = some_files[rng.integers(len(some_files))]
        case = case_of(base.path, base.model, folder)
        entries = [entry for entry in case.entries if entry.pieces]
        vector = rng.random() < VECTORS
        some = [entry for entry in entries if (len(entry.shape) == 1) == vector]
        if not some:
            continue
        entry = some[rng.integers(len(some))]
        made, too_small = damage(rng, kind, case, entry, entries)
        rejected += too_small
        if made:
            path = folder / "damaged.gguf"
            shutil.copy(base.path, path)
            with path.open("r+b") as out:
                for name, data in made.items():
                    out.seek(case.file.tensors[name].offset)
                    out.write(np.ascontiguousarray(data).data)
            found = find_blame(case_of(path, base.model, folder))
            names = sorted(made)
            type_name = case.file.tensors[names[0]].type_name
            return Trial(
                kind,
                base.name,
                " and ".join(names),
                type_name,
                found.tensor,
                found.tensor in made,
                found.reason,
                rejected,
            )
    return None


def damage(
    rng: np.random.Generator, kind: str, case: Case, entry: Entry, entries: Sequence[Entry]
) -> tuple[dict[str, np.ndarray], int]:
    """Stored tensor -> its damaged bytes, nothing where this tensor cannot have that damage; and draws too small."""
    file = case.file
    if kind != EXCHANGED:
        data, too_small = draw(rng, kind, stored(file, compared_with(case), entry))
        return ({} if data is None else {entry.name: data}), too_small
    own = file.tensors[entry.name]
    others = [
        other.name
        for other in entries
        if other is not entry and other.layer == entry.layer and other.shape == entry.shape
        if file.tensors[other.name].type_name == own.type_name
        if not np.array_equal(file.bytes(other.name), file.bytes(entry.name))
    ]
    if not others:
        return {}, 0
    other = others[rng.integers(len(others))]
    return {entry.name: file.bytes(other).copy(), other: file.bytes(entry.name).copy()}, 0


def table(trials: Sequence[Trial]) -> str:
    """How many were named, by kind of damage and by method."""
    lines = [f"{'damage':20} {'named':>9}  too small to count, drawn again"]
    for kind in (*DAMAGES, EXCHANGED):
        own = [one for one in trials if one.kind == kind]
        right = sum(one.right for one in own)
        lines.append(f"{kind:20} {right:4d}/{len(own):<4d}  {sum(one.too_small for one in own)}")
    right = sum(one.right for one in trials)
    by_method = Counter(one.file.split()[-1] for one in trials)
    lines.append(f"{'all':20} {right:4d}/{len(trials):<4d}  {right / len(trials):.1%}")
    for method, count in sorted(by_method.items()):
        lines.append(f"  {method}: {sum(one.right for one in trials if one.file.split()[-1] == method)}/{count}")
    return "\n".join(lines)


def blamed(found: Sequence[tuple[str, Blame]]) -> list[str]:
    return [f"{name}: {blame.reason}" for name, blame in found if blame.tensor is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", default=[EXAMPLE], metavar="MODEL")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--types", default=TYPES, help="of rounded files")
    parser.add_argument("--solved-types", default=SOLVED_TYPES)
    parser.add_argument("--methods", default="rtn,gptq,awq")
    parser.add_argument("--file", action="append", default=[], metavar="GGUF=MODEL", help="a file of another tool")
    parser.add_argument("--least", type=float, default=0.95, help="share of damages that must be named")
    parser.add_argument("--work", type=Path, help="a folder that keeps the exports")
    parser.add_argument("--json", type=Path, help="where every trial is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmx-blame-") as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lists = (option.split(",") for option in (options.types, options.solved_types, options.methods))
        choices = list(bases(options.models, *lists, folder))
        for number, (path, _, model) in enumerate(pair.partition("=") for pair in options.file):
            copy = folder / f"other-{number}.gguf"
            without_digests(Path(path), copy)
            choices.append(Base(f"{Path(path).name} other", copy, Path(model)))
        sound = [(base.name, find_blame(case_of(base.path, base.model, folder))) for base in choices]
        rng = np.random.default_rng(options.seed)
        kinds = (*DAMAGES, EXCHANGED)
        trials: list[Trial] = []
        for number in range(options.count):
            found = trial(rng, kinds[number % len(kinds)], choices, folder)
            if found is None:
                continue
            trials.append(found)
            print(f"{number}: {found.kind}, {found.file}, {found.tensor}: {found.named}", file=sys.stderr, flush=True)
            if not found.right:
                print(
                    f"missed: {found.kind} in {found.tensor} ({found.type}) of {found.file}: {found.reason}", flush=True
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in trials], indent=1) + "\n")
    wrong = blamed(sound)
    print(f"{len(choices)} files, {len(trials)} damages, seed {options.seed}")
    print(table(trials))
    print("\n".join([f"{len(wrong)} of {len(sound)} sound files are blamed", *wrong]))
    sys.exit(bool(wrong) or sum(one.right for one in trials) < options.least * len(trials))


if __name__ == "__main__":
    main()
