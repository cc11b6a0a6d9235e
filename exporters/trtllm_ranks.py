"""The layout of one file a GPU: which part of which weight each rank of trtllm-build has.

rank = pipeline stage · tp + place in the stage

stage    a run of neighbouring layers, numbered from 0 in its files; the first stage has the embedding, the last one
         the final norm and the head
place    outputs of qkv, fc, gate and the head, and inputs of dense and proj, are cut into tp equal parts; all the
         rest is in every place. Heads of keys and values are given to several places where there are fewer of them.

attention.qkv      q, k and v of the rank's heads, under each other
mlp.fc, mlp.gate   gate and up (the names are TensorRT-LLM's); up alone is fc in a model without gates
mlp.fc             up above gate, where one matrix holds both: in Phi-3, and of every expert
dense, proj        o and down
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llmx.errors import UnsupportedError, UsageError
from llmx.exporters.trtllm_tensors import Contents, Matrix, Options, Piece, Stored, constant, parts, vector, whole
from llmx.formats.trtllm import CACHE_SCALE, RANKS
from llmx.models.architecture import Architecture, Role, TensorSpec

ROUTER_TYPE = "F32"
NORMS: Mapping[Role, str] = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_layernorm",
    "q_norm": "attention.q_layernorm",
    "k_norm": "attention.k_layernorm",
}
# Of models that have norms behind both halves of a layer, too.
FOUR_NORMS: Mapping[Role, str] = {
    **NORMS,
    "attention_post_norm": "post_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
FUSED_MLP = frozenset({"phi3"})  # families whose gate and up are one matrix
SHARDED_EMBEDDING = frozenset({"gemma3_text"})  # families whose embedding is cut with the rest
# Patterns over names of modules, which stay floats in any case.
NEVER_QUANTIZED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding")


@dataclass(frozen=True, slots=True)
class Mesh:
    """tp: GPUs that share every layer. pp: stages that the layers are dealt to."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def stages(self, layers: int) -> list[range]:
        """The layers of each stage: as many each, and one more in the first ones where they do not divide."""
        each, more = divmod(layers, self.pp)
        ends = [0]
        for stage in range(self.pp):
            ends.append(ends[-1] + each + (stage < more))
        return [range(start, stop) for start, stop in pairwise(ends)]


ALONE = Mesh()
"""One rank."""


def check_mesh(a: Architecture, mesh: Mesh) -> None:
    """Raises: UsageError naming every number of the model that the mesh does not divide."""
    tp, problems = mesh.tp, []
    if mesh.tp < 1 or mesh.pp < 1:
        raise UsageError("--tp and --pp are whole numbers from 1")
    if a.heads % tp:
        problems.append(f"--tp {tp} does not divide {a.heads} attention heads")
    if a.kv_heads % tp and tp % a.kv_heads:
        problems.append(f"--tp {tp} neither divides {a.kv_heads} key-value heads nor is a multiple of them")
    widths = {"MLP": a.intermediate} if not all(a.sparse_layers) else {}
    widths |= {"expert": a.expert_intermediate} if any(a.sparse_layers) else {}
    problems += [f"--tp {tp} does not divide an {name} width of {size}" for name, size in widths.items() if size % tp]
    if a.family in SHARDED_EMBEDDING and a.vocab % tp:
        problems.append(f"--tp {tp} does not divide a vocabulary of {a.vocab}")
    if mesh.pp > a.layers:
        problems.append(f"--pp {mesh.pp} is more than {a.layers} layers")
    if problems:
        raise UsageError("the model cannot be dealt out like this", problems=problems, fix="choose other --tp and --pp")


