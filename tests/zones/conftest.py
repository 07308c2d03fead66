"""The CUDA kernels on an emulation of the device, as a library and as the module that Python imports."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from support import emulated_module
from support.emulated_cuda import emulation


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulation(tmp_path_factory)


@pytest.fixture(scope="module")
def built_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulated_module.built(tmp_path_factory)
