"""What NVIDIA's bindings make of the values that TensorRT returns, and how the mock says that it has met its limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import VERSION, FakeTensorRT
from support.nvinfer import building, running
from support.nvinfer.abi import raise_what_a_callback_raises
from support.nvinfer.facts import TABLES

from dqe_engine.tensorrt.api import load_engine, make_logger

pytestmark = raise_what_a_callback_raises
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return FakeTensorRT(cuda).install(monkeypatch)


@pytest.fixture
def trt(fake: FakeTensorRT) -> ModuleType:
    return sys.modules["tensorrt"]


def double(folder: Path) -> Path:
    """y = x + x, for x of shape (batch, 4)."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"], name="sum")], "double", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), folder / "double.onnx")
    return folder / "double.onnx"


@pytest.fixture
def engine(fake: FakeTensorRT, trt: ModuleType, tmp_path: Path) -> Any:
    plan = fake.plan(double(tmp_path), [{"x": [(1, 4), (2, 4), (3, 4)]}, {"x": [(1, 4), (1, 4), (1, 4)]}])
    return load_engine(trt, plan, make_logger(trt), host_code=False)


def context_of(trt: ModuleType, engine: Any) -> Any:
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


# -- what comes back ------------------------------------------------------------------------------------------------------


def test_shapes_are_dims_not_tuples(engine: Any) -> None:
    shape = engine.get_tensor_shape("x")
    assert (shape == (-1, 4), tuple(shape), len(shape), isinstance(shape, tuple)) == (True, (-1, 4), 2, False)
    assert [tuple(dims) for dims in engine.get_tensor_profile_shape("x", 0)] == [(1, 4), (2, 4), (3, 4)]
    with pytest.raises(ValueError, match=r"__len__\(\) should return >= 0"):  # an invalid shape has rank -1
        tuple(engine.get_tensor_shape("unknown"))


def test_some_refusals_are_exceptions_and_some_are_false(trt: ModuleType, engine: Any, fake: FakeTensorRT, cuda: FakeCuda) -> None:
    context, stream = context_of(trt, engine), cuda.cudaStreamCreateWithFlags(1)[1]
    with pytest.raises(RuntimeError, match="Error in set optimization profile async"):
        context.set_optimization_profile_async(2, stream)
    assert context.set_optimization_profile_async(1, stream)
    assert not context.set_input_shape("x", (2, 4))
    assert context.infer_shapes() == ["x"]
    assert context.set_input_shape("x", (1, 4))
    assert context.infer_shapes() == []
    fake.faults.infer = -1
    with pytest.raises(RuntimeError, match="infer_shapes error code: -1"):
        context.infer_shapes()
    fake.faults.infer = ["mask", "x"]
    assert context.infer_shapes() == ["mask", "x"]


def test_a_profile_that_is_inconsistent_is_an_exception(trt: ModuleType) -> None:
    builder = trt.Builder(make_logger(trt))
    profile = builder.create_optimization_profile()
    with pytest.raises(RuntimeError, match="Shape provided for opt is inconsistent"):
        profile.set_shape("x", (2, 4), (1, 4), (3, 4))


def test_null_pointers(trt: ModuleType, engine: Any, fake: FakeTensorRT) -> None:
    fake.faults.no_context = True
    assert context_of(trt, engine) is None
    assert engine.get_tensor_name(7) is None
    fake.faults.inspection_missing = True
    assert engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON) is None
    fake.faults.no_builder = True
    logger = make_logger(trt)
    with pytest.raises(TypeError, match="nullptr"):
        trt.Builder(logger)
    assert "CUDA initialization failure" in logger.errors()


