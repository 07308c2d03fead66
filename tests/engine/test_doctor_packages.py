"""What `dqe-doctor` says of packages: those that are here, and made-up ones."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.doctor_probes import findings
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRT
from support.nvinfer.abi import raise_what_a_callback_raises

from dqe_engine.doctor import faiss_search, libraries, onnx_runtime, packages, tensorrt_runtime, twins
from dqe_engine.doctor.tiny_graph import IR_VERSION, OPSET, SIDE, integer_graph, tiny_graph

pytestmark = raise_what_a_callback_raises


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


@pytest.mark.parametrize(
    ("written", "node", "kinds"),
    [
        (tiny_graph, helper.make_node("MatMul", ["x", "x"], ["y"]), {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT}),
        (
            integer_graph,
            helper.make_node("MatMulInteger", ["a", "b"], ["y"]),
            {"a": TensorProto.UINT8, "b": TensorProto.INT8, "y": TensorProto.INT32},
        ),
    ],
)
def test_graphs_are_what_the_onnx_package_would_write(written: Callable[[], bytes], node: onnx.NodeProto, kinds: dict[str, int]) -> None:
    *inputs, output = (helper.make_tensor_value_info(name, kind, [SIDE, SIDE]) for name, kind in kinds.items())
    graph = helper.make_graph([node], "tiny", inputs, [output])
    model = onnx.load_from_string(written())
    wanted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    wanted.opset_import[0].ClearField("domain")  # empty, and written all the same
    assert model == wanted
    onnx.checker.check_model(model, full_check=True)


def fake_onnxruntime(
    monkeypatch: pytest.MonkeyPatch,
    cuda: Callable[[], str],
    *,
    says: str = "",
    wrong: bool = False,
    tensorrt: bool | None = None,
    products: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul,
) -> None:
    """One that lists CUDA; `cuda()` gives the provider that a session asked for CUDA gets, or raises. It prints `says`.

    `products` multiplies 8-bit integers, given to it with 32 bits.
    """

    class Session:
        def __init__(self, graph: bytes, options: Any = None, *, providers: list[str], enable_fallback: int = 0) -> None:
            assert enable_fallback == 0
            if providers == ["TensorrtExecutionProvider"] and not tensorrt:
                raise RuntimeError("libnvinfer.so.10 is not there")
            if providers == ["CUDAExecutionProvider"]:
                assert options.entries == {"session.disable_cpu_ep_fallback": "1"}
                os.write(2, says.encode())
                self.used = [cuda()]
            else:
                self.used = providers

        def get_providers(self) -> list[str]:
            return self.used

        def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            if "a" in inputs:
                return [products(inputs["a"].astype(np.int32), inputs["b"].astype(np.int32))]
            return [inputs["x"] @ inputs["x"] + wrong]

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, key: str, value: str) -> None:
            self.entries[key] = value

    fake: Any = types.ModuleType("onnxruntime")
    fake.InferenceSession, fake.SessionOptions, fake.__version__ = Session, Options, "9.9"
    fake.get_available_providers = lambda: [
        *(["TensorrtExecutionProvider"] if tensorrt is not None else []), "CUDAExecutionProvider", "AzureExecutionProvider",
        "CPUExecutionProvider",
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)


def raising(message: str) -> Callable[[], str]:
    def create() -> str:
        raise RuntimeError(message)

    return create


def test_a_provider_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(monkeypatch, lambda: "CUDAExecutionProvider")
    found = findings(onnx_runtime.probe, devices=1)
    assert list(found) == ["package", "8-bit products", "CUDA provider", "CPU provider"]  # Azure runs no graphs
    assert found["CUDA provider"].status == "ok"
    assert found["CUDA provider"].facts == {"provider": "cuda"}


def in_16_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """As `vpmaddubsw` adds pairs of products."""
    pairs = (a[:, :, None] * b[None, :, :]).reshape(len(a), -1, 2, b.shape[1]).sum(axis=2)
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=1)


@pytest.mark.parametrize(
    ("products", "status", "saturates"),
    [(np.matmul, "ok", False), (in_16_bits, "ok", True), (lambda a, b: a @ b + 1, "broken", None), (lambda a, b: 0 * a, "broken", None)],
)
def test_8_bit_products_that_saturate_are_told_from_wrong_ones(
    products: Callable[..., np.ndarray], status: str, saturates: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_onnxruntime(monkeypatch, lambda: "CUDAExecutionProvider", products=products)
    found = findings(onnx_runtime.probe)["8-bit products"]
    assert found.status == status
    assert found.facts.get("int8_saturates") is saturates


@pytest.mark.parametrize(("works", "status"), [(True, "ok"), (False, "not available")])
def test_tensorrts_provider_is_optional(monkeypatch: pytest.MonkeyPatch, works: bool, status: str) -> None:
    fake_onnxruntime(monkeypatch, lambda: "CUDAExecutionProvider", tensorrt=works)
    found = findings(onnx_runtime.probe, devices=1)["TensorRT provider"]
    assert found.status == status
    assert "ort-tensorrt" in (found.found if works else found.remedy or "")
    assert found.facts == {}  # a bundle's graphs are not tried on it


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
    assert str(found.remedy).startswith(f"pip install 'dqe-engine[{'bench' if name == 'faiss' else 'cpu'}]'")


@PACKAGES
@LEFTOVERS
def test_what_an_uninstalled_twin_did_to_the_other(probe: Any, name: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    only_installed(monkeypatch, twins, **{"faiss-cpu" if name == "faiss" else name: "1.0"})
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


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return FakeTensorRT(FakeCuda()).install(monkeypatch)


def test_tensorrt_without_a_device_is_left_alone(trt: FakeTensorRT) -> None:
    found = findings(tensorrt_runtime.probe, devices=0)
    assert {name: finding.status for name, finding in found.items()} == {"package": "ok", "engine": "not available"}
    assert trt.created == []
    assert findings(tensorrt_runtime.probe, devices=1)["engine"].status == "ok"
    assert trt.created == ["IBuilder", "IRuntime"]


@pytest.mark.parametrize("wrong", ["build", "plan"])
def test_tensorrt_that_builds_nothing(trt: FakeTensorRT, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "build":
        trt.faults.build = "Error Code 10: Internal Error"
    else:
        monkeypatch.setattr(trt, "plan", lambda *_, **__: b"damaged")
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


# Libraries, extras


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries.sys, "version_info", (3, 10, 1))
    assert findings(libraries.probe)["Python"].status == "broken"


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
    python, found = findings(libraries.probe).values()
    assert python.name == "Python"
    assert (found.name, found.status) == ("numpy", status)


@pytest.mark.parametrize("name", ["pillow", "tokenizers"])
def test_a_library_that_fails_its_use_is_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> str:
        raise OSError("libjpeg: no such symbol")

    monkeypatch.setitem(libraries._CHECKS, name, fails)
    found = findings(libraries.probe)[name]
    assert (found.status, found.found) == ("broken", "OSError: libjpeg: no such symbol")
