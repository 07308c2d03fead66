"""A TensorRT session: what it runs, splits, captures and gives back, and how it fails, on a fake device that is as strict as a real one."""

from __future__ import annotations

import gc
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_cuda import FakeCuda, cudaError_t
from support.fake_tensorrt import FakeTensorRT
from support.nvinfer.abi import raise_what_a_callback_raises
from support.tiny_bundle import SIZES
from support.tiny_engines import MANY, ONE, plan

from dqe_engine.contracts.engines import AxisRange, Profile
from dqe_engine.contracts.graphs import QUERY_ENCODER, TARGET_ENCODER, VISION_ENCODER
from dqe_engine.engine import RetrievalEngine
from dqe_engine.errors import BackendError, BundleError, InputError
from dqe_engine.sessions import OnnxSession
from dqe_engine.tensorrt.session import TensorRTSession

pytestmark = raise_what_a_callback_raises


def query_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 100 + length)
    return {
        "image_tokens": rng.standard_normal((batch, SIZES.image_tokens, SIZES.vision_width), np.float32),
        "input_ids": rng.integers(0, 20, (batch, length)),
        "attention_mask": np.ones((batch, length), np.int64),
    }


@pytest.fixture
def session(trt: FakeTensorRT, bundle_path: Path) -> TensorRTSession:
    return TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, ONE, MANY), QUERY_ENCODER, SIZES)


# -- running --------------------------------------------------------------------------------------------------------------


def test_equals_onnx_runtime_at_every_size(trt: FakeTensorRT, bundle_path: Path) -> None:
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, ONE, MANY), QUERY_ENCODER, SIZES)
    reference = OnnxSession(bundle_path / QUERY_ENCODER.file, QUERY_ENCODER, SIZES, provider="cpu", threads=1)
    # Graphs, eager shapes, changes of profile, batches in parts; again, after the eager context has moved on.
    for batch, length in [(1, 4), (3, 5), (2, 2), (1, 16), (3, 5), (6, 8), (7, 8), (13, 3), (2, 16), (1, 4), (0, 4)]:
        inputs = query_inputs(batch, length)
        found, expected = session.run(**inputs), reference.run(**inputs)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)
            assert found[name].dtype == array.dtype


def test_usual_shapes_run_as_graphs(session: TensorRTSession, cuda: FakeCuda) -> None:
    assert session.text_buckets == (4, 5, 8, 16)
    shapes = [(shape["batch"], shape["text_length"]) for shape in session.graph_shapes]
    assert shapes == [(1, 4), (1, 8), (1, 16), (3, 5), (3, 8)]
    for batch, length, launches in [(1, 4, 1), (1, 8, 1), (1, 16, 1), (3, 5, 1), (3, 8, 1), (3, 4, 0), (1, 5, 0), (2, 8, 0)]:
        cuda.calls.clear()
        session.run(**query_inputs(batch, length))
        assert cuda.calls.count("cudaGraphLaunch") == launches


def test_nothing_is_captured_that_a_tighter_profile_runs(trt: FakeTensorRT, bundle_path: Path, cuda: FakeCuda) -> None:
    short, long = (Profile(batch=MANY.batch, text_length=AxisRange(min=2, opt=4, max=most)) for most in (8, 16))
    for profiles in ((short, long), (long, short)):
        session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, *profiles), QUERY_ENCODER, SIZES)
        assert sorted(shape["text_length"] for shape in session.graph_shapes) == [4, 8, 16] == list(session.text_buckets)
        for shape in session.graph_shapes:
            cuda.calls.clear()
            session.run(**query_inputs(shape["batch"], shape["text_length"]))
            assert cuda.calls.count("cudaGraphLaunch") == 1


def test_a_batch_is_split_evenly(session: TensorRTSession, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    original = session._run_part
    monkeypatch.setattr(session, "_run_part", lambda p, dynamic, *rest: (parts.append(dynamic["batch"]), original(p, dynamic, *rest)))
    session.run(**query_inputs(13, 5))
    assert parts == [5, 4, 4]


def test_nothing_is_allocated_by_a_run_and_all_is_freed(session: TensorRTSession, cuda: FakeCuda) -> None:
    cuda.calls.clear()
    for batch in (1, 6, 2, 9):
        session.run(**query_inputs(batch, 5))
    assert not {"cudaMalloc", "cudaStreamCreateWithFlags", "cudaGraphInstantiate"} & set(cuda.calls)


def test_a_session_that_is_dropped_gives_everything_back(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path) -> None:
    session = TensorRTSession(plan(trt, bundle_path, VISION_ENCODER, MANY), VISION_ENCODER, SIZES)
    assert cuda.allocated
    assert len(cuda.graphs) == 1
    del session
    gc.collect()
    assert (cuda.allocated, cuda.streams, cuda.graphs) == ({}, {}, {})


def test_strided_inputs(session: TensorRTSession) -> None:
    inputs = query_inputs(4, 6)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in inputs.items()}
    np.testing.assert_array_equal(session.run(**strided)["base_query"], session.run(**inputs)["base_query"])


