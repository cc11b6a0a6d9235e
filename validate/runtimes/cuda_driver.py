"""The CUDA driver API, as much of it as running an engine takes, through ctypes: no compiler, no torch, any Python.

One library serves TensorRT 8.5 to 11, whatever CUDA runtime each brings. The primary context is retained, which is the
one that TensorRT's own CUDA runtime uses, so that addresses and streams are understood on both sides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from typing import Any

import numpy as np

from llmx.errors import CheckFailed, LlmxError, ResourceError, RuntimeMissing

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY = 2
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no waiting for what others send to the default stream
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NAME_BYTES = 256

_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(c_float), c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


class Device:
    """The first CUDA device, with one stream: all work of a session goes through it, in order.

    Every call raises ResourceError where the device's memory is full, CheckFailed with the driver's words otherwise.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        """Open the driver. Raises RuntimeMissing where there is no driver, or no device that it can use."""
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            fix = "run on a machine with an NVIDIA GPU"
            raise RuntimeMissing(f"there is no CUDA driver: {error}", fix=fix) from error
        for name, arguments in _PROTOTYPES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        number, device = c_int(), c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGetCount", byref(number))
        except CheckFailed as error:
            raise RuntimeMissing(f"the CUDA driver finds no device: {error.what}") from error
        if number.value == 0:
            raise RuntimeMissing("the CUDA driver finds no device")
        self._call("cuDeviceGet", byref(device), 0)
        self._context = self._handle("cuDevicePrimaryCtxRetain", device)
        self._call("cuCtxSetCurrent", self._context)
        self.name = self._name(device)
        self.capability = (self._attribute(_MAJOR, device), self._attribute(_MINOR, device))
        self.stream: int = self._handle("cuStreamCreate", _NON_BLOCKING)

    @property
    def driver(self) -> str:
        """Return the newest CUDA that the driver serves, as 13.0."""
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def free_bytes(self) -> int:
        """Return the device memory that nobody uses."""
        return self._memory()[0]

    def allocate(self, nbytes: int) -> int:
        """Return the address of so many bytes of zeros on the device."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), max(nbytes, 1), needed=nbytes)
        self._call("cuMemsetD8Async", address, 0, max(nbytes, 1), self.stream)
        return address.value

    def release(self, address: int) -> None:
        """Give an allocation back."""
        self._call("cuMemFree_v2", address)

    def upload(self, address: int, values: np.ndarray) -> None:
        """Copy an array to the device; it may be changed at once."""
        values = np.ascontiguousarray(values)
        self._call("cuMemcpyHtoDAsync_v2", address, values.ctypes.data, values.nbytes, self.stream)
        self.wait()

    def download(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """Return an array of the device's bytes, after all that was sent to the stream before."""
        values = np.empty(tuple(shape), dtype)
        self._call("cuMemcpyDtoHAsync_v2", values.ctypes.data, address, values.nbytes, self.stream)
        self.wait()
        return values

    def wait(self) -> None:
        """Wait until all that was sent to the stream is done."""
        self._call("cuStreamSynchronize", self.stream)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return how long the device takes for what work sends to the stream, between two events."""
        first, last = self._handle("cuEventCreate", 0), self._handle("cuEventCreate", 0)
        milliseconds = c_float()
        try:
            self._call("cuEventRecord", first, self.stream)
            work()
            self._call("cuEventRecord", last, self.stream)
            self._call("cuEventSynchronize", last)
            self._call("cuEventElapsedTime", byref(milliseconds), first, last)
        finally:
            self._call("cuEventDestroy_v2", first)
            self._call("cuEventDestroy_v2", last)
        return milliseconds.value / 1000

    def captured(self, work: Callable[[], object]) -> int:
        """Return a graph, to be launched, of what work sends to the stream; nothing of it runs now.

        Raises CheckFailed where something in it cannot be captured.
        """
        self._call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL)
        failed: LlmxError | None = None
        try:
            work()
        except LlmxError as error:
            failed = error
        graph = c_void_p()
        try:
            self._call("cuStreamEndCapture", self.stream, byref(graph))
        except CheckFailed as error:
            failed = failed or error
        if failed is not None:
            raise failed
        try:
            return self._handle("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int) -> None:
        """Send a captured graph to the stream."""
        self._call("cuGraphLaunch", graph, self.stream)

    def discard(self, graph: int) -> None:
        """Let go of a captured graph."""
        self._call("cuGraphExecDestroy", graph)

    def kernel(self, ptx: str, name: str) -> int:
        """Return a kernel of a text in PTX, which the driver translates. Raises CheckFailed where it cannot."""
        module = self._handle("cuModuleLoadData", ptx.encode())
        return self._handle("cuModuleGetFunction", module, name.encode())

    def run_kernel(self, kernel: int, threads: int, arguments: Sequence[Any]) -> None:
        """Send a kernel of one block to the stream. arguments: ctypes values, as the kernel's own parameters are."""
        addresses = (c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        self._call("cuLaunchKernel", kernel, 1, 1, 1, threads, 1, 1, 0, self.stream, addresses, None)

    def _memory(self) -> tuple[int, int]:
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def _name(self, device: c_int) -> str:
        text = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", text, _NAME_BYTES, device)
        return text.value.decode(errors="replace")

    def _attribute(self, which: int, device: c_int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), which, device)
        return value.value

    def _handle(self, name: str, *arguments: Any) -> int:
        """What a call gives through its first argument, which is not among these."""
        handle = c_void_p()
        self._call(name, byref(handle), *arguments)
        assert handle.value is not None, f"{name} gave no handle"
        return handle.value

    def _call(self, name: str, *arguments: Any, needed: int | None = None) -> None:
        result = getattr(self._library, name)(*arguments)
        if result == 0:
            return
        what = f"{name} failed: {self._words(result)}"
        if result == OUT_OF_MEMORY:
            more = "" if needed is None else f", {needed} bytes were asked for"
            raise ResourceError(f"the GPU's memory is full{more}: {what}", fix="ask for a shorter context")
        raise CheckFailed(what)

    def _words(self, result: int) -> str:
        name, text = c_char_p(), c_char_p()
        self._library.cuGetErrorName(result, byref(name))
        self._library.cuGetErrorString(result, byref(text))
        parts = [part.value.decode() for part in (name, text) if part.value]
        return ": ".join(parts) or f"error {result}"
