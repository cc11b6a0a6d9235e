"""How onnxruntime opens a graph, inside the worker process: its settings, and float32 arithmetic where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state  # pyright: ignore[reportAttributeAccessIssue]

from llmx.errors import IntegrityError
from llmx.validate.runtimes.onnxruntime_check import PROVIDER

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto

LEVELS: dict[str, str] = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# How a node says to what its inputs may be rounded, and what float32 is called there.
ACCURACY, FLOAT32 = "accuracy_level", 1
# Of matrices in fewer bits: by default they are multiplied in 8 bits, which hides small faults of a conversion.
EXACT_ENTRIES = {"session.qdq_matmulnbits_accuracy_level": "1"}
# onnxruntime's errors have no class in common.
ERRORS = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoModel,
    state.NoSuchFile,
    state.NotFound,
    state.NotImplemented,
    state.RuntimeException,
)


def session_options(threads: int, exact: bool, level: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.log_severity_level = 3
    # Threads that spin while they wait take the time of whatever else runs here.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in EXACT_ENTRIES.items() if exact else ():
        options.add_session_config_entry(key, value)
    return options


def opened(artifact: Path, options: onnxruntime.SessionOptions, *, exact: bool) -> Any:
    """The session of a graph. Raises: IntegrityError with onnxruntime's words where it refuses the graph."""
    source: Path | bytes = artifact
    if exact and (changed := _exact(artifact)) is not None:
        # From bytes, onnxruntime has to be told where the graph's weights lie.
        options.add_session_config_entry(WEIGHTS_FOLDER, str(artifact.parent))
        source = changed
    try:
        return onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
    except ERRORS as error:
        raise IntegrityError("onnxruntime refuses this graph", where=artifact, problems=[str(error)]) from error


def _exact(artifact: Path) -> bytes | None:
    """The graph with every matrix of few bits multiplied in float32; None where no node asks for anything else.

    No setting of a session overrules a node. The weights stay where they are: the graph holds none of them.
    """
    import onnx

    model = onnx.load(str(artifact), load_external_data=False)
    asked = [one for one in _attributes(model.graph) if one.name == ACCURACY and one.i > FLOAT32]
    for one in asked:
        one.i = FLOAT32
    return model.SerializeToString() if asked else None


def _attributes(graph: GraphProto) -> Iterator[AttributeProto]:
    """Of all nodes, those of graphs inside nodes included."""
    for node in graph.node:
        for one in node.attribute:
            yield one
            for inner in (*([one.g] if one.HasField("g") else []), *one.graphs):
                yield from _attributes(inner)
