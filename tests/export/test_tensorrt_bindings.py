"""Every name that our code uses of TensorRT and CUDA, held against NVIDIA's real Python bindings.

The libraries behind them cannot be installed here; the bindings can, and they import with stub libraries that export
the few symbols they link. What the bindings say of themselves is then true: names, overloads and enum members.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRT

from dqe_engine.files import directory_lock

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("dqe_engine/tensorrt/api.py", "dqe_engine/tensorrt/session.py", "export/dqe_export/tensorrt/build.py")
CUDA_SOURCES = ("dqe_engine/tensorrt/cuda.py", "dqe_engine/tensorrt/session.py")
BINDINGS = ("tensorrt-cu13-bindings==10.16.1.11", "tensorrt-cu13-bindings==11.4.0.106")
CUDA_BINDINGS = ("cuda-bindings==12.9.10", "cuda-bindings==13.5.0")

VARIABLES = {
    "trt": "", "logger": "ILogger", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "inspector": "EngineInspector", "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "error": "ParserError", "config": "IBuilderConfig", "profile": "IOptimizationProfile", "cache": "ITimingCache",
    "measured": "ITimingCache",
}  # fmt: skip
"""What a variable (or an attribute of that name, with an underscore) holds wherever it stands before a dot in SOURCES."""

USED = {
    "": {"Builder", "BuilderFlag", "DataType", "ErrorCode", "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel", "ILogger",
         "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ProfilingVerbosity", "Runtime",
         "TensorIOMode", "__version__"},
    "ILogger": {"__init__"},
    "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed"},
    "ICudaEngine": {"create_engine_inspector", "create_execution_context", "device_memory_size_v2", "get_tensor_dtype", "get_tensor_mode",
                    "get_tensor_name", "get_tensor_profile_shape", "get_tensor_shape", "num_io_tensors", "num_layers",
                    "num_optimization_profiles"},
    "IExecutionContext": {"execute_async_v3", "get_tensor_shape", "infer_shapes", "nvtx_verbosity", "set_device_memory", "set_input_shape",
                          "set_optimization_profile_async", "set_tensor_address"},
    "EngineInspector": {"get_engine_information"},
    "Builder": {"build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"},
    "OnnxParser": {"get_error", "num_errors", "parse_from_file"},
    "ParserError": {"code", "desc", "node_name", "node_operator"},
    "IBuilderConfig": {"add_optimization_profile", "builder_optimization_level", "clear_flag", "create_timing_cache", "get_timing_cache",
                       "hardware_compatibility_level", "profiling_verbosity", "set_flag", "set_memory_pool_limit", "set_timing_cache"},
    "IOptimizationProfile": {"set_shape"},
    "ITimingCache": {"serialize"},
    "BuilderFlag": {"TF32", "VERSION_COMPATIBLE"},
    "DataType": {"FLOAT", "INT64"},
    "ErrorCode": {"UNSUPPORTED_NODE"},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
    "HardwareCompatibilityLevel": {"AMPERE_PLUS"},
    "LayerInformationFormat": {"JSON"},
    "MemoryPoolType": {"WORKSPACE"},
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED"},
    "ProfilingVerbosity": {"DETAILED", "NONE"},
    "TensorIOMode": {"INPUT", "OUTPUT"},
}  # fmt: skip
"""By class, "" for the module itself. `test_the_list_is_what_the_sources_use` keeps it from going stale."""

BY_NAME_ONLY = {"ErrorCode", "DataType"}  # compared by their names or through getattr: no chain of attributes shows them
CUDA_USED = {
    "cudaDriverGetVersion", "cudaError_t", "cudaFree", "cudaGetDevice", "cudaGetDeviceCount", "cudaGetDeviceProperties",
    "cudaGetErrorString", "cudaGetLastError",
    "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaMalloc",
    "cudaMemcpyAsync", "cudaMemcpyKind", "cudaMemsetAsync", "cudaSetDevice", "cudaStreamBeginCapture",
    "cudaStreamCaptureMode",
    "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture", "cudaStreamNonBlocking", "cudaStreamSynchronize",
}  # fmt: skip


class Use(NamedTuple):
    owner: str
    name: str
    arguments: int | None  # None where it is not called, or called with a starred argument


def uses() -> Iterator[Use]:
    """Every `variable.name` and `trt.Enum.MEMBER` in SOURCES."""
    for source in SOURCES:
        tree = ast.parse((REPOSITORY / source).read_text(encoding="utf-8"))
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            owner = _owner(node.value)
            if owner is None or (owner, node.attr) in _OURS:
                continue
            call = calls.get(id(node))
            exact = call is not None and not any(isinstance(a, ast.Starred) for a in call.args)
            yield Use(owner, node.attr, len(call.args) + len(call.keywords) if call and exact else None)


_OURS = {
    ("ILogger", "errors"),
    ("ILogger", "lines"),
    ("ParserError", "strerror"),
    ("IExecutionContext", "context"),
    ("IOptimizationProfile", "get"),
    ("IOptimizationProfile", "items"),
}
"""Attributes of our own objects in variables of those names."""


def _owner(value: ast.expr) -> str | None:
    """The TensorRT class of what stands before a dot; "" for the module, None for anything else."""
    if isinstance(value, ast.Name):
        return VARIABLES.get(value.id)
    if isinstance(value, ast.Attribute):
        if _owner(value.value) == "":
            return value.attr  # trt.BuilderFlag
        if isinstance(value.value, ast.Name) and value.value.id in ("self", "ready"):
            return VARIABLES.get(value.attr.removeprefix("_"))  # self._engine, ready.context
    return None


def test_the_list_is_what_the_sources_use() -> None:
    found: dict[str, set[str]] = {}
    for use in uses():
        found.setdefault(use.owner, set()).add(use.name)
    declared = {owner: names for owner, names in USED.items() if owner not in BY_NAME_ONLY}
    assert {owner: names - BY_NAME_ONLY for owner, names in found.items()} == {o: n - BY_NAME_ONLY for o, n in declared.items()}
    text = "".join((REPOSITORY / source).read_text(encoding="utf-8") for source in SOURCES)
    assert '{"float32": "FLOAT", "int64": "INT64"}' in text
    assert 'code().name.startswith("UNSUPPORTED")' in text
    cuda = "".join((REPOSITORY / source).read_text(encoding="utf-8") for source in CUDA_SOURCES)
    assert set(re.findall(r'(?:runtime\.|")(cuda[A-Z]\w+)', cuda)) == CUDA_USED


# -- the real bindings ----------------------------------------------------------------------------------------------------

STUB = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""

PROBE = """
import json, sys
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
found = {}
for owner, names in json.loads(sys.argv[1]).items():
    holder = getattr(trt, owner) if owner else trt
    found[owner] = {name: str(getattr(holder, name).__doc__) for name in names if hasattr(holder, name)}
