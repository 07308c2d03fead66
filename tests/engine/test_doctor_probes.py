"""Each probe of `dqe-doctor` in this process, on machines that are made up."""

from __future__ import annotations

import ctypes
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dqe_engine.doctor import (
    device_arrays,
    faiss_search,
    kernels,
    libraries,
    machine,
    nvidia,
    onnx_runtime,
    packages,
    tensorrt_runtime,
    twins,
)
from dqe_engine.doctor.device_arrays import CudaMemory, ForeignArray
from dqe_engine.doctor.findings import Context, Finding, Steps, guarded
from dqe_engine.doctor.tiny_graph import IR_VERSION, OPSET, SIDE, tiny_graph
from dqe_engine.zones import cpu, cuda, reference
from dqe_engine.zones.request import validated


def findings(probe: Callable[[Context], Steps], **context: Any) -> dict[str, Finding]:
    return {step.name: step for step in guarded(probe(Context(**context))) if isinstance(step, Finding)}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make distributions look installed, beside those that are."""

    def add(**versions: str) -> None:
        for name, version in versions.items():
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return add


def only_installed(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType, **versions: str) -> None:
    """What the probes' look at the installed distributions finds."""
    monkeypatch.setattr(module, "installed_of", lambda names: {name: version for name, version in versions.items() if name in names})


# ONNX Runtime


def test_the_tiny_graph_is_what_the_onnx_package_would_write() -> None:
    shape = [SIDE, SIDE]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "tiny", [x], [y])
    model = onnx.load_from_string(tiny_graph())
    wanted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    wanted.opset_import[0].ClearField("domain")  # empty, and written all the same
    assert model == wanted
    onnx.checker.check_model(model, full_check=True)


def fake_onnxruntime(monkeypatch: pytest.MonkeyPatch, cuda: Callable[[], str], *, says: str = "", wrong: bool = False) -> None:
    """One that lists CUDA; `cuda()` gives the provider that a session asked for CUDA gets, or raises. It prints `says`."""

    class Session:
        def __init__(self, graph: bytes, options: Any, *, providers: list[str], enable_fallback: int) -> None:
            assert enable_fallback == 0
            if providers == ["CUDAExecutionProvider"]:
                assert options.entries == {"session.disable_cpu_ep_fallback": "1"}
                os.write(2, says.encode())
                self.used = [cuda()]
            else:
                self.used = providers

        def get_providers(self) -> list[str]:
            return self.used

        def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [inputs["x"] @ inputs["x"] + wrong]

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    fake: Any = types.ModuleType("onnxruntime")
    fake.InferenceSession, fake.SessionOptions, fake.__version__ = Session, Options, "9.9"
    fake.get_available_providers = lambda: ["CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)


def raising(message: str) -> Callable[[], str]:
    def create() -> str:
        raise RuntimeError(message)

    return create


def test_a_provider_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, lambda: "CUDAExecutionProvider")
    found = findings(onnx_runtime.probe, devices=1)
    assert list(found) == ["package", "CUDA provider", "CPU provider"]  # Azure runs no graphs
    assert found["CUDA provider"].status == "ok"
    assert found["CUDA provider"].facts == {"provider": "cuda"}


def test_a_provider_that_silently_falls_back_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, lambda: "CPUExecutionProvider")
    found = findings(onnx_runtime.probe, devices=1)
    assert found["CUDA provider"].status == "broken"
    assert found["CUDA provider"].found == "ONNX Runtime took CPUExecutionProvider without a word"
    assert found["CPU provider"].status == "ok"


def test_a_provider_that_miscalculates_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, lambda: "CUDAExecutionProvider", wrong=True)
    found = findings(onnx_runtime.probe, devices=1)
    assert {found[f"{name} provider"].found for name in ("CUDA", "CPU")} == {"a matrix product came out wrong"}
    assert {found[f"{name} provider"].status for name in ("CUDA", "CPU")} == {"broken"}


def test_the_library_that_a_provider_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    says = (
        "[E:onnxruntime] Failed to load library providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file\n"
        "[W:onnxruntime] Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 13.*. Please install all dependencies"
    )
    fake_onnxruntime(monkeypatch, raising("[ONNXRuntimeError] fallback disabled by the user"), says=says)
    found = findings(onnx_runtime.probe, devices=1)["CUDA provider"]
    assert found.status == "broken"
    assert found.found == "does not load: libcublasLt.so.13: cannot open shared object file"
    assert found.remedy == "install cuDNN 9.* and CUDA 13.*, with their folders in LD_LIBRARY_PATH; until then use --provider cpu"


def test_a_gpu_provider_on_a_machine_without_a_gpu_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, raising("no device"))
    assert findings(onnx_runtime.probe, devices=0)["CUDA provider"].status == "not available"


