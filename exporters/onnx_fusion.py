"""Joins nodes of a recorded graph where onnxruntime has one operator for them."""

from __future__ import annotations

import onnx_ir as ir

from llmx.formats.onnx import VENDOR_DOMAIN

# A norm -> the operator that adds, normalizes the sum, and gives the sum as well.
SKIP_NORMS: dict[str, str] = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def fuse_skips(graph: ir.Graph) -> int:
    """Turn every sum that is first of all normalized into one node with its norm; how many there were."""
    fused = 0
    for norm in list(graph):
        total = norm.inputs[0] if norm.op_type in SKIP_NORMS else None
        addition = None if total is None else total.producer()
        if total is not None and addition is not None and addition.op_type == "Add" and not total.is_graph_output():
            _fuse(graph, addition, total, norm)
            fused += 1
    return fused


def drop_unused(graph: ir.Graph) -> int:
    """Remove the nodes that nothing reads; how many there were."""
    dropped = 0
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            dropped += 1
    return dropped


def _fuse(graph: ir.Graph, addition: ir.Node, total: ir.Value, norm: ir.Node) -> None:
    attributes = {"epsilon": norm.attributes["epsilon"]}
    inputs = [*addition.inputs, *norm.inputs[1:]]
    node = ir.Node(VENDOR_DOMAIN, SKIP_NORMS[norm.op_type], inputs, attributes, num_outputs=4, name=norm.name)
    names = (norm.outputs[0].name, "", "", total.name)
    for value, name in zip(node.outputs, names, strict=True):
        value.name = name
    # In the sum's place: it has other users, and they may stand before the norm.
    graph.insert_after(addition, node)
    ir.convenience.replace_all_uses_with([norm.outputs[0], total], [node.outputs[0], node.outputs[3]])
    graph.remove([norm, addition], safe=True)
