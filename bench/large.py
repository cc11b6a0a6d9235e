"""Wall time, CPU time and peak memory of exporting large random checkpoints of many shards.

    python bench/large.py --sizes 1.1,4.4 --types Q4_K_M [--keep FOLDER] [--threads 2] [--quantize llama-quantize]

Memory must follow the largest tensor, not the model: the peaks of the sizes should agree. Each export is a process of
its own, without validation; the figures are the operating system's own for that process. With --quantize, stock
llama-quantize then makes the same type from a BF16 GGUF file (its conversion from the checkpoint is not counted, ours
is), and the ratio of the times is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmx.formats.safetensors import write_safetensors
from llmx.models.families import describe

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples" / "tiny-qwen3"
SHARD_BYTES = 500 << 20
CHUNK = 1 << 22  # values

# billions of parameters -> hidden, intermediate, layers, heads, grouped heads
SHAPES = {
    "1.1": (2048, 5632, 22, 32, 4),
    "4.4": (3200, 8640, 36, 50, 25),
}


def config_of(size: str) -> dict[str, Any]:
    """A llama config of about that many billions of parameters."""
    hidden, intermediate, layers, heads, grouped = SHAPES[size]
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": grouped,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def make(size: str, folder: Path) -> int:
    """Write the checkpoint, in shards of about 500 MB with an index; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(size)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    # One block of normal values, repeated: what the encoders cost depends on the values' spread alone.
    values = np.random.default_rng(0).standard_normal(CHUNK, dtype=np.float32) * np.float32(0.02)
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    for spec in describe(config).tensors:
        nbytes = 2 * int(np.prod(spec.shape))
        if sum(n for _, _, n in shards[-1]) + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append((spec.source.names[0], spec.shape, nbytes))
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, [(n, "BF16", shape, _fill(block, nbytes)) for n, shape, nbytes in shard])
        weight_map |= {tensor: name for tensor, _, _ in shard}
    total = sum(nbytes for shard in shards for _, _, nbytes in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _fill(block: bytes, nbytes: int) -> Iterator[bytes]:
    for start in range(0, nbytes, len(block)):
        yield block[: min(len(block), nbytes - start)]


def export(folder: Path, type_name: str, threads: int, target: Path) -> dict[str, float]:
    """One export in its own process: wall s, CPU s, peak MB, MB written."""
    command = [sys.executable, "-m", "llmx.cli", "export", str(folder), "--type", type_name, "-o", str(target)]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    # --json: the export's own peak; getrusage of the children is the largest of all of them.
    done = subprocess.run(
        [*command, "--threads", str(threads), "--no-validate", "--force", "--json"], check=True, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = json.loads(done.stdout)
    return {
        "wall": time.monotonic() - started,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": told["peak_rss_bytes"] / 1e6,
        "written": told["bytes"] / 1e6,
    }


def stock(binary: Path, source: Path, type_name: str, threads: int, target: Path) -> dict[str, float]:
    """The same type by stock llama-quantize, from a GGUF file: wall s, CPU s."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [str(binary), str(source), str(target), type_name, str(threads)]
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.monotonic() - started, "cpu": cpu}


def _row(size: str, type_name: str, total: int, row: dict[str, float], theirs: dict[str, float] | None) -> str:
    line = (
        f"{size + ' B':>6} {type_name:8} {total / 1e6:8.0f} {row['written']:8.0f} {row['wall']:7.1f} "
        f"{row['cpu']:7.1f} {row['peak']:8.0f}"
    )
    if theirs is None:
        return f"{line}  not run"
    wall, cpu = row["wall"] / theirs["wall"], row["cpu"] / theirs["cpu"]
    return f"{line}  wall {wall:.2f} ({theirs['wall']:.1f} s), CPU {cpu:.2f} ({theirs['cpu']:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1.1,4.4", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--types", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="make the checkpoints here and keep them")
    parser.add_argument("--quantize", type=Path, help="stock llama-quantize")
    options = parser.parse_args()
    header = f"{'size':>6} {'type':8} {'in MB':>8} {'out MB':>8} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}"
    print(f"{header}  ours / stock llama-quantize")
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes.split(","):
            folder = (options.keep or Path(scratch)) / f"random-{size}b"
            index = folder / "model.safetensors.index.json"
            total = json.loads(index.read_text())["metadata"]["total_size"] if index.exists() else make(size, folder)
            source, target = Path(scratch) / "bf16.gguf", Path(scratch) / "out.gguf"
            if options.quantize:
                export(folder, "BF16", options.threads, source)
            for type_name in options.types.split(","):
                ours = export(folder, type_name, options.threads, target)
                theirs = None
                if options.quantize:
                    theirs = stock(options.quantize, source, type_name, options.threads, Path(scratch) / "stock.gguf")
                print(_row(size, type_name, total, ours, theirs), flush=True)


if __name__ == "__main__":
    main()
