"""The kernel that chooses the next token: by its text, thread by thread, and as the assembler and a GPU take it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ptx_double import Block, array_at

from llmx.errors import LlmxError, RuntimeMissing
from llmx.validate.runtimes.cuda_driver import Device
from llmx.validate.runtimes.cuda_kernels import NEXT_TOKEN, PTX, THREADS

RANDOM = np.random.default_rng(3)
TIES = np.zeros(3000, np.float32)
TIES[[1023, 2047, 2049]] = 1
LOGITS = {
    "random": RANDOM.standard_normal(2500).astype(np.float32),
    "fewer than threads": RANDOM.standard_normal(96).astype(np.float32),
    "all below zero": -np.abs(RANDOM.standard_normal(1500)).astype(np.float32) - 1,
    "the last": np.arange(2100, dtype=np.float32),
    "the first of equals": TIES,
    "nothing but minus infinity": np.full(1100, -np.inf, np.float32),
}


@pytest.mark.parametrize("name", LOGITS)
def test_the_text_of_the_kernel_chooses_the_first_of_the_largest_and_moves_on(name: str) -> None:
    logits = LOGITS[name]
    block = Block(PTX, THREADS)
    places = {"logits": 1024, "token": 32768, "start": 32776, "made": 33024}
    array_at(block.memory, places["logits"], len(logits), np.float32)[:] = logits
    array_at(block.memory, places["token"], 1, np.int64)[:] = 7
    array_at(block.memory, places["start"], 1, np.int64)[:] = 5
    assert block.parameters == ["at_logits", "given_count", "at_token", "at_start", "at_made"]
    values = (places["logits"], len(logits), places["token"], places["start"], places["made"])
    block.run(dict(zip(block.parameters, values, strict=True)))
    best = int(logits.argmax())
    assert array_at(block.memory, places["token"], 1, np.int64)[0] == best
    assert array_at(block.memory, places["start"], 1, np.int64)[0] == 6
    assert array_at(block.memory, places["made"], 8, np.uint32).tolist() == [0] * 6 + [best, 0]


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="the CUDA toolkit's ptxas is not installed")
@pytest.mark.parametrize("gpu", ["sm_75", "sm_90", "sm_100"])
def test_the_kernel_is_what_the_assembler_takes(tmp_path: Path, gpu: str) -> None:
    (tmp_path / "kernel.ptx").write_text(PTX)
    command = ["ptxas", f"-arch={gpu}", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_machine_without_a_driver_is_told_so() -> None:
    with pytest.raises(RuntimeMissing, match="there is no CUDA driver"):
        Device("libcuda-that-is-not-there.so")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("width", [np.int32, np.int64])
def test_a_gpu_chooses_as_numpy_does_also_from_a_captured_graph(name: str, width: type) -> None:
    try:
        device = Device()
    except RuntimeMissing as error:
        pytest.skip(error.one_line)
    logits = LOGITS[name]
    places = [device.allocate(nbytes) for nbytes in (logits.nbytes, 8, 8, 64)]
    device.upload(places[0], logits)
    device.upload(places[1], np.array([7], width))
    device.upload(places[2], np.array([5], width))
    kernel = device.kernel(PTX, NEXT_TOKEN)
    arguments = [ctypes.c_uint64(place) for place in places]
    arguments.insert(1, ctypes.c_uint32(len(logits)))  # type: ignore[arg-type]
    graph = device.captured(lambda: device.run_kernel(kernel, THREADS, arguments))
    assert device.download(places[2], (1,), width)[0] == 5
    assert device.seconds(lambda: [device.launch(graph) for _ in range(3)]) > 0
    best = int(logits.argmax())
    assert device.download(places[1], (1,), width)[0] == best
    assert device.download(places[2], (1,), width)[0] == 8
    assert device.download(places[3], (10,), np.uint32).tolist() == [0] * 6 + [best] * 3 + [0]
    device.discard(graph)
    for place in places:
        device.release(place)
    with pytest.raises(LlmxError, match="cuMemFree_v2 failed"):
        device.release(12345)
