"""Find llama.cpp in an installed package and call its C interface through ctypes.

Two packages serve, in this order: `xllamacpp` (prebuilt; it has the symbols, but no ctypes structs, so the byte layout
of the two parameter structs is written down below for each version that was checked) and `llama-cpp-python` (which
brings its own). Everything but those two structs is plain pointers and numbers, declared once in `PROTOTYPES`.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import struct
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmx.errors import RuntimeMissing

Value = int | bool


class Batch(ctypes.Structure):
    """llama_batch: which tokens to run, at which positions, and whose logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class RawParams(ctypes.Structure):
    """Room for a parameter struct of which only the checked fields are known.

    Larger than any version's: returned and passed by value in memory, so the callee touches the bytes it knows only.
    """

    _fields_ = (("data", ctypes.c_ubyte * 512),)


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

# name -> (result, arguments)
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_backend_init": (None, ()),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_n_ubatch": (c_uint32, (c_void_p,)),
    "llama_n_threads": (c_int32, (c_void_p,)),
    "llama_n_threads_batch": (c_int32, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_bos": (c_int32, (c_void_p,)),
    "llama_vocab_eos": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_vocab_get_add_bos": (c_bool, (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_void_p, c_int32, c_int32, c_bool)),
}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a parameter struct: byte offset, struct format, and what llama.cpp's default has there."""

    offset: int
    format: str
    default: Value


@dataclass(frozen=True, slots=True)
class Layout:
    """The checked fields of one version's parameter structs, and the llama.cpp build that it carries."""

    build: str
    model: Mapping[str, Field]
    context: Mapping[str, Field]


