"""The weights of an ONNX graph as its operators read them: whole tensors, whatever pieces they are stored in.

    MatMulNBits            B u8[N, groups, bytes], scales [N, groups], zero points u8[N, bytes]     rows already
    GatherBlockQuantized   data [N, K], scales [N, groups], zero points                             rows already
    DequantizeLinear       x [N, K], blocks along K; or [K, N], blocks along axis 0                 columns: turned here
    anything else          float tensors                                                            as they are

Each comes out as kept rows, see exporters/encoding.py. A graph that says itself what its weights are kept as (one that
llmx wrote) is read by their names instead: then a wrong attribute of an operator cannot hide itself. Such a graph holds
the rows of several of the checkpoint's tensors in one; `onnx_artifact.py` takes them apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from llmx.errors import IntegrityError
from llmx.exporters.encoding import GROUP_ENCODINGS
from llmx.formats.json_text import parse_object
from llmx.formats.onnx import CODES, COLUMNS, SCALES, TABLE, TYPES_KEY, VENDOR_DOMAIN, ZERO_POINTS, split_name
from llmx.formats.onnx_file import OnnxFile, OnnxNode, OnnxTensor
from llmx.formats.onnx_groups import GroupLayout, pack_bits, unpack_bits

FLOATS: Mapping[str, tuple[str, int]] = {"FLOAT": ("F32", 4), "FLOAT16": ("F16", 2), "BFLOAT16": ("BF16", 2)}
STORES: Mapping[str, str] = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
WHOLE: Mapping[str, tuple[int, bool]] = {
    # type of codes -> bits, signed
    **{"UINT2": (2, False), "INT2": (2, True), "UINT4": (4, False), "INT4": (4, True)},
    **{"UINT8": (8, False), "INT8": (8, True)},
}
NAMES = {kept.layout: name for name, kept in GROUP_ENCODINGS.items() if "-pos" not in name}
Rows = Callable[[int, int], np.ndarray]  # (start, stop) -> u8[stop - start, row bytes]


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole tensor. shape: of its values. rows: reads its kept rows. stored: the tensors of the file that hold it.

    part: the share of those bytes that is its own, where it is one of several.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    rows: Rows
    stored: tuple[str, ...]
    nbytes: int

    @property
    def count(self) -> int:
        """Rows of the 2-D view."""
        return prod(self.shape[:-1])


def weights_of(file: OnnxFile) -> dict[str, Kept]:
    """Every weight by its name, those of whole numbers first as the graph uses them, then floats as they are stored."""
    whole = _named(file) if TYPES_KEY in file.metadata else _used(file)
    found = {kept.name: kept for kept in whole}
    taken = {name for kept in whole for name in kept.stored}
    for tensor in file.tensors.values():
        if tensor.name.endswith(f".{COLUMNS}"):
            continue  # the same bytes as the part it is named after
        if tensor.name not in taken and tensor.kind in FLOATS and (tensor.file is not None or len(tensor.shape) > 1):
            found[tensor.name] = _float(file, tensor)
    order = {name: number for number, name in enumerate(file.tensors)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].stored[0]]))


def _used(file: OnnxFile) -> list[Kept]:
    """Whole numbers as the nodes read them, each once."""
    found: dict[str, Kept] = {}
    sources = _reshaped(file)
    for node in file.nodes:
        reader = READERS.get((node.domain, node.operator))
        kept = None if reader is None else reader(file, node, sources)
        if kept is not None:
            found.setdefault(kept.stored[0], kept)
    return list(found.values())


def _named(file: OnnxFile) -> list[Kept]:
    """Whole numbers as the graph's metadata says. Raises: IntegrityError where it says something else than it holds."""
    types = parse_object(file.metadata[TYPES_KEY], TYPES_KEY)
    widths = {node.inputs[1]: node.attributes.get("K") for node in file.nodes if node.operator == "MatMulNBits"}
    found: dict[str, Kept] = {}
    problems = []
    for tensor in file.tensors.values():
        stem, dot, rest = tensor.name.partition(f".{CODES}")
        if not dot or rest[:1] not in ("", ".") or stem in found:
            continue
        layout = _stated(types, stem)
        scales, zeros = (_stored_part(file, stem, part) for part in (SCALES, ZERO_POINTS))
        if layout is None or scales is None or scales.kind not in STORES or layout.zero_points != (zeros is not None):
            problems.append(f"{stem}: {TYPES_KEY} says {types.get(names_in(stem)[0][0])!r}, and it has other parts")
            continue
        parts = _Parts(tensor, scales, zeros)
        by_rows = len(tensor.shape) == 3 or rest == f".{TABLE}"
        cols = tensor.shape[0]
        if by_rows:
            width = widths.get(tensor.name)
            cols = width if isinstance(width, int) else prod(scales.shape[1:]) * (layout.group or 1)
        found[stem] = _of_layout(file, parts, layout, cols, by_rows=by_rows)
    if problems:
        raise IntegrityError("the graph does not hold what it says", where=file.paths[0], problems=problems)
    return list(found.values())


