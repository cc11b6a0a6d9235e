"""A bounded reader of ONNX graphs: what a file says of its weights is checked against its folder before it is used.

A graph names the place of each weight in a data file beside it, and whoever wrote the graph chose that name. So before
a runtime opens anything, every location must be the plain name of a regular file in the graph's own folder, every range
must lie inside it, and no two weights may share some of their bytes. No data is read here.

    model.onnx  | protobuf: nodes, inputs, outputs, small constants, and for each weight (location, offset, length) |
    location    | ... | weight at offset, length bytes | ...

Source: onnx.proto of ONNX 1.23, https://onnx.ai/onnx/repo-docs/ExternalData.html; the offences known from
CVE-2022-25882 and CVE-2024-27318 (paths out of the folder), and from hostile GGUF headers (overflowing shapes).
"""

from __future__ import annotations

import importlib.util
import itertools
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmx.errors import IntegrityError, RuntimeMissing, UsageError
from llmx.formats.onnx import VENDOR_DOMAIN, VENDOR_OPSET
from llmx.formats.onnx_file import OnnxFile, OnnxNode, OnnxTensor
from llmx.formats.onnx_wire import check_parts

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

MAX_GRAPH_BYTES = 1 << 28  # the graph of a thousand layers takes less; weights belong beside it
MAX_NODES = 1 << 20
MAX_TENSORS = 1 << 20
MAX_DIMS = 8
MAX_BYTES = 2**63 - 1
MAX_DEPTH = 8  # of graphs inside nodes of graphs
MAX_SHOWN = 20  # problems of one file that are listed
DOMAINS = ("", "ai.onnx", VENDOR_DOMAIN)  # operators of others have no kernel in any runtime that llmx knows
BITS = {
    # a type of onnx.TensorProto.DataType that a weight may have -> bits of one of its elements
    **{"FLOAT": 32, "UINT8": 8, "INT8": 8, "UINT16": 16, "INT16": 16, "INT32": 32, "INT64": 64, "BOOL": 8},
    **{"FLOAT16": 16, "DOUBLE": 64, "UINT32": 32, "UINT64": 64, "BFLOAT16": 16, "UINT4": 4, "INT4": 4},
    **{"FLOAT8E4M3FN": 8, "FLOAT8E5M2": 8, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2},
}
OF_RUNTIME = ("SimplifiedLayerNormalization",)  # onnxruntime has it in ONNX's own domain, where ONNX does not
TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_NUMBER = re.compile(r"[0-9]{1,19}")
_NAME = re.compile(r"[^/\\\0]+")


def read_onnx(path: str | Path) -> OnnxFile:
    """Returns a graph and the places of its weights, all of them inside the files beside it. No weight is read.

    path: the graph, or the folder that it lies in as model.onnx.
    Raises: IntegrityError naming every offence; UsageError when there is no such file; RuntimeMissing without onnx.
    """
    path = graph_path(Path(path))
    model = _parsed(path)
    problems = [*_header_problems(model)]
    tensors, data = _Weights(path, problems).of(model)
    nodes = tuple(_nodes(model.graph, problems))
    problems += _domain_problems(model, nodes)
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise IntegrityError("the graph is broken or hostile", where=path, problems=[*problems[:MAX_SHOWN], *more])
    _check(path, model)
    return OnnxFile(
        paths=(path, *data),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        producer=(model.producer_name, model.producer_version),
        opsets={one.domain: one.version for one in model.opset_import},
        tensors=tensors,
        nodes=nodes,
        inputs=tuple(one.name for one in model.graph.input),
        outputs=tuple(one.name for one in model.graph.output),
        maps={target: _mapped(target) for target in data},
        inline={one.name: _inline_bytes(one) for one in model.graph.initializer if not one.data_location},
    )


def graph_path(path: Path) -> Path:
    """The graph's file, where its folder was named. Raises: UsageError when there is no such file."""
    from llmx.formats.onnx import MODEL_NAME

    found = path / MODEL_NAME if path.is_dir() else path
    if not found.is_file():
        raise UsageError("no such file", where=found)
    return found


def _parsed(path: Path) -> ModelProto:
    if importlib.util.find_spec("onnx") is None:
        raise RuntimeMissing("reading ONNX takes the package onnx", fix="pip install 'llmx[onnx]'")
    import onnx
    from google.protobuf.message import DecodeError

    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        fix = "store the weights as external data, beside the graph"
        raise IntegrityError(f"a graph of {size} bytes; {MAX_GRAPH_BYTES} are read", where=path, fix=fix)
    data = path.read_bytes()
    check_parts(data, path)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise IntegrityError(f"this is no ONNX graph: {error}", where=path) from error
    if not model.HasField("graph"):
        raise IntegrityError("this is no ONNX graph: it holds none", where=path)
    return model


