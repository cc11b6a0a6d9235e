"""Wall time, CPU time and peak memory of exporting large random checkpoints of many shards.

    python bench/large.py [--sizes 1.1,4.4] [--types Q4_K_M] [--keep FOLDER] [--threads 2] [--max-memory 2GB] \\
        [--sparse] [--quantize llama-quantize | --stock-python PYTHON] [--convert convert_hf_to_gguf.py]

Memory must follow the largest tensor, not the model: the peaks of the sizes should agree. Each export is a process of
its own, without validation; the figures are the operating system's own for that process. --sparse writes the first
8 MB of every tensor and leaves holes behind them, which read as zeros: a checkpoint of 26 GB takes 3 GB of disk, and
its time says nothing. Where stock is given it makes
the same type: from the folder with --convert, else from a BF16 file that we made ("quantize only": reading the
checkpoint is counted for us and not for it). bench/quantize.py measures speed with repeats; this is one run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import stock
from stock import Cost, Stock

from llmx.formats.safetensors import write_safetensors
from llmx.models.families import describe

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "examples" / "tiny-qwen3"
SHARD_BYTES = 500 << 20
CHUNK = 1 << 22  # values

WARM_UP = "0.02"
ROUNDING = ("--method", "rtn")  # a calibration of random weights proves nothing, and its memory is another matter
# billions of parameters -> hidden, intermediate, layers, heads, grouped heads
SHAPES = {
    WARM_UP: (256, 512, 1, 8, 2),
    "1.1": (2048, 5632, 22, 32, 4),
    "4.4": (3200, 8640, 36, 50, 25),
    "13": (5120, 13824, 40, 40, 40),
}


def config_of(size: str) -> dict[str, Any]:
    """A llama config of about that many billions of parameters."""
    hidden, intermediate, layers, heads, grouped = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
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


def make(size: str, folder: Path, *, sparse: bool = False) -> int:
    """Write the checkpoint unless it is there, in shards of about 500 MB with an index; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(size)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        _write_weights(config, folder, index, sparse=sparse)
    return json.loads(index.read_text())["metadata"]["total_size"]


def _write_weights(config: dict[str, Any], folder: Path, index: Path, *, sparse: bool) -> None:
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
        if sparse:
            _write_sparse(folder / name, shard, block)
        else:
            write_safetensors(folder / name, [(n, "BF16", shape, _fill(block, nbytes)) for n, shape, nbytes in shard])
        weight_map |= {tensor: name for tensor, _, _ in shard}
    total = sum(nbytes for shard in shards for _, _, nbytes in shard)
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _write_sparse(path: Path, shard: list[tuple[str, tuple[int, ...], int]], block: bytes) -> None:
    """A safetensors file of which each tensor's first block is written."""
    ends = list(accumulate(nbytes for _, _, nbytes in shard))
    starts = [end - nbytes for end, (_, _, nbytes) in zip(ends, shard, strict=True)]
    header = json.dumps({
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        for (name, shape, _), start, end in zip(shard, starts, ends, strict=True)
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for start, (_, _, nbytes) in zip(starts, shard, strict=True):
            stream.seek(8 + len(header) + start)
            stream.write(block[:nbytes])
        stream.truncate(8 + len(header) + ends[-1])


def _fill(block: bytes, nbytes: int) -> Iterator[bytes]:
    for start in range(0, nbytes, len(block)):
        yield block[: min(len(block), nbytes - start)]


def export(folder: Path, type_name: str, threads: int, target: Path, *options: str) -> Cost:
    """What one export costs in its own process."""
    command = [sys.executable, "-m", "llmx.cli", "export", str(folder), "--type", type_name, "-o", str(target)]
    return stock.measured([*command, "--threads", str(threads), "--no-validate", "--force", *options], threads)


def warm_up(types: Sequence[str], threads: int, scratch: Path, *options: str) -> None:
    """Fill numba's cache with what these types need, on a checkpoint too small to count, in scratch / WARM_UP."""
    make(WARM_UP, scratch / WARM_UP)
    for type_name in types:
        export(scratch / WARM_UP, type_name, threads, scratch / "warm-up.gguf", *options)


def _row(size: str, type_name: str, total: int, written: int, ours: Cost) -> str:
    return (
        f"{size + ' B':>6} {type_name:8} {total / 1e6:8.0f} {written / 1e6:8.0f} {ours.wall:7.1f} "
        f"{ours.cpu:7.1f} {ours.peak:8.0f}"
    )


def _compared(ours: Cost, theirs: Cost, what: str) -> str:
    wall, cpu = ours.wall / theirs.wall, ours.cpu / theirs.cpu
    return f"wall {wall:.2f} ({theirs.wall:.1f} s), CPU {cpu:.2f} ({theirs.cpu:.1f} s), {theirs.peak:.0f} MB; {what}"


def _stock(tools: Stock, source: Path, type_name: str, converted: Cost | None, threads: int, target: Path) -> Cost:
    quantized = tools.quantize(source, target, type_name, threads=threads)
    return converted.then(quantized) if converted else quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1.1,4.4", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--types", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory", metavar="SIZE", help="what an export is told to keep within")
    parser.add_argument("--sparse", action="store_true", help="leave most of a checkpoint out, as holes")
    parser.add_argument("--keep", type=Path, help="make the checkpoints here and keep them")
    stock.add_options(parser)
    options = parser.parse_args()
    tools = stock.chosen(options)
    print(stock.machine())
    header = f"{'size':>6} {'type':8} {'in MB':>8} {'out MB':>8} {'wall s':>7} {'CPU s':>7} {'peak MB':>8}"
    print(f"{header}  ours / stock: {tools.words}")
    types = options.types.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(types, options.threads, Path(scratch), *ROUNDING)
        source, target, theirs = (Path(scratch) / name for name in ("bf16.gguf", "ours.gguf", "stock.gguf"))
        for size in options.sizes.split(","):
            folder = (options.keep or Path(scratch)) / f"random-{size}b"
            total = make(size, folder, sparse=options.sparse)
            converted, maker = None, ""
            if tools.here:
                source.unlink(missing_ok=True)
                converted, maker = stock.float_file(tools, folder, "BF16", source, options.threads)
            what = "convert and quantize" if converted else f"quantize only, source by {maker}"
            for type_name in types:
                limit = ("--max-memory", options.max_memory) if options.max_memory else ()
                ours = export(folder, type_name, options.threads, target, *ROUNDING, *limit)
                row = _row(size, type_name, total, target.stat().st_size, ours)
                if tools.here:
                    cost = _stock(tools, source, type_name, converted, options.threads, theirs)
                    print(f"{row}  {_compared(ours, cost, what)}", flush=True)
                else:
                    print(f"{row}  not run", flush=True)


if __name__ == "__main__":
    main()
