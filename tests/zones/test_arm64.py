"""The kernels for arm64, cross-compiled and emulated, on machines that are none.

Debian and Ubuntu have what it takes: `apt install g++-aarch64-linux-gnu qemu-user-static`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.compiling import SOURCES, compiled
from support.kernel_sources import ARM_TILES, KERNELS, assert_shares_no_inline_code, kernel_flags

COMPILER, NM = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-nm"
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None or EMULATOR is None, reason=f"no {COMPILER}, or no qemu-aarch64"),
]


def compile_object(source: str, factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-c", *flags, SOURCES / source]
    return compiled(factory, command, Path(source).stem + ".o")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: compile_object(f"tiles_{name}.cpp", tmp_path_factory, ["-O3", "-ffp-contract=fast", *flags])
        for name, flags in ARM_TILES.items()
    }


@pytest.mark.parametrize(("processor", "sets"), [("cortex-a72", ["portable"]), ("cortex-a76", ["dotprod", "portable"])])
def test_the_sweep_equals_plain_loops(
    processor: str, sets: list[str], tiles: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With the instruction sets that this processor has."""
    flags = ["-O1", *kernel_flags(ARM_TILES)]
    objects = [*tiles.values(), *(compile_object(name, tmp_path_factory, flags) for name in KERNELS)]
    objects.append(compiled(tmp_path_factory, [COMPILER, "-std=c++20", "-w", "-c", *flags, SOURCES / "tests/sweep_test.cpp"], "test.o"))
    program = tmp_path / "sweep_test"
    subprocess.run([COMPILER, "-static", "-o", str(program), *map(str, objects)], check=True)
    result = subprocess.run([str(EMULATOR), "-cpu", processor, str(program), "100"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.splitlines()) == (0, [f"{name}: 100 requests" for name in sets]), result.stderr[-4000:]


@pytest.mark.parametrize("name", ARM_TILES)
def test_tile_kernels_share_no_inline_code(name: str, tiles: dict[str, Path]) -> None:
    assert_shares_no_inline_code(tiles[name], name, NM)