def _header_problems(model: ModelProto) -> Iterator[str]:
    from onnx import IR_VERSION

    if not 3 <= model.ir_version <= IR_VERSION:
        yield f"IR version {model.ir_version}; 3 to {IR_VERSION} are known"
    keys = Counter(entry.key for entry in model.metadata_props)
    yield from (f"the metadata key {key!r} stands there twice" for key, count in sorted(keys.items()) if count > 1)
    if len(model.graph.sparse_initializer):
        yield f"{len(model.graph.sparse_initializer)} sparse weights, which no exporter of language models writes"
    if len(model.training_info):
        yield "training information, which no runtime of artifacts reads"


def _domain_problems(model: ModelProto, nodes: tuple[OnnxNode, ...]) -> Iterator[str]:
    from onnx import defs

    newest = defs.onnx_opset_version()
    versions: dict[str, int] = {}
    for one in model.opset_import:
        if one.domain in versions:
            yield f"the operators of {one.domain or 'ai.onnx'!r} are imported twice"
        versions[one.domain] = one.version
    local = {function.domain for function in model.functions}
    for domain, version in versions.items():
        if domain not in DOMAINS and domain not in local:
            yield f"operators of the domain {domain!r}, which llmx does not know"
        elif domain in DOMAINS[:2] and not 1 <= version <= newest:
            yield f"opset {version}; 1 to {newest} are known"
    for domain in sorted(
        {node.domain for node in nodes} - versions.keys() - ({""} if "ai.onnx" in versions else set())
    ):
        yield f"nodes of the domain {domain!r}, which the graph does not import"


def _nodes(graph: GraphProto, problems: list[str], depth: int = 0) -> Iterator[OnnxNode]:
    """The nodes of a graph and of the graphs within them."""
    if depth > MAX_DEPTH or len(graph.node) > MAX_NODES:
        problems.append(f"{len(graph.node)} nodes, {depth} graphs deep; {MAX_NODES} and {MAX_DEPTH} are read")
        return
    for node in graph.node:
        yield _node(node)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                if len(inner.initializer):
                    problems.append(f"{node.name or node.op_type} holds a graph with weights of its own")
                yield from _nodes(inner, problems, depth + 1)
            if any(one.external_data for one in (attribute.t, *attribute.tensors)):
                problems.append(f"{node.name or node.op_type}: an attribute that lies in another file")


def _node(node: NodeProto) -> OnnxNode:
    attributes = {attribute.name: _value(attribute) for attribute in node.attribute}
    return OnnxNode(node.op_type, node.domain, node.name, tuple(node.input), tuple(node.output), attributes)


def _value(attribute: AttributeProto) -> Any:
    """A number, text, or list of them; None for what is neither (a graph, a tensor)."""
    import onnx

    kinds = onnx.AttributeProto
    plain = (kinds.INT, kinds.FLOAT, kinds.STRING, kinds.INTS, kinds.FLOATS, kinds.STRINGS)
    if attribute.type not in plain:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


