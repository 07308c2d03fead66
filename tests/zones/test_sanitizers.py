"""The compiled kernels under the address, undefined-behaviour and thread sanitizers, and what their objects share."""

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

ADDRESS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Small work is shared out, too. What a module needs as well, so that its objects are these.
THREAD = ["-O1", "-g1", "-fsanitize=thread", "-DDQE_WORK_PER_THREAD=4096", "-fPIC", "-fvisibility=hidden"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_object(source: str, factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    return compiled(factory, ["g++", "-std=c++20", "-w", "-c", *flags, SOURCES / source], Path(source).stem + ".o")


@pytest.fixture(scope="module")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What starts a program built with it: older ones do not bear addresses as random as newer kernels make them."""
    folder = tmp_path_factory.mktemp("thread_sanitizer")
    (folder / "empty.cpp").write_text("int main() {}")
    build = ["g++", "-fsanitize=thread", str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    if subprocess.run(build, capture_output=True).returncode:
        pytest.skip("this compiler has no thread sanitizer")
    starts = [["setarch", "-R"], []] if shutil.which("setarch") else [[]]
    for start in starts:
        result = subprocess.run([*start, str(folder / "empty")], capture_output=True, text=True)
        if result.returncode == 0:
            return start
    pytest.skip(f"the thread sanitizer does not run here: {result.stderr.strip()[-200:]}")


def kernel_objects(factory: pytest.TempPathFactory, flags: list[str]) -> list[Path]:
    """All of the kernels, without their bindings."""
    objects = [compile_object(f"tiles_{name}.cpp", factory, [*flags, *TILES[name]]) for name in TILES]
    return objects + [compile_object(source, factory, [*flags, *kernel_flags(TILES)]) for source in KERNELS]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "requests", "callers"), [(ADDRESS, 300, 1), (THREAD, cases(30, 3000), 3)], ids=["address", "thread"])
def test_the_sweep_is_clean_under_sanitizers(
    flags: list[str],
    requests: int,
    callers: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    before = request.getfixturevalue("thread_sanitizer") if flags is THREAD else []
    objects = [*kernel_objects(tmp_path_factory, flags), compile_object("tests/sweep_test.cpp", tmp_path_factory, flags)]
    program = tmp_path / "sweep_test"
    subprocess.run(["g++", *flags, "-o", str(program), *map(str, objects), "-lpthread"], check=True)
    result = subprocess.run([*before, program, str(requests), str(callers)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.count(f"portable: {requests} requests") == callers


def build_bindings(folder: Path, factory: pytest.TempPathFactory, flags: list[str]) -> Path:
    """The extension, with these flags throughout (-fPIC among them), in a copy of the package made of links."""
    nanobind_root = Path(nanobind.include_dir()).parent
    include = [f"-I{path}" for path in (nanobind.include_dir(), nanobind_root / "ext/robin_map/include", sysconfig.get_path("include"))]
    objects = kernel_objects(factory, flags)
    bindings = ("bindings.cpp", "bindings_build.cpp", nanobind_root / "src/nb_combined.cpp")
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
def test_the_bindings_are_clean_under_the_thread_sanitizer(
    thread_sanitizer: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], check=True, capture_output=True, text=True).stdout.strip()
    package = build_bindings(tmp_path, tmp_path_factory, THREAD)
    environment = os.environ | {
        "LD_PRELOAD": found, "TSAN_OPTIONS": "exitcode=66 history_size=4", "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (package, Path(__file__).parents[1], Path(np.__file__).parents[1]))),
    }  # fmt: skip
    # -S: no finder of an editable install.
    command = [*thread_sanitizer, sys.executable, "-S", "-m", "support.kernel_threads", str(cases(5, 200))]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)  # not our own package
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert str(package) in result.stdout


@pytest.mark.parametrize(("sanitizer", "task"), [("thread", "callers"), ("undefined", "forks"), ("address,undefined", "held")])
def test_the_pool_of_threads_is_clean(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sanitizer: str, task: str
) -> None:
    """Many callers at once, parts that fail, and children of a process whose pool is at work: at any moment (`forks`; no sanitizer that has
    locks of its own bears it), and while its threads are inside their parts (`held`)."""
    before = request.getfixturevalue("thread_sanitizer") if sanitizer == "thread" else []
    sources = [SOURCES / name for name in ("parallel.cpp", "tests/parallel_test.cpp")]
    command = ["g++", "-std=c++20", "-O1", "-g1", f"-fsanitize={sanitizer}", *sources, "-lpthread"]
    program = compiled(tmp_path_factory, command, "parallel_test")
    result = subprocess.run([*before, program, task], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, "good\n"), result.stdout + result.stderr[-4000:]


@pytest.mark.parametrize("name", TILES)
def test_tile_kernels_share_no_inline_code(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = compile_object(f"tiles_{name}.cpp", tmp_path_factory, ["-O3", "-ffp-contract=fast", *TILES[name]])
    assert_shares_no_inline_code(target, name)