def _stored_part(file: OnnxFile, stem: str, part: str) -> OnnxTensor | None:
    """A part under its own name, or the view of it that rows are looked up in, where nothing else reads it."""
    return file.tensors.get(f"{stem}.{part}") or file.tensors.get(f"{stem}.{part}.{COLUMNS}")


def names_in(stored: str) -> list[tuple[str, int | None]]:
    """(canonical name, expert) of each tensor in a stored one; of a name that is none of llmx's, itself."""
    try:
        return split_name(stored) if "." in stored else [(stored, None)]
    except ValueError:  # what stands in brackets is no number
        return [(stored, None)]


def _stated(types: Mapping[str, object], stem: str) -> GroupLayout | None:
    """The layout that the metadata gives the first of the tensors in one; None for none that there is."""
    name = types.get(names_in(stem)[0][0])
    kept = GROUP_ENCODINGS.get(name) if isinstance(name, str) else None
    return None if kept is None else kept.layout


def _of_layout(file: OnnxFile, parts: _Parts, layout: GroupLayout, cols: int, *, by_rows: bool) -> Kept:
    group = layout.group_weights(cols)
    name = _layout_name(layout.bits, group, cols, parts.scales, layout.zero_points, whole=layout.group is None)
    count = prod(parts.scales.shape) // -(-cols // group)
    if by_rows:
        return _packed(file, parts, name, (count, cols))
    form = _Form(layout.bits, not layout.zero_points, group, (count, cols), True, 1 << layout.bits >> 1)
    return _turned(file, parts, form, name)


def _reshaped(file: OnnxFile) -> dict[str, str]:
    """Value -> the stored tensor that it is another view of."""
    found = {name: name for name in file.tensors}
    for node in file.nodes:
        if node.operator in ("Reshape", "Identity") and node.inputs[0] in found:
            found[node.outputs[0]] = found[node.inputs[0]]
    return found


def _float(file: OnnxFile, tensor: OnnxTensor) -> Kept:
    type_name, size = FLOATS[tensor.kind]
    shape = tensor.shape or (1,)

    def rows(start: int, stop: int) -> np.ndarray:
        width = shape[-1] * size
        return file.bytes(tensor.name).reshape(-1, width)[start:stop]

    return Kept(tensor.name, type_name, shape, rows, (tensor.name,), tensor.nbytes)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The stored tensors of one weight of whole numbers."""

    codes: OnnxTensor
    scales: OnnxTensor
    zeros: OnnxTensor | None

    @property
    def name(self) -> str:
        return self.codes.name.partition(f".{CODES}")[0]

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(one.name for one in (self.codes, self.scales, self.zeros) if one is not None)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.codes, self.scales, self.zeros) if one is not None)


def _parts(file: OnnxFile, node: OnnxNode, sources: Mapping[str, str], places: tuple[int, int, int]) -> _Parts | None:
    """places: of codes, scales and zero points among the node's inputs; None where they are not weights of its own."""
    given = [sources.get(node.inputs[at], "") if at < len(node.inputs) and node.inputs[at] else None for at in places]
    if "" in given or given[0] is None or given[1] is None:
        return None
    codes, scales, zeros = (None if name is None else file.tensors[name] for name in given)
    assert codes is not None and scales is not None, "both were named"
    return _Parts(codes, scales, zeros) if scales.kind in STORES else None


def _layout_name(
    bits: int, group: int, cols: int, scales: OnnxTensor, zero_points: bool, *, whole: bool = False
) -> str:
    """The encoding's name; of a layout that llmx does not know, one that says what it is. whole: one group a row."""
    store = STORES[scales.kind]
    for size in (None,) if whole else (group, None) if group >= cols else (group,):
        name = NAMES.get(GroupLayout(bits, size, store, zero_points))
        if name is not None:
            return name
    return f"int{bits}-g{group}-{'zp' if zero_points else 'sym'}-{store}"


def _matmul(file: OnnxFile, node: OnnxNode, sources: Mapping[str, str]) -> Kept | None:
    """Its three parts are ranges of columns of the kept rows, as they stand."""
    parts = _parts(file, node, sources, (1, 2, 3))
    if parts is None:
        return None
    wanted = (node.attributes.get(key) for key in ("K", "N", "block_size"))
    cols, count, group = (value if isinstance(value, int) and value > 0 else 1 for value in wanted)
    bits = node.attributes.get("bits", 4)
    name = _layout_name(bits, group, cols, parts.scales, parts.zeros is not None)
    return _packed(file, parts, name, (count, cols))


def _packed(file: OnnxFile, parts: _Parts, name: str, shape: tuple[int, int]) -> Kept:
    def rows(start: int, stop: int) -> np.ndarray:
        held = [file.bytes(stored).reshape(shape[0], -1)[start:stop] for stored in parts.stored]
        return np.concatenate(held, axis=1)

    return Kept(parts.name, name, shape, rows, parts.stored, parts.nbytes)