def test_threads_take_turns(session: TensorRTSession, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1 + n % 6, 2 + n % 7) for n in range(24)]
    expected = [session.run(**query_inputs(*size))["base_query"] for size in sizes]
    found: dict[int, np.ndarray] = {}
    inside, most, run_part = [0], [0], session._run_part

    def counted(*arguments: Any) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)  # long enough for the others to come in, if they may
        run_part(*arguments)
        inside[0] -= 1

    monkeypatch.setattr(session, "_run_part", counted)

    def work(n: int) -> None:
        found[n] = session.run(**query_inputs(*sizes[n]))["base_query"]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    for n, array in enumerate(expected):
        np.testing.assert_array_equal(found[n], array)


def test_sizes_outside_the_profiles(session: TensorRTSession, trt: FakeTensorRT, bundle_path: Path) -> None:
    with pytest.raises(InputError, match=r"text_length 17 is outside the engine's profiles \(text_length 2 to 16, text_length 2 to 8\)"):
        session.run(**query_inputs(1, 17))
    fours = Profile(batch=AxisRange(min=4, opt=4, max=5), text_length=MANY.text_length)
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, fours), QUERY_ENCODER, SIZES)
    for batch in (3, 6):
        with pytest.raises(InputError, match=f"a batch of {batch} is outside the engine's profiles .4 to 5 at a time"):
            session.run(**query_inputs(batch, 5))
    with pytest.raises(InputError, match="expected int64, got int32"):
        session.run(**query_inputs(4, 5) | {"input_ids": np.zeros((4, 5), np.int32)})


def test_a_batch_between_two_profiles_runs_in_parts(trt: FakeTensorRT, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fours = Profile(batch=AxisRange(min=4, opt=4, max=5), text_length=ONE.text_length)
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, ONE, fours), QUERY_ENCODER, SIZES)
    assert session._split({"batch": 3, "text_length": 4}) == (0, [1, 1, 1])
    assert session._split({"batch": 6, "text_length": 4}) == (0, [1] * 6)
    assert session._split({"batch": 8, "text_length": 4}) == (1, [4, 4])
    assert session.run(**query_inputs(3, 4))["base_query"].shape[0] == 3


@pytest.mark.parametrize(("most", "expected"), [(2, (2,)), (6, (6,)), (8, (8,)), (64, (8, 12, 16, 32, 64)), (50, (8, 12, 16, 32, 50))])
def test_lengths_that_texts_are_padded_to(trt: FakeTensorRT, bundle_path: Path, most: int, expected: tuple[int, ...]) -> None:
    profile = Profile(batch=AxisRange(min=1, opt=1, max=1), text_length=AxisRange(min=2, opt=12 if most > 12 else most, max=most))
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, profile), QUERY_ENCODER, SIZES)
    assert session.text_buckets == expected
    assert tuple(shape["text_length"] for shape in session.graph_shapes) == expected
    assert TensorRTSession(plan(trt, bundle_path, VISION_ENCODER, profile), VISION_ENCODER, SIZES).text_buckets == ()
    trt.faults.uncapturable = True
    assert TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, profile), QUERY_ENCODER, SIZES).text_buckets == (), "padding gains nothing"


@pytest.mark.parametrize("fixed", [True, False])
def test_profiles_that_leave_no_choice(trt: FakeTensorRT, bundle_path: Path, fixed: bool) -> None:
    """An engine may then report the size, or that it is dynamic."""
    trt.faults.fixed_batch_shapes = fixed
    profile = Profile(batch=AxisRange(min=1, opt=1, max=1), text_length=AxisRange(min=5, opt=5, max=5))
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, profile), QUERY_ENCODER, SIZES)
    assert session.run(**query_inputs(3, 5))["base_query"].shape[0] == 3
    with pytest.raises(InputError, match="outside the engine's profiles"):
        session.run(**query_inputs(1, 4))


def test_nothing_is_reported_to_nvtx(session: TensorRTSession) -> None:
    none = sys.modules["tensorrt"].ProfilingVerbosity.NONE
    assert all(ready.context.nvtx_verbosity == none for ready in (session._eager, *(ready for _, ready in session._graphs.values())))


@pytest.mark.parametrize("function", ["", "cudaStreamBeginCapture", "cudaGraphInstantiate"])
def test_an_engine_that_cannot_be_captured_runs_without_graphs(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path, function: str) -> None:
    """`function`: what fails; "" for the capture itself."""
    trt.faults.uncapturable = not function
    if function:
        cuda.fail[function] = cudaError_t.cudaErrorMemoryAllocation
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, MANY), QUERY_ENCODER, SIZES)
    assert session.graph_shapes == ()
    assert cuda.last_error == cudaError_t.cudaSuccess, "a library that asks CUDA next would take it for its own"
    assert np.isfinite(session.run(**query_inputs(3, 5))["base_query"]).all()
    assert not cuda.graphs


