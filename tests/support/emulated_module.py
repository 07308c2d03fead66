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

from dqe_engine.device_arrays import ForeignArray, tensor_in


class OnDevice(ForeignArray):
    """A C-contiguous NumPy array that DLPack says lies on CUDA device 0."""

    def __init__(self, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        super().__init__(array.ctypes.data, array.shape, array.dtype, owner=array)

    def __dlpack__(self, *, stream: int) -> Any:
        return super().__dlpack__()


def revealed(array: Any, stream: int | None = 1) -> np.ndarray | None:
    if array is None:
        return None
    assert array.__dlpack_device__() == (2, 0)
    capsule = array.__dlpack__(stream=stream, max_version=(1, 0))
    tensor = tensor_in(capsule)
    assert (tensor.device_type, tensor.device_id, tensor.lanes) == (2, 0, 1)
    assert array.shape == tensor.sizes
    raw = (ctypes.c_uint8 * (math.prod(tensor.sizes) * tensor.dtype.itemsize)).from_address(tensor.data)
    return np.frombuffer(raw, tensor.dtype).reshape(tensor.sizes).copy()


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
