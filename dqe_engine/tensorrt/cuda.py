"""The few CUDA calls that a session makes, through NVIDIA's own bindings, each status checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import BackendError


@dataclass(frozen=True)
class Gpu:
    """The device that this process uses. `driver`: the newest CUDA version that its driver supports."""

    name: str
    compute_capability: str  # "9.0"
    driver: str  # "13.0"


class Cuda:
    """`cuda.bindings.runtime`: `cuda("cudaMalloc", size)` returns the value, or raises BackendError with CUDA's own words.

    Construction raises BackendError where the package or a device is missing: TensorRT's Runtime can crash the process
    without a device, so nothing of it is touched before this exists.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except Exception as error:  # extensions that do not fit each other raise ValueError, AttributeError and others
            reason = " ".join(str(error).split())
            raise BackendError(f"cuda.bindings cannot be imported ({reason}); pip install 'dqe-engine[tensorrt]'") from error
        self.runtime = runtime
        try:
            devices = self("cudaGetDeviceCount")
        except BackendError as error:
            raise BackendError(f"no usable CUDA device ({error}); TensorRT needs one, 'cpu' runs without") from error
        if not devices:
            raise BackendError("no CUDA device is visible; TensorRT needs one, 'cpu' runs without")

    def __call__(self, function: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(self.runtime, function)(*arguments)
        except RuntimeError as error:  # the bindings' own, where a library or a function of it cannot be found
            raise BackendError(f"{function}: {' '.join(str(error).split())}") from error
        if status != self.runtime.cudaError_t.cudaSuccess:
            # CUDA also keeps the error for whoever asks next, which may be a library that takes it for its own.
            self.runtime.cudaGetLastError()
            _, text = self.runtime.cudaGetErrorString(status)
            raise BackendError(f"{function}: {text.decode()}")
        return values[0] if values else None

    def release(self, function: str, *arguments: Any) -> None:
        """Call a function that frees or puts back. What a lost device, or a driver that is shutting down, refuses is gone anyway."""
        with contextlib.suppress(BackendError):
            self(function, *arguments)

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Inside, `device` is the calling thread's: each thread has a current device of its own, 0 until it says otherwise."""
        before = self("cudaGetDevice")
        if before == device:
            yield
            return
        self("cudaSetDevice", device)
        try:
            yield
        finally:
            self.release("cudaSetDevice", before)

    def gpu(self) -> Gpu:
        properties = self("cudaGetDeviceProperties", self("cudaGetDevice"))
        driver = self("cudaDriverGetVersion")  # 13000 is 13.0, 12090 is 12.9
        return Gpu(
            name=properties.name.partition(b"\0")[0].decode(errors="replace"),
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=f"{driver // 1000}.{driver % 1000 // 10}",
        )
