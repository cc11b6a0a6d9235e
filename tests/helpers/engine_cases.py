"""A folder of an engine that the stand-in for TensorRT runs: the example's plain graph, and what stands beside it."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import tensorrt_double

from llmx.exporters.onnx import OnnxOptions, prepare, write
from llmx.formats.tensorrt import CONFIG_NAME, ENGINE_NAME, TWO_BUFFERS, EngineConfig, Profile, config_bytes
from llmx.models.model import open_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
LENGTH, INPUT = 512, 128
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def engine_folder(folder: Path, type_name: str = "F16", source: Path = EXAMPLE) -> Path:
    """Writes the graph into folder/graph and the engine's folder beside it, which is returned."""
    graph, engine = folder / "graph", folder / "engine"
    graph.mkdir(parents=True)
    engine.mkdir()
    model = open_model(source)
    planned = prepare(model, OnnxOptions(dialect="plain", type_name=type_name))
    write(planned, [graph / file.name for file in planned.plan.files])
    bounds = [{"positions": [1, INPUT], "capacity": [1, LENGTH]}, {"positions": [1, 1], "capacity": [1, LENGTH]}]
    plan = tensorrt_double.plan(graph / "model.onnx", bounds)
    (engine / ENGINE_NAME).write_bytes(plan)
    a = model.architecture
    config = EngineConfig(
        architecture=a.family,
        builder="tensorrt",
        builder_version=tensorrt_double.VERSION,
        compute_capability=(9, 0),
        type_name=type_name,
        floats=type_name,
        encodings={spec.name: type_name for spec in a.tensors},
        parameters=sum(prod(spec.shape) for spec in a.tensors),
        vocab_size=a.vocab,
        layers=a.layers,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        context_length=a.context_length,
        max_batch=1,
        max_input=INPUT,
        max_length=LENGTH,
        profiles=(
            Profile("prefill", (1, 1, 1), (1, INPUT // 2, INPUT), (1, LENGTH, LENGTH)),
            Profile("decode", (1, 1, 1), (1, 1, 1), (1, LENGTH, LENGTH)),
        ),
        cache=TWO_BUFFERS,
        engine_bytes=len(plan),
        sha256=hashlib.sha256(plan).hexdigest(),
        dialect="plain",
        version="0",
    )
    (engine / CONFIG_NAME).write_bytes(config_bytes(config))
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, engine / name)
    return engine


def changed(engine: Path, target: Path, **values: Any) -> Path:
    """A copy of the folder with other values in config.json."""
    from llmx.formats.tensorrt import read_config

    shutil.copytree(engine, target)
    (target / CONFIG_NAME).write_bytes(config_bytes(replace(read_config(engine), **values)))
    return target
