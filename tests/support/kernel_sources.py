"""What the CPU kernels' library is made of, for tests that compile it in another way than CMake (cpp_ext/CMakeLists.txt)."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
X86_TILES = {"portable": [], "avx2": _AVX2, "avx512": _AVX512, "amx": [*_AVX512, "-mamx-tile", "-mamx-int8"]}
ARM_TILES = {"portable": [], "dotprod": ["-march=armv8.2-a+dotprod"]}
"""Instruction sets: `tiles_NAME.cpp` and its flags."""
TILES = (
    X86_TILES
    if platform.machine() in ("x86_64", "AMD64")
    else ARM_TILES
    if platform.machine() in ("aarch64", "arm64")
    else {"portable": []}
)
"""Of this processor's architecture."""

KERNELS = (
    "tiles_dispatch.cpp",
    "parallel.cpp",
    "sweep.cpp",
    "sweep_finish.cpp",
    "scoring.cpp",
    "scoring_prefix.cpp",
    "screen.cpp",
    "prefix.cpp",
    "cluster.cpp",
    "lists.cpp",
)
"""All others."""


def kernel_flags(tiles: dict[str, list[str]]) -> list[str]:
    """Of `KERNELS`, which do not contract, and are told of the tiles that not every compiler has."""
    return ["-ffp-contract=off", *(flag for name, flag in {"amx": "-DDQE_AMX", "dotprod": "-DDQE_DOTPROD"}.items() if name in tiles)]


def assert_shares_no_inline_code(tiles: Path, name: str, nm: str = "nm") -> None:
    """A weak symbol compiled for a newer instruction set could be the copy that the linker keeps for everybody."""
    symbols = subprocess.run([nm, "-C", str(tiles)], check=True, capture_output=True, text=True).stdout
    kinds = {line.split(maxsplit=2)[-2:][0] if line[0] == " " else line.split(maxsplit=2)[1] for line in symbols.splitlines()}
    assert not kinds & {"W", "w", "V", "v", "u"}, symbols
    assert f"kernels_{name}" in symbols
