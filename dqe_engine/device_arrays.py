"""NumPy arrays to a CUDA device and back through the driver library and DLPack, without PyTorch or CuPy.

Just what the self-check of the kernels and pooled zones need: everything is synchronous, on one device and its primary context.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .driver_library import CUDA_DRIVER, load_library
from .errors import BackendError

CUDA_DEVICE = 2  # kDLCUDA
_LEGACY_DEFAULT_STREAM = 1  # DLPack's number of the stream that the driver's synchronous copies are made on
_INT, _FLOAT = 0, 2  # kDLInt, kDLFloat


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_keep = _Deleter(lambda _: None)  # consumers tell when they are done; the memory is the array's to free
_NAME = b"dltensor"
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


class ForeignArray:
    """C-contiguous memory at an address, as DLPack's consumers take it. Must outlive them."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int] = (CUDA_DEVICE, 0)) -> None:
        self.address = address
        self._device = device
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
        code = _FLOAT if dtype.kind == "f" else _INT
        tensor = _Tensor(address, *device, len(shape), code, dtype.itemsize * 8, 1, self._shape, self._strides, 0)
        self._managed = _Managed(tensor, None, _keep)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), _NAME, None)


class CudaMemory:
    """What was uploaded, until the end of the `with` block."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._allocated: list[ctypes.c_uint64] = []
        self._arrays: list[ForeignArray] = []  # a consumer may let go of an array later than the caller does
        self._before: ctypes.c_void_p | None = None  # the caller's context

    @classmethod
    def open(cls, number: int = 0) -> CudaMemory:
        """On the device of that number, until the end of the `with` block. Raises BackendError where there is none."""
        driver = load_library(CUDA_DRIVER)
        if driver is None:
            raise BackendError(f"{CUDA_DRIVER} is not there; install the NVIDIA driver")
        memory = cls(driver)
        device, context, before = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        memory._call("cuInit", 0)
        memory._call("cuCtxGetCurrent", ctypes.byref(before))
        memory._before = before
        memory._call("cuDeviceGet", ctypes.byref(device), number)
        memory._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        memory._call("cuCtxSetCurrent", context)
        return memory

    def __enter__(self) -> CudaMemory:
        return self

    def __exit__(self, *_: object) -> None:
        while self._allocated:
            self._driver.cuMemFree_v2(self._allocated.pop())  # after a failure it fails too, and the first error is the one to tell
        if self._before is not None:
            self._driver.cuCtxSetCurrent(self._before)

    def upload(self, array: NDArray[Any]) -> ForeignArray:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(array.nbytes, 1)))  # the driver refuses to allocate 0 bytes
        self._allocated.append(address)
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        self._arrays.append(ForeignArray(address.value, array.shape, array.dtype))
        return self._arrays[-1]

    def download(self, array: Any, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """A C-contiguous array of any DLPack producer, or some `rows` of it in ascending order, as a new NumPy array."""
        on_device = int(array.__dlpack_device__()[0]) == CUDA_DEVICE
        capsule = array.__dlpack__(
            **({"stream": _LEGACY_DEFAULT_STREAM} if on_device else {})
        )  # held until the copy is made, and with it the memory
        tensor = ctypes.cast(_pointer_in(capsule, _NAME), ctypes.POINTER(_Managed)).contents.tensor
        kind = {_INT: "i", _FLOAT: "f"}[tensor.code]
        size, *rest = (tensor.shape[axis] for axis in range(tensor.ndim))
        rows = np.arange(size) if rows is None else rows
        out = np.empty((len(rows), *rest), f"{kind}{tensor.bits // 8}")
        row_bytes, base = out.itemsize * math.prod(rest), (tensor.data or 0) + tensor.byte_offset
        for run in np.split(np.arange(len(rows)), np.nonzero(np.diff(rows) != 1)[0] + 1):  # a copy for each run of consecutive rows
            if len(run):
                target, source = out.ctypes.data + int(run[0]) * row_bytes, base + int(rows[run[0]]) * row_bytes
                self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(target), ctypes.c_uint64(source), ctypes.c_size_t(len(run) * row_bytes))
        return out

    def _call(self, function: str, *arguments: Any) -> None:
        called: Callable[..., int] = getattr(self._driver, function)
        if code := called(*arguments):
            raise BackendError(f"{function}: CUDA error {code}")
