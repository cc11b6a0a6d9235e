"""An ONNX graph that was looked at, as plain data: its weights, where they lie, and its nodes."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class OnnxTensor:
    """A stored tensor. kind: its name in onnx.TensorProto.DataType. file: None where it lies inside the graph."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None
    offset: int


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """One use of an operator. attributes: numbers, texts and lists of them; None for what is neither."""

    operator: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OnnxFile:
    """A graph with its data files. paths: the graph first. producer: (name, version). opsets: domain -> version.

    inline: the bytes of the tensors that lie inside the graph.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, str]
    producer: tuple[str, str]
    opsets: Mapping[str, int]
    tensors: Mapping[str, OnnxTensor]
    nodes: tuple[OnnxNode, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    maps: Mapping[Path, mmap.mmap | None]
    inline: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """The size of the graph and its data files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def values(self) -> int:
        """How many elements its tensors hold, those of scales and zero points included."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def operators(self) -> dict[str, int]:
        """How many nodes there are of each operator, most first; a vendor's have its domain before them."""
        named = (f"{node.domain}.{node.operator}" if node.domain else node.operator for node in self.nodes)
        return dict(Counter(named).most_common())

    def bytes(self, name: str) -> np.ndarray:
        """uint8[nbytes], a read-only view of the mapped file, or of the graph's own bytes."""
        tensor = self.tensors[name]
        if tensor.file is None:
            return np.frombuffer(self.inline[name], np.uint8)
        mapped = self.maps[tensor.file]
        return np.frombuffer(b"" if mapped is None else mapped, np.uint8, tensor.nbytes, tensor.offset)

    def release(self, name: str) -> None:
        """Hands the tensor's pages back to the system; reading it again maps them again."""
        tensor = self.tensors[name]
        mapped = None if tensor.file is None else self.maps[tensor.file]
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.nbytes - start)
