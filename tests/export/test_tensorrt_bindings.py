"""Our code against other bindings than those that the mock runs in this process: the newest of TensorRT, the other version
that the table of slots describes, and those of CUDA.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.fake_tensorrt import VERSION
from support.nvidia_wheels import fetch
from support.nvinfer.facts import VERSIONS

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = (
    "dqe_engine/tensorrt/api.py", "dqe_engine/tensorrt/session.py", "dqe_engine/doctor/tensorrt_runtime.py",
    "export/dqe_export/tensorrt/build.py",
)  # fmt: skip
CUDA_SOURCES = ("dqe_engine/tensorrt/cuda.py", "dqe_engine/tensorrt/session.py")
NEWEST = "11.4.0.106"
BY_NAME = {"FLOAT", "INT64", "UNSUPPORTED_NODE"}  # members that the code compares by name
CUDA_BINDINGS = ("cuda-bindings==12.9.10", "cuda-bindings==13.5.0")
CUDA_USED = {
    "cudaDriverGetVersion", "cudaError_t", "cudaFree", "cudaGetDevice", "cudaGetDeviceCount", "cudaGetDeviceProperties",
    "cudaGetErrorString", "cudaGetLastError",
    "cudaGraphDestroy", "cudaGraphExecDestroy", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaMalloc",
    "cudaMemcpyAsync", "cudaMemcpyKind", "cudaMemsetAsync", "cudaSetDevice", "cudaStreamBeginCapture",
    "cudaStreamCaptureMode",
    "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamEndCapture", "cudaStreamNonBlocking", "cudaStreamSynchronize",
}  # fmt: skip


# -- TensorRT -------------------------------------------------------------------------------------------------------------

PROBE = """
import json, sys
from support.nvinfer import abi
version, names = json.loads(sys.argv[1])
abi.compile_libraries(version)
trt = abi.import_bindings(version)
found = {"": [name for name in names if hasattr(trt, name)]}
for owner, kind in vars(trt).items():
    if isinstance(kind, type) and kind.__module__.startswith("tensorrt_bindings"):
        found[owner] = [name for name in names if hasattr(kind, name)]
docs = {
    f"{owner}.{name}": str(getattr(getattr(trt, owner) if owner else trt, name).__doc__)
    for owner, names in found.items() for name in names if not name.startswith("__")
}
print(json.dumps({"version": trt.__version__, "docs": docs}))
"""


def probe(program: str, argument: Any, *folders: Path) -> Any:
    paths = os.pathsep.join(map(str, [*folders, REPOSITORY, REPOSITORY / "tests"]))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argument)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def signatures(version: str) -> dict[str, list[str]]:
    """By "Class.name", for every attribute in SOURCES that a class of these bindings has: the lines that say how it is called."""
    fetch(f"tensorrt-cu13-bindings=={version}")  # skips here, where it can
    trees = [ast.parse((REPOSITORY / source).read_text(encoding="utf-8")) for source in SOURCES]
    names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | BY_NAME
    found = probe(PROBE, (version, sorted(names)))
    assert found["version"] == version
    lines = {name: re.findall(r"^(?:\d+\. )?(\w+\(.*\) -> .*)$", doc, re.MULTILINE) for name, doc in found["docs"].items()}
    return {name: [re.sub(r"0x[0-9a-f]+|tensorrt_bindings\.|: \d+>", "", line) for line in found] for name, found in lines.items()}


def test_the_newest_bindings_are_called_like_those_that_the_tests_run() -> None:
    run, newest = signatures(VERSIONS[-1]), signatures(NEWEST)
    assert {"ICudaEngine.get_tensor_profile_shape", "BuilderFlag.VERSION_COMPATIBLE", "IBuilderConfig.set_timing_cache"} <= set(run)
    missing = {name for name in run if name not in newest}
    assert not missing
    assert {name: lines for name, lines in newest.items() if run.get(name, lines) != lines} == {}


@pytest.mark.slow
@pytest.mark.skipif("DQE_TEST_TENSORRT" in os.environ, reason="this is the run in another process")
@pytest.mark.parametrize("version", [version for version in VERSIONS if version != VERSION])
def test_the_other_version(version: str) -> None:
    """The tests that use the mock, once more: one process can load one version. Not the one that needs an exported model first."""
    engine = ("test_tensorrt_mock.py", "test_tensorrt_session.py", "test_tensorrt_choice.py", "test_doctor_packages.py")
    export = ("test_tensorrt_build.py", "test_tensorrt_check.py")
    files = (*(f"tests/engine/{name}" for name in engine), *(f"tests/export/{name}" for name in export))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not in_one_go", *files]
    fetch(f"tensorrt-cu13-bindings=={version}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"DQE_TEST_TENSORRT": version}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout, done.stdout


# -- CUDA -----------------------------------------------------------------------------------------------------------------

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


def test_the_list_is_what_the_sources_use() -> None:
    text = "".join((REPOSITORY / source).read_text(encoding="utf-8") for source in CUDA_SOURCES)
    assert set(re.findall(r'(?:runtime\.|")(cuda[A-Z]\w+)', text)) == CUDA_USED


@pytest.mark.parametrize("requirement", CUDA_BINDINGS)
def test_cuda_bindings(requirement: str) -> None:
    folders = [fetch(requirement), fetch("cuda-pathfinder")]
    found = probe(CUDA_PROBE, sorted(CUDA_USED), *folders)
    assert found["missing"] == []
    assert found["members"] == [True] * 4
    assert (found["text"], found["count"], found["stream"]) == ("out of memory", 2, 5)
    values = {"cudaStreamCreateWithFlags", "cudaMalloc", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGetDevice",
              "cudaGetDeviceProperties", "cudaDriverGetVersion"}  # fmt: skip
    assert found["results"] == {name: 1 + (name in values) for name in found["results"]}
    assert found["properties"] == ["bytes", "int", "int"]
