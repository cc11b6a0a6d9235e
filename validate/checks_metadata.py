"""What a file says of itself, beside what its checkpoint and its own tensors say.

A runtime shows a wrong number only where the text reaches it: a context that is too long never, an epsilon on a model
of large activations hardly. So the numbers are compared as they stand, too.
"""

from __future__ import annotations

from llmx.exporters.gguf_types import FILE_TYPES, FLOAT_TYPES, FileType, fitting
from llmx.formats.ggml_blocks import BLOCKS
from llmx.validate.case import Case
from llmx.validate.kinds import kind_of
from llmx.validate.report import SHOWN, Check, at_most, not_applicable

FILE_TYPE_KEY = "general.file_type"
GUESSED = 1024  # added by programs that guessed the type
BY_ID = {file_type.id: file_type for file_type in FILE_TYPES.values()}
NEAR = 0.85  # of the bits of a mix that is named for its size only; the nearest of those has at least 0.89


def check_numbers(case: Case) -> Check:
    """Returns bytes.numbers."""
    wrong = kind_of(case.file).differences(case.file, case.model)
    if isinstance(wrong, str):
        return not_applicable("bytes.numbers", wrong)
    detail = "; ".join(wrong[:SHOWN]) + (f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
    detail = detail or "every number of the architecture"
    return at_most("bytes.numbers", len(wrong), 0, "numbers", "config.json of the checkpoint", detail=detail)


def check_type(case: Case) -> Check:
    """Returns bytes.type: whether a GGUF file holds the type that it is named by."""
    stored = case.file.metadata.get(FILE_TYPE_KEY)
    mix = BY_ID.get(stored % GUESSED) if isinstance(stored, int) else None
    if mix is None:
        return not_applicable("bytes.type", f"{FILE_TYPE_KEY} is {stored}, which says nothing of one type")
    return _type(case, mix)


def _type(case: Case, mix: FileType) -> Check:
    """Whether any matrix has the type that the file is named by, or all together its size: the rest may be a mix."""
    sizes: dict[str, int] = {}
    named = False
    for entry in case.entries:
        tensor = case.file.tensors.get(entry.name)
        if tensor is None or not entry.quantizable:
            continue
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + entry.rows * entry.columns
        base = mix.base if mix.base in FLOAT_TYPES else fitting(mix.base, entry.columns)
        named = named or tensor.type_name == base
    most = max(sizes, key=lambda name: sizes[name], default="none")
    bits = sum(size * _bits(name) for name, size in sizes.items()) / max(sum(sizes.values()), 1)
    detail = f"named {mix.name}; most weights are {most}, {bits:.2f} bits a weight"
    origin = "a file holds the type that it is named by, or is as large"
    held = named or bits >= NEAR * _bits(mix.base)
    return Check("bytes.type", held, most, mix.base, "type", origin, detail)


def _bits(type_name: str) -> float:
    return 8 * BLOCKS[type_name].bytes / BLOCKS[type_name].weights
