"""Faults of ONNX folders as data: what is planted into which sound one, which checks must fail, and the exit code.

A fault changes the files of a folder: the graph (a protobuf), the weights' bytes, or what stands beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHECK_FAILED, INTEGRITY = 4, 6
Plant = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class OnnxSubject:
    """A sound folder. model: a key of fault_table.SUBJECTS. type_name: an encoding of all matrices, F32 or F16."""

    model: str
    type_name: str
    dialect: str


@dataclass(frozen=True, slots=True)
class OnnxFault:
    """One row. caught_by: checks that must fail, all of them; none where the file is refused before any check."""

    name: str
    subject: str
    plant: Plant
    caught_by: frozenset[str] = frozenset()
    exit_code: int = CHECK_FAILED


SUBJECTS: dict[str, OnnxSubject] = {
    "floats": OnnxSubject("chat", "F32", "ort"),
    "halves": OnnxSubject("experts", "F16", "ort"),
    "halves, standard": OnnxSubject("window", "F16", "standard"),
    "four bits": OnnxSubject("chat", "int4-g32-zp-float32", "ort"),
    "four bits, standard": OnnxSubject("chat", "int4-g32-zp-float32", "standard"),
    "eight bits": OnnxSubject("chat", "int8-g32-sym-float32", "ort"),
    "experts": OnnxSubject("experts", "int4-g32-sym-float32", "ort"),
    "window": OnnxSubject("window", "int8-g32-sym-float32", "ort"),
}


# Ways to plant.


def graph(change: Callable[[Any], None]) -> Plant:
    """Another graph."""

    def plant(folder: Path) -> None:
        import onnx

        path = folder / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return plant


def attribute(operator: str, name: str, change: Callable[[Any], Any]) -> Plant:
    """Another value of the attribute in every node of that operator."""

    def planted(model: Any) -> None:
        from onnx import helper

        nodes = [node for node in model.graph.node if node.op_type == operator]
        assert nodes, operator
        for node in nodes:
            old = next(one for one in node.attribute if one.name == name)
            new = helper.make_attribute(name, change(helper.get_attribute_value(old)))
            node.attribute.remove(old)
            node.attribute.append(new)

    return graph(planted)


def tensor(name: str, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Other values of the stored tensor, seen as a flat array of that numpy type."""

    def plant(folder: Path) -> None:
        from llmx.formats.onnx_reader import read_onnx

        found = read_onnx(folder).tensors[name]
        data = np.memmap(folder / "model.onnx.data", np.uint8, "r+")
        place = data[found.offset : found.offset + found.nbytes]
        place[:] = np.ascontiguousarray(change(place.view(kind).copy()), kind).view(np.uint8)
        data.flush()

    return plant


def beside(name: str, change: Callable[[dict[str, Any]], None]) -> Plant:
    """Another JSON file beside the graph."""

    def plant(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        change(told)
        (folder / name).write_text(json.dumps(told))

    return plant


def at(index: int, change: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """One value of many."""

    def changed(values: np.ndarray) -> np.ndarray:
        values[index] = change(values[index])
        return values

    return changed


# Faults of their own.


def exchanged_halves(values: np.ndarray) -> np.ndarray:
    """Two stacked matrices of one shape in each other's place."""
    return np.roll(values, len(values) // 2)


def other_keys(model: Any) -> None:
    """Attention is given the values as its keys, and the keys as its values."""
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[1], node.input[2] = node.input[2], node.input[1]


def other_head(model: Any) -> None:
    """The head multiplies by a matrix of its own instead of the embedding."""
    from onnx import numpy_helper

    head = [node for node in model.graph.node if node.op_type == "Gemm"][-1]
    assert head.input[1] == "embedding.weight"
    shape = next(list(one.dims) for one in model.graph.initializer if one.name == "embedding.weight")
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.05
    model.graph.initializer.append(numpy_helper.from_array(values, "other"))
    head.input[1] = "other"


def other_activation(model: Any) -> None:
    """Every sigmoid is a tanh."""
    for node in model.graph.node:
        node.op_type = "Tanh" if node.op_type == "Sigmoid" else node.op_type


def other_frequencies(model: Any) -> None:
    """The rotary base of a graph that computes its angles: frequencies lie in a constant."""
    from onnx import numpy_helper

    held = [one for one in model.graph.initializer if one.data_type == 1 and len(one.dims) == 1 and one.raw_data]
    (constant,) = [one for one in held if one.dims[0] > 8]
    constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) ** np.float32(1.02), constant.name))


