"""What a machine is: processor, instruction sets, cores, memory, system. Read from files that the system keeps; nothing is imported for it.

The only place that knows where a system writes these: reports, benchmarks and the tests' header ask here.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

from ..processors import control_groups, read_text

INSTRUCTION_SETS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
}
"""Those that decide which kernels run and how they round: Linux's names, and ours for them."""
_APPLE = {"AdvSIMD": "neon", "FEAT_FP16": "fp16", "FEAT_DotProd": "dotprod", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
"""The same for macOS's `hw.optional.arm.*`."""
_CPUINFO = Path("/proc/cpuinfo")
_NO_LIMIT = 1 << 60
"""What the first version of control groups says for none is a little less than 2**63."""


def processor_name() -> str:
    """`AMD EPYC 7B13`; the architecture where the system does not say more."""
    if found := _field("model name") or _sysctl("machdep.cpu.brand_string"):
        return found
    if part := _field("CPU part"):  # Linux on arm64 gives numbers alone
        return f"{platform.machine()}, implementer {_field('CPU implementer')}, part {part}"
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that this processor has, by our names; empty where the system does not say."""
    flags = _flags()
    found = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    return found or [name for key, name in _APPLE.items() if _sysctl(f"hw.optional.arm.{key}") == "1"]


def is_virtual() -> bool | None:
    """Whether a hypervisor is underneath; None where the system does not say (arm64)."""
    flags = _flags()
    return "hypervisor" in flags if platform.machine() in ("x86_64", "AMD64") and flags else None


def memory_bytes() -> int | None:
    """What the machine has; None where the system does not say."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else int(_sysctl("hw.memsize") or 0) or None


def memory_limit() -> int | None:
    """What the container may take; None for no limit."""
    limits = [read_text(group / name).strip() for group in control_groups("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    return min((int(limit) for limit in limits if limit.isdecimal() and int(limit) < _NO_LIMIT), default=None)


def system() -> str:
    """`Linux 6.8.0 x86_64, glibc 2.39`."""
    return ", ".join(filter(None, (f"{platform.system()} {platform.release()} {platform.machine()}", " ".join(platform.libc_ver()))))


def _flags() -> set[str]:
    return set((_field("flags") or _field("Features") or "").split())


def _field(name: str) -> str | None:
    """Of the first processor."""
    found = re.search(rf"^{name}\s*:\s*(.+)$", read_text(_CPUINFO), re.MULTILINE)
    return found[1].strip() if found else None


def _sysctl(name: str) -> str | None:
    if sys.platform != "darwin":
        return None
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
