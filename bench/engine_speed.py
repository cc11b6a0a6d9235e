"""Decode speed of a float16 engine against the GPU's memory and against compiled torch, in one run.

    python bench/engine_speed.py [MODEL …] [--random 1.1] [--engine FOLDER …] [--context 512] [--decode 256]
        [--modes reduce-overhead,max-autotune] [--rounds 3] [--keep FOLDER] [--json rows.json] [--more='--profiles 1']

Each llama MODEL, and a random one of the shapes of bench/large.py, is exported to an engine (or taken from --engine, in
the same order) and decodes by Session.speed: one token at a time, batch of one. torch does the same in float16 with a
static cache of the same capacity: transformers, and a plain llama whose projections are joined, compiled with each mode
of --modes. Rounds alternate; each gives its best. The limit is what the GPU's memory could do: the measured speed of
copying over the bytes that a token has to read, that is the matrices and the filled part of the cache. All values of
the random model are drawn anew: TensorRT stores equal matrices once, and would read less than a model's bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from large import TOKENIZER, config_of
from safetensors.torch import load_file, save_file
from torch.nn import functional

from llmx.models.families import describe

PREFILL = 32
COPIED = 1 << 31  # bytes; far beyond the GPU's cache
WARM_UPS = 3
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids i64[1, 1], position i64[1]) -> the next ids


@dataclass
class Way:
    """A way to decode. restart: makes its cache one of PREFILL positions."""

    step: Step
    restart: Callable[[], None] = lambda: None


@dataclass
class Row:
    """Tokens a second of each way to decode one model; `best_torch` is the fastest of torch's."""

    model: str
    parameters: int
    read_bytes: int
    bandwidth: float
    limit: float
    engine: float = 0.0
    torch: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def best_torch(self) -> float:
        return max(self.torch.values(), default=0.0)

    def told(self) -> str:
        others = ", ".join(f"{name} {speed:.0f}" for name, speed in self.torch.items())
        ratio = self.engine / self.best_torch if self.best_torch else float("nan")
        lines = [
            f"{self.model}: engine {self.engine:.0f} tokens/s, {100 * self.engine / self.limit:.1f} % of the limit"
            f" {self.limit:.0f} ({self.read_bytes / 1e6:.1f} MB a token at {self.bandwidth / 1e12:.2f} TB/s)",
            f"  torch: {others}; engine / best of torch {ratio:.2f}",
        ]
        lines += [f"  {name} failed: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- plain torch


class Held(torch.nn.Module):
    """Tensors by name. As buffers they keep their addresses, and a replayed graph does not copy them first."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Llama(torch.nn.Module):
    """A llama for one token at a time: q, k and v one product, gate and up one, the cache written in place."""

    def __init__(self, folder: Path, capacity: int, device: str = "cuda") -> None:
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] != "llama" or config.get("rope_scaling") or config.get("attention_bias"):
            raise ValueError("the plain model is a llama with plain rope and no biases")
        files = sorted(folder.glob("*.safetensors"))
        given = {k: v.half().to(device) for file in files for k, v in load_file(file).items()}
        self.heads = config["num_attention_heads"]
        self.grouped = config.get("num_key_value_heads") or self.heads
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.epsilon = config["rms_norm_eps"]
        cache = torch.zeros(1, self.grouped, capacity, self.size, dtype=torch.half, device=device)
        self.layers = torch.nn.ModuleList(
            Held(**self._layer(given, f"model.layers.{n}."), keys=cache.clone(), values=cache.clone())
            for n in range(config["num_hidden_layers"])
        )
        theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
        inverse = theta ** -(torch.arange(0, self.size, 2, device=device) / self.size)
        angles = torch.arange(capacity, device=device)[:, None] * torch.cat([inverse, inverse])[None]
        embedding = given["model.embed_tokens.weight"]
        self.held = Held(
            embedding=embedding,
            head=given.get("lm_head.weight", embedding),
            norm=given["model.norm.weight"],
            cos=angles.cos().half(),
            sin=angles.sin().half(),
            seen=torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril(),
        )

    def _layer(self, given: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        names = [f"{prefix}self_attn.{p}_proj.weight" for p in "qkv"]
        return {
            "qkv": torch.cat([given.pop(name) for name in names]),
            "o": given.pop(f"{prefix}self_attn.o_proj.weight"),
            "gate_up": torch.cat([given.pop(f"{prefix}mlp.{p}_proj.weight") for p in ("gate", "up")]),
            "down": given.pop(f"{prefix}mlp.down_proj.weight"),
            "before": given.pop(f"{prefix}input_layernorm.weight"),
            "between": given.pop(f"{prefix}post_attention_layernorm.weight"),
        }

    def _rms(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).half() * gain

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        held: Any = self.held
        x = held.embedding[ids[0]]  # [1, H]
        cos, sin, seen = held.cos[position], held.sin[position], held.seen[position]
        layer: Any
        for layer in self.layers:
            joined = functional.linear(self._rms(x, layer.before), layer.qkv).view(1, -1, 1, self.size)
            q, k, v = joined.split([self.heads, self.grouped, self.grouped], 1)
            layer.keys.index_copy_(2, position, self._turned(k, cos, sin))
            layer.values.index_copy_(2, position, v)
            mixed = functional.scaled_dot_product_attention(
                self._turned(q, cos, sin), layer.keys, layer.values, attn_mask=seen[None, None], enable_gqa=True
            )
            x = x + functional.linear(mixed.reshape(1, -1), layer.o)
            gate, up = functional.linear(self._rms(x, layer.between), layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return functional.linear(self._rms(x, held.norm), held.head).argmax(-1, keepdim=True)


def plain(folder: Path, capacity: int, mode: str) -> Way:
    return Way(torch.compile(Llama(folder, capacity), mode=mode, fullgraph=True))


def of_transformers(folder: Path, capacity: int, mode: str) -> Way:
    from transformers import AutoModelForCausalLM, StaticCache

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.half, attn_implementation="sdpa")
    model = model.cuda().eval()
    cache = StaticCache(config=model.config, max_cache_len=capacity)

    def step(ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        found = model(ids, past_key_values=cache, cache_position=position, position_ids=position[None], use_cache=True)
        return found.logits[:, -1].argmax(-1, keepdim=True)

    def restart() -> None:
        for layer in cache.layers:
            if (counted := getattr(layer, "cumulative_length", None)) is not None:  # newer versions count by themselves
                counted.fill_(PREFILL)

    with torch.inference_mode():  # the cache is laid out by its first use
        step(torch.zeros(1, 1, dtype=torch.long, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda"))
    return Way(torch.compile(step, mode=mode), restart)


TORCH: dict[str, Callable[[Path, int, str], Way]] = {"plain": plain, "transformers": of_transformers}


# ---------------------------------------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], object]) -> float:
    """Of the GPU, by its own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def decoded_per_second(way: Way, count: int) -> float:
    """Tokens a second after PREFILL positions; each token is what the one before it gave."""
    ids = torch.ones(1, 1, dtype=torch.long, device="cuda")
    position = torch.full((1,), PREFILL, dtype=torch.long, device="cuda")

    def work() -> None:
        current = ids
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            current = way.step(current, position).clone()
            position.add_(1)

    with torch.inference_mode():
        way.restart()
        return count / seconds(work)


def bandwidth() -> float:
    """Bytes a second of the best copy, read and written both counted."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / min(seconds(lambda: target.copy_(source)) for _ in range(12))


def read_bytes(folder: Path, positions: int) -> tuple[int, int]:
    """(parameters, bytes that a token reads in float16 with so many positions in the cache)."""
    from llmx.models.model import open_model

    architecture = open_model(folder).architecture
    sizes = {spec.name: torch.Size(spec.shape).numel() for spec in architecture.tensors}
    tied = not any(spec.role == "head" for spec in architecture.tensors)
    gathered = {spec.name for spec in architecture.tensors if spec.role == "embedding" and not tied}
    config = json.loads((folder / "config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    grouped = config.get("num_key_value_heads") or config["num_attention_heads"]
    cache = 2 * config["num_hidden_layers"] * grouped * size * positions
    return sum(sizes.values()), 2 * (sum(n for name, n in sizes.items() if name not in gathered) + cache)


def random_llama(size: str, folder: Path) -> Path:
    """A checkpoint of those shapes whose matrices all differ; its norms are ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(size)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER / name).read_bytes())
    draw = torch.Generator().manual_seed(0)
    values = {
        spec.source.names[0]: (
            torch.ones(spec.shape) if len(spec.shape) == 1 else 0.02 * torch.randn(spec.shape, generator=draw)
        ).bfloat16()
        for spec in describe(config).tensors
    }
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def export(model: Path, target: Path, context: int, *options: str) -> None:
    """Makes the float16 engine of a model by the command that anybody would give."""
    command = [sys.executable, "-m", "llmx.cli", "export", str(model), "--format", "tensorrt", "--type", "F16"]
    command += ["--max-length", str(context), "--max-input", str(PREFILL), "--no-validate", "--force"]
    started = time.perf_counter()
    subprocess.run([*command, "-o", str(target), *options], check=True)
    print(f"{model.name}: engine made in {time.perf_counter() - started:.1f} s", flush=True)