def external(name: str, key: str, change: Callable[[int], int]) -> Plant:
    """Another place of a stored tensor."""

    def planted(model: Any) -> None:
        told = next(one for one in model.graph.initializer if one.name == name)
        entry = next(entry for entry in told.external_data if entry.key == key)
        entry.value = str(change(int(entry.value)))

    return graph(planted)


def same_place(model: Any) -> None:
    """One matrix is said to lie where another does."""
    by_name = {one.name: one for one in model.graph.initializer}
    by_name["layers.1.o.weight.codes"].external_data[1].value = next(
        entry.value for entry in by_name["layers.0.o.weight.codes"].external_data if entry.key == "offset"
    )
    assert by_name["layers.1.o.weight.codes"].external_data[1].key == "offset"


def cut(folder: Path) -> None:
    """The last bytes are missing, as after a download that broke off."""
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-5000])


def without_data(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()


def linked(folder: Path) -> None:
    """The weights are a link to a file elsewhere."""
    data = folder / "model.onnx.data"
    elsewhere = folder.parent / f"{folder.name}.elsewhere"
    data.rename(elsewhere)
    data.symlink_to(elsewhere)


def dirty(folder: Path) -> None:
    """Bytes that no weight has."""
    with (folder / "model.onnx.data").open("ab") as data:
        data.write(b"more")


def no_graph(folder: Path) -> None:
    (folder / "model.onnx").write_text("<html>Not found</html>")


def without_merges(told: dict[str, Any]) -> None:
    """A tokenizer that lost half of its merges."""
    told["model"]["merges"] = told["model"]["merges"][: len(told["model"]["merges"]) // 2]


def _numbers(*more: str) -> frozenset[str]:
    return frozenset({"bytes.numbers", *more})


def _o(part: str) -> str:
    return f"layers.1.o.weight.{part}"


FAULTS: tuple[OnnxFault, ...] = (
    OnnxFault("one flipped high bit of a nibble", "four bits", tensor(_o("codes"), "u1", at(99, lambda v: v ^ 0x80)),
              frozenset({"bytes.steps"})),
    OnnxFault("the same in columns", "four bits, standard", tensor(_o("codes"), "u1", at(99, lambda v: v ^ 0x80)),
              frozenset({"bytes.steps"})),
    OnnxFault("scales that are 1 % too large", "eight bits", tensor(_o("scales"), "f4", lambda v: v * np.float32(1.01)),
              frozenset({"bytes.gain"})),
    OnnxFault("scales that are twice as large", "four bits", tensor(_o("scales"), "f4", lambda v: v * 2),
              frozenset({"bytes.error", "bytes.steps"})),
    OnnxFault("a scale that is no number", "four bits", tensor(_o("scales"), "f4", at(7, lambda v: np.nan)),
              frozenset({"bytes.finite", "bytes.error"})),
    OnnxFault("zero points that are one too large", "four bits", tensor(_o("zero_points"), "u1", lambda v: v + 0x11),
              frozenset({"bytes.error"})),
    OnnxFault("zero points in each other's place", "four bits, standard",
              tensor(_o("zero_points"), "u1", exchanged_halves), frozenset({"bytes.error"})),
    OnnxFault("gate and up exchanged", "four bits",
              lambda folder: [tensor(f"layers.0.gate+up.weight.{part}", "u1", exchanged_halves)(folder)
                              for part in ("codes", "scales", "zero_points")] and None,
              frozenset({"bytes.error", "bytes.steps"})),
    OnnxFault("an expert's rows rolled", "experts",
              tensor("layers.0.expert_down[2].weight.codes", "u1", lambda v: np.roll(v, 64)),
              frozenset({"bytes.error"})),
    OnnxFault("a norm's gain that is 1 % too large", "floats",
              tensor("layers.1.ffn_norm.weight", "f4", lambda v: v * np.float32(1.01)),
              frozenset({"bytes.error", "bytes.steps"})),
    OnnxFault("one matrix said to lie in another's place", "four bits", graph(same_place), frozenset({"bytes.error"})),
    OnnxFault("another epsilon", "floats", attribute("RMSNormalization", "epsilon", lambda v: v * 300),
              _numbers("conversion.kl")),
    OnnxFault("another epsilon in float16", "halves", attribute("RMSNormalization", "epsilon", lambda v: v * 300),
              _numbers("conversion.kl")),
    OnnxFault("another scale of attention", "four bits", attribute("GroupQueryAttention", "scale", lambda v: v * 1.05),
              _numbers("conversion.kl", "conversion.logits", "conversion.decode")),
    OnnxFault("keys and values exchanged", "four bits", graph(other_keys), _numbers("conversion.kl", "quality.kl")),
    OnnxFault("another activation", "four bits", graph(other_activation), _numbers("conversion.kl")),
    OnnxFault("another rotary base, in a table", "four bits",
              tensor("rope.0.cos", "f4", lambda v: np.cos(np.arccos(v) * 0.97)),
              frozenset({"bytes.steps", "conversion.kl"})),
    OnnxFault("another rotary base, in a constant", "four bits, standard", graph(other_frequencies),
              _numbers("conversion.kl")),
    OnnxFault("a window that is one too long", "window",
              attribute("GroupQueryAttention", "local_window_size", lambda v: v + 1 if v > 0 else v),
              _numbers("conversion.window")),
    OnnxFault("a window that is one too short", "window",
              attribute("GroupQueryAttention", "local_window_size", lambda v: v - 1 if v > 0 else v),
              _numbers("conversion.window")),
    OnnxFault("a tied head with weights of its own", "floats", graph(other_head),
              _numbers("bytes.tensors", "conversion.kl", "quality.kl")),
    OnnxFault("other groups than the weights have", "four bits",
              attribute("MatMulNBits", "block_size", lambda v: 2 * v), frozenset({"runtime.loads"})),
    OnnxFault("another end of generation", "four bits",
              beside("genai_config.json", lambda told: told["model"].update(eos_token_id=[5])),
              _numbers("tokens.ends")),
    OnnxFault("another BOS", "four bits",
              beside("genai_config.json", lambda told: told["model"].update(bos_token_id=9)),
              _numbers("tokens.bos")),
    OnnxFault("a longer context", "four bits",
              beside("genai_config.json", lambda told: told["model"].update(context_length=131072)), _numbers()),
    OnnxFault("another chat template", "four bits",
              beside("tokenizer_config.json", lambda told: told.update(chat_template="{{ messages[0]['content'] }}")),
              frozenset({"template.embedded"})),
    OnnxFault("no chat template", "four bits", beside("tokenizer_config.json", lambda told: told.pop("chat_template")),
              frozenset({"template.embedded"})),
    OnnxFault("a tokenizer without half of its merges", "four bits", beside("tokenizer.json", without_merges),
              frozenset({"tokens.ids"})),
    OnnxFault("bytes behind the last weight", "four bits", dirty, frozenset({"bytes.padding"})),
    OnnxFault("a data file that is cut", "four bits", cut, exit_code=INTEGRITY),
    OnnxFault("a data file that is missing", "four bits", without_data, exit_code=INTEGRITY),
    OnnxFault("a data file that is a link", "four bits", linked, exit_code=INTEGRITY),
    OnnxFault("a weight said to lie 64 bytes later", "four bits", external(_o("codes"), "offset", lambda v: v + 64),
              exit_code=INTEGRITY),
    OnnxFault("a weight said to lie behind the end", "four bits", external(_o("codes"), "offset", lambda v: 1 << 40),
              exit_code=INTEGRITY),
    OnnxFault("no graph at all", "four bits", no_graph, exit_code=INTEGRITY),
)  # fmt: skip
