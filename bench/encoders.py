"""Error and speed of every encoder, beside llama.cpp's own where its library is given.

    python bench/encoders.py [--model FOLDER] [--ggml path/to/libggml-base.so] [TYPE …]

One thread. Error: Σ importance · (x − x̂)² over Σ importance · x², in percent, without and with importance (without: all
ones). Without a model, weights are drawn from Student's t. The importance is drawn, log-normal: it need not be real to
compare two minimizers of the same sum.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from llmx.formats.ggml_blocks import BLOCKS, row_bytes
from llmx.formats.ggml_decode import decode
from llmx.quant.grid import GRIDS, encode

Encoder = Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]


def ggml_encoder(library: Path) -> Encoder:
    """llama.cpp's quantizer as a function of (type, weight, importance)."""
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(type_name: str, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        out = np.empty((len(weight), row_bytes(type_name, weight.shape[1])), np.uint8)
        ggml.ggml_quantize_init(BLOCKS[type_name].id)
        columns = None if importance is None else importance.ctypes.data
        ggml.ggml_quantize_chunk(
            BLOCKS[type_name].id, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, columns
        )  # fmt: skip
        return out

    return quantize


def matrices(model: Path | None) -> Iterator[np.ndarray]:
    """Up to six matrices of the model, or six random ones of 1 M weights."""
    if model is None:
        random = np.random.default_rng(0)
        yield from (
            random.standard_t(df, (512, 2048)).astype(np.float32) * np.float32(0.02) for df in (4, 6, 8, 12, 20, 50)
        )
        return
    from llmx.models.model import open_model

    found = [weight for weight in open_model(model).weights() if weight.rows > 1 and weight.cols % 256 == 0]
    for weight in found[:: max(1, len(found) // 6)][:6]:
        yield weight.read(0, min(weight.rows, 2048))


def measure(encoder: Encoder, type_name: str, weight: np.ndarray, importance: np.ndarray | None) -> tuple[float, float]:
    """(relative weighted error, ms of CPU a million weights)."""
    start = time.process_time()
    data = encoder(type_name, weight, importance)
    seconds = time.process_time() - start
    columns = 1.0 if importance is None else importance
    lost = (columns * (weight - decode(type_name, data)).astype(np.float64) ** 2).sum()
    return lost / (columns * weight.astype(np.float64) ** 2).sum(), seconds * 1e3 / (weight.size / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: every block type")
    parser.add_argument("--model", type=Path, help="checkpoint folder to take matrices from")
    parser.add_argument("--ggml", type=Path, help="libggml-base.so to compare with")
    options = parser.parse_args()
    theirs = ggml_encoder(options.ggml) if options.ggml else None
    weights = list(matrices(options.model))
    print(
        f"{'type':8}{'importance':12}{'error %':>10}{'ms/Mweight':>12}{'ggml error %':>15}{'ggml ms':>10}{'ratio':>13}"
    )
    for type_name in options.types or GRIDS:
        for with_importance in (False, True):
            rows = []
            for seed, weight in enumerate(weights):
                columns = np.exp(np.random.default_rng(seed).normal(0, 1, weight.shape[1])).astype(np.float32)
                importance = columns if with_importance else None
                encode(type_name, weight[:1], importance)  # compiled before the clock runs
                ours = measure(encode, type_name, weight, importance)
                rows.append((*ours, *(measure(theirs, type_name, weight, importance) if theirs else (np.nan, np.nan))))
            error, speed, ggml_error, ggml_speed = np.median(rows, axis=0)
            ratio = np.exp(np.mean([np.log(row[0] / row[2]) for row in rows]))
            peer = f"{100 * ggml_error:15.4f}{ggml_speed:10.1f}{ratio:13.3f}" if theirs else f"{'not run':>15}"
            print(
                f"{type_name:8}{'yes' if with_importance else 'no':12}{100 * error:10.4f}{speed:12.1f}{peer}",
                flush=True,
            )


if __name__ == "__main__":
    main()
