"""`cuda.bindings.runtime` without a GPU: device memory is host memory, and a stream does its work when it is synchronised.

As strict as the real one where a mistake would show there as a crash: addresses outside allocations, double frees, and
synchronising while a stream is captured are errors.
"""
# ruff: noqa: N801, N815

from __future__ import annotations

import ctypes
import enum
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess


class FakeCuda:
    """Devices of one kind. `fail[function]` makes that function return the status; `calls` lists what was called. `last_error` is what CUDA
    keeps for whoever asks next. Each thread has a current device; streams and memory belong to the one they were made on."""

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamNonBlocking = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, 1

    def __init__(self, capability: tuple[int, int] = (9, 0), devices: int = 1) -> None:
        self.capability, self.devices = capability, devices
        self.fail: dict[str, cudaError_t] = {}
        self.calls: list[str] = []
        self.allocated: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capturing = 0  # the stream, 0 for none
        self.invalidated = False
        self.last_error = OK
        self._thread = threading.local()
        self._device_of: dict[int, int] = {}  # streams
        self._next = 1000

    @property
    def device(self) -> int:
        """The calling thread's."""
        return getattr(self._thread, "device", 0)

    def install(self, patch: pytest.MonkeyPatch) -> FakeCuda:
        runtime: Any = types.ModuleType("cuda.bindings.runtime")
        runtime.__getattr__ = self._function
        bindings: Any = types.ModuleType("cuda.bindings")
        bindings.runtime = runtime
        for name, module in (("cuda", types.ModuleType("cuda")), ("cuda.bindings", bindings), ("cuda.bindings.runtime", runtime)):
            patch.setitem(sys.modules, name, module)
        return self

    def _function(self, name: str) -> Any:
        value = getattr(self, name)
        if not callable(value) or isinstance(value, type) or name == "cudaGetErrorString":
            return value

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            results = (self.fail[name], None) if name in self.fail else value(*arguments)
            if results[0] != OK and name != "cudaGetLastError":
                self.last_error = results[0]
            return results

        return call

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        assert self._device_of[stream] == self.device, f"a stream of device {self._device_of[stream]}, from a thread on {self.device}"
        self.streams[stream].append(work)

    def owns(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + block.nbytes for start, block in self.allocated.items())

    def cudaGetErrorString(self, status: cudaError_t) -> tuple[Any, bytes]:
        return OK, {2: b"out of memory", 100: b"no CUDA-capable device is detected"}.get(int(status), status.name.encode())

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (OK, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, None)

    def cudaGetLastError(self) -> tuple[Any]:
        found, self.last_error = self.last_error, OK
        return (OK,) if found == OK else (found,)

    def cudaGetDevice(self) -> tuple[Any, int]:
        return OK, self.device

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        if not 0 <= device < self.devices:
            return (cudaError_t.cudaErrorInvalidValue,)
        self._thread.device = device
        return (OK,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        major, minor = self.capability
        return OK, types.SimpleNamespace(name=b"Fake GPU\0\0", major=major, minor=minor)

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return OK, 13010

    def cudaMalloc(self, size: int) -> tuple[Any, Any]:
        block = np.full(size, 0xAB, np.uint8)  # device memory is not zeroed
        self.allocated[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cudaFree(self, address: int) -> tuple[Any]:
        return (OK,) if self.allocated.pop(address, None) is not None else (cudaError_t.cudaErrorInvalidValue,)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Any]:
        if not self.owns(address, size):
            return (cudaError_t.cudaErrorInvalidValue,)
        self.submit(stream, lambda: ctypes.memset(address, value, size) and None)
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[Any]:
        device = target if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else source
        if not self.owns(device, size):
            return (cudaError_t.cudaErrorIllegalAddress,)
        self.submit(stream, lambda: ctypes.memmove(target, source, size) and None)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        stream = self._handle()
        self.streams[stream], self._device_of[stream] = [], self.device
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        return (OK,) if self.streams.pop(stream, None) is not None else (cudaError_t.cudaErrorInvalidValue,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        if self.capturing:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: cudaStreamCaptureMode) -> tuple[Any]:
        assert not self.streams[stream], "work that was enqueued before would be recorded here"
        self.capturing, self.invalidated = stream, False
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, Any]:
        self.capturing, recorded = 0, self.streams[stream]
        self.streams[stream] = []
        if self.invalidated:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        graph = self._handle()
        self.graphs[graph] = recorded
        return OK, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        executable = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return OK, executable

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Any]:
        for step in self.graphs[executable]:
            self.submit(stream, step)
        return (OK,)

    def cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Any]:
        del self.graphs[executable]
        return (OK,)
