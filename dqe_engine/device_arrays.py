"""NumPy arrays to a CUDA device and back through the driver library and DLPack, without PyTorch or CuPy.

Everything is synchronous, and on the primary context of one device.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .driver_library import CUDA_DRIVER, load_library
from .errors import BackendError

CPU_DEVICE, CUDA_DEVICE = 1, 2  # kDLCPU, kDLCUDA
_LEGACY_DEFAULT_STREAM = 1  # DLPack's number of the stream that the driver's synchronous copies are made on
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # kDLInt, kDLUInt, kDLFloat, kDLBool, by the kind of a NumPy dtype


class Tensor(ctypes.Structure):
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

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in range(self.ndim))

    @property
    def dtype(self) -> np.dtype[Any]:
        kind = next(kind for kind, code in _CODES.items() if code == self.code)
        return np.dtype(f"{kind}{self.bits // 8}")


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))


_keep = _Deleter(lambda _: None)  # consumers tell when they are done; the memory is the array's to free
_NAME = b"dltensor"
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", ctypes.pythonapi))
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))


def tensor_in(capsule: Any) -> Tensor:
    """What a producer's `__dlpack__` gave, without a version (DLPack 0.x). Its memory is there as long as the capsule is."""
    tensor: Tensor = ctypes.cast(_pointer_in(capsule, _NAME), ctypes.POINTER(_Managed)).contents.tensor
    return tensor


class ForeignArray:
    """C-contiguous memory at an address, as DLPack's consumers take it. Must outlive them.

    device: DLPack's type of the device and its number. owner: what the memory belongs to, kept as long as this array or a row of it is.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int] = (CUDA_DEVICE, 0), owner: object = None
    ) -> None:
        self.address, self.shape, self.dtype, self.device, self.owner = address, shape, dtype, device, owner
        self.nbytes = dtype.itemsize * math.prod(shape)
        self._sizes = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))(*(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
        tensor = Tensor(address, *device, len(shape), _CODES[dtype.kind], dtype.itemsize * 8, 1, self._sizes, self._strides, 0)
        self._managed = _Managed(tensor, None, _keep)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), _NAME, None)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[ForeignArray]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> ForeignArray:
        """A view of one row, counted from 0."""
        start = self.address + row * (self.nbytes // len(self))
        return ForeignArray(start, self.shape[1:], self.dtype, self.device, owner=self)


class CudaMemory:
    """What was uploaded, until the end of the `with` block; what was `placed`, as long as somebody holds it."""

    def __init__(self, driver: Any, number: int = 0) -> None:
        self._driver = driver
        self._number = number
        self._allocated: list[ctypes.c_uint64] = []
        self._arrays: list[ForeignArray] = []  # a consumer may let go of an array later than the caller does
        self._before: ctypes.c_void_p | None = None  # the caller's context

    @classmethod
    def open(cls, number: int = 0) -> CudaMemory:
        """On the device of that number, until the end of the `with` block. Raises BackendError where there is none."""
        driver = load_library(CUDA_DRIVER)
        if driver is None:
            raise BackendError(f"{CUDA_DRIVER} cannot be loaded; install the NVIDIA driver")
        memory = cls(driver, number)
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
        address = self._allocate(array.nbytes)
        self._allocated.append(address)
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        self._arrays.append(ForeignArray(address.value, array.shape, array.dtype, (CUDA_DEVICE, self._number)))
        return self._arrays[-1]

    def placed(self, parts: Sequence[NDArray[Any]]) -> ForeignArray:
        """One array of C-contiguous parts that agree in all but their length. Its memory is freed with the last reference to it."""
        size = sum(part.nbytes for part in parts)
        try:
            address = self._allocate(size)
        except BackendError as error:
            raise BackendError(
                f"CUDA device {self._number} has no room for {size / 2**20:,.0f} MiB ({error}); free memory there, or choose another device"
            ) from error
        array = ForeignArray(address.value, (sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype, (CUDA_DEVICE, self._number))
        weakref.finalize(array, _free, self._number, address).atexit = False  # the end of the process frees it
        starts = accumulate((part.nbytes for part in parts), initial=address.value)
        self.write([(start, part.ctypes.data, part.nbytes) for start, part in zip(starts, parts, strict=False)])
        return array

    def write(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Make copies, each a target and a source, on the device or on the host, and a number of bytes."""
        for target, source, size in copies:
            self._call("cuMemcpy", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size))
        self._call("cuStreamSynchronize", ctypes.c_void_p(_LEGACY_DEFAULT_STREAM))  # copies within a device are not waited for otherwise

    def download(self, array: Any, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """A C-contiguous array of any DLPack producer, or some `rows` of it in ascending order, as a new NumPy array."""
        on_device = int(array.__dlpack_device__()[0]) == CUDA_DEVICE
        capsule = array.__dlpack__(
            **({"stream": _LEGACY_DEFAULT_STREAM} if on_device else {})
        )  # held until the copy is made, and with it the memory
        tensor = tensor_in(capsule)
        size, *rest = tensor.sizes
        rows = np.arange(size) if rows is None else rows
        out = np.empty((len(rows), *rest), tensor.dtype)
        row_bytes, base = out.itemsize * math.prod(rest), (tensor.data or 0) + tensor.byte_offset
        for run in np.split(np.arange(len(rows)), np.nonzero(np.diff(rows) != 1)[0] + 1):  # a copy for each run of consecutive rows
            if len(run):
                target, source = out.ctypes.data + int(run[0]) * row_bytes, base + int(rows[run[0]]) * row_bytes
                self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(target), ctypes.c_uint64(source), ctypes.c_size_t(len(run) * row_bytes))
        return out

    def _allocate(self, size: int) -> ctypes.c_uint64:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))  # the driver refuses to allocate 0 bytes
        return address

    def _call(self, function: str, *arguments: Any) -> None:
        called: Callable[..., int] = getattr(self._driver, function)
        if code := called(*arguments):
            raise BackendError(f"{function}: CUDA error {code}")


def _free(number: int, address: ctypes.c_uint64) -> None:
    with suppress(BackendError), CudaMemory.open(number) as memory:  # a device that is lost has lost its memory, too
        memory._allocated.append(address)