from dqe_engine.tensorrt.api import import_tensorrt, make_logger
logger = make_logger(import_tensorrt())
try:
    trt.Builder(logger)
    null = "a builder"
except TypeError as error:
    null = str(error)
logger.log(trt.ILogger.Severity.ERROR, "it\\nbroke")
logger.log(trt.ILogger.Severity.VERBOSE, "chatter")
print(json.dumps({"version": trt.__version__, "found": found, "errors": logger.errors(), "lines": logger.lines, "null": null}))
"""

CUDA_PROBE = """
import json, sys
from cuda.bindings import runtime
kind, mode = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
stream, graph, executable = runtime.cudaStream_t(0), runtime.cudaGraph_t(0), runtime.cudaGraphExec_t(0)
calls = {  # as our code makes them; without a device all of them are refused, but a wrong argument would be a TypeError
    "cudaStreamCreateWithFlags": (runtime.cudaStreamNonBlocking,), "cudaMalloc": (16,), "cudaFree": (0,),
    "cudaMemsetAsync": (4096, 0, 16, stream), "cudaMemcpyAsync": (4096, 8192, 16, kind, stream), "cudaStreamSynchronize": (stream,),
    "cudaStreamBeginCapture": (stream, mode), "cudaStreamEndCapture": (stream,), "cudaGraphInstantiate": (graph, 0),
    "cudaGraphLaunch": (executable, stream), "cudaGraphDestroy": (graph,), "cudaGraphExecDestroy": (executable,),
    "cudaStreamDestroy": (stream,), "cudaGetDevice": (), "cudaGetDeviceProperties": (0,), "cudaDriverGetVersion": (),
    "cudaSetDevice": (0,), "cudaGetLastError": (),
}
results = {name: len(getattr(runtime, name)(*arguments)) for name, arguments in calls.items()}
status, text = runtime.cudaGetErrorString(runtime.cudaError_t.cudaErrorMemoryAllocation)
count = runtime.cudaGetDeviceCount()
print(json.dumps({
    "missing": [name for name in json.loads(sys.argv[1]) if not hasattr(runtime, name)],
    "members": [hasattr(runtime.cudaMemcpyKind, "cudaMemcpyHostToDevice"), hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDeviceToHost"),
                hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal"), hasattr(runtime.cudaError_t, "cudaSuccess")],
    "text": text.decode(), "count": len(count), "results": results, "stream": int(runtime.cudaStream_t(5)),
    "properties": [type(getattr(runtime.cudaDeviceProp(), name)).__name__ for name in ("name", "major", "minor")],
}))
"""


@pytest.fixture(scope="session")
def wheels(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.cache.mkdir("nvidia-bindings"))  # type: ignore[union-attr]


def fetch(wheels: Path, requirement: str) -> Path:
    """The unpacked wheel, downloaded once; the test is skipped where that is not possible."""
    folder = wheels / f"{requirement}-{sys.version_info[0]}{sys.version_info[1]}"
    with directory_lock(wheels):  # from other workers
        if not folder.exists():
            partial = wheels / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20",
                       "--disable-pip-version-check", "--target", str(partial), requirement]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
            partial.rename(folder)
    return folder


def probe(program: str, argument: Any, folders: list[Path], **environment: str) -> Any:
    paths = os.pathsep.join(map(str, [*folders, REPOSITORY]))
    command = [sys.executable, "-c", program, json.dumps(argument)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths} | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session", params=BINDINGS)
def real(request: pytest.FixtureRequest, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the bindings of one version have of `USED`, with docstrings."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    bindings = fetch(wheels, request.param)
    major = request.param.partition("==")[2].partition(".")[0]
    stubs = tmp_path_factory.mktemp("stubs")
    (stubs / "stub.c").write_text(STUB)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        name = f"lib{library}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", stubs / name, stubs / "stub.c"], check=True)
    asked = {owner: sorted(names) for owner, names in {**USED, **_public_names_of_the_fake()}.items()}
    for owner, names in USED.items():
        asked[owner] = sorted({*asked[owner], *names})
    found = probe(PROBE, asked, [bindings], LD_LIBRARY_PATH=str(stubs))
    assert found["version"] == request.param.partition("==")[2]
    return found


def _public_names_of_the_fake() -> dict[str, set[str]]:
    module = FakeTensorRT(FakeCuda()).module()
    classes = {owner: getattr(module, owner) for owner in USED if owner}
    return {owner: {name for name in vars(kind) if not name.startswith("_") and name != "Severity"} for owner, kind in classes.items()}


def test_every_name_is_there(real: Any) -> None:
    missing = {f"{owner}.{name}" for owner, names in USED.items() for name in names if name not in real["found"][owner]}
    assert not missing
    imagined = {f"{o}.{n}" for o, names in _public_names_of_the_fake().items() for n in names if n not in real["found"][o]}
    assert not imagined, "the fake has what TensorRT does not"


def test_every_call_has_as_many_arguments_as_an_overload_takes(real: Any) -> None:
    checked = 0
    for use in uses():
        doc = real["found"].get(use.owner, {}).get(use.name, "")
        signatures = re.findall(rf"^(?:\d+\. )?{use.name}\((self.*?)\) ->", doc, re.MULTILINE)
        if use.arguments is None or not signatures or use.name == "__init__":
            continue
        counts = [_parameters(signature) for signature in signatures]
        assert any(least <= use.arguments <= most for least, most in counts), f"{use} against {signatures}"
        checked += 1
    assert checked >= 25


def _parameters(signature: str) -> tuple[int, int]:
    """How many arguments a pybind11 signature takes, at least and at most, without self."""
    plain = re.sub(r"\[[^\]]*\]|<[^>]*>", "", signature)
    parameters = plain.split(",")[1:]
    return sum("=" not in parameter for parameter in parameters), len(parameters)


def test_our_logger_is_one_of_theirs(real: Any) -> None:
    assert (real["errors"], real["lines"]) == ("it broke", ["[ERROR] it\nbroke"])
    assert "nullptr" in real["null"]  # a TypeError, which build_engine turns into a line


@pytest.mark.parametrize("requirement", CUDA_BINDINGS)
def test_cuda_bindings(wheels: Path, requirement: str) -> None:
    folders = [fetch(wheels, requirement), fetch(wheels, "cuda-pathfinder")]
    found = probe(CUDA_PROBE, sorted(CUDA_USED), folders, CUDA_VISIBLE_DEVICES="")
    assert found["missing"] == []
    assert found["members"] == [True] * 4
    assert (found["text"], found["count"], found["stream"]) == ("out of memory", 2, 5)
    values = {"cudaStreamCreateWithFlags", "cudaMalloc", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGetDevice",
              "cudaGetDeviceProperties", "cudaDriverGetVersion"}  # fmt: skip
    assert found["results"] == {name: 1 + (name in values) for name in found["results"]}
    assert found["properties"] == ["bytes", "int", "int"]
