"""The compiled sweep under the address and undefined-behaviour sanitizers, and what its objects share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nanobind
import numpy as np
import pytest
from support.compiling import SOURCES, compiled
from support.kernel_sources import KERNELS, TILES, assert_shares_no_inline_code, kernel_flags
from support.thorough import cases

import dqe_engine

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_object(source: str, factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    return compiled(factory, ["g++", "-std=c++20", "-w", "-c", *flags, SOURCES / source], Path(source).stem + ".o")


@pytest.mark.slow
def test_the_sweep_is_clean_under_sanitizers(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sanitize = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = [compile_object(f"tiles_{name}.cpp", tmp_path_factory, [*sanitize, *TILES[name]]) for name in TILES]
    flags = [*sanitize, *kernel_flags(TILES)]
    objects += [compile_object(source, tmp_path_factory, flags) for source in (*KERNELS, "tests/sweep_test.cpp")]
    program = tmp_path / "sweep_test"
    subprocess.run(["g++", *sanitize, "-o", str(program), *map(str, objects), "-lpthread"], check=True)
    result = subprocess.run([program, "300"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert "portable: 300 requests" in result.stdout


def build_bindings(folder: Path, factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    """The extension, with these flags throughout, in a copy of the package made of links."""
    nanobind_root = Path(nanobind.include_dir()).parent
    include = [f"-I{path}" for path in (nanobind.include_dir(), nanobind_root / "ext/robin_map/include", sysconfig.get_path("include"))]
    flags = [*flags, "-fPIC", "-fvisibility=hidden"]
    objects = [compile_object(f"tiles_{name}.cpp", factory, [*flags, *TILES[name]]) for name in TILES]
    bindings = ("bindings.cpp", "bindings_build.cpp", nanobind_root / "src/nb_combined.cpp")
    objects += [compile_object(source, factory, [*flags, *kernel_flags(TILES)]) for source in KERNELS]
    objects += [compile_object(str(source), factory, [*flags, *include, "-fno-strict-aliasing"]) for source in bindings]
    package = folder / "package" / "dqe_engine"
    package.mkdir(parents=True)
    for file in Path(dqe_engine.__file__).parent.iterdir():
        if not file.name.startswith(("_kernels.", "__pycache__")):
            (package / file.name).symlink_to(file)
    target = package / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *flags, "-o", str(target), *map(str, objects), "-lpthread"], check=True)
    return package.parent


@pytest.mark.slow
def test_the_bindings_are_clean_under_the_thread_sanitizer(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`DQE_TSAN_SECONDS`: how long eight threads call them."""
    found = subprocess.run(["gcc", "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file() or shutil.which("setarch") is None:
        pytest.skip("no libtsan or no setarch")
    package = build_bindings(tmp_path, tmp_path_factory, ["-O1", "-g1", "-fsanitize=thread"])
    environment = os.environ | {
        "LD_PRELOAD": found, "TSAN_OPTIONS": "exitcode=66 history_size=4", "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (package, Path(__file__).parents[1], Path(np.__file__).parents[1]))),
    }  # fmt: skip
    # -R: the sanitizer does not bear addresses as random as newer kernels make them. -S: no finder of an editable install.
    command = ["setarch", "-R", sys.executable, "-S", "-m", "support.kernel_threads", os.environ.get("DQE_TSAN_SECONDS", str(cases(4, 10)))]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)  # not our own package
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert str(package) in result.stdout
    assert int(result.stdout.split()[-1]) > 50


@pytest.mark.parametrize(("sanitizer", "task"), [("thread", "callers"), ("undefined", "forks"), ("address,undefined", "held")])
def test_the_pool_of_threads_is_clean(tmp_path_factory: pytest.TempPathFactory, sanitizer: str, task: str) -> None:
    """Many callers at once, parts that fail, and children of a process whose pool is at work: at any moment (`forks`; no sanitizer that has
    locks of its own bears it), and while its threads are inside their parts (`held`)."""
    sources = [SOURCES / name for name in ("parallel.cpp", "tests/parallel_test.cpp")]
    command = ["g++", "-std=c++20", "-O1", "-g1", f"-fsanitize={sanitizer}", *sources, "-lpthread"]
    program = compiled(tmp_path_factory, command, "parallel_test")
    result = subprocess.run([program, task], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, "good\n"), result.stdout + result.stderr[-4000:]


@pytest.mark.parametrize("name", TILES)
def test_tile_kernels_share_no_inline_code(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = compile_object(f"tiles_{name}.cpp", tmp_path_factory, ["-O3", "-ffp-contract=fast", *TILES[name]])
    assert_shares_no_inline_code(target, name)
