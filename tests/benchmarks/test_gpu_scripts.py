"""The scripts that run on a lent GPU, rehearsed with fakes for its tools and for Python: what one step does costs no other its results."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ZONES = (
    "wheels",
    "build",
    "requests",
    "measure",
    "timeline",
    "profile",
    "test",
    "memcheck",
    "racecheck",
    "synccheck",
    "initcheck",
    "faiss",
)
GRAPHS = ("unpack", "small", "query", "vision", "query_compiled", "vision_compiled")
PYTHON = r"""#!/usr/bin/env bash
out() { while (($#)); do if [[ $1 == --out ]]; then echo "$2"; fi; shift; done; }
case "$*" in
    *gpu_requests*) what=requests ;;
    *gpu_chain*) what=chain ;;
    *gpu_timeline*) what=timeline ;;
    *--once*) what=once ;;
    *--faiss*) what=faiss ;;
    *"gpu_zones --out"*) what=measure ;;
    *ncu_summary*) what=summary ;;
    *"-m pytest"*) what=test ;;
    *"gpu_graphs measure"*small*) what=small ;;
    *"gpu_graphs measure"*query*) what=query ;;
    *"gpu_graphs measure"*vision*) what=vision ;;
    *"gpu_graphs compile"*) what=compiled ;;
    *) what=other ;;
esac
if [[ $what == "${FAULTY:-}" ]]; then
    case $FAULT in
        hang) trap '' TERM; echo before the hang; while :; do sleep 1; done ;;
        crash) echo before the crash; kill -SEGV $$ ;;
        wrong) echo "DIFFERS in ids"; exit 1 ;;
    esac
fi
case $what in
    measure | faiss) echo "figures of $what"; echo '{}' >"$(out "$@")/gpu_zones.json" ;;
    small | query | vision | compiled | chain) echo "figures of $what"; echo "$what" >>"$(out "$@")/gpu_graphs.json" ;;
    *) echo "figures of $what" ;;
esac
"""
CMAKE = """#!/usr/bin/env bash
mkdir -p build/gpu/cuda dqe_engine && touch build/gpu/_kernels.so build/gpu/cuda/_kernels_cuda.so && echo built "$@"
"""
RUNS_THE_REST = """#!/usr/bin/env bash
while [[ $1 != *python* ]]; do shift; done
exec "$@"
"""
TOOLS = {
    "python3": PYTHON,
    "cmake": CMAKE,
    "ncu": RUNS_THE_REST,
    "compute-sanitizer": RUNS_THE_REST,
    "nvidia-smi": "#!/bin/sh\necho 9.0\n",
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with the scripts, as a machine gets them, and tools that only look like a GPU's."""
    (tmp_path / "benchmarks").mkdir()
    for script in ("gpu_steps.sh", "gpu_zones.sh", "gpu_graphs.sh"):
        shutil.copy(ROOT / "benchmarks" / script, tmp_path / "benchmarks")
    for folder in ("tools", "tmp", "out", ".gpu", "carried"):
        (tmp_path / folder).mkdir()
    for name, text in TOOLS.items():
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)
    for archive in (".gpu/faiss_1.tar.xz", "carried/ort_gpu.tar.xz"):
        tarfile.open(tmp_path / archive, "w:xz").close()
    return tmp_path