def test_an_inspector_may_give_what_json_refuses(trt: ModuleType, engine: Any, fake: FakeTensorRT) -> None:
    inspector = engine.create_engine_inspector()
    fake.faults.inspection = '{"Layers": ["a\x01b"]}'
    assert "\x01" in inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    fake.faults.inspection = b'{"Layers": ["\xff"]}'
    with pytest.raises(UnicodeDecodeError):
        inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def test_a_pinned_axis_may_be_reported_as_its_size(fake: FakeTensorRT, trt: ModuleType, tmp_path: Path) -> None:
    engine = load_engine(trt, fake.plan(double(tmp_path), [{"x": [(1, 4)] * 3}]), make_logger(trt), host_code=False)
    assert tuple(engine.get_tensor_shape("y")) == (-1, 4)
    fake.faults.fixed_batch_shapes = True
    assert tuple(engine.get_tensor_shape("y")) == (1, 4)


def test_timing_caches(fake: FakeTensorRT, trt: ModuleType) -> None:
    builder = trt.Builder(make_logger(trt))
    config = builder.create_builder_config()
    assert config.get_timing_cache() is None
    other = config.create_timing_cache(b"of another device")
    assert not config.set_timing_cache(other, False)
    fake.faults.refuse_cache = True
    assert not config.set_timing_cache(other, True)
    assert config.get_timing_cache() is None
    cache = config.create_timing_cache(b"")
    assert config.set_timing_cache(cache, False)
    assert config.get_timing_cache() is cache  # the same object: nothing is freed twice
    memory = cache.serialize()
    assert (bytes(memory), memory.nbytes) == (fake.cache(), len(fake.cache()))
    with pytest.raises(RuntimeError, match="does not match"):  # its buffer says float, with one byte an element
        np.asarray(memory)


def test_the_verbosity_of_markers_is_that_of_the_build(trt: ModuleType, engine: Any) -> None:
    context, levels = context_of(trt, engine), trt.ProfilingVerbosity
    assert context.nvtx_verbosity == levels.DETAILED  # that of the build
    context.nvtx_verbosity = levels.NONE
    assert context.nvtx_verbosity == levels.NONE


# -- the mock's own limits ------------------------------------------------------------------------------------------------


def test_what_the_mock_raises_reaches_pytest(trt: ModuleType, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Any] = []
    context = context_of(trt, engine)
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    context.set_device_memory(4096, 512)  # nobody has allocated it
    assert [hook.exc_type for hook in raised] == [AssertionError]


BEGIN = """
import sys
import pytest
from support.fake_cuda import FakeCuda
from support.fake_tensorrt import FakeTensorRT
fake = FakeTensorRT(FakeCuda().install(pytest.MonkeyPatch())).install(pytest.MonkeyPatch())
trt = sys.modules["tensorrt"]
logger = trt.Logger()
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("trt.Runtime(logger).max_threads", "IRuntime_slot_{}_is_not_in_the_mock".format(13 if VERSION.startswith("10.") else 12)),
        ("trt.get_plugin_registry()", "the TensorRT mock has no plugin registry"),
        (
            "parser = trt.OnnxParser(trt.Builder(logger).create_network(), logger)\n"
            "parser.parse_from_file('absent.onnx')\nerror = parser.get_error(0)\ndel parser\nerror.desc()",
            "IParserError_was_used_after_its_deletion",
        ),
    ],
)
def test_what_is_not_there_ends_the_process_by_name(fake: FakeTensorRT, program: str, message: str) -> None:
    paths = os.pathsep.join(map(str, (REPOSITORY / "tests", REPOSITORY)))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", BEGIN + program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode < 0, "it went on"
    assert message in done.stderr


def test_every_function_of_the_table_is_implemented() -> None:
    found = [*vars(building).values(), *vars(running).values()]
    classes = {kind.kind: kind for kind in found if isinstance(kind, type) and getattr(kind, "kind", "")}
    assert set(classes) == set(TABLES)
    missing = {f"{kind}.{name}" for kind, table in TABLES.items() for name in table.methods if not hasattr(classes[kind], name)}
    assert not missing
    for table in TABLES.values():
        for column, length in enumerate(table.length):
            slots = [method.slots[column] for method in table.methods.values()]
            assert len(set(slots)) == len(slots)
            assert all(slot < length for slot in slots)
