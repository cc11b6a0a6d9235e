"""What the commands share: options, each written once, and how a result is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmx.printing import harmless, harmless_json

JSON_OPTION = "--json"

json_option = click.option(JSON_OPTION, "as_json", is_flag=True, help="Print one JSON object on stdout.")
revision = click.option("--revision", metavar="REV", help="Revision of a hub model (branch, tag or commit).")
threads = click.option("--threads", type=int, default=0, show_default="all cores", help="Worker threads.")
max_memory = click.option("--max-memory", metavar="SIZE", help="Memory to keep within, for example 4GB.")
FILE = click.Path(path_type=Path, dir_okay=False)
ANY = click.Path(path_type=Path)


def several(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator from many, in reading order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


what = several(
    click.option(
        "--format", "format_", default="gguf", show_default=True, help="Target format: gguf, onnx, tensorrt or trtllm."
    ),
    click.option("--bits", type=int, help="Size class: 2, 3, 4, 5, 6, 8, 16 or 32. [default: 4]"),
    click.option("--type", "type_name", metavar="NAME", help="Exact file type, for example Q4_K_M, IQ4_XS, BF16."),
    click.option("--dialect", metavar="NAME", help="ONNX operators: ort (onnxruntime's own too) or standard."),
    click.option("--layout", metavar="NAME", help="TensorRT-LLM: hf (Hugging Face's names) or ranks (a file a GPU)."),
    click.option("--tp", type=int, metavar="N", help="With --layout ranks: GPUs that share every layer."),
    click.option("--pp", type=int, metavar="N", help="With --layout ranks: stages that the layers are dealt to."),
    click.option("--kv-cache", metavar="TYPE", help="TensorRT-LLM: cache keys and values as fp8 or int8."),
    click.option("--builder", metavar="NAME", help="TensorRT: tensorrt or tensorrt_rtx. [default: what is installed]"),
    click.option("--max-batch", type=int, metavar="N", help="TensorRT: sequences at once. [default: 1]"),
    click.option(
        "--max-input", type=int, metavar="N", help="TensorRT: new tokens of a sequence. [default: up to 1024]"
    ),
    click.option("--max-length", type=int, metavar="N", help="TensorRT: tokens in all. [default: up to 4096]"),
    click.option("--timing-cache", type=FILE, metavar="FILE", help="TensorRT: read and write what kernels took."),
    click.option("--refit", is_flag=True, default=None, help="TensorRT: weights can be exchanged later."),
    click.option("--portable", is_flag=True, default=None, help="TensorRT: for other GPUs too, from Ampere on."),
    click.option(
        "--profiles", type=int, metavar="N", help="TensorRT: 1 for all lengths, 2 for prompts and for tokens."
    ),
    click.option(
        "--wide-head/--narrow-head",
        default=None,
        help="TensorRT: logits in float32, or in the engine's type. [default: as the builder keeps its bytes small]",
    ),
    click.option("--optimization-level", type=int, metavar="N", help="TensorRT: 0 to 5. [default: the builder's]"),
    click.option(
        "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Type of single tensors; repeatable."
    ),
    click.option("--imatrix", type=FILE, help="Importance matrix file, GGUF or legacy .dat."),
    click.option("--split-max-size", metavar="SIZE", help="Split into files of at most this size, for example 2GB."),
    revision,
)
device = click.option("--device", default="auto", show_default=True, help="Where to calibrate: auto, cpu or cuda.")
calibration = several(
    click.option(
        "--calibration", type=FILE, metavar="FILE", help="Text or JSON Lines to calibrate on. [default: built in]"
    ),
    click.option("--calibration-tokens", type=int, metavar="N", help="How many tokens of it. [default: by model size]"),
    device,
)
how = several(
    click.option("--recipe", metavar="NAME|FILE", help="A recipe: q4_k_m+gptq, w4a16-awq, … or a YAML file."),
    click.option("--method", help="auto, rtn, awq or gptq. [default: auto, which calibrates where it takes minutes]"),
    click.option("--effort", help="fast, balanced or best. [default: balanced]"),
    click.option(
        "--sparsity", metavar="PATTERN",
        help="Zeros in every matrix: 2:4 or 50%; --method sparsegpt, wanda or magnitude. Floats unless --type.",
    ),
    calibration,
    click.option(
        "--statistics", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
        help="Keep the calibration's statistics here, and go on from those that are.",
    ),
    click.option("--target-size", metavar="SIZE", help="Choose every tensor's type so that the file fits, e.g. 900MB."),
    click.option("--target-bpw", type=float, metavar="BITS", help="The same by bits per weight, for example 4.2."),
)  # fmt: skip
limits = several(
    click.option("--text", type=FILE, help="Text to judge on. [default: a built-in mixed text]"),
    click.option(
        "--positions", type=click.IntRange(min=1), metavar="N",
        help="How many next-token distributions are compared; a text with fewer is refused. [default: 512, or fewer]",
    ),
    click.option(
        "--gate", type=FILE, metavar="FILE", help="YAML of limits: max_kl, … or a check's name. Options go before it."
    ),
    click.option("--max-kl", type=float, help="Largest mean KL divergence to pass."),
    click.option("--min-top1", type=float, help="Smallest share of equal most likely tokens to pass."),
    click.option("--max-ppl-ratio", type=float, help="Largest perplexity ratio to pass."),
    click.option("--min-tokens-per-second", type=float, help="Slowest decoding to pass."),
)  # fmt: skip


def answer(as_json: bool, value: dict[str, Any], words: Callable[[], str]) -> None:
    """The result on stdout: one JSON object for scripts, words for people."""
    if as_json:
        print_json(value)
    else:
        click.echo(harmless(words()))


def print_json(value: dict[str, Any]) -> None:
    click.echo(harmless_json(json.dumps(value, ensure_ascii=False)))
