"""The module that Python imports, built on the emulation of a device. The arrays it takes for a device's lie in host memory."""

from __future__ import annotations

import ctypes
import math
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.compiling import compiled
from support.emulated_cuda import CUDA, loaded


class Tensor(ctypes.Structure):
    """DLManagedTensor of DLPack 0.x."""

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
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
open_capsule = ctypes.pythonapi.PyCapsule_GetPointer
open_capsule.restype, open_capsule.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class OnDevice:
    """A NumPy array that DLPack says lies on CUDA device 0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.sizes = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.steps = (ctypes.c_int64 * array.ndim)(*(step // array.itemsize for step in array.strides))
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        self.tensor = Tensor(
            *(array.ctypes.data, 2, 0, array.ndim, code, array.itemsize * 8, 1, self.sizes, self.steps, 0, None, None),
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int) -> Any:
        return new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)


def revealed(array: Any, stream: int | None = 1) -> np.ndarray | None:
    if array is None:
        return None
    assert array.__dlpack_device__() == (2, 0)
    capsule = array.__dlpack__(stream=stream, max_version=(1, 0))
    tensor = Tensor.from_address(open_capsule(capsule, b"dltensor"))
    assert (tensor.device_type, tensor.device_id, tensor.lanes) == (2, 0, 1)
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    dtype = np.dtype({0: "i", 2: "f"}[tensor.code] + str(tensor.bits // 8))
    raw = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(tensor.data)
    assert array.shape == shape
    return np.frombuffer(raw, dtype).reshape(shape).copy()


def built(factory: pytest.TempPathFactory) -> Any:
    nanobind = pytest.importorskip("nanobind", reason="the adapter needs nanobind's headers")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    root = Path(nanobind.__file__).parent
    includes = [sysconfig.get_path("include"), root / "include", root / "ext" / "robin_map" / "include", CUDA]
    command = [
        compiler, "-std=c++20", "-O0", "-ffp-contract=off", "-fvisibility=hidden", "-shared", "-fPIC", "-fno-strict-aliasing",
        *(f"-I{include}" for include in includes), str(CUDA / "tests" / "host_module.cpp"), str(root / "src" / "nb_combined.cpp"),
    ]  # fmt: skip
    name = f"_kernels_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    return loaded(compiled(factory, command, name))
