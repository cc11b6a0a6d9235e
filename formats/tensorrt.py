"""The folder of a TensorRT engine: what config.json says of it. No numerics, and no TensorRT is imported here.

    rank0.engine         the plan, as its builder serialized it: only that version reads it, mostly only on that GPU
    config.json          what it is, for whoever wants to run it            EngineConfig
    build-report.json    how it was built: seconds, layers, bytes, warnings
    tokenizer.json, …    copies of the checkpoint's own files

The engine is one decoder over a cache of capacity M, for B sequences and T new positions; a profile bounds all three:

    in     input_ids i64[B, T]    start i64[B]: how many are cached    past_key_values.N.key, .value  float[B, H, M, D]
    out    logits f32[B, T, V]    present.N.key, .value  float[B, H, M, D]: the same with the new positions written

    start = 3, T = 2, M = 8    | k0 | k1 | k2 | new | new | ·· | ·· | ·· |    a query sees itself and what is left of it

"in place": present is past, written into. "two buffers": the runner has two and exchanges them after every step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmx.errors import IntegrityError, UnsupportedError, UsageError
from llmx.formats.json_text import read_object

ENGINE_NAME = "rank0.engine"
CONFIG_NAME = "config.json"
BUILD_REPORT_NAME = "build-report.json"
PRODUCER = "llmx"
LAYOUT = 1  # of config.json; a key that changes its meaning raises it
PACKAGES = ("tensorrt", "tensorrt_rtx")
IN_PLACE, TWO_BUFFERS = "in place", "two buffers"
CACHES = (IN_PLACE, TWO_BUFFERS)
_CHUNK = 1 << 22
_LARGEST_CONFIG = 64 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """Bounds of the open sizes, each (least, best, most): sequences, new positions, the cache's capacity."""

    name: str
    batch: tuple[int, int, int]
    positions: tuple[int, int, int]
    capacity: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What config.json says.

    builder: the package and its version that built the engine, and the only ones that load it. compute_capability: of
    the only GPU that runs it, None where there is no such bond. floats: the type of what is not quantized, and of the
    cache. encodings: canonical name -> encoding or float type of every tensor. parameters: weights. max_batch in
    sequences, max_input and max_length in tokens of one; max_length is the largest capacity. cache:
    one of CACHES. sha256: of the engine. sparsity: what a sparse artifact says of its zeros, JSON; None of a dense one.
    """

    architecture: str
    builder: str
    builder_version: str
    compute_capability: tuple[int, int] | None
    type_name: str
    floats: str
    encodings: Mapping[str, str]
    parameters: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    context_length: int
    max_batch: int
    max_input: int
    max_length: int
    profiles: tuple[Profile, ...]
    cache: str
    engine_bytes: int
    sha256: str
    dialect: str
    version: str
    solver: str | None = None
    sparsity: str | None = None
    refit: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def config_bytes(config: EngineConfig) -> bytes:
    """config.json, UTF-8. The same record makes the same bytes."""
    told = {
        "producer": PRODUCER,
        "layout": LAYOUT,
        "version": config.version,
        "architecture": config.architecture,
        "builder": {"package": config.builder, "version": config.builder_version},
        "compute_capability": None if config.compute_capability is None else list(config.compute_capability),
        "type": config.type_name,
        "floats": config.floats,
        "encodings": dict(config.encodings),
        **{key: getattr(config, key) for key in _SIZES},
        "profiles": [asdict(profile) for profile in config.profiles],
        "cache": config.cache,
        "engine_bytes": config.engine_bytes,
        "sha256": config.sha256,
        "dialect": config.dialect,
        "solver": config.solver,
        "sparsity": config.sparsity,
        "refit": config.refit,
        "options": dict(config.options),
    }
    return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()


def engine_folder(path: Path) -> Path | None:
    """The folder of an engine that `path` names: itself, or as its engine or its config.json. None for all else."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name in {ENGINE_NAME, CONFIG_NAME}
    if not named or not (folder / CONFIG_NAME).is_file() or not (folder / ENGINE_NAME).is_file():
        return None
    try:
        told = read_object(folder / CONFIG_NAME, _LARGEST_CONFIG)
    except IntegrityError:
        return folder  # nothing else has a file of that name: read_config says what is wrong
    return folder if told.get("producer") == PRODUCER and isinstance(told.get("builder"), Mapping) else None