def test_both_twins(install: Callable[..., None]) -> None:
    import onnxruntime

    (here,) = packages.installed_of(onnx_runtime.DISTRIBUTIONS)  # what the test environment has
    other = {"onnxruntime": "onnxruntime_gpu"}.get(here, "onnxruntime")
    install(**{other: "1.0"})
    found = findings(onnx_runtime.probe)
    assert found["package"].status == "broken"
    assert f"(the files are {onnxruntime.__version__}'s)" in found["package"].found
    assert found["package"].remedy is not None
    assert found["package"].remedy.startswith("pip uninstall -y onnxruntime onnxruntime-gpu; then pip install 'dqe-engine[cpu]'")
    assert found["CPU provider"].status == "ok"


LEFTOVERS = pytest.mark.parametrize("left", [False, True], ids=["no module", "an empty folder of an uninstalled twin"])
PACKAGES = pytest.mark.parametrize(("probe", "name"), [(onnx_runtime.probe, "onnxruntime"), (faiss_search.probe, "faiss")])


@PACKAGES
@LEFTOVERS
def test_no_package(probe: Any, name: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    only_installed(monkeypatch, twins)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if left else None)
    (found,) = findings(probe).values()
    assert (found.status, found.found) == ("not installed", f"no {name}")
    assert str(found.remedy).startswith("pip install 'dqe-engine[cpu]'")


@PACKAGES
@LEFTOVERS
def test_what_an_uninstalled_twin_did_to_the_other(probe: Any, name: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if left else None)
    found = findings(probe)
    assert list(found) == ["package"]
    assert found["package"].status == "broken"
    assert found["package"].found.endswith("is installed, but its files are gone")
    assert str(found["package"].remedy).startswith("pip uninstall -y ")


# FAISS


