"""What `dqe-doctor` says a machine is: this one, and made-up files of others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dqe_engine import processors
from dqe_engine.doctor import Finding, describe, first_lines, machine

X86 = (
    "processor\t: 0\nmodel name\t: Abacus 3000  \nflags\t\t: fpu avx2 avx512_vnni hypervisor amx_int8\n\nprocessor\t: 1\nmodel name\t: B\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
KEYS = {
    "processor": str, "architecture": str, "virtual": bool | None, "instruction_sets": list, "cores": dict, "memory": dict, "system": str,
    "python": str, "packages": dict, "zone_kernels": dict, "onnx_runtime": dict,
}  # fmt: skip


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty files in the place of the system's own."""
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    for name, file in (("_CGROUPS", "cgroup"), ("_ROOT", "groups")):
        monkeypatch.setattr(processors, name, tmp_path / file)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    return tmp_path


def test_keys_of_the_record() -> None:
    found = describe()
    assert list(found) == list(KEYS)
    for key, kind in KEYS.items():
        assert isinstance(found[key], kind), key
    assert json.loads(json.dumps(found)) == found
    assert list(found["cores"]) == ["machine", "allowed", "quota"]
    assert list(found["memory"]) == ["bytes", "limit"]
    assert list(found["zone_kernels"]) == ["runnable", "chosen"]
    assert list(found["onnx_runtime"]) == ["version", "providers", "int8_saturates"]
    assert 1 <= found["cores"]["allowed"] <= found["cores"]["machine"]


def test_it_is_what_the_libraries_themselves_say() -> None:
    import numpy as np
    import onnxruntime

    from dqe_engine import _kernels

    found, sets = describe(), _kernels.instruction_sets()
    assert found["zone_kernels"] == {"runnable": sets, "chosen": sets[0]}
    assert found["onnx_runtime"]["version"] == onnxruntime.__version__
    assert found["onnx_runtime"]["providers"] == onnxruntime.get_available_providers()
    assert found["packages"]["numpy"] == np.__version__
    if "avx512" in sets:  # the kernels ask the processor, the record asks the system
        assert {"avx2", "avx512f", "avx512_vnni"} <= set(found["instruction_sets"])
    if {"avx512_vnni", "avx_vnni"} & set(found["instruction_sets"]) or found["architecture"] == "aarch64":
        assert found["onnx_runtime"]["int8_saturates"] is False
    elif "avx2" in found["instruction_sets"]:
        assert found["onnx_runtime"]["int8_saturates"] is True


def test_an_x86_processor(system: Path) -> None:
    (system / "cpuinfo").write_text(X86)
    assert machine.processor_name() == "Abacus 3000"
    assert machine.instruction_sets() == ["avx2", "avx512_vnni", "amx_int8"]
    assert machine.is_virtual() is True


def test_an_arm_processor(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "cpuinfo").write_text(ARM)
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.processor_name() == "aarch64, implementer 0x41, part 0xd40"
    assert machine.instruction_sets() == ["neon", "dotprod", "i8mm"]
    assert machine.is_virtual() is None


def test_an_apple_processor(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"machdep.cpu.brand_string": "Apple M9", "hw.optional.arm.AdvSIMD": "1", "hw.optional.arm.FEAT_I8MM": "0"}
    done = subprocess.CompletedProcess
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", lambda command, **_: done(command, 0, said.get(command[-1], "") + "\n"))
    assert machine.processor_name() == "Apple M9"
    assert machine.instruction_sets() == ["neon"]


def test_a_system_that_says_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, processors):
        monkeypatch.setattr(module, "read_text", lambda path: "")
    found = describe({})
    assert found["processor"]
    assert (found["instruction_sets"], found["virtual"]) == ([], None)
    assert (found["memory"], found["cores"]["quota"]) == ({"bytes": None, "limit": None}, None)
    assert found["zone_kernels"] == {"runnable": [], "chosen": None}
    assert found["onnx_runtime"] == {"version": None, "providers": [], "int8_saturates": None}
    assert any("8-bit products: not tried" in line for line in first_lines(found))


@pytest.mark.parametrize(
    ("groups", "files", "quota", "limit"),
    [
        ("0::/", {}, None, None),
        ("0::/", {"cpu.max": "150000 100000\n", "memory.max": "1073741824\n"}, 1.5, 1 << 30),
        ("0::/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n", "a/b/memory.max": "max\n"}, 0.5, None),
        ("0::/a", {"a/cpu.max": "400000 100000", "cpu.max": "200000 100000"}, 2, None),
        (
            "4:memory:/\n1:cpu,cpuacct:/x\n0::/",
            {
                "cpu,cpuacct/x/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "2147483648\n",
            },
            3, 1 << 31,
        ),
        (
            "4:memory:/\n1:cpu:/",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "9223372036854771712"},
            None, None,
        ),
    ],
)  # fmt: skip
def test_what_a_container_may_take(system: Path, groups: str, files: dict[str, str], quota: float | None, limit: int | None) -> None:
    (system / "cgroup").write_text(groups)
    for name, content in files.items():
        (system / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (system / "groups" / name).write_text(content)
    assert processors.core_quota() == quota
    assert machine.memory_limit() == limit
    found: dict[str, Any] = describe({})
    assert (found["cores"]["quota"], found["memory"]["limit"]) == (quota, limit)
    assert any("of which the container gives" in line for line in first_lines(found)) == bool(quota or limit)


@pytest.mark.parametrize(
    ("allowed", "quota", "available"), [(8, None, 8), (2, None, 2), (8, "150000 100000", 2), (2, "400000 100000", 2), (8, "5000 100000", 1)]
)
def test_one_thread_per_processor(system: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, quota: str | None, available: int) -> None:
    """Of those that this process was confined to and that its container pays for, not of the machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed)), raising=False)
    (system / "cgroup").write_text("0::/")
    if quota is not None:
        (system / "groups").mkdir()
        (system / "groups" / "cpu.max").write_text(quota)
    processors.available_cpus.cache_clear()
    try:
        assert processors.available_cpus() == available
    finally:
        processors.available_cpus.cache_clear()


def test_lines_say_what_makes_a_processor_answer_otherwise(system: Path) -> None:
    (system / "cpuinfo").write_text(X86)
    found = describe(
        {
            "zone kernels": [Finding("CPU kernels", "ok", "", facts={"instruction_sets": ["avx2", "portable"], "chosen": "avx2"})],
            "ONNX Runtime": [
                Finding("package", "ok", "", facts={"version": "9.9", "providers": ["CPUExecutionProvider"]}),
                Finding("8-bit products", "ok", "", facts={"int8_saturates": True}),
            ],
        }
    )
    lines = first_lines(found)
    assert lines[0].startswith("processor: Abacus 3000, ")
    assert lines[0].endswith(", virtual")
    assert lines[1] == "instruction sets: avx2 avx512_vnni amx_int8"
    assert lines[-1] == "zone kernels: avx2 (of avx2, portable); ONNX Runtime: CPU; its 8-bit products: saturate"


def test_nothing_native_is_imported_for_it() -> None:
    """The tests' header shows it before anything else runs: a library that crashes must not take pytest with it."""
    program = "from dqe_engine.doctor import describe; import sys; describe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"numpy", "onnxruntime", "torch", "dqe_engine._kernels"} & set(done.stdout.split())
