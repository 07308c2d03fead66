"""What a report says of the machine it was made on."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor_name() -> str:
    """`AMD EPYC 7B13`; the architecture where the system does not say more."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Those of `packages` that are installed: onnxruntime, for one, has another name where it comes with CUDA."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