@contextlib.contextmanager
def engine(folder: Path, context: int, count: int) -> Iterator[Callable[[], float]]:
    """What measures an engine, loaded: tokens a second."""
    from llmx.validate.runtimes import find_runtime

    with find_runtime("tensorrt").open(folder, threads=1, context=context) as session:
        print(f"  {session.build}", flush=True)
        yield lambda: session.speed(PREFILL, count).decode_tokens_per_second


def measured(model: Path, folder: Path, asked: argparse.Namespace) -> Row:
    """The row of one model: each of torch and the engine in turns."""
    positions = PREFILL + asked.decode // 2
    parameters, nbytes = read_bytes(model, positions)
    copied = bandwidth()
    row = Row(model.name, parameters, nbytes, copied, copied / nbytes)
    with engine(folder, asked.context, asked.decode) as run:
        ways: dict[str, Callable[[], float]] = {}
        for kind in asked.torch.split(","):
            for mode in asked.modes.split(","):
                name, started = f"{kind} {mode}", time.perf_counter()
                try:
                    way = TORCH[kind](model, asked.context, mode)
                    for _ in range(WARM_UPS):
                        decoded_per_second(way, 8)
                except Exception as error:  # noqa: BLE001  # one of torch's ways may fail to compile: shown, not lost
                    row.failed[name] = str(error).splitlines()[0][:200]
                    continue
                ways[name] = lambda way=way: decoded_per_second(way, asked.decode)
                print(f"  {name}: compiled in {time.perf_counter() - started:.1f} s", flush=True)
        for _ in range(asked.rounds):
            row.engine = max(row.engine, run())
            for name, way in ways.items():
                row.torch[name] = max(row.torch.get(name, 0.0), way())
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--random", help="a random llama too; of bench/large.py, in billions of weights")
    parser.add_argument("--engine", type=Path, action="append", default=[], help="of each model in order")
    parser.add_argument("--more", default="", help="more options of llmx export, as one word")
    parser.add_argument("--context", type=int, default=512, help="positions that the caches have room for")
    parser.add_argument("--decode", type=int, default=256)
    parser.add_argument("--modes", default="reduce-overhead", help="of torch.compile")
    parser.add_argument("--torch", default=",".join(TORCH), help=f"of {', '.join(TORCH)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder of random checkpoints and engines")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def rows(asked: argparse.Namespace, folder: Path) -> Iterator[Row]:
    models: Sequence[Path] = list(asked.models)
    if asked.random:
        models = [*models, random_llama(asked.random, folder / f"random-{asked.random}b")]
    for number, model in enumerate(models):
        if number < len(asked.engine):
            made = asked.engine[number]
        else:
            made = folder / f"{model.name}-engine"
            export(model, made, asked.context, *shlex.split(asked.more))
        yield measured(model, made, asked)
        torch.compiler.reset()
        torch.cuda.empty_cache()


def main() -> None:
    asked = arguments()
    if not torch.cuda.is_available():
        sys.exit("no GPU: nothing to measure")
    if PREFILL + asked.decode + 2 > asked.context:
        sys.exit(f"--context {asked.context} has no room for {PREFILL} + {asked.decode} positions")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(asked, asked.keep or Path(scratch)):
            print(row.told(), flush=True)
            found.append({**asdict(row), "best_torch": row.best_torch})
            if asked.json:
                asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
