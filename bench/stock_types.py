"""Write down which type stock llama.cpp gives every tensor: tests/golden/stock_types.json.

    python bench/stock_types.py --quantize /path/to/llama-quantize

Random checkpoints of many shapes are exported to F32 and handed to stock llama-quantize for every file type, with and
without an importance matrix. The types found in its files are what llmx must choose.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llmx import api
from llmx.exporters.gguf_types import FILE_TYPES, FLOAT_TYPES
from llmx.formats.gguf import read_gguf
from llmx.formats.imatrix import write_imatrix
from llmx.formats.safetensors import write_safetensors
from llmx.models.families import describe

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "stock_types.json"
TOKENIZER = ROOT / "examples" / "tiny-qwen3"

_BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# name -> config.json: depths, grouped keys, tied heads, row lengths and experts that llama.cpp's rules look at
CASES: dict[str, dict[str, Any]] = {
    "llama-32": _BASE,
    "llama-22-grouped-tied": _BASE | {"num_hidden_layers": 22, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-80-grouped": _BASE | {"num_hidden_layers": 80, "num_key_value_heads": 1},
    "llama-80": _BASE | {"num_hidden_layers": 80},
    "llama-3-rows-of-96": _BASE | {"num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 160, "head_dim": 12},
    "llama-3-rows-of-40": _BASE | {"num_hidden_layers": 3, "hidden_size": 40, "intermediate_size": 72, "head_dim": 6},
    "llama-30-rows-of-576-tied": _BASE
    | {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    "qwen2-28-grouped": _BASE | {"model_type": "qwen2", "num_hidden_layers": 28, "num_key_value_heads": 1},
    "qwen3-17-tied": _BASE | {"model_type": "qwen3", "num_hidden_layers": 17, "tie_word_embeddings": True},
    "gemma3-26": _BASE
    | {"model_type": "gemma3_text", "num_hidden_layers": 26, "num_key_value_heads": 2, "tie_word_embeddings": True}
    | {"sliding_window": 128, "query_pre_attn_scalar": 32, "hidden_activation": "gelu_pytorch_tanh"},
    "phi3-24-grouped": _BASE
    | {"model_type": "phi3", "num_hidden_layers": 24, "num_key_value_heads": 2, "pad_token_id": 0}
    | {"original_max_position_embeddings": 256},
    "mixtral-8-experts": _BASE | _EXPERTS | {"model_type": "mixtral", "num_hidden_layers": 9, "num_key_value_heads": 2},
    "mixtral-4-experts": _BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3moe-16-experts": _BASE
    | {"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    | {"num_hidden_layers": 8, "norm_topk_prob": True, "num_key_value_heads": 2},
    "gpt2-12": {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_embd": 256,
        "n_head": 4,
        "n_layer": 12,
        "n_positions": 256,
        "activation_function": "gelu_new",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def random_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of this config with small random bfloat16 weights and the example's tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    random = np.random.default_rng(0)
    architecture = describe(config)
    shapes = {name: spec for spec in architecture.tensors for name in spec.source.names}
    tensors = []
    for name, spec in shapes.items():
        shape = list(spec.shape[1:] if len(spec.source.names) > 1 else spec.shape)
        if spec.source.rows is not None:
            users = [s for s in architecture.tensors if name in s.source.names]
            shape[0] = max(s.source.rows[1] for s in users if s.source.rows)
        shape = shape[::-1] if spec.source.transpose else shape
        values = random.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        if spec.role.endswith("norm") and spec.part == "weight":
            values += 1 - architecture.norm_offset
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        tensors.append((name, "BF16", shape, [bits.tobytes()]))
    write_safetensors(folder / "model.safetensors", tensors)


def stock_types(binary: Path, config: dict[str, Any], scratch: Path) -> dict[str, dict[str, str]]:
    """File type ("+importance" when made with a matrix) -> kind of tensor -> types by layer, run-length coded."""
    random_checkpoint(scratch / "model", config)
    source = api.export(
        api.ExportRequest(str(scratch / "model"), type_name="F32", output=scratch / "f32.gguf", validate=False)
    ).artifact
    matrix = _flat_importance(scratch)
    found = {}
    for file_type in sorted(set(FILE_TYPES) - FLOAT_TYPES):
        for suffix, options in (("", []), ("+importance", ["--imatrix", str(matrix)])):
            target = scratch / "stock.gguf"
            command = [str(binary), *options, str(source), str(target), file_type, "2"]
            subprocess.run(command, check=True, capture_output=True)
            found[file_type + suffix] = summary(
                {name: tensor.type_name for name, tensor in read_gguf(target).tensors.items()}
            )
    return found


def _flat_importance(scratch: Path) -> Path:
    """An importance matrix of ones for every matrix of the scratch model: only its presence matters."""
    tensors = read_gguf(scratch / "f32.gguf").tensors.values()
    matrices = [t for t in tensors if len(t.shape) > 1 and t.name.startswith("blk.")]
    sums = {t.name: np.ones((t.shape[0] if len(t.shape) == 3 else 1, t.shape[-1]), np.float32) for t in matrices}
    counts = {name: np.ones(len(values), np.float32) for name, values in sums.items()}
    path = scratch / "imatrix.gguf"
    write_imatrix(path, sums, counts, datasets=["ones"], chunk_count=1, chunk_size=1)
    return path


def summary(types: dict[str, str]) -> dict[str, str]:
    """Tensor name -> type, as kind -> "Q6_K*2 Q4_K*3 ..." over the layers."""
    by_kind: dict[str, dict[int, str]] = {}
    for name, type_name in types.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        by_kind.setdefault(re.sub(r"^blk\.\d+\.", "", name), {})[int(layer[1]) if layer else 0] = type_name
    return {
        kind: " ".join(f"{t}*{len(list(run))}" for t, run in itertools.groupby(layers[i] for i in sorted(layers)))
        for kind, layers in sorted(by_kind.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", type=Path, required=True, help="stock llama-quantize")
    binary = parser.parse_args().quantize
    golden = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            golden[name] = {"config": config, "types": stock_types(binary, config, Path(scratch))}
        print(name)
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