#   llama_model_params                                  llama_context_params
#   byte  0  devices              pointer               byte   0  n_ctx            u32
#         8  tensor_buft_overrides pointer                     4  n_batch          u32
#        16  n_gpu_layers         i32                           8  n_ubatch         u32
#        20  split_mode           i32                          12  n_seq_max        u32
#        ...                                                   28  n_threads        i32
#        72  vocab_only, ... flags of one byte                 32  n_threads_batch  i32
#                                                              52  flash_attn_type  i32  (-1 automatic, 0 off)
#                                                             104  type_k           i32  (ggml type: 0 F32, 1 F16)
#                                                             108  type_v           i32
#                                                             136  embeddings       flag
#                                                             137  offload_kqv      flag
#                                                             139  op_offload       flag
# The defaults are read back at load: another value there means another layout, and nothing is run.
LAYOUTS: dict[str, Layout] = {
    "2026.10.11549": Layout(
        build="b11549",
        model={
            "devices": Field(0, "P", 0),
            "n_gpu_layers": Field(16, "i", -1),
            "split_mode": Field(20, "i", 1),
        },
        context={
            "n_ctx": Field(0, "I", 512),
            "n_batch": Field(4, "I", 2048),
            "n_ubatch": Field(8, "I", 512),
            "n_seq_max": Field(12, "I", 1),
            "n_threads": Field(28, "i", 4),
            "n_threads_batch": Field(32, "i", 4),
            "flash_attn_type": Field(52, "i", -1),
            "type_k": Field(104, "i", 1),
            "type_v": Field(108, "i", 1),
            "embeddings": Field(136, "?", False),
            "offload_kqv": Field(137, "?", True),
            "op_offload": Field(139, "?", True),
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Library:
    """llama.cpp, ready to be called. load_model and new_context take the fields to change in a default struct."""

    api: ctypes.CDLL
    build: str
    load_model: Callable[[Path, Mapping[str, Value]], int | None]
    new_context: Callable[[int, Mapping[str, Value]], int | None]


@dataclass(frozen=True, slots=True)
class Backend:
    """A package that carries llama.cpp."""

    name: str
    unavailable: Callable[[], str | None]
    load: Callable[[], Library]
    renders_templates: bool


def available_backend() -> Backend | None:
    """Return the first package that can be used here."""
    return next((backend for backend in BACKENDS.values() if backend.unavailable() is None), None)


def why_unavailable() -> str | None:
    """Return every package's reason in one line, or None where one can be used."""
    reasons = {backend.name: backend.unavailable() for backend in BACKENDS.values()}
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _declare(api: ctypes.CDLL) -> ctypes.CDLL:
    missing = [name for name in PROTOTYPES if not hasattr(api, name)]
    if missing:
        raise RuntimeMissing("this llama.cpp lacks functions that llmx calls", where=api._name, problems=missing)
    for name, (result, arguments) in PROTOTYPES.items():
        function = getattr(api, name)
        function.restype, function.argtypes = result, arguments
    return api


def _binder(api: ctypes.CDLL, default: str, call: str, first: Any, params: type[ctypes.Structure]) -> Callable:
    """Return run(argument, assign, values): llama.cpp's default struct, changed by assign, passed to call by value."""
    make, function = getattr(api, default), getattr(api, call)
    make.restype, make.argtypes = params, ()
    function.restype, function.argtypes = c_void_p, (first, params)

    def run(argument: Any, assign: Callable[[Any, Mapping[str, Value]], None], values: Mapping[str, Value]) -> Any:
        structure = make()
        assign(structure, values)
        return function(argument, structure)

    return run


@dataclass(frozen=True, slots=True)
class _Structs:
    """The two parameter structs of a package, and how a field of each is set."""

    model: type[ctypes.Structure]
    set_model: Callable[[Any, Mapping[str, Value]], None]
    context: type[ctypes.Structure]
    set_context: Callable[[Any, Mapping[str, Value]], None]


def _library(api: ctypes.CDLL, build: str, structs: _Structs) -> Library:
    _declare(api)
    load = _binder(api, "llama_model_default_params", "llama_model_load_from_file", c_char_p, structs.model)
    create = _binder(api, "llama_context_default_params", "llama_init_from_model", c_void_p, structs.context)
    return Library(
        api=api,
        build=build,
        load_model=lambda path, values: load(str(path).encode(), structs.set_model, values),
        new_context=lambda model, values: create(model, structs.set_context, values),
    )


def _xllamacpp_version() -> str | None:
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return None


def _xllamacpp_file() -> Path | None:
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    return next(iter(sorted([*folder.glob("xllamacpp*.so"), *folder.glob("xllamacpp*.pyd")])), None)


def _xllamacpp_unavailable() -> str | None:
    version = _xllamacpp_version()
    if version is None:
        return f"not installed (pip install xllamacpp=={next(iter(LAYOUTS))})"
    if version not in LAYOUTS:
        return f"version {version} is installed, but only {', '.join(LAYOUTS)} has struct layouts that were checked"
    if struct.calcsize("P") != 8:
        return "the checked struct layouts are those of 64-bit machines"
    if _xllamacpp_file() is None:
        return f"version {version} is installed, but its extension module is missing"
    return None


def _xllamacpp_load() -> Library:
    file, version = _xllamacpp_file(), _xllamacpp_version()
    if file is None or version not in LAYOUTS:
        raise RuntimeMissing("xllamacpp cannot be used", fix=_xllamacpp_unavailable())
    layout = LAYOUTS[version]
    # Loaded as a plain library: importing the extension would start its Python side for nothing.
    api = ctypes.CDLL(str(file))
    _check_defaults(api, layout, version)
    structs = _Structs(
        RawParams,
        lambda structure, values: _patch(structure, layout.model, values),
        RawParams,
        lambda structure, values: _patch(structure, layout.context, values),
    )
    return _library(api, f"xllamacpp {version} (llama.cpp {layout.build})", structs)


def _check_defaults(api: ctypes.CDLL, layout: Layout, version: str) -> None:
    problems = []
    sides = (("llama_model_default_params", layout.model), ("llama_context_default_params", layout.context))
    for name, fields in sides:
        make = getattr(api, name)
        make.restype, make.argtypes = RawParams, ()
        data = bytes(make().data)
        for field_name, field in fields.items():
            (value,) = struct.unpack_from(field.format, data, field.offset)
            if value != field.default:
                problems.append(f"{name}().{field_name} at byte {field.offset}: {value}, expected {field.default}")
    if problems:
        raise RuntimeMissing(
            f"xllamacpp {version} does not have the struct layout that was checked for it", problems=problems
        )


def _patch(structure: RawParams, fields: Mapping[str, Field], values: Mapping[str, Value]) -> None:
    for name, value in values.items():
        struct.pack_into(fields[name].format, structure.data, fields[name].offset, value)


def _llama_cpp_unavailable() -> str | None:
    if importlib.util.find_spec("llama_cpp") is None:
        return "not installed (pip install llama-cpp-python, which compiles for some minutes)"
    return None


def _llama_cpp_load() -> Library:
    # A package without type information, often absent.
    binding = importlib.import_module("llama_cpp.llama_cpp")
    version = importlib.import_module("llama_cpp").__version__
    # A second handle of the same library: the package's own declarations stay as they are.
    api = ctypes.CDLL(binding._lib._name)
    structs = _Structs(binding.llama_model_params, _assign_fields, binding.llama_context_params, _assign_fields)
    return _library(api, f"llama-cpp-python {version}", structs)


def _assign_fields(structure: ctypes.Structure, values: Mapping[str, Value]) -> None:
    known = {field[0] for field in structure._fields_}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise RuntimeMissing(
            "this llama-cpp-python is too old or too new: its parameter structs lack fields that llmx sets",
            problems=[f"{type(structure).__name__}.{name}" for name in unknown],
        )
    for name, value in values.items():
        setattr(structure, name, value)


BACKENDS: dict[str, Backend] = {
    "xllamacpp": Backend("xllamacpp", _xllamacpp_unavailable, _xllamacpp_load, renders_templates=True),
    "llama-cpp-python": Backend("llama-cpp-python", _llama_cpp_unavailable, _llama_cpp_load, renders_templates=False),
}