class FakeIndex:
    def __init__(self, width: int) -> None:
        self.shift = 0

    def add(self, vectors: np.ndarray) -> None:
        self.size = len(vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        return None, np.arange(self.size)[::-1, None] + self.shift


def fake_faiss(monkeypatch: pytest.MonkeyPatch, *, gpus: int, gpu_shift: int = 0) -> None:
    fake: Any = types.ModuleType("faiss")
    fake.IndexFlatIP, fake.StandardGpuResources, fake.__version__ = FakeIndex, object, "9.9"
    fake.get_num_gpus = lambda: gpus

    def to_gpu(resources: object, device: int, index: FakeIndex) -> FakeIndex:
        index.shift = gpu_shift
        return index

    fake.index_cpu_to_gpu = to_gpu
    monkeypatch.setitem(sys.modules, "faiss", fake)


@pytest.mark.parametrize(
    ("gpus", "devices", "shift", "status"),
    [(2, 2, 0, "ok"), (2, 2, 1, "broken"), (0, 2, 0, "broken"), (0, 0, 0, "not available")],
)
def test_faiss_with_gpu(gpus: int, devices: int, shift: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_faiss(monkeypatch, gpus=gpus, gpu_shift=shift)
    found = findings(faiss_search.probe, devices=devices)
    assert (found["CPU search"].status, found["GPU search"].status) == ("ok", status)


def test_both_faiss_twins(install: Callable[..., None]) -> None:
    install(faiss_gpu="1.0", faiss_gpu_cuvs="1.0")
    found = findings(faiss_search.probe)
    assert found["package"].status == "broken"
    assert "faiss-gpu 1.0 and faiss-gpu-cuvs 1.0" in found["package"].found


# TensorRT


def fake_tensorrt(monkeypatch: pytest.MonkeyPatch, *, plan: bytes | None = b"plan", tensors: int = 2) -> None:
    """With the parts of the API that the check uses; `Builder` and `Runtime` come into being when they are asked for."""

    class Anything:
        num_io_tensors = tensors

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *_: plan if name == "build_serialized_network" else Anything()

    fake: Any = types.ModuleType("tensorrt")
    fake.__version__, fake.float32 = "11.4", object()
    fake.ElementWiseOperation = types.SimpleNamespace(SUM=1)
    fake.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    fake.touched = []
    fake.__getattr__ = lambda name: fake.touched.append(name) or (lambda *_: Anything())
    monkeypatch.setitem(sys.modules, "tensorrt", fake)


def test_tensorrt_without_a_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch)
    found = findings(tensorrt_runtime.probe, devices=0)
    assert {name: finding.status for name, finding in found.items()} == {"package": "ok", "engine": "not available"}
    assert sys.modules["tensorrt"].touched == []
    assert findings(tensorrt_runtime.probe, devices=1)["engine"].status == "ok"
    assert sys.modules["tensorrt"].touched == ["Builder", "Runtime"]


@pytest.mark.parametrize(("plan", "tensors"), [(None, 2), (b"plan", 1)])
def test_tensorrt_that_builds_nothing(plan: bytes | None, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt(monkeypatch, plan=plan, tensors=tensors)
    assert findings(tensorrt_runtime.probe, devices=1)["engine"].status == "broken"


def test_tensorrt_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Callable[..., None]) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    install(tensorrt="11.4")
    (found,) = findings(tensorrt_runtime.probe).values()
    assert (found.status, found.found) == (
        "broken",
        "tensorrt 11.4 cannot be imported: libnvinfer.so.11: cannot open shared object file",
    )


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    only_installed(monkeypatch, tensorrt_runtime)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (found,) = findings(tensorrt_runtime.probe).values()
    assert found.status == "not installed"


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
        monkeypatch.setattr(nvidia, "load_library", {nvidia.NVML: nvml, nvidia.CUDA_DRIVER: cuda_driver}.__getitem__)
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
    assert nvidia.load_library("libno-such-library.so.1") is None


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


class HostDriver:
    """The CUDA driver's memory calls, on the host."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def cuMemAlloc_v2(self, out: Any, size: Any) -> int:
        block = ctypes.create_string_buffer(size.value)
        out._obj.value = ctypes.addressof(block)
        self.blocks[out._obj.value] = block
        return 0

    def cuMemFree_v2(self, address: Any) -> int:
        del self.blocks[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0


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


@pytest.mark.parametrize("wrong", [False, True])
def test_cuda_kernels_are_held_against_numpy(wrong: bool, cuda_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, results = HostDriver(), []
    monkeypatch.setattr(device_arrays, "load_library", lambda name: driver)

    def select(queries: ForeignArray, items: ForeignArray, **options: Any) -> Any:
        memory = CudaMemory(driver)
        assert queries.__dlpack_device__() == items.__dlpack_device__() == (2, 0)
        request = validated(memory.download(queries), memory.download(items), anchor=None, exclude=None, **options)
        result = reference.select(request)
        if wrong:
            result.ids[0, 0] += 1
        results.append(result)
        fields = {name: getattr(result, name) for name in kernels.COMPARED}
        return types.SimpleNamespace(**{name: ForeignArray(a.ctypes.data, a.shape, a.dtype) for name, a in fields.items()})

    monkeypatch.setattr(cuda, "select", select)
    found = findings(kernels.probe, devices=2)["CUDA kernels"]
    assert found.status == ("broken" if wrong else "ok"), found
    assert len(results) == (1 if wrong else 2 * len(kernels.QUERIES))
    assert driver.blocks == {}, "device memory was not given back"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64])
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


# Machine, libraries, extras


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "version_info", (3, 10, 1))
    assert findings(machine.probe)["Python"].status == "broken"


def test_a_system_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "")
    found = findings(machine.probe)["processor"]
    assert found.status == "ok"
    assert found.facts["flags"] == []


REQUIRES = [
    "numpy>=1.26",
    'torch>=2.8; extra == "train"',
    "peft>=0.15 ; extra == 'lora'",
    'dqe-engine[train]; extra == "lora"',
    "faiss-gpu>=1.9; platform_system == 'Linux' and extra == 'gpu'",
]


@pytest.mark.parametrize(
    ("versions", "train", "lora"),
    [
        ({"torch": "2.13.0+cpu", "peft": "0.15"}, "ok", "ok"),
        ({"torch": "2.8.0"}, "ok", "not installed"),
        ({"torch": "2.7.1", "peft": "0.21.2"}, "broken", "broken"),
        ({"peft": "1.0"}, "not installed", "not installed"),
    ],
)
def test_extras(versions: dict[str, str], train: str, lora: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(packages, "version_of", versions.get)
    found = findings(libraries.probe_extras)
    assert {name: finding.status for name, finding in found.items()} == {"train": train, "lora": lora}
    assert all(finding.remedy == f"pip install 'dqe-engine[{name}]'" for name, finding in found.items() if finding.status != "ok")


@pytest.mark.parametrize(("version", "status"), [("1.26.4", "ok"), ("1.9", "broken"), (None, "broken")])
def test_what_is_always_needed(version: str | None, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(packages, "version_of", {"numpy": version}.get)
    (found,) = findings(libraries.probe).values()
    assert (found.name, found.status) == ("numpy", status)


@pytest.mark.parametrize("name", ["pillow", "tokenizers"])
def test_a_library_that_fails_its_use_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise OSError("libjpeg: no such symbol")

    monkeypatch.setitem(libraries._CHECKS, name, fails)
    found = findings(libraries.probe)[name]
    assert (found.status, found.found) == ("broken", "OSError: libjpeg: no such symbol")