def rehearse(machine: Path, script: str, **environment: str) -> dict[str, str]:
    """Exit code of each step, by its name, as the summary has them; and the summary whole, under ""."""
    started = time.monotonic()
    tools = machine / "tools"
    given = {"PATH": f"{tools}:/usr/bin:/bin", "CUDA_BIN": str(tools), "TMPDIR": str(machine / "tmp"), "OUT": str(machine / "out")}
    command = [str(machine / "benchmarks" / script)] + ["carried"] * (script == "gpu_graphs.sh")
    done = subprocess.run(
        command, cwd=machine, env={**os.environ, **given, "HURRY": "20", **environment}, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(f"{script} {environment}: {time.monotonic() - started:.1f} s")
    assert len(list((machine / "out").iterdir())) <= 5
    summary = (machine / "out" / "summary.txt").read_text()
    lines = [line.split() for line in summary.splitlines() if line.startswith("== ")]
    ran = {line[1].rstrip(":"): line[4] for line in lines if line[2] == "exit"}
    if ran:
        with tarfile.open(machine / "out" / "logs.tar.gz") as logs:
            assert {f"{name}.log" for name in ran} == set(logs.getnames())
    return ran | {"": summary}


def others_ran(found: dict[str, str], steps: tuple[str, ...], *faulty: str) -> bool:
    return {name for name in steps if found.get(name) != "0"} == set(faulty)


def test_every_step_of_the_zones_leaves_its_results(machine: Path) -> None:
    found = rehearse(machine, "gpu_zones.sh")
    assert others_ran(found, ZONES)
    assert {path.name for path in (machine / "out").iterdir()} == {
        "gpu_zones.json", "gpu_zones_faiss.json", "ncu.csv", "summary.txt", "logs.tar.gz",
    }  # fmt: skip
    assert "figures of measure" in found[""]


def test_graphs_and_search_together_run_for_each_model_that_was_carried(machine: Path) -> None:
    (machine / ".gpu" / "faiss_1.tar.xz").rename(machine / ".gpu" / "ort_gpu_1.tar.xz")
    for model in ("full", "small"):
        (machine / ".gpu" / "graphs" / model).mkdir(parents=True)
    assert others_ran(rehearse(machine, "gpu_zones.sh"), ("chain", *ZONES[:-1]))
    assert (machine / "out" / "gpu_graphs.json").read_text().split() == ["chain", "chain"]


def test_every_step_of_the_graphs_leaves_its_results(machine: Path) -> None:
    assert others_ran(rehearse(machine, "gpu_graphs.sh"), GRAPHS)
    assert {path.name for path in (machine / "out").iterdir()} == {"gpu_graphs.json", "summary.txt", "logs.tar.gz"}
    assert (machine / "out" / "gpu_graphs.json").read_text().split() == ["small", "query", "vision", "compiled", "compiled"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "step", "steps"),
    [("gpu_zones.sh", "measure", ZONES), ("gpu_zones.sh", "test", ZONES), ("gpu_graphs.sh", "small", GRAPHS)],
)
def test_a_step_that_hangs_and_ignores_being_told_to_end(machine: Path, script: str, step: str, steps: tuple[str, ...]) -> None:
    found = rehearse(machine, script, FAULTY=step, FAULT="hang")
    assert others_ran(found, steps, step)
    assert "before the hang" in found[""]


@pytest.mark.parametrize("fault", ["crash", "wrong"])
def test_a_crash_or_a_wrong_answer_in_the_zones(machine: Path, fault: str) -> None:
    found = rehearse(machine, "gpu_zones.sh", FAULTY="requests", FAULT=fault)
    assert others_ran(found, ZONES, "requests", "memcheck", "racecheck", "synccheck", "initcheck")
    assert ("before the crash" if fault == "crash" else "DIFFERS in ids") in found[""]


@pytest.mark.parametrize("step", ["small", "vision"])
def test_a_crash_in_the_graphs(machine: Path, step: str) -> None:
    assert others_ran(rehearse(machine, "gpu_graphs.sh", FAULTY=step, FAULT="crash"), GRAPHS, step)


@pytest.mark.parametrize(
    ("tool", "steps"),
    [
        ("ncu", ["profile"]),
        ("cmake", ["build"]),
        ("compute-sanitizer", ["memcheck", "racecheck", "synccheck", "initcheck"]),
        ("nvidia-smi", []),
    ],
)
def test_a_missing_tool(machine: Path, tool: str, steps: list[str]) -> None:
    if shutil.which(tool, path="/usr/bin:/bin"):
        (machine / "tools" / tool).write_text("#!/bin/sh\nexit 127\n")
    else:
        (machine / "tools" / tool).unlink()
    assert others_ran(rehearse(machine, "gpu_zones.sh"), ZONES, *steps)


def test_a_full_disk(machine: Path) -> None:
    (machine / "out" / "ncu.csv").symlink_to("/dev/full")
    (machine / "out" / "gpu_zones.json").symlink_to("/dev/full")
    found = rehearse(machine, "gpu_zones.sh")
    assert others_ran(found, ZONES, "measure", "profile")
    assert "figures of measure" in found[""]


def test_an_archive_that_cannot_be_unpacked(machine: Path) -> None:
    (machine / "carried" / "ort_gpu.tar.xz").write_bytes(b"cut short")
    (machine / ".gpu" / "faiss_1.tar.xz").write_bytes(b"cut short")
    assert others_ran(rehearse(machine, "gpu_graphs.sh"), GRAPHS, "unpack")
    assert others_ran(rehearse(machine, "gpu_zones.sh"), ZONES, "faiss")


def test_what_no_time_is_left_for_is_said(machine: Path) -> None:
    found = rehearse(machine, "gpu_zones.sh", BUDGET="9")
    assert found.keys() == {""}
    assert "== measure: not run, no time left" in found[""]
