"""Launches of CUDA kernels from several threads: platform.hpp on a runtime that is a fake."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
from support.compiling import compiled

TESTS = Path(__file__).resolve().parents[2] / "cpp_ext" / "cuda" / "tests"


def test_threads_do_not_lower_shared_memory_for_each_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", f"-I{TESTS / 'fake_runtime'}"]
    library = ctypes.CDLL(str(compiled(tmp_path_factory, [compiler, *flags, str(TESTS / "host_launch.cpp")], "host_launch.so")))
    sets = ctypes.c_int()
    assert library.refused_launches(8, 10, ctypes.byref(sets)) == 0
    assert sets.value == 4  # two kernels on two devices