class _Weights:
    """Reads the initializers of a graph. Every offence goes into `problems`, so that all are told at once."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.path, self.problems = path, problems
        self.sizes: dict[str, int | None] = {}  # of each location, None for one that cannot be read

    def of(self, model: ModelProto) -> tuple[dict[str, OnnxTensor], list[Path]]:
        """(the tensors by name, the data files)."""
        found: dict[str, OnnxTensor] = {}
        if len(model.graph.initializer) > MAX_TENSORS:
            self.problems.append(f"{len(model.graph.initializer)} weights; {MAX_TENSORS} are read")
            return {}, []
        for proto in model.graph.initializer:
            tensor = self._tensor(proto)
            if tensor is None:
                continue
            if tensor.name in found:
                self.problems.append(f"weight {tensor.name!r}: the name stands there twice")
            found[tensor.name] = tensor
        self._overlaps(found)
        return found, [self.path.with_name(name) for name, size in self.sizes.items() if size is not None]

    def _refuse(self, name: str, what: str) -> None:
        self.problems.append(f"weight {name!r}: {what}")

    def _tensor(self, proto: TensorProto) -> OnnxTensor | None:
        from onnx import TensorProto

        known = proto.data_type in TensorProto.DataType.values()
        kind = TensorProto.DataType.Name(proto.data_type) if known else str(proto.data_type)
        if (offence := self._form_offence(proto, kind)) is not None:
            return self._refuse(proto.name, offence)
        shape = tuple(proto.dims)
        nbytes = -(-prod(shape) * BITS[kind] // 8)
        if proto.data_location == TensorProto.EXTERNAL:
            place = self._place(proto, nbytes)
            return None if place is None else OnnxTensor(proto.name, kind, shape, nbytes, *place)
        if (offence := self._inline_offence(proto, prod(shape), nbytes)) is not None:
            return self._refuse(proto.name, offence)
        return OnnxTensor(proto.name, kind, shape, nbytes, None, 0)

    @staticmethod
    def _form_offence(proto: TensorProto, kind: str) -> str | None:
        if not proto.name:
            return "it has no name"
        if kind not in BITS:
            return f"its type is {kind}; one of {', '.join(BITS)} was expected"
        if len(proto.dims) > MAX_DIMS or any(size < 0 for size in proto.dims) or prod(proto.dims) * 8 > MAX_BYTES:
            return f"its shape {list(proto.dims)} is negative, overflows or has more than {MAX_DIMS} dims"
        return None

    def _inline_offence(self, proto: TensorProto, count: int, nbytes: int) -> str | None:
        if proto.external_data:
            return "it lies both inside the graph and in another file"
        if proto.HasField("raw_data") and len(proto.raw_data) != nbytes:
            return f"{len(proto.raw_data)} bytes; its shape and type take {nbytes}"
        if not proto.HasField("raw_data") and not self._typed_fits(proto, count):
            return f"its values are not the {count} that its shape takes"
        return None

    @staticmethod
    def _typed_fits(proto: TensorProto, count: int) -> bool:
        from onnx import TensorProto

        halved = proto.data_type in (TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1)
        held = sum(len(getattr(proto, field)) for field in TYPED_FIELDS)
        return held == (-(-count // 2) if halved else count)

    def _place(self, proto: TensorProto, nbytes: int) -> tuple[Path, int] | None:
        """(file, offset), after both were looked at."""
        told = {entry.key: entry.value for entry in proto.external_data}
        if len(told) != len(proto.external_data):
            return self._refuse(proto.name, "where it lies is said twice")
        location = told.get("location", "")
        if not _NAME.fullmatch(location) or location in (".", "..") or location == self.path.name:
            what = f"its data is said to lie in {location!r}, which is no plain name of a file beside the graph"
            return self._refuse(proto.name, what)
        numbers = {key: told.get(key, default) for key, default in (("offset", "0"), ("length", str(nbytes)))}
        if wrong := [f"{key} {value!r}" for key, value in numbers.items() if not _NUMBER.fullmatch(value)]:
            return self._refuse(proto.name, f"{' and '.join(wrong)} is no number of bytes")
        offset, length = int(numbers["offset"]), int(numbers["length"])
        if length != nbytes:
            return self._refuse(proto.name, f"{length} bytes are given; its shape and type take {nbytes}")
        size = self._size(location)
        if size is not None and offset + length > size:
            what = f"its {length} bytes from {offset} end past the {size} of {location}"
            return self._refuse(proto.name, f"{what}: the file is cut, or the place wrong")
        return (self.path.with_name(location), offset) if size is not None else None

    def _size(self, location: str) -> int | None:
        if location not in self.sizes:
            target = self.path.with_name(location)
            offences = (
                (target.is_symlink(), "is a symbolic link"),
                (not target.exists(), "is not there"),
                (not target.is_file(), "is no regular file"),
                (
                    target.is_file() and target.stat().st_nlink > 1,
                    "is a hard link: it has another name, too",
                ),
            )
            offence = next((words for there, words in offences if there), None)
            self.sizes[location] = target.stat().st_size if offence is None else None
            if offence is not None:
                self.problems.append(f"the data file {location} {offence}")
        return self.sizes[location]

    def _overlaps(self, tensors: dict[str, OnnxTensor]) -> None:
        """Weights may lie at one place (a tied head), but not share a part."""
        placed = sorted((t for t in tensors.values() if t.file is not None and t.nbytes), key=_range)
        for before, after in itertools.pairwise(placed):
            same = _range(before) == _range(after)
            if not same and before.file == after.file and before.offset + before.nbytes > after.offset:
                self._refuse(after.name, f"its bytes overlap those of {before.name!r}")


def _range(tensor: OnnxTensor) -> tuple[str, int, int]:
    return str(tensor.file), tensor.offset, tensor.nbytes


def _check(path: Path, model: ModelProto) -> None:
    """onnx's own look at the graph, by path: graphs of more than 2 GB with their weights pass no other way."""
    import onnx

    foreign = any(node.op_type in OF_RUNTIME and node.domain in DOMAINS[:2] for node in model.graph.node)
    try:
        onnx.checker.check_model(_in_vendor_domain(model) if foreign else str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise IntegrityError("onnx.checker refuses the graph", where=path, problems=[told]) from error


def _in_vendor_domain(model: ModelProto) -> bytes:
    """The graph without weights, the operators of OF_RUNTIME where onnxruntime's others are, which onnx does not know.

    The weights are inputs of it: their data, looked at already, lie beside another file.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type in OF_RUNTIME:
            node.domain = VENDOR_DOMAIN
    if all(one.domain != VENDOR_DOMAIN for one in copy.opset_import):
        copy.opset_import.add(domain=VENDOR_DOMAIN, version=VENDOR_OPSET)
    given = {one.name for one in copy.graph.input}
    for one in model.graph.initializer:
        if one.name not in given:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(one.name, one.data_type, one.dims))
    copy.graph.ClearField("initializer")
    return copy.SerializeToString()


def _mapped(path: Path) -> mmap.mmap | None:
    """The file in memory, read only; None for an empty one, which no system maps."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None


def _inline_bytes(proto: TensorProto) -> bytes:
    from onnx import numpy_helper

    return proto.raw_data if proto.HasField("raw_data") else numpy_helper.to_array(proto).tobytes()