def read_config(folder: Path) -> EngineConfig:
    """What the folder's config.json says, with every value's type and bounds looked at.

    Raises: UsageError without such a file, UnsupportedError for another producer's or a later layout, IntegrityError
    naming every broken key.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UsageError(f"a folder of an engine has a {CONFIG_NAME}", where=folder)
    told = read_object(path, _LARGEST_CONFIG)
    if told.get("producer") != PRODUCER or told.get("layout") != LAYOUT:
        raise UnsupportedError(
            f"this {CONFIG_NAME} is of {told.get('producer')!r}, layout {told.get('layout')!r}",
            where=path,
            fix=f"engines that llmx built (layout {LAYOUT}) are read; export the model with --format tensorrt",
        )
    # A key that may be null must still be there.
    broken = (key for key, (good, _) in _KEYS.items() if key not in told or not good(told[key]))
    if problems := [f"{key}: {_KEYS[key][1]}" for key in broken]:
        raise IntegrityError(f"the {CONFIG_NAME} of the engine is broken", where=path, problems=problems)
    config = _config(told)
    if problems := _contradictions(config):
        raise IntegrityError(f"the {CONFIG_NAME} of the engine contradicts itself", where=path, problems=problems)
    return config


def check_engine(folder: Path, config: EngineConfig) -> None:
    """Compare the engine's bytes with what config.json says of them.

    Raises: IntegrityError where it is cut short, has other bytes, or is not there.
    """
    path = folder / ENGINE_NAME
    try:
        size = path.stat().st_size
        if size != config.engine_bytes:
            what = "is cut short" if size < config.engine_bytes else "is too long"
            raise IntegrityError(
                f"the engine {what}: {size} bytes, {config.engine_bytes} are in {CONFIG_NAME}",
                where=path,
                fix="copy the whole folder again, or build the engine again",
            )
        found = _sha256(path)
    except OSError as error:
        raise IntegrityError(f"the engine cannot be read: {error.strerror}", where=path) from error
    if found != config.sha256:
        raise IntegrityError(
            f"the engine has other bytes than {CONFIG_NAME} says",
            where=path,
            problems=[f"sha256 {found} instead of {config.sha256}"],
            fix="copy the whole folder again, or build the engine again",
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _config(told: Mapping[str, Any]) -> EngineConfig:
    capability = told["compute_capability"]
    return EngineConfig(
        architecture=told["architecture"],
        builder=told["builder"]["package"],
        builder_version=told["builder"]["version"],
        compute_capability=None if capability is None else (capability[0], capability[1]),
        type_name=told["type"],
        floats=told["floats"],
        encodings=told["encodings"],
        **{key: told[key] for key in _SIZES},
        profiles=tuple(Profile(p["name"], *(tuple(p[key]) for key in _BOUNDS)) for p in told["profiles"]),
        cache=told["cache"],
        engine_bytes=told["engine_bytes"],
        sha256=told["sha256"],
        dialect=told["dialect"],
        version=told["version"],
        solver=told["solver"],
        sparsity=told["sparsity"],
        refit=told["refit"],
        options=told["options"],
    )


def _contradictions(config: EngineConfig) -> list[str]:
    problems = []
    if config.max_input > config.max_length:
        problems.append(f"max_input is {config.max_input}, and max_length only {config.max_length}")
    for profile in config.profiles:
        most = (profile.batch[2], profile.positions[2], profile.capacity[2])
        largest = (config.max_batch, config.max_input, config.max_length)
        words = ("batch", "positions", "capacity")
        problems += [
            f"profile {profile.name}: {word} reaches {got}, the engine {limit}"
            for word, got, limit in zip(words, most, largest, strict=True)
            if got > limit
        ]
    if len({profile.name for profile in config.profiles}) < len(config.profiles):
        problems.append("two profiles have one name")
    return problems


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) < 1 << 16


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


def _is_builder(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("package") in PACKAGES and _is_text(value.get("version"))


def _is_capability(value: object) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value))


def _is_bounds(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 3 and all(map(_is_count, value)) and sorted(value) == [*value]


def _are_profiles(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(p, Mapping) and _is_text(p.get("name")) and all(_is_bounds(p.get(key)) for key in _BOUNDS)
            for p in value
        )
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, (*value, *value.values())))


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def _is_text_or_none(value: object) -> bool:
    return value is None or _is_text(value)


_BOUNDS = ("batch", "positions", "capacity")
_SIZES = (
    "parameters", "vocab_size", "layers", "kv_heads", "head_dim", "context_length",
    "max_batch", "max_input", "max_length",
)  # fmt: skip
_KEYS = {
    "version": (_is_text, "the version of llmx that wrote it"),
    "architecture": (_is_text, "the family's name"),
    "builder": (_is_builder, f"package (one of {', '.join(PACKAGES)}) and version"),
    "compute_capability": (_is_capability, "[major, minor], or null"),
    "type": (_is_text, "the mix's name"),
    "floats": (_is_text, "a float type"),
    "encodings": (_are_texts, "an object: canonical name -> encoding"),
    **dict.fromkeys(_SIZES, (_is_count, "a positive whole number")),
    "profiles": (_are_profiles, "a list of name, batch, positions and capacity, each [least, best, most]"),
    "cache": (lambda value: value in CACHES, f"one of {', '.join(CACHES)}"),
    "engine_bytes": (_is_count, "a positive whole number"),
    "sha256": (_is_sha256, "64 hexadecimal digits"),
    "dialect": (_is_text, "the graph's dialect"),
    "solver": (_is_text_or_none, "text, or null"),
    "sparsity": (_is_text_or_none, "text, or null"),
    "refit": (lambda value: isinstance(value, bool), "true or false"),
    "options": (lambda value: isinstance(value, Mapping), "an object"),
}
"""Key -> (whether a value is good, what is expected)."""
