"""The graph of an artifact beside the one that llmx would record of the checkpoint: every number of the architecture.

An epsilon, a rotary base, a window or a head count is an attribute of a node or a small constant. So the graph is
recorded again, with the types that the artifact's weights have, and the two are compared node by node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import numpy as np
import onnx_ir as ir

from llmx.errors import LlmxError
from llmx.exporters.onnx import DIALECTS, OnnxOptions, record
from llmx.exporters.onnx_genai import CONFIG_NAME, configuration
from llmx.exporters.onnx_graph import Stored
from llmx.formats.json_text import parse_object
from llmx.formats.onnx import INPUT_SCALE, INPUT_ZERO_POINT, TYPES_KEY
from llmx.formats.onnx_file import OnnxFile
from llmx.models.model import Model
from llmx.models.tokenizer import open_tokenizer
from llmx.quant.activations import InputScale
from llmx.validate.onnx_artifact import OnnxArtifact

CLOSE = 1e-6  # relative: attributes are float32
DIALECT_KEY = "llmx.dialect"


def recorded(artifact: OnnxArtifact, model: Model) -> tuple[Mapping[str, Stored], ir.Model] | str:
    """(the weights, the graph) as llmx records them for such an artifact, or why it cannot."""
    name, version = artifact.file.producer
    if name != "llmx" or DIALECT_KEY not in artifact.metadata:
        return f"the graph was written by {name or 'an unknown program'}: its numbers are judged by what it computes"
    if version != metadata.version("llmx"):
        return f"the graph was written by llmx {version}, which may have built it otherwise"
    try:
        recorder, graph = record(model, options_of(artifact))
    except LlmxError as error:
        return error.one_line
    return recorder.stored, graph


def options_of(artifact: OnnxArtifact) -> OnnxOptions:
    """What the exporter was told, as far as the artifact shows it."""
    halves = any(kept.type_name == "F16" for kept in artifact.tensors.values())
    types = parse_object(artifact.metadata.get(TYPES_KEY, "{}"), TYPES_KEY)
    return OnnxOptions(
        "F16" if halves else "F32",
        artifact.metadata[DIALECT_KEY],
        types=types,
        scales=_input_scales(artifact.file, types),
    )


def _input_scales(file: OnnxFile, names: Iterable[str]) -> dict[str, InputScale]:
    """The static scales of inputs: what was measured cannot be recorded again, so it is taken as it is.

    Matrices with the same inputs may be one product, whose first one gives the name.
    """
    found = {}
    for name in names:
        stem = name.removesuffix(".weight")
        scale, zero = (file.tensors.get(stem + ending) for ending in (INPUT_SCALE, INPUT_ZERO_POINT))
        if scale is not None and zero is not None and (scale.shape, zero.shape) == ((), ()):
            step, middle = (file.bytes(stem + ending).tobytes() for ending in (INPUT_SCALE, INPUT_ZERO_POINT))
            found[name] = InputScale(float(np.frombuffer(step, np.float32)[0]), int(np.frombuffer(middle, np.uint8)[0]))
    return found


def differences(artifact: OnnxArtifact, model: Model) -> list[str] | str:
    """One clause for every attribute, constant or node that is not as recorded; or why none were compared."""
    found = recorded(artifact, model)
    if isinstance(found, str):
        return found
    return [*_nodes(artifact.file, found[1]), *_constants(artifact.file, found[1]), *_beside(artifact, model)]


def _nodes(file: OnnxFile, graph: ir.Model) -> Iterator[str]:
    here = {node.name: node for node in file.nodes}
    for node in graph.graph:
        name = str(node.name)
        if name not in here:
            yield f"the node {name} ({node.op_type}) is not there"
            continue
        found = here.pop(name)
        if (found.domain, found.operator) != (node.domain, node.op_type):
            yield f"{name} is a {found.operator}, the checkpoint's is a {node.op_type}"
        inputs = tuple("" if value is None else str(value.name) for value in node.inputs)
        if found.inputs != inputs:
            pairs = [(a, b) for a, b in zip(found.inputs, inputs, strict=False) if a != b] or [(found.inputs, inputs)]
            yield f"{name} reads {pairs[0][0]}, the checkpoint's reads {pairs[0][1]}"
        expected = {key: _value(value) for key, value in node.attributes.items()}
        for key in sorted(expected.keys() | found.attributes.keys()):
            a, b = found.attributes.get(key), expected.get(key)
            if not _same(a, b):
                yield f"{name}'s {key} is {_shown(a)}, the checkpoint's is {_shown(b)}"
    yield from (f"a node {name} ({node.operator}) that the checkpoint's graph has not" for name, node in here.items())


def _value(attribute: Any) -> object:
    value = attribute.value
    if isinstance(value, ir.DataType):
        return int(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def _constants(file: OnnxFile, graph: ir.Model) -> Iterator[str]:
    """Small tensors inside the graph: angles' frequencies, windows, factors."""
    for name, value in graph.graph.initializers.items():
        held = value.const_value
        if held is None or isinstance(held, ir.ExternalTensor):
            continue
        expected = held.numpy()
        there = file.tensors.get(name)
        if there is None:
            yield f"the constant {name} is not there"
            continue
        found = file.bytes(name)
        if there.shape != expected.shape or len(found) != expected.nbytes:
            yield f"the constant {name} has shape {list(there.shape)}, the checkpoint's has {list(expected.shape)}"
            continue
        read = np.frombuffer(found.tobytes(), expected.dtype).reshape(expected.shape)
        if not np.allclose(read, expected, rtol=CLOSE, atol=0, equal_nan=True):
            at = int(np.argmax(~np.isclose(read, expected, rtol=CLOSE, atol=0).reshape(-1)))
            where = f"'s item {at}" if expected.size > 1 else ""
            a, b = read.reshape(-1)[at], expected.reshape(-1)[at]
            yield f"the constant {name}{where} is {_shown(a.item())}, the checkpoint's is {_shown(b.item())}"


def _beside(artifact: OnnxArtifact, model: Model) -> Iterator[str]:
    """The model's half of genai_config.json; how to sample is the user's business."""
    found = artifact.beside.get(CONFIG_NAME)
    if found is None:
        return
    shares = DIALECTS[artifact.metadata[DIALECT_KEY]].shares_cache
    tokenizer = open_tokenizer(model.checkpoint.folder)
    expected = configuration(model.architecture, tokenizer, artifact.file.inputs, shares_cache=shares)["model"]
    told = found.get("model")
    yield from _objects("model", told if isinstance(told, Mapping) else {}, expected)


def _objects(path: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for key, value in expected.items():
        where, there = f"{path}.{key}", found.get(key)
        if key == "session_options":  # tuned where it runs
            continue
        if isinstance(value, Mapping):
            yield from _objects(where, there if isinstance(there, Mapping) else {}, value)
        elif not _same(there, value):
            yield f"{CONFIG_NAME}: {where} is {_shown(there)}, the checkpoint's is {_shown(value)}"


def _same(a: object, b: object) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=CLOSE)
    return a == b


def _shown(value: object) -> str:
    return "absent" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)
