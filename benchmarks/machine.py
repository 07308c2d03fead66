"""What a measurement ran on: the machine as `dqe_engine.doctor.machine` reads it, and its load, threads, versions and commit besides."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from dqe_engine.doctor.machine import instruction_sets, is_virtual, memory_bytes, processor_name
from dqe_engine.doctor.packages import version_of
from dqe_engine.driver_library import CUDA_DRIVER, load_library
from dqe_engine.processors import affinity, cores

__all__ = [
    "affinity",
    "available_bytes",
    "cores",
    "cuda_devices",
    "describe",
    "frequencies",
    "limit_threads",
    "load_average",
    "slug",
]
_ENVIRONMENT = ("OMP_", "MKL_", "OPENBLAS_", "GOMP_", "KMP_")
_ROOT = Path(__file__).parent.parent


def slug() -> str:
    """A folder name for results of this kind of machine: `amd-epyc-2-cores`."""
    name = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*|\b\d+-core processor\b", " ", processor_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {cores()} cores").strip("-")


def available_bytes() -> int:
    """Memory that can be taken without swapping; a large number where the system does not say."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 1 << 62


def load_average() -> list[float]:
    return [round(value, 2) for value in os.getloadavg()]


def frequencies() -> list[int]:
    """MHz of each processor of the machine at this moment; empty where the system does not say."""
    return [round(float(value)) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _read("/proc/cpuinfo"), re.MULTILINE)]


def cuda_devices() -> int:
    """How many the driver shows; asked of the driver itself, so that no library is loaded for it."""
    driver = load_library(CUDA_DRIVER)
    if driver is None:
        return 0
    count = ctypes.c_int(0)
    found: bool = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def limit_threads(threads: int) -> None:
    """Give every loaded BLAS and OpenMP pool this many threads. Call when all libraries are loaded."""
    if threads == cores():
        return  # what they take by themselves
    with contextlib.suppress(ImportError):
        from threadpoolctl import threadpool_limits

        threadpool_limits(limits=threads)


def describe(packages: tuple[str, ...]) -> dict[str, Any]:
    """The record that stands beside every result."""
    return {
        "cpu": processor_name(),
        "cores": cores(),
        "affinity": affinity(),
        "mhz": frequencies(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "caches": _caches(),
        "flags": instruction_sets(),
        "virtual": is_virtual(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)},
        "versions": {"python": platform.python_version(), "numpy": np.__version__} | {name: version_of(name) for name in packages},
        "thread_pools": _thread_pools(),
        **_git(),
    }


def _thread_pools() -> list[dict[str, Any]]:
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    wanted = ("internal_api", "version", "threading_layer", "architecture", "num_threads")
    return [{name: pool[name] for name in wanted if name in pool} for pool in threadpool_info()]


def _caches() -> dict[str, str]:
    out = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (kind := _read(entry / "type").strip()) != "Instruction":
            out[f"L{_read(entry / 'level').strip()}{'d' if kind == 'Data' else ''}"] = _read(entry / "size").strip()
    return out


def _git() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    with contextlib.suppress(OSError):
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
    return {"commit": None, "dirty": None}


def _read(path: str | Path) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace")
    return ""
