"""A TensorRT-LLM checkpoint, opened and mapped, whichever of its two layouts it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmx.errors import IntegrityError
from llmx.formats.trtllm import HF, RANKS
from llmx.models.architecture import Architecture
from llmx.validate import trtllm_hf, trtllm_ranks
from llmx.validate.trtllm_artifact import TrtllmArtifact
from llmx.validate.trtllm_folder import Folder, open_folder
from llmx.validate.trtllm_weights import Held, Parts, held


@dataclass(frozen=True, slots=True)
class Layout:
    """modules: (tensor, its arrays) of a folder. cache: name -> scale. mapped: with the checkpoint's own tensors."""

    modules: Callable[[Folder], Iterator[tuple[str, Parts]]]
    cache: Callable[[Folder], dict[str, float]]
    mapped: Callable[[TrtllmArtifact, Architecture], TrtllmArtifact]


LAYOUTS: Mapping[str, Layout] = {
    HF: Layout(trtllm_hf.modules, trtllm_hf.cache_scales, trtllm_hf.mapped),
    RANKS: Layout(trtllm_ranks.modules, trtllm_ranks.cache_scales, trtllm_ranks.mapped),
}


def open_trtllm(path: Path) -> TrtllmArtifact:
    """The artifact of a folder, or of the config.json in one.

    Raises: IntegrityError for a broken or hostile folder, or a weight whose scales do not fit it.
    """
    folder = open_folder(path)
    layout = LAYOUTS[folder.layout]
    found: dict[str, Held] = {}
    problems = []
    for name, parts in layout.modules(folder):
        try:
            found[name] = held(name, parts)
        except IntegrityError as error:
            problems.append(error.what)
    if problems:
        raise IntegrityError("weights and scales do not belong together", where=folder.path, problems=problems)
    return TrtllmArtifact(folder, found, found, layout.cache(folder))


def mapped(artifact: TrtllmArtifact, architecture: Architecture) -> TrtllmArtifact:
    """The same with the checkpoint's own tensors under their canonical names.

    What is no tensor of the checkpoint, or lacks some of its rows, stays what it is: it counts as left over, and the
    tensor as missing.
    """
    return LAYOUTS[artifact.folder.layout].mapped(artifact, architecture)