def _gathered(file: OnnxFile, node: OnnxNode, sources: Mapping[str, str]) -> Kept | None:
    """An embedding: rows of whole numbers, packed in bytes or of a type of their own."""
    parts = _parts(file, node, sources, (0, 2, 3))
    if parts is None or parts.codes.kind not in WHOLE:
        return None
    typed, signed = WHOLE[parts.codes.kind]
    bits = node.attributes.get("bits", 4) if parts.codes.kind == "UINT8" else typed
    count, cols = parts.codes.shape[0], prod(parts.codes.shape[1:]) * typed // bits
    middle = 1 << bits >> 1
    unstated = middle if parts.codes.kind == "UINT8" or signed else 0  # the zero point where none is stored
    return _turned(
        file, parts, _Form(bits, signed, node.attributes.get("block_size", 128), (count, cols), False, unstated)
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """How whole numbers lie: columns: [K, N] in place of [N, K]. unstated: the zero point where none is stored."""

    bits: int
    signed: bool
    group: int
    shape: tuple[int, int]
    columns: bool
    unstated: int


def _dequantized(file: OnnxFile, node: OnnxNode, sources: Mapping[str, str]) -> Kept | None:
    """ONNX's own operator, in blocks or with one scale a row or column."""
    parts = _parts(file, node, sources, (0, 1, 2))
    if parts is None or parts.codes.kind not in WHOLE or len(parts.codes.shape) != 2:
        return None
    bits, signed = WHOLE[parts.codes.kind]
    first, last = parts.codes.shape
    axis, block = node.attributes.get("axis", 1) % 2, node.attributes.get("block_size", 0)
    # In blocks, axis is the one that is cut; with one scale each, it is the one that scales go along.
    columns = (axis == 0) if block else (axis == 1)
    shape = (last, first) if columns else (first, last)
    if prod(parts.scales.shape) != shape[0] * (-(-shape[1] // block) if block else 1):
        return None  # one scale for all: no weight of ours, and none that a group encoding holds
    form = _Form(bits, signed, block or shape[1], shape, columns, 1 << bits >> 1 if signed else 0)
    return _turned(file, parts, form)


def _turned(file: OnnxFile, parts: _Parts, form: _Form, known: str | None = None) -> Kept:
    """Whole numbers as kept rows: counted from 0, with zero points where they are not in the middle."""
    count, cols = form.shape
    middle = 1 << form.bits >> 1
    stated = parts.zeros is not None or form.unstated != middle
    name = known or _layout_name(form.bits, form.group, cols, parts.scales, stated)
    groups = -(-cols // form.group)

    def numbers(tensor: OnnxTensor, width: int, start: int, stop: int) -> np.ndarray:
        """u8[stop - start, width], counted from 0."""
        data, total = file.bytes(tensor.name), count * width
        if form.columns:
            whole = unpack_bits(data, form.bits, total).reshape(width, count)[:, start:stop].T
        elif width * form.bits % 8 == 0:
            whole = unpack_bits(data.reshape(count, -1)[start:stop], form.bits, width)
        else:
            whole = unpack_bits(data, form.bits, total).reshape(count, width)[start:stop]
        return whole ^ np.uint8(middle) if form.signed else whole

    def scales(start: int, stop: int) -> np.ndarray:
        size = FLOATS[parts.scales.kind][1]
        data = file.bytes(parts.scales.name)
        held = data.reshape(groups, count, size).swapaxes(0, 1) if form.columns else data.reshape(count, groups, size)
        return held[start:stop].reshape(stop - start, -1)

    def rows(start: int, stop: int) -> np.ndarray:
        codes = numbers(parts.codes, cols, start, stop)
        zeros = None
        if parts.zeros is not None:
            zeros = numbers(parts.zeros, groups, start, stop)
        elif stated:
            zeros = np.full((stop - start, groups), form.unstated, np.uint8)
        missing = groups * form.group - cols
        if missing:  # filled up with what stands for zero
            last = np.full((len(codes), 1), middle, np.uint8) if zeros is None else zeros[:, -1:]
            codes = np.concatenate([codes, np.repeat(last, missing, axis=1)], axis=1)
        grouped = pack_bits(codes.reshape(len(codes), groups, form.group), form.bits).reshape(len(codes), -1)
        packed = [] if zeros is None else [pack_bits(zeros, form.bits)]
        return np.concatenate([grouped, scales(start, stop), *packed], axis=1)

    return Kept(parts.name, name, form.shape, rows, parts.stored, parts.nbytes)


def released(file: OnnxFile, kept: Kept) -> None:
    """Hands its pages back to the system."""
    for name in kept.stored:
        file.release(name)


def pieces(kept: Kept, chunk_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, u8[rows, row bytes]), so many rows that their float32 values take `chunk_bytes` at most, or one."""
    step = max(1, chunk_bytes // (4 * kept.shape[-1]))
    for start in range(0, kept.count, step):
        yield start, kept.rows(start, min(start + step, kept.count))


Reader = Callable[[OnnxFile, OnnxNode, Mapping[str, str]], Kept | None]
READERS: Mapping[tuple[str, str], Reader] = {
    (VENDOR_DOMAIN, "MatMulNBits"): _matmul,
    (VENDOR_DOMAIN, "GatherBlockQuantized"): _gathered,
    ("", "DequantizeLinear"): _dequantized,
}
