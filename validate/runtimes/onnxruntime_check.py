"""What the installed onnxruntime lacks for a graph, told before a weight is read: each node with its reason.

`uses_of` runs where the graph was read; `lacks` in the worker process, where onnxruntime is. Between them goes JSON.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmx.formats.onnx import VENDOR_DOMAIN
from llmx.formats.onnx_file import OnnxFile

ONNX_NAMES = ("", "ai.onnx")
PROVIDER = "CPUExecutionProvider"
NO_END = 2**31 - 1  # a kernel's last version, where none is named
LIFTED = {"Constant"}  # becomes a weight while the graph is loaded
# What decides whether the kernel of MatMulNBits runs. Measured: other bits and blocks are refused when it is made.
LAYOUT = ("bits", "block_size")
# bits -> the largest block; the least is 16, and all are powers of two.
LARGEST_BLOCK: dict[int, int | None] = {2: 256, 4: None, 8: None}
LEAST_BLOCK = 16


def uses_of(graph: OnnxFile) -> list[dict[str, Any]]:
    """Return one entry for each operator of the graph, and each layout of its weights, with the first such node.

    operator, domain, node: names. opset: the version that the graph imports. layout: attributes of LAYOUT, or empty.
    composed: ONNX defines the operator by others, so that it runs without a kernel.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    versions = {"" if domain in ONNX_NAMES else domain: version for domain, version in graph.opsets.items()}
    for node in graph.nodes:
        domain = "" if node.domain in ONNX_NAMES else node.domain
        layout = [node.attributes.get(key) for key in LAYOUT] if node.operator == "MatMulNBits" else []
        key = (domain, node.operator, *layout)
        if key not in found:
            opset = versions.get(domain, 1)
            found[key] = {
                "operator": node.operator,
                "domain": domain,
                "node": node.name or (node.outputs[0] if node.outputs else ""),
                "opset": opset,
                "layout": layout,
                "composed": domain == "" and _is_composed(node.operator, opset),
            }
    return list(found.values())


def _is_composed(operator: str, opset: int) -> bool:
    from onnx import defs

    try:
        schema: Any = defs.get_schema(operator, opset)  # onnx declares only some of its attributes
    except defs.SchemaError:
        return False
    return schema.has_function or schema.has_context_dependent_function


def lacks(uses: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each use that this onnxruntime cannot run on the processor."""
    state: Any = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    schemas: dict[tuple[str, str], list[int]] = {}
    for one in state.get_all_operator_schema():
        schemas.setdefault((one.domain, one.name), []).append(one.since_version)
    kernels: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for one in state.get_all_opkernel_def():
        if one.provider == PROVIDER:
            kernels.setdefault((one.domain, one.op_name), set()).add(tuple(one.version_range))
    newest = max(max(versions) for (domain, _), versions in schemas.items() if domain == "")
    if (
        opset := next((use["opset"] for use in uses if use["domain"] == "" and use["opset"] > newest), None)
    ) is not None:
        return [f"the graph needs opset {opset}; this onnxruntime knows up to {newest}"]
    known = [use for use in uses if use["domain"] in ("", VENDOR_DOMAIN)]  # others may be functions of the graph
    return [f"{use['node']}: {reason}" for use in known for reason in _reasons(use, schemas, kernels)]


def _reasons(
    use: Mapping[str, Any],
    schemas: Mapping[tuple[str, str], Sequence[int]],
    kernels: Mapping[tuple[str, str], set[tuple[int, int]]],
) -> Iterator[str]:
    key = use["domain"], use["operator"]
    name = f"{use['domain']}.{use['operator']}" if use["domain"] else use["operator"]
    versions = [version for version in schemas.get(key, ()) if version <= use["opset"]]
    if not versions:
        yield f"there is no operator {name} in opset {use['opset']} of this onnxruntime"
    elif not use["composed"] and use["operator"] not in LIFTED and not _runs(max(versions), kernels.get(key, set())):
        yield f"this onnxruntime has no kernel of {name}, version {max(versions)}, for the processor"
    if use["layout"]:
        yield from _layout_reasons(*use["layout"])


def _runs(version: int, ranges: set[tuple[int, int]]) -> bool:
    """Whether a kernel is for this version: from it on, or for a closed range around it, as onnxruntime matches."""
    return any(first == version or (first < version <= last and last != NO_END) for first, last in ranges)


def _layout_reasons(bits: Any, block: Any) -> Iterator[str]:
    bits = 4 if bits is None else bits
    if bits not in LARGEST_BLOCK:
        yield f"weights of {bits} bits; the kernel runs {', '.join(map(str, LARGEST_BLOCK))}"
        return
    largest = LARGEST_BLOCK[bits]
    good = isinstance(block, int) and block >= LEAST_BLOCK and block & (block - 1) == 0
    if not good or (largest is not None and block > largest):
        upper = "" if largest is None else f", at most {largest}"
        yield f"blocks of {block} weights; with {bits} bits the kernel runs powers of two from {LEAST_BLOCK}{upper}"