def widths(a: Architecture, mesh: Mesh) -> dict[str, int]:
    """Canonical name -> inputs of a rank's part of each matrix."""
    narrow: frozenset[Role] = frozenset({"o", "down", "expert_down"})
    return {s.name: s.shape[-1] // (mesh.tp if s.role in narrow else 1) for s in a.tensors if len(s.shape) > 1}


def rank_contents(architecture: Architecture, options: Options, mesh: Mesh) -> Contents:
    """The tensors of all ranks, file by file, and the patterns of modules that stay floats."""
    tensors: list[Stored] = []
    for stage, layers in enumerate(mesh.stages(architecture.layers)):
        for place in range(mesh.tp):
            rank = _Rank(architecture, options, mesh, stage * mesh.tp + place, place)
            tensors += rank.first() if stage == 0 else []
            for local, layer in enumerate(layers):
                tensors += rank.layer(layer, f"transformer.layers.{local}")
            tensors += rank.last() if stage == mesh.pp - 1 else []
    return Contents(tuple(tensors), (*NEVER_QUANTIZED, *_floats(architecture, options)))


def _floats(a: Architecture, options: Options) -> list[str]:
    """Patterns of the modules of layers whose matrices stay floats.

    Raises: UnsupportedError where only some layers have such: names count from 0 in every stage.
    """
    modules: dict[str, set[bool]] = {}
    names: Mapping[Role, str] = {"q": "attention.qkv", "o": "attention.dense", "down": "mlp.proj", "up": "mlp.fc"}
    gated = {"gate": "mlp.gate"} if a.gated and a.family not in FUSED_MLP else {}
    named: Mapping[Role, str] = {**names, **gated, "expert_up": "mlp.fc", "expert_down": "mlp.proj"}  # type: ignore[dict-item]
    for spec in a.tensors:
        if spec.part == "weight" and spec.role in named:
            modules.setdefault(named[spec.role], set()).add(spec.name in options.types)
    mixed = [module for module, kinds in modules.items() if len(kinds) > 1]
    if mixed:
        raise UnsupportedError(
            "per-rank checkpoints quantize a matrix in all layers or in none", problems=mixed, fix="--layout hf"
        )
    return [f"*.{module}" for module, kinds in modules.items() if not all(kinds)] if options.types else []


@dataclass(frozen=True, slots=True)
class _Rank:
    architecture: Architecture
    options: Options
    mesh: Mesh
    file: int
    place: int

    def first(self) -> list[Stored]:
        """What stands before the layers."""
        a, found = self.architecture, self._specs(None)
        matrix = Matrix("transformer.vocab_embedding", whole([found["embedding"]]))
        if a.family in SHARDED_EMBEDDING and self.mesh.tp > 1:
            matrix = self._cut(matrix)
        made = self._parts(matrix)
        if "position_embedding" in found:
            made += self._parts(Matrix("transformer.position_embedding", whole([found["position_embedding"]])))
        return made

    def last(self) -> list[Stored]:
        """What stands behind the layers. A tied head is written where the embedding is not beside it, whole."""
        a, found = self.architecture, self._specs(None)
        made = self._norm(found, "final_norm", "transformer.ln_f")
        if a.tied and self.mesh.ranks == 1:
            return made
        head = Matrix("lm_head", whole([found["embedding" if a.tied else "head"]]))
        return [*made, *self._parts(self._cut(head))]

    def layer(self, layer: int, prefix: str) -> list[Stored]:
        """The tensors of a layer."""
        found, a = self._specs(layer), self.architecture
        names = FOUR_NORMS if "ffn_post_norm" in found else NORMS
        made = []
        for role, name in names.items():
            made += self._norm(found, role, f"{prefix}.{name}") if role in found else []
        made += self._linear(f"{prefix}.attention.qkv", found, ("q", "k", "v"), self._heads)
        made += self._linear(f"{prefix}.attention.dense", found, ("o",), None)
        made += self._cache(f"{prefix}.attention", layer)
        if a.sparse_layers[layer]:
            return made + self._experts(f"{prefix}.mlp", found)
        if a.family in FUSED_MLP:
            made += self._linear(f"{prefix}.mlp.fc", found, ("up", "gate"), self._outputs)
        elif a.gated:
            made += self._linear(f"{prefix}.mlp.fc", found, ("gate",), self._outputs)
            made += self._linear(f"{prefix}.mlp.gate", found, ("up",), self._outputs)
        else:
            made += self._linear(f"{prefix}.mlp.fc", found, ("up",), self._outputs)
        return made + self._linear(f"{prefix}.mlp.proj", found, ("down",), None)

    def _experts(self, prefix: str, found: Mapping[str, TensorSpec]) -> list[Stored]:
        up, gate, down = found["expert_up"], found["expert_gate"], found["expert_down"]
        count, wide, _ = up.shape
        low, high = self._range(wide)
        both = [
            Piece(spec, expert * wide + low, expert * wide + high) for expert in range(count) for spec in (up, gate)
        ]
        router = Matrix(f"{prefix}.router", whole([found["router"]]))
        made = [Stored(self.file, f"{prefix}.router.weight", ROUTER_TYPE, router.pieces[0].spec.shape, router)]
        types = self.options.types
        made += self._parts(Matrix(f"{prefix}.fc", tuple(both), types.get(up.name), experts=count))
        rows = tuple(Piece(down, expert * down.shape[1], (expert + 1) * down.shape[1]) for expert in range(count))
        columns = self._range(down.shape[-1])
        proj = Matrix(f"{prefix}.proj", rows, types.get(down.name), columns, experts=count)
        return made + self._parts(proj)

    def _linear(
        self,
        module: str,
        found: Mapping[str, TensorSpec],
        roles: Sequence[Role],
        cut: Callable[[TensorSpec], Piece] | None,
    ) -> list[Stored]:
        """A product's matrix and its bias. cut: rows of a rank; None cuts the inputs, and leaves the bias whole."""
        specs = [found[role] for role in roles]
        pieces = whole(specs) if cut is None else tuple(cut(spec) for spec in specs)
        columns = self._range(specs[0].shape[-1]) if cut is None else None
        matrix = Matrix(module, pieces, self.options.types.get(specs[0].name), columns)
        made = self._parts(matrix)
        biases = [found[f"{role}.bias"] for role in roles if f"{role}.bias" in found]
        if biases:
            own = whole(biases) if cut is None else tuple(cut(spec) for spec in biases)
            made.append(vector(Matrix(module, own), self.file, f"{module}.bias", self.options.floats))
        return made

    def _parts(self, matrix: Matrix) -> list[Stored]:
        scale = self.options.inputs.get(matrix.pieces[0].spec.name)
        return parts(matrix, self.file, RANKS, self.options, scale)

    def _norm(self, found: Mapping[str, TensorSpec], role: Role, name: str) -> list[Stored]:
        """The gain as TensorRT-LLM multiplies by it, and the shift of a layer norm."""
        gain = Matrix(name, whole([found[role]]), offset=self.architecture.norm_offset)
        made = [vector(gain, self.file, f"{name}.weight", self.options.floats)]
        if f"{role}.bias" in found:
            shift = Matrix(name, whole([found[f"{role}.bias"]]))
            made.append(vector(shift, self.file, f"{name}.bias", self.options.floats))
        return made

    def _cache(self, prefix: str, layer: int) -> list[Stored]:
        scales = [self.options.cache[f"layers.{layer}.{part}"] for part in "kv"] if self.options.cache else []
        if not scales:
            return []
        return [constant(self.file, f"{prefix}.{CACHE_SCALE}", "F32", np.array([max(scales)], "<f4"))]

    def _specs(self, layer: int | None) -> dict[str, TensorSpec]:
        """Role, with ".bias" behind it for a bias -> the weight in this layer, or outside the layers."""
        return {
            spec.role + (".bias" if spec.part == "bias" else ""): spec
            for spec in self.architecture.tensors
            if spec.layer == layer
        }

    def _range(self, size: int) -> tuple[int, int]:
        own = size // self.mesh.tp
        return self.place * own, (self.place + 1) * own

    def _outputs(self, spec: TensorSpec) -> Piece:
        return Piece(spec, *self._range(spec.shape[0]))

    def _heads(self, spec: TensorSpec) -> Piece:
        """The rows of the rank's heads; of a bias, its values."""
        a, size = self.architecture, self.architecture.head_dim
        if spec.role == "q" or a.kv_heads % self.mesh.tp == 0:
            return self._outputs(spec)
        head = self.place // (self.mesh.tp // a.kv_heads)
        return Piece(spec, head * size, (head + 1) * size)

    def _cut(self, matrix: Matrix) -> Matrix:
        """A table's rows of this place. Where they do not divide, rows of zeros come behind the last."""
        [piece] = matrix.pieces
        each = -(-piece.rows // self.mesh.tp)
        low, high = min(self.place * each, piece.rows), min((self.place + 1) * each, piece.rows)
        return Matrix(matrix.module, (Piece(piece.spec, low, high),), pad=each - (high - low))
