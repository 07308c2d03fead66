"""What `dqe-doctor` says of GPUs and kernels, on machines that are made up."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import pytest
from support.doctor_probes import findings
from support.host_driver import HostDriver

from dqe_engine import device_arrays
from dqe_engine.device_arrays import CudaMemory, ForeignArray
from dqe_engine.doctor import kernels, nvidia
from dqe_engine.driver_library import CUDA_DRIVER, load_library
from dqe_engine.zones import cpu, cuda, reference
from dqe_engine.zones.request import validated

# NVIDIA


class FakeNvml:
    """Two GPUs. `failing`: error codes by function."""

    def __init__(self, gpus: int = 2, **failing: int) -> None:
        self.gpus, self.failing = gpus, failing

    def __getattr__(self, name: str) -> Any:
        code = self.failing.get(name, 0)
        function = getattr(type(self), f"do_{name}", lambda self, *_: None)
        return lambda *arguments: code or function(self, *arguments) or 0

    class nvmlErrorString:  # noqa: N801
        restype: Any = None

        def __new__(cls, code: int) -> Any:
            return f"error text {code}".encode()

    def do_nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> None:
        text.value = b"580.65.06"

    def do_nvmlSystemGetCudaDriverVersion_v2(self, out: Any) -> None:
        out._obj.value = 13010

    def do_nvmlDeviceGetCount_v2(self, out: Any) -> None:
        out._obj.value = self.gpus

    def do_nvmlDeviceGetHandleByIndex_v2(self, index: Any, out: Any) -> None:
        out._obj.value = 1000 + index.value

    def do_nvmlDeviceGetName(self, handle: Any, text: Any, size: Any) -> None:
        text.value = [b"NVIDIA H100", b"NVIDIA A10"][handle.value - 1000]

    def do_nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> None:
        out._obj.total = 80 << 30

    def do_nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = [(9, 0), (8, 6)][handle.value - 1000]


class FakeCuda:
    """`devices` sm_90, or an error code of cuInit."""

    def __init__(self, devices: int = 2, error: int = 0) -> None:
        self.devices, self.error = devices, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self.devices
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 13010
        return 0

    def cuDeviceGet(self, out: Any, index: int) -> int:
        out._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:
        text.value = b"NVIDIA H100"
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> int:
        out._obj.value = {75: 9, 76: 0}[attribute]
        return 0


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(nvml: Any, cuda_driver: Any, visible: str | None = None) -> None:
        monkeypatch.setattr(nvidia, "load_library", {nvidia.NVML: nvml, CUDA_DRIVER: cuda_driver}.__getitem__)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return use


def test_two_gpus(drivers: Callable[..., None]) -> None:
    drivers(FakeNvml(), FakeCuda())
    found = findings(nvidia.probe)
    assert found["driver"].status == "ok"
    assert found["driver"].facts == {
        "driver": "580.65.06",
        "cuda": "13.1",
        "gpus": [
            {"name": "NVIDIA H100", "compute_capability": "9.0", "memory_bytes": 80 << 30},
            {"name": "NVIDIA A10", "compute_capability": "8.6", "memory_bytes": 80 << 30},
        ],
    }
    assert "NVIDIA H100, compute 9.0, 80.0 GiB; NVIDIA A10, compute 8.6, 80.0 GiB" in found["driver"].found
    assert found["CUDA devices"].facts["devices"] == 2
    assert found["CUDA devices"].found == "2 usable: NVIDIA H100 (sm_90), NVIDIA H100 (sm_90)"


def test_no_driver(drivers: Callable[..., None]) -> None:
    drivers(None, None)
    assert {name: finding.status for name, finding in findings(nvidia.probe).items()} == {
        "driver": "not available",
        "CUDA devices": "not available",
    }


def test_a_library_that_is_not_there() -> None:
    assert load_library("libno-such-library.so.1") is None


@pytest.mark.parametrize(
    ("nvml", "cuda_driver", "visible", "driver", "devices"),
    [
        (FakeNvml(nvmlInit_v2=18), FakeCuda(error=803), None, "broken", "broken"),
        (FakeNvml(nvmlInit_v2=9), FakeCuda(error=100), None, "broken", "not available"),
        (FakeNvml(gpus=0), FakeCuda(error=100), None, "not available", "not available"),
        (FakeNvml(), FakeCuda(error=100), None, "ok", "broken"),
        (FakeNvml(), FakeCuda(devices=0), "", "ok", "not available"),
        (FakeNvml(), None, None, "ok", "broken"),
        (None, FakeCuda(), None, "not available", "ok"),
        (FakeNvml(nvmlDeviceGetMemoryInfo=3), FakeCuda(), None, "ok", "ok"),
    ],
    ids=["mismatch", "module not loaded", "no GPU", "CUDA sees none", "hidden", "no libcuda", "no NVML", "shared memory"],
)
def test_drivers_in_disorder(
    nvml: Any, cuda_driver: Any, visible: str | None, driver: str, devices: str, drivers: Callable[..., None]
) -> None:
    drivers(nvml, cuda_driver, visible)
    found = findings(nvidia.probe)
    assert (found["driver"].status, found["CUDA devices"].status) == (driver, devices)
    assert all(finding.remedy for finding in found.values() if finding.status != "ok")
    assert bool(found["CUDA devices"].facts.get("devices")) == (devices == "ok")


# Zone kernels


def test_a_kernel_that_gives_a_wrong_id_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    select, wrong_set = cpu.select, cpu._kernels.instruction_sets()[-1]

    def select_wrongly(request: Any, **options: Any) -> Any:
        result = select(request, **options)
        if options["instruction_set"] == wrong_set and request.batch > 4 and request.screen is None:
            result.ids[5, 3] += 1
        return result

    monkeypatch.setattr(cpu, "select", select_wrongly)
    found = findings(kernels.probe)
    for name in cpu._kernels.instruction_sets():
        assert found[f"CPU, {name}"].status == ("broken" if name == wrong_set else "ok")
    assert found[f"CPU, {wrong_set}"].found.startswith("float16 items: ids of query 5 of 9 are ")


@pytest.mark.parametrize("field", kernels.COMPARED)
def test_every_compared_field_is_compared(field: str) -> None:
    wanted = kernels.expected(2)
    changed = getattr(wanted, field).copy()
    changed[1, 0] += 1
    assert kernels.difference(wanted, wanted) is None
    assert str(kernels.difference(replace(wanted, **{field: changed}), wanted)).startswith(f"{field} of query 1 of 2 are ")
    assert "shape" in str(kernels.difference(replace(wanted, **{field: changed[:, :0]}), wanted))


def test_the_problem_exercises_zones_and_ties() -> None:
    for batch in kernels.QUERIES:
        wanted = kernels.expected(batch)
        assert wanted.counts is not None
        assert wanted.picks is not None
        assert (wanted.counts > 0).all()
        assert (wanted.picks >= 0).all()
        assert (np.diff(wanted.scores, axis=1) == 0).any(), "no equal scores: the tie rule is not tested"


def test_kernels_that_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert {name: finding.status for name, finding in findings(kernels.probe).items()} == {
        "CPU kernels": "not installed",
        "CUDA kernels": "not installed",
    }


@pytest.fixture
def cuda_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands where a build with CUDA has its module; sees two devices."""
    module: Any = types.ModuleType("dqe_engine._kernels_cuda")
    module.__spec__ = ModuleSpec(module.__name__, None)
    module.device_count = lambda: 2
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize(("devices", "status"), [(0, "not available"), (2, "broken")])
def test_cuda_kernels_that_see_no_device(devices: int, status: str, cuda_module: Any) -> None:
    cuda_module.device_count = lambda: 0
    assert findings(kernels.probe, devices=devices)["CUDA kernels"].status == status