def test_a_session_stays_on_its_device(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path) -> None:
    cuda.devices = 2
    cuda.cudaSetDevice(1)
    session = TensorRTSession(plan(trt, bundle_path, QUERY_ENCODER, MANY), QUERY_ENCODER, SIZES)
    expected = session.run(**query_inputs(2, 5))["base_query"]
    found: list[np.ndarray] = []

    def work() -> None:
        found.append(session.run(**query_inputs(2, 5))["base_query"])  # a new thread's device is 0
        found.append(np.array(cuda.device))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], expected)
    assert (found[1], cuda.device) == (0, 1)


def test_a_session_is_released_on_its_device(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path) -> None:
    cuda.devices, devices = 2, set[int]()
    cuda.cudaSetDevice(1)
    session = TensorRTSession(plan(trt, bundle_path, VISION_ENCODER, MANY), VISION_ENCODER, SIZES)
    cuda.cudaSetDevice(0)
    free = cuda.cudaFree
    cuda.cudaFree = lambda address: (devices.add(cuda.device), free(address))[1]  # type: ignore[method-assign]
    del session
    gc.collect()
    assert (devices, cuda.device) == ({1}, 0)


def test_what_a_lost_device_does_not_take_back(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path) -> None:
    session = TensorRTSession(plan(trt, bundle_path, VISION_ENCODER, MANY), VISION_ENCODER, SIZES)
    cuda.fail |= dict.fromkeys(("cudaFree", "cudaStreamDestroy", "cudaGraphExecDestroy"), cudaError_t.cudaErrorIllegalAddress)
    cuda.calls.clear()
    del session
    gc.collect()  # raises nothing, and tries all
    assert cuda.calls.count("cudaFree") == 3
    assert {"cudaStreamDestroy", "cudaGraphExecDestroy"} <= set(cuda.calls)


# -- failing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamSynchronize"])
def test_a_device_that_fails_is_a_backend_error(session: TensorRTSession, cuda: FakeCuda, function: str) -> None:
    cuda.fail[function] = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match=f"query_encoder failed on tensorrt: {function}: cudaErrorIllegalAddress"):
        session.run(**query_inputs(3, 5))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (-1, "TensorRT refuses batch 2, text_length 2 in profile 1: infer_shapes error code: -1"),
        (["input_ids"], "input_ids is not set"),
    ],
)
def test_shapes_that_cannot_be_inferred(
    session: TensorRTSession, trt: FakeTensorRT, with_engines: Callable[..., Path], answer: list[str] | int, message: str
) -> None:
    trt.faults.infer = answer
    with pytest.raises(BackendError, match=message):
        session.run(**query_inputs(2, 2))
    assert set(RetrievalEngine.load(with_engines()).providers.values()) == {"cpu"}  # where the engine was not chosen by name


def test_a_profile_that_is_refused(session: TensorRTSession, trt: FakeTensorRT, with_engines: Callable[..., Path]) -> None:
    trt.faults.profile = True
    with pytest.raises(BackendError, match="TensorRT refuses batch 2, text_length 2 in profile 1: Error in set optimization profile"):
        session.run(**query_inputs(2, 2))
    assert set(RetrievalEngine.load(with_engines()).providers.values()) == {"cpu"}


def test_an_enqueue_that_is_refused(session: TensorRTSession, trt: FakeTensorRT) -> None:
    trt.faults.enqueue = True
    with pytest.raises(BackendError, match="execute_async_v3: IExecutionContext::enqueueV3: Error Code 3"):
        session.run(**query_inputs(2, 2))


def test_out_of_device_memory(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path) -> None:
    cuda.fail["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(BackendError, match=r"vision_encoder: the device has no 0 MiB of memory left \(cudaMalloc: out of memory\)"):
        TensorRTSession(plan(trt, bundle_path, VISION_ENCODER, MANY), VISION_ENCODER, SIZES)
    assert not cuda.streams


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"devices": 0}, "no usable CUDA device .cudaGetDeviceCount: no CUDA-capable device is detected"),
        ({"capability": (8, 0)}, "cannot load the engine: expecting compute 8.0 got compute 9.0"),
    ],
)
def test_no_device_or_another(trt: FakeTensorRT, cuda: FakeCuda, bundle_path: Path, changed: dict[str, Any], message: str) -> None:
    made = plan(trt, bundle_path, VISION_ENCODER, MANY)
    for name, value in changed.items():
        setattr(cuda, name, value)
    with pytest.raises(BackendError, match=message):
        TensorRTSession(made, VISION_ENCODER, SIZES)


def test_missing_and_unknown_tensorrt(trt: FakeTensorRT, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(trt, bundle_path, VISION_ENCODER, MANY)
    for module, message in ((None, "tensorrt cannot be imported"), (types.SimpleNamespace(__version__="9.3"), "TensorRT 9.3 is installed")):
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        with pytest.raises(BackendError, match=message):
            TensorRTSession(made, VISION_ENCODER, SIZES)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"cuda.bindings cannot be imported"):
        TensorRTSession(made, VISION_ENCODER, SIZES)


def test_another_graphs_engine(trt: FakeTensorRT, bundle_path: Path) -> None:
    with pytest.raises(BundleError, match="target_encoder: the engine's inputs are pixel_values"):
        TensorRTSession(plan(trt, bundle_path, VISION_ENCODER, MANY), TARGET_ENCODER, SIZES)
