"""Python, operating system and processor."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from dqe_engine import __version__

from .findings import Context, Finding, Steps, Trying

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp")
"""What the zone kernels could use."""
OLDEST_PYTHON = (3, 11)


def probe(context: Context) -> Steps:
    yield Trying("Python", "install Python 3.11 or newer")
    version = platform.python_version()
    python = f"{version} ({platform.python_implementation()}), dqe-engine {__version__}"
    facts = {"python": version, "dqe_engine": __version__, "executable": sys.executable}
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("Python", "broken", f"{python}; expected {oldest} or newer", f"install Python {oldest} or newer", facts)
    else:
        yield Finding("Python", "ok", python, facts=facts)
    system, libc = f"{platform.system()} {platform.release()} {platform.machine()}", " ".join(platform.libc_ver())
    yield Finding("platform", "ok", ", ".join(filter(None, (system, libc))), facts={"system": platform.platform()})
    yield Trying("processor", "report this as a bug of dqe-doctor")
    yield _processor()


def _processor() -> Finding:
    info = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    name = model[1].strip() if model else platform.processor() or platform.machine()
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(listed[1].split()) if listed else set()
    flags = [flag for flag in _FLAGS if flag in present]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{name}, {cores} usable core{'s' if cores != 1 else ''}"
    return Finding(
        "processor", "ok", f"{found}: {' '.join(flags)}" if flags else found, facts={"model": name, "cores": cores, "flags": flags}
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