@pytest.mark.parametrize("wrong", ["", "zones", "top-k"])
def test_cuda_kernels_are_held_against_numpy(wrong: str, cuda_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, results, batches = HostDriver(), [], set()
    monkeypatch.setattr(device_arrays, "load_library", lambda name: driver)

    class Index:
        def __init__(self, items: ForeignArray) -> None:
            self.items = items

        def architecture(self, batch: int, *, zones: Any) -> str:
            return "sm_90a" if batch > 2 and not zones else "sm_80"

        def select(self, queries: ForeignArray, **options: Any) -> Any:
            memory = CudaMemory(driver)
            assert queries.__dlpack_device__() == self.items.__dlpack_device__() == (2, 0)
            given = {"zones": None, "picks": 0, "counts": False} | options
            request = validated(memory.download(queries), memory.download(self.items), anchor=None, exclude=None, **given)
            result = reference.select(request)
            if wrong == ("zones" if "zones" in options else "top-k"):
                result.ids[0, 0] += 1
            results.append(result)
            batches.add(len(result.ids))
            fields = {name: getattr(result, name) for name in kernels.COMPARED}
            arrays = {name: a if a is None else ForeignArray(a.ctypes.data, a.shape, a.dtype) for name, a in fields.items()}
            return types.SimpleNamespace(**arrays)

    monkeypatch.setattr(cuda, "Index", Index)
    found = findings(kernels.probe, devices=2)["CUDA kernels"]
    assert found.status == ("broken" if wrong else "ok"), found
    assert len(results) == {"": 4 * len(kernels.CUDA_QUERIES), "zones": 1, "top-k": 2}[wrong]
    assert wrong or found.found.endswith("; top-k by kernels for sm_80 and sm_90a, zones by kernels for sm_80")
    assert wrong or (min(batches) <= 16 and max(batches) > 64), "kernels for few queries, and more than one tile for many"
    assert driver.blocks == {}, "device memory was not given back"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 4)])
def test_foreign_arrays_are_what_dlpack_means(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    foreign = ForeignArray(array.ctypes.data, shape, array.dtype, device=(1, 0))
    taken = np.from_dlpack(foreign)
    assert taken.dtype == array.dtype
    np.testing.assert_array_equal(taken, array)
    del taken  # before what it was taken from
    copy = CudaMemory(HostDriver()).download(array)
    assert copy.dtype == array.dtype
    np.testing.assert_array_equal(copy, array)
    for rows in ([], [0], [0, len(array) - 1], [1, 2]):
        if all(row < len(array) for row in rows):
            chosen = np.unique(np.array(rows, np.int64))
            np.testing.assert_array_equal(CudaMemory(HostDriver()).download(array, chosen), array[chosen])
