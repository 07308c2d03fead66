"""Libraries that come with an operating system or a driver, and may not be there."""

from __future__ import annotations

import ctypes
from typing import Any

CUDA_DRIVER = "libcuda.so.1"


def load_library(name: str) -> Any:
    """The shared library, None where there is none."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
